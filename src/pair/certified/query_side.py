"""What is proved about patched *queries* (Theorems 4-7), measured on clean photos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.certified import balls, query, votes
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
    the top-K lists (Theorem 6), and how long is that list. ``target_ap`` and ``cert_target_ap``:
    clean AP of another class, and what no patch can lift it above (Theorem 7c).
    ``intersection_size``, ``intersection_target``: items that all views return, and items of that
    other class which they could all return under some patch (Theorem 6).
    """

    diameter: Tensor
    radius: Tensor
    live: Tensor
    ap: Tensor
    cert_ap: Tensor
    cert_recall: Tensor
    union_hit: Tensor
    union_size: Tensor
    target_ap: Tensor
    cert_target_ap: Tensor
    intersection_size: Tensor
    intersection_target: Tensor

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
    targets: Tensor | None = None,
) -> QueryFigures:
    """Query photos (Q, 3, H, W) against unpurified gallery features (N, d); ``relevant`` (Q, N).

    ``binary`` compares signs by Hamming distance, otherwise unit features by chord. ``targets``
    (Q, N) are the items that an attacker wants each query to find; default: the class of another.
    """
    targets = other_class(relevant) if targets is None else targets
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
                "target_ap": _ap(metric, found.output[i], items, targets[start + i]),
            }
            both = wanted, targets[start + i]
            figures |= _certified(metric, second[i], found.radii[i], items, both, patterns, k)
            rows.append({**figures, **_lists(metric, first[i], items, both, patterns, k)})
    return QueryFigures(
        **{name: torch.stack([torch.as_tensor(r[name]).float() for r in rows]) for name in rows[0]}
    )


def _ap(metric: query.Metric, point: Tensor, items: Tensor, wanted: Tensor) -> Tensor:
    far = metric(items, point)
    return balls.average_precision(far[wanted], far[~wanted])


def other_class(relevant: Tensor) -> Tensor:
    """For every query (Q, N) the relevant items of the next query with another answer."""
    rows = []
    for i, own in enumerate(relevant):
        others = [relevant[(i + j) % len(relevant)] for j in range(1, len(relevant))]
        rows.append(next((o for o in others if not bool((o & own).any())), ~own))
    return torch.stack(rows)


def _certified(metric, second, radii, items, both, patterns, k) -> dict[str, Tensor]:
    """Theorem 7 around every centre z_{r,r*} with radius S_{r*}; r is not known, L neither."""
    count, (wanted, target) = len(radii), both
    ap, kept = torch.zeros(count, count), torch.zeros(count, count)  # [r, r*]
    lifted = torch.zeros(count, count)
    slack = 0.0 if metric is query.hamming else 1e-5
    for star in range(count):
        rho = float(radii[star]) + slack
        for r in range(count):
            far = metric(items, second[r, star])
            ap[r, star] = balls.ap_lower(far[wanted], far[~wanted], rho)
            lifted[r, star] = balls.ap_upper(far[target], far[~target], rho)
            ahead = balls.overtakers_by_distance(far, rho)
            kept[r, star] = float(balls.certified_in_top_k(ahead, k)[wanted].any())
    worst = {"cert_ap": ap.amin(0), "cert_recall": kept.amin(0)}  # over the unknown r
    proved = {name: balls.worst_case(values, patterns) for name, values in worst.items()}
    return {**proved, "cert_target_ap": -balls.worst_case(-lifted.amax(0), patterns)}


def _lists(metric, first, items, both, patterns, k) -> dict[str, Tensor]:
    wanted, target = both
    lists = query.top_k_lists(torch.stack([-metric(items, z) for z in first]), k)  # (R, N)
    certain = query.certain_members(lists, patterns)
    return {
        "union_hit": (certain & wanted).any().float(),
        "union_size": query.union(lists).sum().float(),
        "intersection_size": query.intersection(lists).sum().float(),
        "intersection_target": (query.possible_members(lists, patterns) & target).sum().float(),
    }


@dataclass(frozen=True)
class VoteFigures:
    """Theorem 8, per query (Q,): ``radius`` in bits that one patch can flip, AP of the voted code
    and its lower bound, and whether some relevant item is (certain to stay) in the top K."""

    radius: Tensor
    ap: Tensor
    cert_ap: Tensor
    recall: Tensor
    cert_recall: Tensor

    def means(self) -> dict[str, float]:
        return {name: float(value.double().mean()) for name, value in vars(self).items()}


@torch.no_grad()
def measure_votes(
    model: CertifiedPurifier,
    encoder: ImageEncoder,
    images: Tensor,
    gallery: Tensor,
    relevant: Tensor,
    *,
    k: int = 10,
) -> VoteFigures:
    """Codes by majority over the views of ``model``, whose cover shows small blocks
    (:func:`pair.certified.covering.visible_blocks`); arguments as in :func:`measure`."""
    items, patterns = binarise(gallery), model.cover.patterns
    rows: list[dict[str, Any]] = []
    for i in range(len(images)):
        bits = binarise(model.embed(encoder, images[i : i + 1]).masked[0])  # (V, K)
        wanted, code = relevant[i], votes.vote(bits)
        far = query.hamming(items, code)
        radius = votes.hamming_radius(bits, patterns)
        ahead = votes.vote_overtakers(bits, patterns, items)
        own = balls.overtakers_by_distance(far, 0.0)
        rows.append(
            {
                "radius": radius,
                "ap": balls.average_precision(far[wanted], far[~wanted]),
                "cert_ap": balls.ap_lower(far[wanted], far[~wanted], float(radius)),
                "recall": balls.certified_in_top_k(own, k)[wanted].any(),
                "cert_recall": balls.certified_in_top_k(ahead, k)[wanted].any(),
            }
        )
    return VoteFigures(**{name: torch.tensor([float(r[name]) for r in rows]) for name in rows[0]})
