"""The zero-gradient floor: patches that nobody optimised. An attack below it has failed.

Grey, noise, QR code, natural collage (crops of the concept) and typography (the keyword itself).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pair.attacks import carriers
from pair.attacks.evaluate import score
from pair.attacks.objectives import Goal, TextGoal
from pair.attacks.patch import Patch
from pair.images import resize


@dataclass(frozen=True)
class FloorEntry:
    """The best patch of one family and its mean loss on the selection draws."""

    family: str
    patch: Patch
    loss: float
    candidates: int


def typographic(words: str, height: int, width: int) -> list[Tensor]:
    """``words`` in 5 styles (colours and weights) x 3 sizes x 2 polarities: 30 contents."""
    inks: list[tuple[tuple[float, float, float], tuple[float, float, float], int]] = [
        ((0, 0, 0), (1, 1, 1), 0),
        ((0, 0, 0), (1, 1, 1), 1),
        ((0.8, 0, 0), (1, 1, 0.8), 0),
        ((0, 0, 0.6), (0.9, 0.9, 0.9), 1),
        ((0, 0.35, 0), (1, 0.9, 0.3), 0),
    ]
    out = []
    for ink, paper, stroke in inks:
        for scale in (1.0, 0.75, 0.5):
            for a, b in ((ink, paper), (paper, ink)):
                out.append(
                    carriers.text(words, height, width, ink=a, paper=b, scale=scale, stroke=stroke)
                )
    return out


def crops(
    photos: Iterable[Tensor],
    height: int,
    width: int,
    count: int = 400,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Up to ``count`` natural crops (3, h, w) of photos (3, H, W) of the concept.

    Each photo gives its whole, then random crops with 50-100 % of its short side.
    """
    pool = list(photos)
    if not pool:
        raise ValueError("a collage needs at least one photo of the concept")
    out = [carriers.photo(p, height, width) for p in pool[:count]]
    while len(out) < count:
        photo = pool[len(out) % len(pool)]
        share, y, x = torch.rand(3, generator=generator).tolist()
        side = max(1, int(min(photo.shape[1:]) * (0.5 + share / 2)))
        top, left = (int(s * (n - side + 1)) for s, n in ((y, photo.shape[1]), (x, photo.shape[2])))
        out.append(carriers.photo(photo[:, top : top + side, left : left + side], height, width))
    return out


def tiled(photo: Tensor, height: int, width: int, tile: int) -> Tensor:
    """Small copies of a photo side by side, so that half of the tokens still show some."""
    small = resize(photo[None], tile)[0].clamp(0, 1)
    return small.repeat(1, -(-height // tile), -(-width // tile))[:, :height, :width]


def floor(
    features: Any,
    images: Tensor,
    target: Tensor | Goal,
    patch: Patch,
    *,
    words: str | None = None,
    photos: Sequence[Tensor] = (),
    collages: int = 400,
    tile: int = 16,
    draws: int = 6,
    seed: int = 3_000_003,
    prescreen: Any = None,
) -> list[FloorEntry]:
    """Best of each family on ``draws`` selection draws, best family first.

    ``patch`` gives shape and place. Collages are first ranked by ``prescreen`` (usually the
    undefended features; one draw each) down to 20, then scored like all others.
    """
    h, w = patch.size
    generator = torch.Generator().manual_seed(seed)
    goal: Goal = TextGoal(target) if isinstance(target, Tensor) else target

    def rate(content: Tensor, victim: Any, n: int) -> float:
        chooser = torch.Generator().manual_seed(seed)
        candidate = replace(patch, content=content.to(images), notes={})
        return score(victim, images, candidate, goal, n, chooser)

    qr = carriers.photo(carriers.qr(carriers.ADVERTISEMENT, max(h, w)), h, w)
    families: dict[str, list[Tensor]] = {
        "grey": [carriers.grey(h, w)],
        "noise": [carriers.noise(h, w, generator)],
        "qr": [qr],
    }
    if words:
        families["typographic"] = typographic(words, h, w)
    if photos:
        many = crops(photos, h, w, collages, generator)
        if prescreen is not None and len(many) > 20:
            many = sorted(many, key=lambda c: rate(c, prescreen, 1))[:20]
        families["collage"] = many
        families["tiled"] = [tiled(p, h, w, min(tile, h, w)) for p in photos[:20]]
    entries = []
    for family, contents in families.items():
        losses = [rate(c, features, draws) for c in contents]
        at = min(range(len(losses)), key=losses.__getitem__)
        best = replace(patch, content=contents[at], notes={"attack": "floor", "family": family})
        entries.append(FloorEntry(family, best, losses[at], len(contents)))
    return sorted(entries, key=lambda e: e.loss)
