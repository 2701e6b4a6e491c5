"""Train the denoisers ARN and CAFD against attacks on the embeddings of the small targets.

Both sources denoise for classifiers of 28 to 32 pixels. Here the attacked network is a retrieval
target: the perturbations are l_inf and l_2 PGD on its features, and CAFD's class-activation
features come from the target's own class directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pair.data.pack import Collection
from pair.defenses.denoise import ArnNet, CafdNet, relativistic_loss
from pair.defenses.network import Network, NetworkConfig
from pair.training import start, towers
from pair.training.augment import crop_flip, to_float
from pair.training.pgd import perturb


@dataclass(frozen=True)
class DenoiserTraining:
    """``target`` is a "clip" or "csq" model folder or shipped name; perturbations stay within
    ``epsilon`` (l_inf) or ``radius`` (l_2 per pixel value, as a share of sqrt(3 S^2))."""

    image_size: int = 112
    width: int = 16
    kind: str = "clip"
    target: str = "clip-small"
    epsilon: float = 8 / 255
    radius: float = 4 / 255
    inner_steps: int = 7
    lr: float = 1e-4
    validation: int = 64

    @property
    def photo_side(self) -> int:
        """Side at which photos are decoded when they come from a data set."""
        return self.image_size * 8 // 7


class Target:
    """The attacked network: its last feature map, its embedding and its class directions (of
    captions, where there are any, else of class names)."""

    def __init__(self, config: DenoiserTraining, pack: Collection):
        self.tower = towers.load(config.kind, config.target)
        self.model = self.tower.model
        texts = towers.captions(pack) or [f"a photo of a {n}" for n in towers.classes(pack)]
        if not texts and not self.tower.hashing:
            raise ValueError("the photos have neither class names nor captions to train on")
        self.texts = texts

    @cached_property
    def weights(self) -> Tensor:
        """(C, features): class scores of a pooled feature, in single precision."""
        with torch.autocast(self.model.mean.device.type, enabled=False):
            return self.tower.directions(self.texts)

    def features(self, images: Tensor) -> Tensor:
        """Last features in their places (B, features, h, w)."""
        return self.tower.feature_map(images)

    def embed(self, images: Tensor) -> Tensor:
        return self.tower.encode(images)

    def class_weights(self, features: Tensor) -> Tensor:
        """(B, features): the class directions, weighted by the softmax of the class scores.

        CAFD compares the weight vector of the predicted class; the softmax makes that choice
        differentiable.
        """
        scores = features.mean((2, 3)) @ self.weights.T
        return scores.softmax(1) @ self.weights

    def activation(self, features: Tensor, weights: Tensor) -> Tensor:
        """Class-activation features: the map weighted by class directions (B, features)."""
        return features * weights[:, :, None, None]


class PixelCritic(nn.Module):
    """Strided convolutions without batch statistics: images -> one score (B, 1) per image."""

    def __init__(self, width: int, inside: int = 3):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            *(nn.Conv2d(inside, w, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(w, 2 * w, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.LeakyReLU(0.2)),
        )
        self.last = nn.Linear(4 * w, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.body(images).mean((2, 3)))


def frozen(critic: nn.Module) -> Callable[[Tensor], Tensor]:
    """The critic as the generator's loss sees it: gradients reach its input, not its weights."""
    weights = {k: v.detach() for k, v in critic.named_parameters()}
    return lambda x: functional_call(critic, weights, (x,))


class _DenoiserTask:
    """See :class:`pair.training.loop.Task`. The module holds the denoiser and its critics."""

    module: nn.ModuleDict

    def __init__(self, config: DenoiserTraining, pack: Collection):
        self.config, self.pack, self.device = config, pack, torch.device("cpu")
        self.rows = pack.where(lambda label, data, split: split == "train")
        self.target = Target(config, pack)
        held = pack.where(lambda label, data, split: split in ("val", "gallery"))
        if not len(self.rows) or not len(held):
            raise ValueError("the pack has no training or no held-out photos (splits val, gallery)")
        seeded = torch.Generator().manual_seed(0)
        held = held[torch.randperm(len(held), generator=seeded)][: config.validation]
        self.photos = pack.batch(held, config.image_size)
        self.seeded = seeded

    @cached_property
    def held(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the held-out photos, and these photos attacked; on the device of the
        training, in single precision."""
        with torch.autocast(self.device.type, enabled=False):
            with torch.no_grad():
                clean = self.target.embed(self.photos)
            return clean, self.away(self.photos, self.seeded)

    def to(self, device: torch.device) -> None:
        """Move everything that takes part in a step."""
        self.device = device
        self.module.to(device)
        self.target.tower.module.to(device)
        self.photos = self.photos.to(device)

    def prefetch(self, rows: Tensor) -> None:
        self.pack.prefetch(self.rows[rows])

    def inputs(self) -> dict[str, str]:
        """SHA-256 of the attacked network."""
        return {"target": start.digest(self.target.tower.module)}

    def size(self) -> int:
        return len(self.rows)

    def away(self, images: Tensor, generator: torch.Generator, norm: str = "linf") -> Tensor:
        """Perturbed images whose embedding has left the clean one."""
        c = self.config
        with torch.no_grad():
            z = self.target.embed(images)

        def leave(x: Tensor) -> Tensor:
            return -F.cosine_similarity(self.target.embed(x), z).sum()

        return perturb(images, leave, c.epsilon, c.inner_steps, generator, norm)

    def towards(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """l_2 perturbed images on the way to the embedding of another image of the batch."""
        c = self.config
        with torch.no_grad():
            z = self.target.embed(images).roll(1, 0)

        def approach(x: Tensor) -> Tensor:
            return F.cosine_similarity(self.target.embed(x), z).sum()

        return perturb(images, approach, c.radius, c.inner_steps, generator, "l2")

    def batch(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        raw = self.pack.raw(self.rows[rows]).to(self.device)
        return crop_flip(to_float(raw), self.config.image_size, generator)

    def denoise(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Cosine to the clean embedding: of attacked photos, of both after denoising."""

        clean, attacked = self.held

        def cosine(images: Tensor) -> float:
            z = torch.cat([self.target.embed(x) for x in images.split(32)])
            return float(F.cosine_similarity(z, clean).mean())

        def denoised(images: Tensor) -> Tensor:
            return torch.cat([self.denoise(x).clamp(0, 1) for x in images.split(32)])

        figures = {
            "cos_attacked": cosine(attacked),
            "cos_denoised": cosine(denoised(attacked)),
            "cos_clean_denoised": cosine(denoised(self.photos)),
        }
        return {"score": figures["cos_denoised"] + figures["cos_clean_denoised"], **figures}

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        network = self.module["denoiser"]
        assert isinstance(network, Network)
        network.save_pretrained(folder, torch.float16, **facts)


class ArnTask(_DenoiserTask):
    """ARN: 200 * MSE + 1e-6 * KL + 0.5 * attack invariance + 0.01 * pixel GAN.

    Three kinds of input (natural, l_inf, l_2) pass the encoder; a critic of the code learns to
    tell them apart and the encoder learns to look like any of them (1/3 each). The pixel critic
    carries a gradient penalty of 30. All parts step together; each loss reaches only its own.
    """

    MSE, KL, INVARIANCE, PIXEL, PENALTY = 200.0, 1e-6, 0.5, 0.01, 30.0

    def __init__(self, config: DenoiserTraining, pack: Collection):
        net = ArnNet(NetworkConfig(config.image_size, config.width))
        code = nn.Sequential(
            nn.Conv2d(net.code, 64, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 3, 1), nn.Flatten(2)
        )
        parts = {"denoiser": net, "code": code, "pixel": PixelCritic(config.width)}
        self.module = nn.ModuleDict(parts)
        super().__init__(config, pack)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        lr, betas = self.config.lr, (0.5, 0.999)
        return [torch.optim.Adam(part.parameters(), lr, betas) for part in self.module.values()]

    def denoise(self, images: Tensor) -> Tensor:
        return self.module["denoiser"](images)

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        net, code, pixel = (self.module[k] for k in ("denoiser", "code", "pixel"))
        assert isinstance(net, ArnNet)
        natural = self.batch(rows, generator)
        groups = [natural, self.away(natural, generator), self.towards(natural, generator)]
        mean, log_variance = net.encode(torch.cat(groups))
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        rebuilt = net.decode(mean + noise * (log_variance / 2).exp())
        mse = F.mse_loss(rebuilt, natural.repeat(3, 1, 1, 1))
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()

        kinds = torch.eye(3, device=mean.device).repeat_interleave(len(natural), 0)  # (3B, 3)
        told = code(mean.detach()).mean(2)
        code_loss = F.binary_cross_entropy_with_logits(told, kinds)
        confused = frozen(code)(mean).mean(2)
        invariance = F.binary_cross_entropy_with_logits(confused, torch.full_like(kinds, 1 / 3))

        pixel_loss = self._pixel_loss(pixel, natural, rebuilt[: len(natural)].detach(), generator)
        real_looking = F.softplus(-frozen(pixel)(rebuilt)).mean()
        total = self.MSE * mse + self.KL * kl
        total = total + self.INVARIANCE * invariance + self.PIXEL * real_looking
        return {
            "loss": total + code_loss + pixel_loss,
            "mse": mse,
            "kl": kl,
            "code": code_loss,
            "pixel": pixel_loss,
        }

    def _pixel_loss(self, critic, real: Tensor, fake: Tensor, generator) -> Tensor:
        gan = (F.softplus(-critic(real)) + F.softplus(critic(fake))).mean()
        mix = torch.rand(len(real), 1, 1, 1, generator=generator).to(real)
        between = (mix * real + (1 - mix) * fake).float().requires_grad_()
        with torch.autocast(between.device.type, enabled=False):  # a gradient of a gradient
            (grad,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            penalty = ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean()
        return gan + self.PENALTY * penalty


class CafdTask(_DenoiserTask):
    """CAFD: 1e3 * MSE of last features + 1e-3 * MSE of class weights + 5e-3 * relativistic GAN.

    Its attack raises the MSE between the class-activation features of x and x + delta, which
    needs no label.
    """

    FEATURE, WEIGHT, GAN = 1e3, 1e-3, 5e-3

    def __init__(self, config: DenoiserTraining, pack: Collection):
        net = CafdNet(NetworkConfig(config.image_size, config.width))
        self.module = nn.ModuleDict({"denoiser": net, "pixel": PixelCritic(config.width)})
        super().__init__(config, pack)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        return [
            torch.optim.Adam(part.parameters(), c.lr, weight_decay=2e-4)
            for part in self.module.values()
        ]

    def denoise(self, images: Tensor) -> Tensor:
        return images + self.module["denoiser"](images)

    def away(self, images: Tensor, generator: torch.Generator, norm: str = "linf") -> Tensor:
        c, target = self.config, self.target
        with torch.no_grad():
            features = target.features(images)
            weights = target.class_weights(features)
            clean = target.activation(features, weights)

        def leave(x: Tensor) -> Tensor:
            gap = target.activation(target.features(x), weights) - clean
            return gap.square().mean((1, 2, 3)).sum()

        return perturb(images, leave, c.epsilon, c.inner_steps, generator, norm)

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        target, critic = self.target, self.module["pixel"]
        natural = self.batch(rows, generator)
        restored = self.denoise(self.away(natural, generator))
        with torch.no_grad():
            clean = target.features(natural)
            wanted = target.class_weights(clean)
        features = target.features(restored)
        feature = F.mse_loss(features, clean)
        weight = F.mse_loss(target.class_weights(features), wanted)
        judge = frozen(critic)
        fool = relativistic_loss(judge(restored), judge(natural))
        detect = relativistic_loss(critic(natural), critic(restored.detach()))
        total = self.FEATURE * feature + self.WEIGHT * weight + self.GAN * fool
        return {"loss": total + detect, "feature": feature, "weight": weight, "critic": detect}
