"""A patch: contents, shape, place. Pasted onto images, saved as PNG + JSON, loaded elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pair.attacks.carriers import carrier, pixels, rectangle
from pair.files import write_atomic
from pair.images import quantise

CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")
RANDOM = ("random-image", "random-step")
FORMAT = 1

# content (B, 3, h, w), mask (B, h, w), generator -> the same, as printed and photographed
Transform = Callable[[Tensor, Tensor, torch.Generator | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Placement:
    """Where a patch goes.

    ``kind`` is a corner ("top-right"), "centre", "fixed" (with ``top`` and ``left``),
    "random-image" (the i-th image of every call gets its own place, drawn from ``seed``) or
    "random-step" (new places at every call, drawn from the caller's generator).
    """

    kind: str = "top-right"
    top: int = 0
    left: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in (*CORNERS, *RANDOM, "fixed"):
            raise ValueError(
                f"unknown placement {self.kind!r}: use {', '.join((*CORNERS, 'fixed', *RANDOM))}"
            )

    @property
    def random(self) -> bool:
        return self.kind in RANDOM

    def at(
        self,
        batch: int,
        image: tuple[int, int],
        patch: tuple[int, int],
        generator: torch.Generator | None = None,
    ) -> list[tuple[int, int]]:
        """(top, left) for each image of a batch of (H, W) images and a patch of (h, w)."""
        room_y, room_x = image[0] - patch[0], image[1] - patch[1]
        if room_y < 0 or room_x < 0:
            raise ValueError(
                f"a patch of {patch[0]} x {patch[1]} does not fit into an image of "
                f"{image[0]} x {image[1]}"
            )
        if self.kind == "fixed":
            if not (0 <= self.top <= room_y and 0 <= self.left <= room_x):
                raise ValueError(
                    f"a patch of {patch[0]} x {patch[1]} at ({self.top}, {self.left}) leaves the "
                    f"image of {image[0]} x {image[1]}"
                )
            return [(self.top, self.left)] * batch
        if self.kind == "centre":
            return [(room_y // 2, room_x // 2)] * batch
        if self.random:
            source = generator
            if self.kind == "random-image":
                source = torch.Generator().manual_seed(self.seed)
            device = source.device if source is not None else torch.device("cpu")
            share = torch.rand(batch, 2, generator=source, device=device).tolist()
            return [(int(y * (room_y + 1)), int(x * (room_x + 1))) for y, x in share]
        vertical, _, horizontal = self.kind.partition("-")
        top, left = room_y * (vertical == "bottom"), room_x * (horizontal == "right")
        return [(top, left)] * batch


def paste(
    images: Tensor, content: Tensor, mask: Tensor, at: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Put contents (3, h, w) or (B, 3, h, w) at ``at`` onto images (B, 3, H, W).

    ``mask`` (h, w) or (B, h, w) in [0, 1] weighs contents against image. Differentiable. Returns
    the images and the weights in place, (B or 1, 1, H, W).
    """
    height, width = images.shape[-2:]
    h, w = content.shape[-2:]
    content = content if content.ndim == 4 else content[None]
    mask = (mask if mask.ndim == 3 else mask[None])[:, None].to(content.dtype)
    if len(set(at)) == 1:
        top, left = at[0]
        sides = (left, width - w - left, top, height - h - top)
        canvas, cover = F.pad(content, sides), F.pad(mask, sides)
    else:
        content, mask = content.expand(len(at), -1, -1, -1), mask.expand(len(at), -1, -1, -1)
        boxes = [(left, width - w - left, top, height - h - top) for top, left in at]
        canvas = torch.stack([F.pad(c, s) for c, s in zip(content, boxes, strict=True)])
        cover = torch.stack([F.pad(m, s) for m, s in zip(mask, boxes, strict=True)])
    # where() keeps uncovered pixels bit for bit, and their gradient away from the patch.
    mixed = (1 - cover) * images + cover * canvas
    return torch.where(cover > 0, mixed, images), cover


@dataclass(frozen=True)
class Patch:
    """``content`` (3, h, w) in [0, 1], ``mask`` (h, w) in [0, 1], a place, and where it came from.

    ``image_size`` is the side of the images it was made for: :meth:`fit` scales it to others.
    """

    content: Tensor
    mask: Tensor
    placement: Placement = field(default_factory=Placement)
    image_size: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.content.ndim != 3 or self.content.shape[0] != 3:
            raise ValueError(f"patch contents must be (3, h, w), got {tuple(self.content.shape)}")
        if self.mask.shape != self.content.shape[1:]:
            raise ValueError(
                f"patch mask must be {tuple(self.content.shape[1:])}, got {tuple(self.mask.shape)}"
            )
        object.__setattr__(self, "mask", self.mask.to(self.content.dtype))

    @classmethod
    def make(
        cls,
        start: str | Tensor = "qr",
        size: int | float | tuple[int | float, int | float] = 0.35,
        image_size: int = 224,
        placement: str | Placement = "top-right",
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Patch:
        """Start from a carrier's name or a content, with a size in px or as a share of the side."""
        if isinstance(start, Tensor):
            content = start
        else:
            if mask is not None:
                h, w = mask.shape
            else:
                sizes = size if isinstance(size, tuple) else (size, size)
                h, w = (pixels(s, image_size) for s in sizes)
            content = carrier(start, h, w, generator)
        mask = rectangle(*content.shape[1:]) if mask is None else mask
        where = Placement(placement) if isinstance(placement, str) else placement
        return cls(content, mask, where, image_size)

    @property
    def size(self) -> tuple[int, int]:
        return self.content.shape[1], self.content.shape[2]

    def area(self, image: tuple[int, int]) -> float:
        """Share of an (H, W) image that it covers."""
        return float(self.mask.sum()) / (image[0] * image[1])

    def with_content(self, content: Tensor, **notes: Any) -> Patch:
        return replace(self, content=content.detach(), notes={**self.notes, **notes})

    def to(self, device: torch.device | str) -> Patch:
        return replace(self, content=self.content.to(device), mask=self.mask.to(device))

    def apply(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        *,
        content: Tensor | None = None,
        transform: Transform | None = None,
    ) -> Tensor:
        """Paste onto images (B, 3, H, W). Differentiable in ``content`` (default: its own)."""
        return self.paste(images, generator, content=content, transform=transform)[0]

    def paste(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        *,
        content: Tensor | None = None,
        transform: Transform | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`apply`, and where the patch went: weights (B or 1, 1, H, W)."""
        content = self.content if content is None else content
        mask = self.mask.to(images.device)
        if transform is not None:
            many = content if content.ndim == 4 else content.expand(len(images), -1, -1, -1)
            content, mask = transform(many, mask.expand(len(images), -1, -1), generator)
        shape = (images.shape[-2], images.shape[-1])
        at = self.placement.at(len(images), shape, self.size, generator)
        return paste(images, content.to(images), mask.to(images), at)

    def fit(self, image_size: int) -> Patch:
        """The same patch for images of another side (content, mask and place scaled)."""
        if self.image_size in (None, image_size):
            return self
        scale = image_size / self.image_size
        size = tuple(max(1, round(s * scale)) for s in self.size)
        grown = F.interpolate(self.content[None], size, mode="bilinear", antialias=True)[0]
        mask = F.interpolate(self.mask[None, None], size, mode="bilinear", antialias=True)[0, 0]
        top = min(round(self.placement.top * scale), image_size - size[0])
        left = min(round(self.placement.left * scale), image_size - size[1])
        place = replace(self.placement, top=top, left=left)
        return replace(
            self, content=grown.clamp(0, 1), mask=mask, placement=place, image_size=image_size
        )

    def quantised(self) -> Patch:
        """Rounded to the 8 bits of a file."""
        return replace(
            self, content=quantise(self.content.clamp(0, 1)), mask=quantise(self.mask.clamp(0, 1))
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``<path>.png`` (8 bits, alpha = mask) and ``<path>.json``; returns the PNG."""
        png = _png(path)
        png.parent.mkdir(parents=True, exist_ok=True)
        rgba = torch.cat([self.content, self.mask[None]]).detach().cpu().clamp(0, 1)
        array = rgba.mul(255).round().byte().permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG")
        write_atomic(png, buffer.getvalue())
        facts = {
            "format": FORMAT,
            "kind": "patch",
            "png": png.name,
            "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
            "size": list(self.size),
            "image_size": self.image_size,
            "placement": asdict(self.placement),
            "notes": self.notes,
        }
        write_atomic(png.with_suffix(".json"), (json.dumps(facts, indent=1) + "\n").encode())
        return png

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read what :meth:`save` wrote; ``path`` with or without suffix. Refuses a changed PNG."""
        png = _png(path)
        sheet = png.with_suffix(".json")
        for file in (png, sheet):
            if not file.is_file():
                raise ValueError(f"{file} is missing: a patch is a .png and its .json")
        try:
            facts = json.loads(sheet.read_text())
            place = Placement(**facts["placement"])
            size, digest, made_for = facts["size"], facts["sha256"], facts["image_size"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{sheet} is not the description of a patch: {error}") from error
        if facts.get("format") != FORMAT:
            raise ValueError(
                f"{sheet} has format {facts.get('format')!r}, this version reads {FORMAT}"
            )
        if hashlib.sha256(png.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{png} is not the picture that {sheet.name} describes (SHA-256)")
        with Image.open(png) as picture:
            array = torch.from_numpy(np.array(picture.convert("RGBA")))
        rgba = array.permute(2, 0, 1).float().div(255)
        if list(rgba.shape[1:]) != size:
            raise ValueError(f"{png} is {tuple(rgba.shape[1:])}, {sheet.name} says {tuple(size)}")
        return cls(rgba[:3].contiguous(), rgba[3].contiguous(), place, made_for, facts["notes"])


def _png(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path.with_suffix(".png") if path.suffix in (".png", ".json") else Path(f"{path}.png")
