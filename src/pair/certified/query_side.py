"""What is proved about patched *queries* (Theorems 4-7), measured on clean photos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.certified import balls, query
from pair.certified.purifier import CertifiedPurifier
from pair.retrieval.encoders import ImageEncoder
from pair.retrieval.hashing import binarise


@dataclass(frozen=True)
class QueryFigures:
    """Per query (Q,): numbers that need no attack to be measured.

    ``diameter``: accepted by Theorem 4 iff at most tau. ``radius`` and ``live``: smallest and
    largest S_r of Theorem 5. ``ap`` and ``cert_ap``: clean AP of the recovered embedding and its
    lower bound under every patch. ``cert_recall``: is some relevant item certain to stay in the
    top K? ``union_hit`` and ``union_size``: is some relevant item certain to be in the union of
    the top-K lists (Theorem 6), and how long is that list.
    """

    diameter: Tensor
    radius: Tensor
    live: Tensor
    ap: Tensor
    cert_ap: Tensor
    cert_recall: Tensor
    union_hit: Tensor
    union_size: Tensor

    def means(self) -> dict[str, float]:
        return {name: float(value.double().mean()) for name, value in vars(self).items()}


@torch.no_grad()
def measure(
    model: CertifiedPurifier,
    encoder: ImageEncoder,
    images: Tensor,
    gallery: Tensor,
    relevant: Tensor,
    *,
    binary: bool = False,
    k: int = 10,
    batch: int = 8,
) -> QueryFigures:
    """Query photos (Q, 3, H, W) against unpurified gallery features (N, d); ``relevant`` (Q, N).

    ``binary`` compares signs by Hamming distance, otherwise unit features by chord.
    """
    metric = query.hamming if binary else query.chord
    items = binarise(gallery) if binary else F.normalize(gallery, dim=-1)
    patterns = model.cover.minimal
    rows: list[dict[str, Any]] = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        first, second = model.embed(encoder, part).masked, model.embed_pairs(encoder, part)
        if binary:
            first, second = binarise(first), binarise(second)
        found = query.double_masked_recovery(first, second, metric)
        widths = query.diameter(first, metric)
        for i in range(len(part)):
            wanted = relevant[start + i]
            figures = {
                "diameter": widths[i],
                "radius": found.radius[i],
                "live": found.live[i],
                "ap": _ap(metric, found.output[i], items, wanted),
            }
            figures |= _certified(metric, second[i], found.radii[i], items, wanted, patterns, k)
            rows.append({**figures, **_union(metric, first[i], items, wanted, patterns, k)})
    return QueryFigures(
        **{name: torch.stack([torch.as_tensor(r[name]).float() for r in rows]) for name in rows[0]}
    )


def _ap(metric: query.Metric, point: Tensor, items: Tensor, wanted: Tensor) -> Tensor:
    far = metric(items, point)
    return balls.average_precision(far[wanted], far[~wanted])


def _certified(metric, second, radii, items, wanted, patterns, k) -> dict[str, Tensor]:
    """Theorem 7 around every centre z_{r,r*} with radius S_{r*}; r is not known, L neither."""
    count = len(radii)
    ap, kept = torch.zeros(count, count), torch.zeros(count, count)  # [r, r*]
    slack = 0.0 if metric is query.hamming else 1e-5
    for star in range(count):
        rho = float(radii[star]) + slack
        for r in range(count):
            far = metric(items, second[r, star])
            ap[r, star] = balls.ap_lower(far[wanted], far[~wanted], rho)
            ahead = balls.overtakers_by_distance(far, rho)
            kept[r, star] = float(balls.certified_in_top_k(ahead, k)[wanted].any())
    worst = {"cert_ap": ap.amin(0), "cert_recall": kept.amin(0)}  # over the unknown r
    return {name: balls.worst_case(values, patterns) for name, values in worst.items()}


def _union(metric, first, items, wanted, patterns, k) -> dict[str, Tensor]:
    lists = query.top_k_lists(torch.stack([-metric(items, z) for z in first]), k)  # (R, N)
    certain = query.certain_members(lists, patterns)
    return {
        "union_hit": (certain & wanted).any().float(),
        "union_size": query.union(lists).sum().float(),
    }
