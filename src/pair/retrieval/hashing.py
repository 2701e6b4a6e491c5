"""Deep hashing with central similarity: CSQ (Yuan et al. 2020), the content-based target."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair import hub
from pair.generator import IMAGENET_MEAN, IMAGENET_STD
from pair.images import check_images, resize, resize_crop
from pair.retrieval.backbones import build_backbone
from pair.retrieval.resnet import ResNetConfig


def hadamard(order: int) -> Tensor:
    """Sylvester's Hadamard matrix (order, order) of +-1; order must be a power of two."""
    if order < 1 or order & (order - 1):
        raise ValueError(f"Sylvester's construction needs a power of two, got {order}")
    h = torch.ones(1, 1)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def hash_centres(classes: int, bits: int, generator: torch.Generator | None = None) -> Tensor:
    """Hash centres (classes, bits) of +-1.

    Rows of [H; -H] while they last and ``bits`` is a power of two; else random balanced codes
    with minimum pairwise distance above bits/4 and mean at least bits/2 (the best of 20 draws
    where no draw meets both).
    """
    if bits & (bits - 1) == 0 and classes <= 2 * bits:
        h = hadamard(bits)
        return torch.cat([h, -h])[:classes]
    best, best_min = None, -1.0
    for _ in range(20):
        noise = torch.rand(classes, bits, generator=generator)
        codes = torch.ones(classes, bits)
        codes.scatter_(1, noise.argsort(1)[:, : bits // 2], -1.0)
        distance = (bits - codes @ codes.T) / 2
        pairs = distance[torch.triu(torch.ones_like(distance), 1) > 0]
        low, mean = (float(pairs.min()), float(pairs.mean())) if len(pairs) else (bits, bits)
        if low > best_min:
            best, best_min = codes, low
        if low > bits / 4 and mean >= bits / 2:
            break
    assert best is not None
    return best


def multilabel_centres(labels: Tensor, centres: Tensor, generator: torch.Generator) -> Tensor:
    """Centre of each image with several labels: sign of the sum of its labels' centres.

    ``labels`` (B, C) 0/1, ``centres`` (C, K) -> (B, K). Ties take one fixed random code.
    """
    total = labels.float() @ centres
    tie = torch.randint(0, 2, (centres.shape[1],), generator=generator).float() * 2 - 1
    return torch.where(total == 0, tie, total.sign())


def csq_loss(u: Tensor, centres: Tensor, quantisation: float = 1e-4) -> Tensor:
    """L_C + lambda * L_Q for real outputs ``u`` (B, K) before tanh and target centres (B, K)."""
    h = u.tanh()
    central = F.binary_cross_entropy((h + 1) / 2, (centres + 1) / 2)
    return central + quantisation * ((h.abs() - 1) ** 2).mean()


@dataclass(frozen=True)
class HashConfig:
    """Configuration of a :class:`HashNet`.

    ``backbone``: a residual network of this package, or a name that
    :func:`pair.retrieval.backbones.build_backbone` knows. ``head``: "linear", or "mlp" as in the
    official CSQ code. ``resize`` of images of another size than S: "squash" (the whole image to
    S), "short" (short side to 8/7 S, centre crop) or "square" (squash to 255/224 S, centre crop).
    """

    image_size: int = 112
    bits: int = 64
    backbone: ResNetConfig | str = field(default_factory=ResNetConfig)
    classes: tuple[str, ...] = ()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    head: str = "linear"
    resize: str = "squash"

    def __post_init__(self) -> None:
        if self.head not in ("linear", "mlp"):
            raise ValueError(f"unknown hash head {self.head!r}: use 'linear' or 'mlp'")
        if self.resize not in ("squash", "short", "square"):
            raise ValueError(f"unknown resize {self.resize!r}: use squash, short or square")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HashConfig:
        backbone = data["backbone"]
        if not isinstance(backbone, str):
            backbone = ResNetConfig(**backbone)
        rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**{**rest, "backbone": backbone})


def hash_head(kind: str, features: int, bits: int) -> nn.Module:
    """The hash layer: one linear layer N(0, 0.01), as DeepHash and AdvHash have it, or the two
    hidden layers of the official CSQ code. The tanh belongs to the loss."""
    last = nn.Linear(features if kind == "linear" else 2048, bits)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    if kind == "linear":
        return last
    first = [nn.Linear(features, 2048), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*first, nn.Linear(2048, 2048), nn.ReLU(), last)


class HashNet(nn.Module):
    """CSQ network: ``encode_image`` (B, 3, H, W) in [0, 1] -> real outputs (B, bits), pre-tanh."""

    centres: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: HashConfig):
        super().__init__()
        self.config = config
        self.image_size, self.dim, self.bits = config.image_size, config.bits, config.bits
        self.backbone, features = build_backbone(config.backbone)
        self.head = hash_head(config.head, features, config.bits)
        seeded = torch.Generator().manual_seed(0)
        centres = hash_centres(max(1, len(config.classes)), config.bits, seeded)
        self.register_buffer("centres", centres)
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image_features(self.prepare(check_images(images)))

    def prepare(self, images: Tensor) -> Tensor:
        """Images of any size -> (B, 3, S, S), by the rule of the config."""
        size, rule = self.image_size, self.config.resize
        if rule == "squash" or tuple(images.shape[-2:]) == (size, size):
            return resize(images, size)
        if rule == "square":
            images = resize(images, size * 255 // 224)
        else:
            images = resize_crop(images, size * 8 // 7)
        at = (images.shape[-1] - size) // 2
        return images[..., at : at + size, at : at + size]

    def image_features(self, images: Tensor) -> Tensor:
        """Outputs for images that already have a trained size (no checks, no resize)."""
        return self.head(self.backbone((images - self.mean) / self.std))

    def codes(self, images: Tensor) -> Tensor:
        """Binary codes (B, bits) of +-1; an output of exactly 0 counts as -1."""
        return binarise(self.encode_image(images))

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] = "csq-small") -> HashNet:
        folder = hub.resolve(name)
        config = hub.read_config(folder, "csq")
        table = hub.section(config, "model", [f.name for f in fields(HashConfig)], folder)
        if not isinstance(table["backbone"], str):
            hub.section(table, "backbone", [f.name for f in fields(ResNetConfig)], folder)
        model = cls(HashConfig.from_dict(table))
        hub.load_into(model, hub.read_weights(folder, config), str(folder))
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder, dtype=torch.float32, card=None, **facts) -> None:
        config = {"kind": "csq", "model": asdict(self.config), **facts}
        hub.save(folder, self, config, dtype, card)


def binarise(u: Tensor) -> Tensor:
    """Real hash outputs -> codes of +-1 (zero becomes -1)."""
    return torch.where(u > 0, 1.0, -1.0)
