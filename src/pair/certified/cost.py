"""What certified search costs: views against plain purification, storage, time per query."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.certified.index import CertifiedIndex
from pair.certified.purifier import CertifiedPurifier, Views
from pair.purifier import Purifier
from pair.retrieval.encoders import ImageEncoder


@torch.no_grad()
def cost_record(
    model: CertifiedPurifier,
    purifier: Purifier,
    encoder: ImageEncoder,
    images: Tensor,
    views: Views,
    queries: Tensor,
    *,
    rounds: int = 5,
    rows: int = 100_000,
    k: int = 10,
) -> dict[str, Any]:
    """Times in milliseconds of CPU, medians, taking what is compared in turns.

    ``images`` (B, 3, H, W) are purified and certified; ``views`` (of N items) and random unit
    vectors, ``rows`` in all, are searched for ``queries`` (Q, d): ``plain`` is exact search by one
    vector, ``certified`` the exact certified search with the views that it needs at hand.
    ``certified_per_query`` is how many items a query had to look at among the N alone: so many it
    certifies when nobody has asked before.
    """
    seeded = torch.Generator().manual_seed(0)
    made = len(model.cover)
    once = _alternate(
        rounds,
        lambda: encoder.encode_image(purifier(images, generator=seeded)),
        lambda: model.embed(encoder, images),
    )
    per_image, per_certified = (1000 * t / len(images) for t in once)
    large = _index(views, rows, seeded)
    small = _index(views, 0, seeded)
    asked, plain, certified = [], [], []
    for query in queries:
        last = small.search(query, k)[-1].score
        asked.append(int((small.plain @ query >= last).sum()))
        large.search(query, k)
        plain.append(_timed(partial(_nearest, large.plain, query, k)))
        certified.append(_timed(partial(large.search, query, k)))
    return {
        "images": len(images),
        "views": made,
        "ms_purify": per_image,
        "ms_certify": per_certified,
        "views_per_second": 1000 * (made + 1) / per_certified,
        "bytes_plain": large.plain[0].nbytes,
        "bytes_certified": made * (views.masked.shape[-1] + 4),
        "rows": len(large),
        "ms_query_plain": 1000 * median(plain),
        "ms_query_certified": 1000 * median(certified),
        "certified_per_query": sum(asked) / max(1, len(asked)),
        "items": len(small),
    }


def _index(views: Views, rows: int, seeded: torch.Generator) -> CertifiedIndex:
    """The given items among random ones, ``rows`` in all."""
    count, (_, made, dim) = len(views.plain), views.masked.shape
    others = F.normalize(torch.randn(max(0, rows - count), dim, generator=seeded), dim=-1)

    def certify(items: list[int]) -> Tensor:
        return torch.stack(
            [views.masked[i] if i < count else others[i - count].expand(made, dim) for i in items]
        )

    index = CertifiedIndex(dim, made, certify=certify)
    index.add(torch.cat([views.plain, others]))
    return index


def _nearest(items: Tensor, query: Tensor, k: int) -> Tensor:
    return (items @ query).topk(k).indices


def _alternate(rounds: int, *calls: Callable[[], Any]) -> list[float]:
    for call in calls:  # the first call of each pays for what later ones find ready
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, row in zip(calls, times, strict=True):
            row.append(_timed(call))
    return [median(row) for row in times]


def _timed(call: Callable[[], Any]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin
