"""Photos of a benchmark: a few are held decoded, many are decoded whenever they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pair.data.photos import batches, read_bytes
from pair.data.sets import Record
from pair.images import load_batch, load_image

Item = Path | Record  # a file of ours, or a row of a data set
HELD = 2**29  # bytes that may stay decoded: 890 photos of 224 pixels
MARGIN = (8, 7)  # hash networks see the centre of a larger photo: 224 of 256, as DeepHash has it


def identity(item: Item) -> str:
    """What a result says it was measured on."""
    return item.id if isinstance(item, Record) else f"{item.parent.name}/{item.name}"


def title(item: Item) -> str:
    """A short name for a picture of search results."""
    if isinstance(item, Record):
        return item.labels[0] if item.labels else item.path.stem[-12:]
    return item.parent.name.replace("_", " ")


def whole(item: Item) -> Tensor:
    """One photo in its own size (3, H, W)."""
    return load_image(read_bytes(item) if isinstance(item, Record) else item)


def decoded(items: Sequence[Item], size: int, framed: bool = False, workers: int = 0) -> Tensor:
    """(B, 3, size, size) in [0, 1]: the short side resized, the centre kept.

    ``framed``: resized to 8/7 of ``size`` first. An empty list is refused.
    """
    if not items:
        raise ValueError("there are no photos to decode")
    return torch.cat(list(_batches(items, size, len(items), framed, workers)))


def _batches(
    items: Sequence[Item], size: int, batch: int, framed: bool, workers: int
) -> Iterator[Tensor]:
    if isinstance(items[0], Path):
        for at in range(0, len(items), batch):
            yield load_batch([p for p in items[at : at + batch] if isinstance(p, Path)], size)
        return
    side = size * MARGIN[0] // MARGIN[1] if framed else size
    cut = (side - size) // 2
    records = [r for r in items if isinstance(r, Record)]
    for images in batches(records, side, batch, workers):
        yield images[..., cut : cut + size, cut : cut + size]


class Photos:
    """Photos by number, list of numbers or slice, as ``(B, 3, S, S)`` (one number: ``(3, S, S)``).

    Few are decoded once. Of many, what is asked for is decoded each time, ahead of its use, so
    memory does not grow with their number.
    """

    def __init__(self, items: Sequence[Item], size: int, framed: bool = False, workers: int = 0):
        self.items, self.size = items, size
        self.framed, self.workers = framed, workers

    def __len__(self) -> int:
        return len(self.items)

    @property
    def few(self) -> bool:
        return len(self.items) * 12 * self.size**2 <= HELD

    @cached_property
    def _all(self) -> Tensor:
        return decoded(self.items, self.size, self.framed)

    def __getitem__(self, which: int | slice | list[int]) -> Tensor:
        if self.few:
            return self._all[which]
        if isinstance(which, int):
            return self[[which]][0]
        chosen = self.items[which] if isinstance(which, slice) else [self.items[i] for i in which]
        return decoded(chosen, self.size, self.framed)

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them, in batches of ``size``."""
        if self.few:
            return iter(self._all.split(size))
        return _batches(self.items, self.size, size, self.framed, self.workers)
