"""Certified metrics: computed from clean data alone, they bound every attack of the family.

Tables are over queries (Q) x carriers (C) or queries x gallery items (N). No attack is run.
Means and intervals over the per-query values: :mod:`pair.retrieval.statistics`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pair.certified.database import certified_out, certified_rank


def cert_asr(upper: Tensor, benign: Tensor, k: int, slack: float = 0.0) -> Tensor:
    """CertASR@K per query, (Q, C) and (Q, N) -> (Q,): share of carriers not certified out.

    An upper bound on the share of carriers that *any* patch of the family, placed anywhere and
    optimised against this very defense, brings into the top K (Theorem 2). With clean scores
    for ``upper`` it is the level without attack, below which no bound can go.
    """
    return 1 - certified_out(upper, benign, k, slack).double().mean(-1)


def cert_asr_any(upper: Tensor, benign: Tensor, k: int, slack: float = 0.0) -> Tensor:
    """Any-of-N variant: 1 where at least one of the carriers is not certified out. (Q,)."""
    return (~certified_out(upper, benign, k, slack)).any(-1).double()


def cert_recall(
    upper: Tensor, benign: Tensor, relevant: Tensor, k: int, slack: float = 0.0
) -> Tensor:
    """CertRecall@K, (Q,): is some relevant item certain to stay in the top K (Corollary 2a)?

    Holds while all carriers of ``upper`` (Q, C) are injected at once with any patches.
    """
    worst = certified_rank(upper, benign, slack)
    return ((worst <= k) & relevant).any(1).double()


def cert_kept(
    lower: Tensor, scores: Tensor, relevant: Tensor, k: int, slack: float = 0.0
) -> Tensor:
    """Demotion, (Q,): the share of the relevant items in the top K that no patch on the item
    itself can push out. ``lower`` (Q, N) are Lo_A of the items, ``scores`` (Q, N) clean; a query
    without a relevant hit counts as 0."""
    ordered = scores.sort(-1).values
    below = torch.searchsorted(ordered, (lower - slack).contiguous(), right=False)
    # Others at least as good as the bound: all of those, without the item itself.
    ahead = scores.shape[-1] - below - 1
    top = torch.zeros_like(relevant).scatter(1, scores.topk(k, dim=1).indices, True) & relevant
    kept = ((ahead <= k - 1) & top).sum(1).double()
    return kept / top.sum(1).clamp(min=1)


def cert_average_precision(
    upper: Tensor, benign: Tensor, relevant: Tensor, slack: float = 0.0
) -> Tensor:
    """Lower bound on AP with all carriers injected, as irrelevant items, with any patches. (Q,).

    The i-th best relevant item is at worst at the i-th smallest certified rank, and
    AP = (1/N) sum_i i / rank_i falls with every rank.
    """
    worst = certified_rank(upper, benign, slack)
    out = torch.zeros(len(worst), dtype=torch.float64)
    for row, (ranks, mask) in enumerate(zip(worst, relevant, strict=True)):
        ordered = ranks[mask].sort().values.double().cpu()
        if len(ordered):
            i = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
            out[row] = (i / torch.maximum(ordered, i)).mean()
    return out
