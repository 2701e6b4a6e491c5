"""A collection searched by certified score: exact top K, certifying only what is needed.

The certified score min(plain, lowest view + delta) never exceeds the plain score. So items are
taken in order of their plain score, certified one after another, and the search stops once the
K-th certified score beats every plain score that is left. The result is the exact certified
ranking: no shortlist that injected images could flood (they only cost views, once per image).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        self._codes: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.plain)

    @property
    def certified(self) -> int:
        """Number of items whose views are known."""
        return len(self._codes)

    @property
    def bytes(self) -> int:
        """Memory of all stored vectors."""
        views = sum(c.nbytes + s.nbytes for c, s in self._codes.values())
        return self.plain.nbytes + views

    def add(self, plain: Tensor, masked: Tensor | None = None) -> list[int]:
        """Append items (n, d), with their views (n, R, d) if known; returns their numbers."""
        if masked is None and self.certify is None:
            raise ValueError("give the views of the items, or a function that computes them")
        items = list(range(len(self), len(self) + len(plain)))
        self.plain = torch.cat([self.plain, plain.detach().float()])
        if masked is not None:
            self._store(items, masked)
        return items

    def scores(self, query: Tensor, items: Sequence[int]) -> Tensor:
        """View scores (n, R + 1) of certified items, the plain view last."""
        masked = torch.stack([c.float() * s for c, s in (self._codes[i] for i in items)])
        # One item at a time, in effect: no product depends on which items share the call.
        views = (masked * query).sum(-1)
        return torch.cat([views, self._plain_scores(query)[list(items), None]], 1)

    def search(self, query: Tensor, k: int = 10) -> list[Hit]:
        """The ``k`` items with the highest certified score for a unit query (d,)."""
        if query.shape != self.plain.shape[1:]:
            raise ValueError(f"the query must have shape {tuple(self.plain.shape[1:])}")
        query = query.detach().float()
        bound = self._plain_scores(query)
        order = bound.argsort(descending=True, stable=True).tolist()
        hits: list[Hit] = []
        for start in range(0, len(order), self.batch):
            if len(hits) >= k and hits[k - 1].score > bound[order[start]]:
                break
            items = order[start : start + self.batch]
            self._require(items)
            hits += self._hits(query, items)
            hits = sorted(hits, key=lambda h: (-h.score, h.item))[:k]
        return hits

    def _hits(self, query: Tensor, items: list[int]) -> list[Hit]:
        table = self.scores(query, items)
        pooled = self.pool(table)
        lowest, window = table[:, :-1].min(1)
        rows = zip(items, pooled, table[:, -1], lowest, window, strict=True)
        return [Hit(i, float(s), float(p), float(m), int(w)) for i, s, p, m, w in rows]

    def _plain_scores(self, query: Tensor) -> Tensor:
        return (self.plain * query).sum(-1)

    def _require(self, items: list[int]) -> None:
        missing = [i for i in items if i not in self._codes]
        if missing:
            assert self.certify is not None
            self._store(missing, self.certify(missing))

    def _store(self, items: Sequence[int], masked: Tensor) -> None:
        if masked.shape != (len(items), *self.shape):
            raise ValueError(
                f"views must have shape {(len(items), *self.shape)}, got {tuple(masked.shape)}"
            )
        for item, views in zip(items, masked.detach().float().cpu(), strict=True):
            if self.exact:
                self._codes[item] = views, views.new_ones(len(views), 1)
            else:
                scale = views.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
                self._codes[item] = (views / scale).round().to(torch.int8), scale
