"""Learned denoisers: ARN and CAFD. One forward pass, exact gradient."""

from __future__ import annotations

import itertools
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.defenses.base import Defense
from pair.defenses.network import Network, NetworkConfig, conv_bn, double_size


class ArnNet(Network):
    """Variational encoder-decoder of ARN (Zhou et al. 2021), scaled to photos.

    Four strided stages keep a spatial code of 8 * width channels at 1/16 of the resolution,
    where the original squeezed 28-pixel digits into a vector.
    """

    kind = "arn"

    def __init__(self, config: NetworkConfig | None = None):
        super().__init__(config)
        w = self.config.width
        self.code = 8 * w
        widths = [3, 2 * w, 4 * w, 8 * w]
        down: list[nn.Module] = []
        for inside, outside in itertools.pairwise(widths):
            down += [
                nn.Conv2d(inside, outside, 4, 2, 1, bias=False),
                nn.BatchNorm2d(outside),
                nn.LeakyReLU(0.2),
            ]
        self.encoder = nn.Sequential(*down, nn.Conv2d(8 * w, 2 * self.code, 4, 2, 1))
        up: list[nn.Module] = []
        widths = [self.code, 8 * w, 4 * w, 2 * w]
        for inside, outside in itertools.pairwise(widths):
            up += [
                nn.ConvTranspose2d(inside, outside, 4, 2, 1, bias=False),
                nn.BatchNorm2d(outside),
                nn.LeakyReLU(0.2),
            ]
        self.decoder = nn.Sequential(*up, nn.ConvTranspose2d(2 * w, 3, 4, 2, 1), nn.Tanh())

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the code, each (B, 8 * width, H/16, W/16)."""
        mean, log_variance = self.encoder(images * 2 - 1).chunk(2, 1)
        return mean, log_variance.clamp(-20, 10)

    def decode(self, z: Tensor) -> Tensor:
        return (self.decoder(z) + 1) / 2

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images)[0])


class CafdNet(Network):
    """U-Net denoiser of CAFD (Zhou et al. 2021), after HGD: forward gives the *correction*."""

    kind = "cafd"

    def __init__(self, config: NetworkConfig | None = None):
        super().__init__(config)
        w = self.config.width
        widths = [w, 2 * w, 4 * w, 4 * w, 4 * w]
        self.first = nn.Sequential(conv_bn(3, w), conv_bn(w, w))
        self.down = nn.ModuleList(self._triple(a, b, 2) for a, b in itertools.pairwise(widths))
        skips = widths[-2::-1]  # 4w, 4w, 2w, w
        self.up = nn.ModuleList(
            self._triple(inside + skip, skip, 1)
            for inside, skip in zip([4 * w, *skips], skips, strict=False)
        )
        self.last = nn.Conv2d(w, 3, 1)
        nn.init.zeros_(self.last.weight)  # starts as "no correction"
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    @staticmethod
    def _triple(inside: int, outside: int, stride: int) -> nn.Sequential:
        rest = [conv_bn(outside, outside) for _ in range(2)]
        return nn.Sequential(conv_bn(inside, outside, stride), *rest)

    def forward(self, images: Tensor) -> Tensor:
        skips = [self.first(images)]
        for block in self.down:
            skips.append(block(skips[-1]))
        x = skips.pop()
        for block in self.up:
            x = block(torch.cat([skips.pop(), double_size(x)], 1))
        return self.last(x)


class Arn(Defense):
    """The decoded mean code (z = mu at test time)."""

    def __init__(self, network: ArnNet):
        super().__init__()
        self.network = network

    def defend(self, images, generator, join):
        return self.network.at_size(images).clamp(0, 1)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] = "arn-small") -> Arn:
        return cls(ArnNet.from_pretrained(name)).eval()


class Cafd(Defense):
    """x' = x + denoiser(x). The clamp to [0, 1] passes gradients straight through."""

    def __init__(self, network: CafdNet):
        super().__init__()
        self.network = network

    def defend(self, images, generator, join):
        out = images + self.network.at_size(images)
        return out + (out.clamp(0, 1) - out).detach()

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] = "cafd-small") -> Cafd:
        return cls(CafdNet.from_pretrained(name)).eval()


def relativistic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Relativistic average GAN loss of whoever wants ``real`` to look more real than ``fake``."""
    ahead = F.softplus(-(real - fake.mean(0, keepdim=True))).mean()
    return (ahead + F.softplus(fake - real.mean(0, keepdim=True)).mean()) / 2
