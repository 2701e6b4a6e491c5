"""Score matrices too large to hold, read a few rows at a time, and the exact top k of a row.

Everything that ranks accepts ``Rows``: anything with ``.shape == (Q, M)`` whose slice of rows
is a tensor. A plain tensor is one; :class:`Product` and :class:`Hamming` compute their rows when
they are asked for, :class:`SameLabel` does so for relevance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

CELLS = 2**23  # scores held at a time: 32 MB in float32


class Rows(Protocol):
    """A (Q, M) matrix that gives slices of its rows."""

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


@dataclass(frozen=True)
class Product:
    """Inner products of query features (Q, D) and gallery features (M, D); larger is nearer.

    Cosine, once both are normalised.
    """

    query: Tensor
    gallery: Tensor

    def __post_init__(self) -> None:
        if self.query.ndim != 2 or self.gallery.shape[1:] != self.query.shape[1:]:
            raise ValueError(
                f"queries {tuple(self.query.shape)} and gallery {tuple(self.gallery.shape)} "
                "must be matrices with equally long rows"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.query), len(self.gallery)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.query[rows] @ self.gallery.T


@dataclass(frozen=True)
class Hamming(Product):
    """Inner products of codes of +-1, that is bits - 2 * Hamming distance; larger is nearer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for codes in (self.query, self.gallery):
            if not bool((codes.abs() == 1).all()):
                raise ValueError("codes must hold +1 and -1 only: binarise the hash outputs first")

    @property
    def bits(self) -> int:
        return self.query.shape[1]


@dataclass(frozen=True)
class SameLabel:
    """Relevance by label: equal classes (Q,), (M,), or at least one shared label of multi-hot
    (Q, C), (M, C)."""

    query: Tensor
    gallery: Tensor

    def __post_init__(self) -> None:
        if self.query.ndim not in (1, 2) or self.query.shape[1:] != self.gallery.shape[1:]:
            raise ValueError(
                f"labels {tuple(self.query.shape)} and {tuple(self.gallery.shape)} must be two "
                "vectors of classes or two multi-hot matrices with the same number of classes"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.query), len(self.gallery)

    def __getitem__(self, rows: slice) -> Tensor:
        if self.query.ndim == 1:
            return self.query[rows, None] == self.gallery[None]
        return self.query[rows].float() @ self.gallery.float().T > 0


def row_slices(matrix: Rows) -> Iterator[slice]:
    """Slices of rows with at most ``CELLS`` entries each (one row at least)."""
    count, width = matrix.shape
    step = max(1, CELLS // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def top(similarity: Tensor, k: int) -> Tensor:
    """Indices (B, min(k, M)) of the k highest scores of each row, best first.

    Exact and stable: equal scores keep the order of the gallery, also at the cut, which
    ``torch.topk`` does not promise. Raises ``ValueError`` on NaN.
    """
    check_finite(similarity)
    k = min(k, similarity.shape[1])
    if k == similarity.shape[1]:
        return similarity.argsort(dim=1, descending=True, stable=True)
    last = similarity.topk(k, dim=1).values[:, -1:]
    above, tied = similarity > last, similarity == last
    room = k - above.sum(1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(1) <= room))  # exactly k per row, in gallery order
    index = chosen.nonzero()[:, 1].view(-1, k)
    order = similarity.gather(1, index).argsort(dim=1, descending=True, stable=True)
    return index.gather(1, order)


def check_finite(similarity: Tensor) -> None:
    """Refuse NaN, which every sort places somewhere else."""
    if similarity.is_floating_point() and bool(similarity.isnan().any()):
        raise ValueError("scores contain NaN: a feature is zero or not finite")
