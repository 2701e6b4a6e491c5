"""Other honest ways to pool and to look, on the same views: what do they buy?

Each is a function of one item and one query, non-decreasing in every view's score, so Theorems 1
and 2 hold as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from pair.certified.pooling import DeltaCap, Pool, SoftMinimum, upper_bound, with_plain
from pair.certified.purifier import Views
from pair.retrieval.mirror import Mirrored

Measure = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]  # benign, plain, upper

RULES: tuple[tuple[str, Pool], ...] = (
    ("worst view", DeltaCap(0.0)),
    ("worst view + 0.05", DeltaCap(0.05)),
    ("worst view + 0.1", DeltaCap(0.1)),
    ("worst view + 0.15", DeltaCap(0.15)),
    ("worst view + 0.2", DeltaCap(0.2)),
    ("soft minimum, 40", SoftMinimum(40.0)),
    ("soft minimum, 20", SoftMinimum(20.0)),
)


def variants(
    photos: Views, carriers: Views, text: Tensor, patterns: Tensor, measure: Measure, slack: float
) -> Iterator[dict[str, Any]]:
    """One record per rule and look; views come from a :class:`Mirrored` encoder.

    ``text`` (Q, d) are queries for the encoder alone; "upright" uses its features alone,
    "mirrored" both. ``patterns`` (P, R) are those of the masked views.
    """
    cover = with_plain(patterns)
    for look, turn, query in (
        ("upright", Mirrored.upright, text),
        ("mirrored", lambda x: x, Mirrored.twice(text)),
    ):
        items, ads = (
            Views(turn(v.plain), turn(v.masked)).scores(query) for v in (photos, carriers)
        )
        for name, pool in RULES:
            upper = upper_bound(pool, ads, cover, slack=slack)
            yield {"rule": name, "look": look, **measure(pool(items), pool(ads), upper)}
