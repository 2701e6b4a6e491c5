"""Tiny random models: a 32 px generator with 4 px tokens (8 x 8) and a linear encoder."""

from __future__ import annotations

import torch
from torch import nn

from pair.certified import Cover, PatchFamily, window_cover
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.retrieval.hashing import HashConfig, HashNet
from pair.retrieval.resnet import ResNetConfig

SIZE, TOKEN = 32, 4


def generator(seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    config = GeneratorConfig(SIZE, TOKEN, 32, 1, 2, 32, 1, 2)
    return MaskedAutoencoder(config).eval().requires_grad_(False)


def cover(side: int = 7, views: int = 9) -> Cover:
    return window_cover(PatchFamily.square(side), SIZE, TOKEN, views)


class Encoder(nn.Module):
    """A small convolutional image tower with text features drawn at random."""

    image_size, dim = SIZE, 16

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16 * 8 * 8, self.dim)
        self.eval().requires_grad_(False)

    def encode_image(self, images):
        return self.head(self.net(images - 0.5).flatten(1))

    def encode_text(self, texts):
        seeds = [torch.Generator().manual_seed(sum(t.encode())) for t in texts]
        return torch.stack([torch.randn(self.dim, generator=g) for g in seeds])


def hash_net() -> HashNet:
    torch.manual_seed(0)
    config = HashConfig(SIZE, 16, ResNetConfig((1, 1, 1, 1), 8), ("a", "b"))
    return HashNet(config).eval().requires_grad_(False)


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
