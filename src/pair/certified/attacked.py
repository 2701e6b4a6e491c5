"""The strongest attack beside the certificate: the truth about a defense lies between the two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.certified import metrics
from pair.certified.challenge import challenge, pasted
from pair.certified.covering import Cover
from pair.certified.pooling import DeltaCap, upper_bound, with_plain
from pair.certified.purifier import CertifiedPurifier, Views
from pair.images import quantise, resize
from pair.retrieval.encoders import ImageEncoder


def attack_record(
    model: CertifiedPurifier,
    encoder: ImageEncoder,
    gallery: Views,
    carriers: Tensor,
    queries: Tensor,
    start: Tensor | None,
    *,
    steps: int = 30,
    deltas: tuple[float, ...] = (0.0, 0.2),
    k: int = 10,
    slack: float = 1e-5,
) -> dict[str, Any]:
    """Attack carriers (B, 3, S, S) for one keyword and score them against its certificate.

    ``queries`` (Q, d) are the unit texts that search for the keyword: the attack optimises their
    mean, and is judged by each, so a bound is checked Q times per carrier. ``start`` is a genuine
    picture of the keyword, if there is one. Shares are over (query, carrier) pairs: ``clean``, with
    the genuine picture pasted (``collage``), ``attacked``, and ``certified``, the proved bound on
    any patch; ``undefended`` is how the same pasted and attacked pictures fare without defense.
    """
    goal = F.normalize(queries.mean(0), dim=-1)
    found = challenge(
        model, encoder, carriers, goal, delta=deltas[0], steps=steps, start=start, slack=slack
    )
    images = model.prepare(carriers)
    collage = torch.cat(
        [
            x[None] if start is None else pasted(x[None], quantise(_fitting(start, box)).to(x), box)
            for x, box in zip(images, found.boxes, strict=True)
        ]
    )
    with torch.no_grad():
        views = {
            name: model.embed(encoder, batch).scores(queries)  # (Q, B, R + 1)
            for name, batch in (("clean", images), ("collage", collage), ("attacked", found.images))
        }
    items = gallery.scores(queries)
    record: dict[str, Any] = {
        "pairs": queries.shape[0] * len(images),
        "undefended": {
            name: _share(table[..., -1], items[..., -1], k) for name, table in views.items()
        },
        "pools": {},
    }
    for delta in deltas:
        pool, patterns = DeltaCap(delta), with_plain(model.cover.minimal)
        benign = pool(items)
        upper = upper_bound(pool, views["clean"], patterns, slack=slack)
        shares = {name: _share(pool(table), benign, k) for name, table in views.items()}
        reached = pool(views["attacked"])
        record["pools"][f"{delta:g}"] = {
            **shares,
            "certified": float(metrics.cert_asr(upper, benign, k, slack).mean()),
            "violations": sum(int((pool(t) > upper).sum()) for t in views.values()),
            "closest": float((upper - reached).min()),
            "of_the_way": _way(pool(views["clean"]), reached, upper),
        }
    return record


def hardest(cover: Cover, carriers: Views, queries: Tensor, count: int) -> list[int]:
    """The carriers with the highest bounds for the mean query: where an attacker would begin."""
    goal = F.normalize(queries.mean(0), dim=-1)[None]
    upper = upper_bound(DeltaCap(0.0), carriers.scores(goal)[0], with_plain(cover.minimal))
    return upper.topk(min(count, len(upper))).indices.tolist()


def _fitting(start: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    return resize(start[None], (box[2], box[3]))[0].clamp(0, 1)


def _share(scores: Tensor, benign: Tensor, k: int) -> float:
    return float(metrics.cert_asr(scores, benign, k).mean())


def _way(clean: Tensor, reached: Tensor, upper: Tensor) -> float:
    """How much of the room between the clean score and the bound was used, on average."""
    return float(((reached - clean) / (upper - clean).clamp(min=1e-6)).clamp(max=1).mean())
