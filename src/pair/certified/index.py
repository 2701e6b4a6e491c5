"""A collection searched by certified score: exact top K, certifying only what is needed.

The certified score min(plain, lowest view + delta) never exceeds the plain score. So items are
taken in order of their plain score, certified one after another, and the search stops once the
K-th certified score beats every plain score that is left. The result is the exact certified
ranking: no shortlist that injected images could flood (they only cost views, once per image).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pair.certified.pooling import DeltaCap

Certify = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Hit:
    """One answer. ``window`` is the mask whose removal costs most: what the hit hangs on."""

    item: int
    score: float
    plain: float
    lowest: float
    window: int


class CertifiedIndex:
    """Unit features of N items: one plain vector each, R view vectors once certified.

    ``certify(items) -> (n, R, d)`` computes missing views; without it all views must be given to
    :meth:`add`. Views are stored as int8 with one scale per vector (``exact=True`` keeps
    float32): rounding a view is a function of that view alone, so every theorem holds for the
    stored vectors as it does for the exact ones.
    """

    def __init__(
        self,
        dim: int,
        views: int,
        *,
        delta: float = 0.0,
        certify: Certify | None = None,
        exact: bool = False,
        batch: int = 16,
    ):
        self.pool, self.certify = DeltaCap(delta), certify
        self.exact, self.batch, self.shape = exact, batch, (views, dim)
        self.plain = torch.empty(0, dim)
        # Views lie in slots, in the order of certification; an item without views has slot -1.
        self._slots = torch.empty(0, dtype=torch.long)
        self._codes = torch.empty(0, views, dim, dtype=torch.float32 if exact else torch.int8)
        self._scales = torch.empty(0, views, 1)
        self._used = 0
        self._removed = torch.empty(0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.plain)

    @property
    def certified(self) -> int:
        """Number of items whose views are known."""
        return self._used

    @property
    def bytes(self) -> int:
        """Memory of all stored vectors."""
        views, dim = self.shape
        return self.plain.nbytes + self._used * views * (dim * self._codes.element_size() + 4)

    def add(self, plain: Tensor, masked: Tensor | None = None) -> list[int]:
        """Append items (n, d), with their views (n, R, d) if known; returns their numbers."""
        if masked is None and self.certify is None:
            raise ValueError("give the views of the items, or a function that computes them")
        items = list(range(len(self), len(self) + len(plain)))
        self.plain = torch.cat([self.plain, plain.detach().float().cpu()])
        self._slots = torch.cat([self._slots, torch.full((len(plain),), -1)])
        self._removed = torch.cat([self._removed, torch.zeros(len(plain), dtype=torch.bool)])
        if masked is not None:
            self._store(items, masked)
        return items

    def scores(self, query: Tensor, items: Sequence[int]) -> Tensor:
        """View scores (n, R + 1) of certified items, the plain view last."""
        slots = self._slots[list(items)]
        if bool((slots < 0).any()):
            raise ValueError("these items have no views yet: search certifies them when needed")
        masked = self._codes[slots].float() * self._scales[slots]
        # One item at a time, in effect: no product depends on which items share the call.
        views = (masked * query).sum(-1)
        plain = (self.plain[list(items)] * query).sum(-1, keepdim=True)
        return torch.cat([views, plain], 1)

    def search(self, query: Tensor, k: int = 10) -> list[Hit]:
        """The ``k`` items with the highest certified score for a unit query (d,)."""
        if query.shape != self.plain.shape[1:]:
            raise ValueError(f"the query must have shape {tuple(self.plain.shape[1:])}")
        query = query.detach().float()
        bound = self._plain_scores(query)
        hits: list[Hit] = []
        for items in self._batches(bound, 16 * k):
            if len(hits) >= k and hits[k - 1].score > bound[items[0]]:
                break
            hits += self.hits(query, items)
            hits = sorted(hits, key=lambda h: (-h.score, h.item))[:k]
        return hits

    def remove(self, items: Sequence[int]) -> None:
        """Never return these items again; the others keep their numbers."""
        self._removed[list(items)] = True

    def plain_top(self, query: Tensor, k: int = 10) -> list[int]:
        """The ``k`` items with the highest plain score: what an unprotected search returns."""
        return next(self._batches(self._plain_scores(query), k, k), [])

    def plain_rank(self, query: Tensor, item: int) -> int:
        """Place (from 1) of an item by its plain score."""
        scores = self._plain_scores(query)
        better = (scores > scores[item]) & ~self._removed
        return 1 + int(better.sum())

    def hits(self, query: Tensor, items: list[int]) -> list[Hit]:
        """What the index knows of these items, in their order; certifies those it must."""
        if not items:
            return []
        self._require(items)
        table = self.scores(query, items)
        pooled = self.pool(table)
        lowest, window = table[:, :-1].min(1)
        rows = zip(items, pooled, table[:, -1], lowest, window, strict=True)
        return [Hit(i, float(s), float(p), float(m), int(w)) for i, s, p, m, w in rows]

    def _batches(self, bound: Tensor, first: int, size: int = 0) -> Iterator[list[int]]:
        """Items by falling bound, ties by number, ``size`` at a time. About ``first`` are sorted
        at once, because few searches look further, and then all that are left."""
        size = size or self.batch
        bound = bound.masked_fill(self._removed, -torch.inf)
        rest = ~self._removed
        while bool(rest.any()):
            left = bound.masked_fill(~rest, -torch.inf)
            edge = left.topk(min(first, int(rest.sum()))).values[-1]
            some = (rest & (bound >= edge)).nonzero()[:, 0]
            items = some[bound[some].argsort(descending=True, stable=True)].tolist()
            for start in range(0, len(items), size):
                yield items[start : start + size]
            rest[some], first = False, len(bound)

    def _plain_scores(self, query: Tensor) -> Tensor:
        return (self.plain * query).sum(-1)

    def _require(self, items: list[int]) -> None:
        missing = [i for i in items if int(self._slots[i]) < 0]
        if missing:
            assert self.certify is not None
            self._store(missing, self.certify(missing))

    def _store(self, items: Sequence[int], masked: Tensor) -> None:
        if masked.shape != (len(items), *self.shape):
            raise ValueError(
                f"views must have shape {(len(items), *self.shape)}, got {tuple(masked.shape)}"
            )
        views = masked.detach().float().cpu()
        codes, scales = (views, torch.ones(*views.shape[:-1], 1)) if self.exact else quantise(views)
        end = self._used + len(items)
        if end > len(self._codes):  # at least doubled, so that adding one by one stays cheap
            room = max(end, 2 * len(self._codes))
            self._codes = _grown(self._codes, room)
            self._scales = _grown(self._scales, room)
        self._codes[self._used : end], self._scales[self._used : end] = codes, scales
        self._slots[list(items)] = torch.arange(self._used, end)
        self._used = end


def quantise(views: Tensor) -> tuple[Tensor, Tensor]:
    """Each vector (..., d) by itself as int8 codes and a scale (..., 1): ``codes * scale``."""
    scales = views.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (views / scales).round().to(torch.int8), scales


def _grown(old: Tensor, room: int) -> Tensor:
    new = old.new_zeros(room, *old.shape[1:])
    new[: len(old)] = old
    return new
