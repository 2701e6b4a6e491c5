"""The small CLIP that ships: a ResNet image tower and a transformer text tower.

Serves as text-to-image target and as the semantic discriminator of the generator's training.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from pair import hub
from pair.generator import IMAGENET_MEAN, IMAGENET_STD, Block, Selection
from pair.images import check_images, resize
from pair.retrieval.resnet import ResNet, ResNetConfig

PAD, UNKNOWN = "<pad>", "<unknown>"


def words(text: str) -> list[str]:
    """Lower-case words of a text; everything that is not a letter or digit separates them."""
    return re.findall(r"[a-z0-9]+", text.lower())


def build_vocabulary(texts: Iterable[str]) -> list[str]:
    """Sorted vocabulary of the texts, with the padding and unknown tokens first."""
    return [PAD, UNKNOWN, *sorted({w for t in texts for w in words(t)})]


@dataclass(frozen=True)
class ClipConfig:
    image_size: int = 112
    dim: int = 128
    backbone: ResNetConfig = field(default_factory=ResNetConfig)
    text_width: int = 128
    text_depth: int = 2
    text_heads: int = 4
    context: int = 24
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    vocabulary: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClipConfig:
        backbone = ResNetConfig(**data["backbone"])
        rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**{**rest, "backbone": backbone})


class SmallClip(nn.Module):
    """Text-image encoder: ``encode_image`` (B, 3, H, W) -> (B, dim), ``encode_text`` -> (T, dim).

    Images in [0, 1] of any size; resizing and normalisation happen inside. Features are not
    normalised; compare them by cosine. Words outside the vocabulary count as one unknown word.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.image_size, self.dim = config.image_size, config.dim
        self.backbone = ResNet(config.backbone)
        self.image_projection = nn.Linear(config.backbone.features, config.dim, bias=False)
        self.tokens = nn.Embedding(len(config.vocabulary), config.text_width, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(config.context, config.text_width) * 0.02)
        self.text_blocks = nn.ModuleList(
            Block(config.text_width, config.text_heads, 4.0, 1e-6) for _ in range(config.text_depth)
        )
        self.text_norm = nn.LayerNorm(config.text_width)
        self.text_projection = nn.Linear(config.text_width, config.dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)
        self._index = {word: i for i, word in enumerate(config.vocabulary)}

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image_features(resize(check_images(images), self.image_size))

    def image_features(self, images: Tensor) -> Tensor:
        """Features of images that already have a trained size (no checks, no resize)."""
        return self.image_projection(self.backbone((images - self.mean) / self.std))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """(T, context) word indices, truncated and zero-padded."""
        out = torch.zeros(len(texts), self.config.context, dtype=torch.long)
        unknown = self._index[UNKNOWN]
        for row, text in enumerate(texts):
            ids = [self._index.get(w, unknown) for w in words(text)] or [unknown]
            ids = ids[: self.config.context]
            out[row, : len(ids)] = torch.tensor(ids)
        return out

    def unknown(self, texts: Sequence[str]) -> list[str]:
        """Words outside the vocabulary, each once; of a text without any word, the text."""
        found = (w for text in texts for w in words(text) or [text.strip()])
        return list(dict.fromkeys(w for w in found if w not in self._index))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        if isinstance(texts, str):
            texts = [texts]
        return self.text_features(self.tokenize(texts).to(self.positions.device))

    def text_features(self, ids: Tensor) -> Tensor:
        ids = ids[:, : int((ids != 0).sum(1).max())]  # nothing beyond the longest sentence
        real = ids != 0  # (T, L)
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        seen = Selection.of(real)
        rows, layout = seen.take(x), seen.layout()
        for block in self.text_blocks:
            rows = block(rows, layout)
        x = seen.put(torch.zeros_like(x), self.text_norm(rows))
        return self.text_projection(x.sum(1) / real.sum(1, keepdim=True))

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] = "clip-small") -> SmallClip:
        folder = hub.resolve(name)
        config = hub.read_config(folder, "clip")
        table = hub.section(config, "model", [f.name for f in fields(ClipConfig)], folder)
        hub.section(table, "backbone", [f.name for f in fields(ResNetConfig)], folder)
        model = cls(ClipConfig.from_dict(table))
        hub.load_into(model, hub.read_weights(folder, config), str(folder))
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder, dtype=torch.float32, card=None, **facts) -> None:
        config = {"kind": "clip", "model": asdict(self.config), **facts}
        hub.save(folder, self, config, dtype, card)
