"""Tiny targets and defenses with random weights, for tests of attacks."""

from __future__ import annotations

import torch
from torch import nn

from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.images import check_images
from pair.masks import ExactCount
from pair.purifier import Purifier

SIZE = 32
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


class Encoder(nn.Module):
    """A small convolutional network that knows where things are; features (B, dim)."""

    image_size = SIZE

    def __init__(self, dim: int = 16, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.dim = self.bits = dim
        self.conv = nn.Conv2d(3, 12, 5, stride=3)
        self.head = nn.Linear(12 * 10 * 10, dim)
        self.requires_grad_(False).eval()

    def features_of(self, images):
        return 5 * self.head((self.conv(2 * images - 1) * 2).tanh().flatten(1))

    def encode_image(self, images):
        return self.features_of(check_images(images))


def encoder(dim: int = 16, seed: int = 0, dtype=torch.float32) -> Encoder:
    return Encoder(dim, seed).to(dtype)


def purifier(rule=None, passes: int = 2, seed: int = 0, dtype=torch.float32) -> Purifier:
    torch.manual_seed(seed)
    config = GeneratorConfig(
        image_size=SIZE,
        patch_size=8,
        width=32,
        depth=1,
        heads=2,
        decoder_width=32,
        decoder_depth=1,
        decoder_heads=2,
    )
    model = MaskedAutoencoder(config)
    for name, p in model.named_parameters():  # outputs that depend on what is visible
        if "decoder_pred" not in name and p.ndim > 1:
            p.data.mul_(2)
    rule = rule or ExactCount(0.5)
    out = Purifier(model, rule, passes=passes, straight_through=True)
    return out.eval().requires_grad_(False).to(dtype)


def photos(n: int = 4, seed: int = 1, dtype=torch.float32) -> torch.Tensor:
    """Smooth random pictures (n, 3, 32, 32) on the 8-bit grid."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 3, 6, 6, generator=generator, dtype=dtype)
    big = nn.functional.interpolate(small, (SIZE, SIZE), mode="bilinear")
    return big.mul(255).round().div(255)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
