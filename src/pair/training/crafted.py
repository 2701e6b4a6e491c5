"""Patches to train detectors on: noise, QR codes, and PGD patches against the small targets.

Nothing here is the attack that measures a defense: those patches (TTH, AdvHash, their classes and
photos) stay unseen. Every fifth class is held out of the crafting and used for validation only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.attacks.carriers import qr
from pair.training import towers
from pair.training.precision import ascent

Objective = Callable[[Tensor], Tensor]  # images (B, 3, S, S) -> scalar, minimised
KINDS = ("noise", "qr", "pgd")
HELD_OUT_EVERY = 5


@dataclass
class Victim:
    """A retrieval target and the features (C, D) that patches may aim at."""

    encode: Callable[[Tensor], Tensor]
    targets: Tensor
    hashing: bool
    module: nn.Module

    def to(self, device: torch.device) -> None:
        self.module.to(device)
        self.targets = self.targets.to(device)

    def objective(self, count: int, generator: torch.Generator) -> Objective:
        """Pull ``count`` images, each towards a class of its own (TTH's and AdvHash's goals)."""
        pick = torch.randint(len(self.targets), (count,), generator=generator)
        goal = self.targets[pick.to(self.targets.device)]
        if self.hashing:
            return lambda x: -(self.encode(x).tanh() * goal).mean(1).sum()
        return lambda x: (1 - F.cosine_similarity(self.encode(x), goal)).sum()


def victims(
    clip: str, csq: str, labels: list[str], held_out: bool, captions: Sequence[str] = ()
) -> list[Victim]:
    """The targets named (empty = leave out), aiming at the held-out classes or at the others.

    A text search is aimed at ``captions`` instead, where there are any; every fifth is held out.
    """
    chosen = _side(labels, held_out)
    texts = _side(captions, held_out) or [f"a photo of a {n}" for n in chosen]
    if not texts or (csq and not chosen):
        raise ValueError(
            f"{len(labels)} class names are too few to hold some out: pack more, or name a data "
            "set with labels"
        )
    found = []
    with torch.no_grad():
        if clip:
            tower = towers.load("clip", clip)
            found.append(Victim(tower.encode, tower.text(texts), False, tower.module))
        if csq:
            tower = towers.load("csq", csq)
            names = set(chosen)
            rows = [i for i, n in enumerate(tower.model.config.classes) if n in names]
            if rows:
                centres = tower.model.centres[rows]
                found.append(Victim(tower.encode, centres, True, tower.module))
    if not found:
        raise ValueError("name at least one target to craft patches against: clip or csq")
    return found


def _side(names: Sequence[str], held_out: bool) -> list[str]:
    return [n for i, n in enumerate(names) if (i % HELD_OUT_EVERY == 0) == held_out]


def squares(
    batch: int, size: int, low: float, high: float, generator: torch.Generator
) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Random squares with sides from ``low`` to ``high`` of the image: masks (B, 1, S, S) of 0/1
    and their (top, left, side)."""
    masks, boxes = torch.zeros(batch, 1, size, size), []
    for i, (a, b, c) in enumerate(torch.rand(batch, 3, generator=generator).tolist()):
        side = max(1, round(size * (low + (high - low) * a)))
        top, left = int(b * (size - side + 1)), int(c * (size - side + 1))
        masks[i, :, top : top + side, left : left + side] = 1
        boxes.append((top, left, side))
    return masks, boxes


def craft(
    images: Tensor, mask: Tensor, start: Tensor, objective: Objective, steps: int, step: float
) -> Tensor:
    """Sign-gradient descent on the pixels under ``mask``, step falling to 0: patched images.

    ``start`` (B, 3, S, S) holds the first content. Free within [0, 1]: eps = 1, as SAC does.
    """
    patch = start
    for k in range(steps):
        patch = patch.detach().requires_grad_()
        with torch.enable_grad():
            loss = objective(images * (1 - mask) + patch * mask)
        grad = ascent(loss, patch)
        patch = (patch - step * (1 - k / steps) * grad.sign()).clamp(0, 1)
    return (images * (1 - mask) + patch * mask).detach()


def code(side: int, generator: torch.Generator) -> Tensor:
    """A QR code of a random number: (3, side, side)."""
    number = int(torch.randint(10**12, (1,), generator=generator))
    return qr(f"https://example.org/{number}", side)


Bank = dict[str, list[Tensor]]


def build_bank(
    photos: Tensor,
    found: list[Victim],
    low: float,
    high: float,
    steps: int,
    step: float,
    generator: torch.Generator,
) -> Bank:
    """One patch of each kind per photo (N, 3, S, S); kind -> N contents (3, side, side).

    PGD patches start from noise or from a QR code, and aim at each victim in turn.
    """
    size = photos.shape[-1]
    bank: Bank = {kind: [] for kind in KINDS}
    for turn, images in enumerate(photos.split(16)):
        mask, boxes = squares(len(images), size, low, high, generator)
        mask = mask.to(images.device)
        start = torch.rand(images.shape, generator=generator).to(images.device)
        for i, (top, left, side) in enumerate(boxes):
            bank["noise"].append(torch.rand(3, side, side, generator=generator))
            bank["qr"].append(code(side, generator))
            if i % 2:
                start[i, :, top : top + side, left : left + side] = bank["qr"][-1]
        objective = found[turn % len(found)].objective(len(images), generator)
        made = craft(images, mask, start, objective, steps, step)
        for image, (top, left, side) in zip(made, boxes, strict=True):
            bank["pgd"].append(image[:, top : top + side, left : left + side].cpu().clone())
    return bank


def paste(
    images: Tensor, contents: list[Tensor | None], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Put each content (None = leave clean) at a random place: images and masks (B, 1, S, S)."""
    out, masks = images.clone(), torch.zeros_like(images[:, :1])
    places = torch.rand(len(images), 2, generator=generator).tolist()
    for i, (content, (y, x)) in enumerate(zip(contents, places, strict=True)):
        if content is None:
            continue
        h, w = content.shape[-2:]
        top, left = int(y * (images.shape[-2] - h + 1)), int(x * (images.shape[-1] - w + 1))
        out[i, :, top : top + h, left : left + w] = content
        masks[i, :, top : top + h, left : left + w] = 1
    return out, masks


def draw(bank: Bank, count: int, clean: float, generator: torch.Generator) -> list[Tensor | None]:
    """``count`` contents: none with probability ``clean``, else of a random kind."""
    picks = torch.rand(count, 3, generator=generator).tolist()
    contents: list[Tensor | None] = []
    for keep, kind, which in picks:
        of_kind = bank[KINDS[int(kind * len(KINDS))]]
        contents.append(None if keep < clean else of_kind[int(which * len(of_kind))])
    return contents
