"""The retrieval targets that trainings of defenses harden or attack, small or at full size.

A target is named as elsewhere: a model folder of this package (a small CLIP, or the hash network
that ``pair train csq`` or ``pair train csq-paper`` writes), ``open_clip:ARCHITECTURE/WEIGHTS``, or
a folder that open_clip reads (what ``pair train clip-paper`` writes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.data.pack import Collection
from pair.retrieval.clip import SmallClip
from pair.retrieval.hashing import HashNet
from pair.retrieval.openclip import OpenClip
from pair.training import start
from pair.training.clip_paper import save_open_clip

KINDS = ("clip", "csq")
CAPTIONS = 1000  # of training photos, where texts stand in for classes
OPEN_CLIP_CONFIG = "open_clip_config.json"


class Tower:
    """A target without its resizing: images (B, 3, S, S) of its own size -> features."""

    trained: tuple[str, ...]  # prefixes of the parameters that adversarial training moves
    hashing = False

    def __init__(self, model: Any):
        self.model: Any = model
        self.module: nn.Module = model
        self.size: int = model.image_size

    def encode(self, images: Tensor) -> Tensor:
        return self.model.image_features(images)

    def feature_map(self, images: Tensor) -> Tensor:
        """Last features in their places (B, F, h, w)."""
        return self.model.backbone.feature_map((images - self.model.mean) / self.model.std)

    def directions(self, texts: list[str]) -> Tensor:
        """Directions (C, F) in the space of the feature map: of texts, or of a hash network's
        classes."""
        raise NotImplementedError

    def text(self, texts: list[str]) -> Tensor:
        """Features (T, D) of texts, without gradient."""
        with torch.no_grad():
            parts = [self.model.encode_text(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        return torch.cat(parts)

    def scale(self) -> Tensor:
        """Factor on cosines in a contrastive loss."""
        return self.model.logit_scale.detach().exp().clamp(max=50)

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.model.save_pretrained(folder, torch.float16, **facts)


class SmallTower(Tower):
    trained = ("backbone.", "image_projection.")

    def directions(self, texts: list[str]) -> Tensor:
        found = F.normalize(self.text(texts), dim=-1) @ self.model.image_projection.weight
        return found.detach()


class HashTower(Tower):
    trained = ("backbone.", "head.")
    hashing = True

    def directions(self, texts: list[str]) -> Tensor:
        if not isinstance(self.model.head, nn.Linear):
            raise ValueError("class activations need a hash network with a linear head")
        return (self.model.centres @ self.model.head.weight).detach()

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        # As ``pair train csq-paper`` does it, where the start is of that size.
        large = sum(p.numel() for p in self.model.parameters()) > 10_000_000
        self.model.save_pretrained(folder, torch.float32 if large else torch.float16, **facts)


class OpenTower(Tower):
    """A model of open_clip. Its image tower is trained, its text tower stays as it is."""

    trained = ("model.visual.",)

    def __init__(self, model: OpenClip, spec: str):
        super().__init__(model)
        self.spec = spec
        if len(set(model.size)) > 1:
            raise ValueError(f"{spec} takes pictures of {model.size}: only squares are trained on")

    def encode(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)

    def feature_map(self, images: Tensor) -> Tensor:
        """The patch tokens of the last layer, projected as the class token is."""
        visual = self.model.model.visual
        if not all(hasattr(visual, name) for name in ("_embeds", "transformer", "_pool", "proj")):
            raise ValueError(f"{self.spec} has no patch tokens: name a vision transformer")
        x = visual.transformer(visual._embeds(self.model.preprocess(images)))
        tokens = visual._pool(x)[1]
        tokens = tokens if visual.proj is None else tokens @ visual.proj
        side = self.size // visual.patch_size[0]
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def directions(self, texts: list[str]) -> Tensor:
        return F.normalize(self.text(texts), dim=-1)

    def scale(self) -> Tensor:
        return self.model.model.logit_scale.detach().exp().clamp(max=100)

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        save_open_clip(self.model, self.spec, folder, facts)


def load(kind: str, name: str) -> Tower:
    """The target of that name; ``kind`` is "clip" or "csq"."""
    if kind not in KINDS:
        raise ValueError(f"kind must be 'clip' or 'csq', got {kind!r}")
    if kind == "csq":
        return HashTower(HashNet.from_pretrained(name))
    if not name.startswith(start.OPEN_CLIP) and (Path(name) / OPEN_CLIP_CONFIG).is_file():
        name = f"{start.OPEN_CLIP}local-dir:{name}"
    if name.startswith(start.OPEN_CLIP):
        return OpenTower(start.open_clip(name.removeprefix(start.OPEN_CLIP)), name)
    return SmallTower(SmallClip.from_pretrained(name))


def names_of(label: str) -> list[str]:
    """The names of one photo's label."""
    return [name for name in label.split(";") if name]


def classes(pack: Collection) -> list[str]:
    """All class names, sorted."""
    return sorted({name for label in pack.labels for name in names_of(label)})


def captions(pack: Collection, most: int = CAPTIONS) -> list[str]:
    """Seeded captions of training photos, one of a photo; none where the photos have none."""
    if not pack.captions:
        return []
    rows = [i for i, s in enumerate(pack.splits) if s in ("train", "restval") and pack.captions[i]]
    seeded = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(rows), generator=seeded)[:most].tolist()
    return [pack.captions[rows[i]][0] for i in chosen]
