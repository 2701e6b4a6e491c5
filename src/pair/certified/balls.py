"""From "the embedding lies within rho of a clean point" to Recall@K and mAP (Theorem 7)."""

from __future__ import annotations

import torch
from torch import Tensor


def overtakers(centre: Tensor, items: Tensor, rho: float) -> Tensor:
    """Theorem 7a: for unit features, how many items might be ranked ahead of each item.

    For any D with |D - centre| <= rho, item y' can beat y only if
    <centre, y - y'> <= rho |y - y'|. ``centre`` (d,), ``items`` (N, d) -> (N,) counts.
    """
    score = items @ centre
    gap = score[:, None] - score[None]  # (N, N)
    apart = torch.cdist(items, items)
    may = gap <= rho * apart
    may.fill_diagonal_(False)
    return may.sum(1)


def overtakers_by_distance(distances: Tensor, rho: float) -> Tensor:
    """Theorem 7b: the same for any metric, from the distances d(centre, y): (N,) -> (N,).

    y' can beat y only if d(centre, y') <= d(centre, y) + 2 rho. For Hamming distances this is
    exact per pair: 2 rho is what rho flipped bits can change.
    """
    ordered = distances.sort().values
    reach = torch.searchsorted(ordered, (distances + 2 * rho).contiguous(), right=True)
    return reach - 1  # without y itself


def certified_in_top_k(ahead: Tensor, k: int) -> Tensor:
    """Items that stay in the top K: at most K - 1 others may be ahead."""
    return ahead <= k - 1


def average_precision(relevant: Tensor, irrelevant: Tensor, k: int | None = None) -> Tensor:
    """AP (AP@K over min(N_rel, K)) from distances; ties count against the relevant item."""
    return ap_lower(relevant, irrelevant, 0.0, k)


def ap_lower(relevant: Tensor, irrelevant: Tensor, rho: float, k: int | None = None) -> Tensor:
    """Theorem 7c: AP of every point within ``rho`` of the centre is at least this.

    ``relevant`` (N,) and ``irrelevant`` (M,) distances to the centre in any metric. Assumes the
    AP@K that divides by min(N_rel, K); the variant that divides by the relevant items *retrieved*
    is not monotone and has no certificate.
    """
    ordered = irrelevant.sort().values
    ahead = torch.searchsorted(ordered, (relevant.sort().values + 2 * rho), right=True)
    return _ap(ahead, k)


def ap_upper(relevant: Tensor, irrelevant: Tensor, rho: float, k: int | None = None) -> Tensor:
    """Theorem 7c for a targeted attack: AP of the target class is at most this.

    ``relevant`` are the distances of the target's items; ties count for the attacker.
    """
    ordered = irrelevant.sort().values
    ahead = torch.searchsorted(ordered, (relevant.sort().values - 2 * rho), right=False)
    return _ap(ahead, k)


def _ap(ahead: Tensor, k: int | None) -> Tensor:
    """(1/N) sum_i i / (i + n_i), with n_i irrelevant items ahead of the i-th relevant one."""
    i = torch.arange(1, len(ahead) + 1, device=ahead.device)
    terms = i / (i + ahead)
    if k is None:
        return terms.mean()
    return torch.where(i + ahead <= k, terms, torch.zeros_like(terms)).sum() / min(len(ahead), k)


def worst_case(values: Tensor, patterns: Tensor) -> Tensor:
    """Combine per-view certificates: min over regions of the best view in Cov(L).

    ``values`` (..., R): what is proved if view r hides the patch (higher is better), already the
    worst over the unknown returned view; ``patterns`` (P, R). Every view in Cov(L) gives a valid
    certificate for that L, so the best counts; the attacker picks L.
    """
    open_to_us = torch.where(patterns, values[..., None, :], -torch.inf)  # (..., P, R)
    return open_to_us.amax(-1).amin(-1)
