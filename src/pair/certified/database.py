"""Database side: what injected or patched images can do to a ranking (Theorems 2, 3 and 10).

All statements assume per-item scoring (A6): the score of an item depends on the query and that
item only. Query-bank normalisation, statistics refitted on the collection, or a shortlist that an
attacker can fill break it. Ties are always counted against us.
"""

from __future__ import annotations

import torch
from torch import Tensor


def threshold(benign: Tensor, k: int) -> Tensor:
    """tau_K: the K-th largest benign score, (..., N) -> (...); -inf with fewer than K items."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if benign.shape[-1] < k:
        return benign.new_full(benign.shape[:-1], -torch.inf)
    return benign.topk(k, dim=-1).values[..., -1]


def certified_out(upper: Tensor, benign: Tensor, k: int, slack: float = 0.0) -> Tensor:
    """Theorem 2: carriers that no patch can bring into the top K, whoever else is injected.

    ``upper`` (..., C) are bounds U_A of the carriers, ``benign`` (..., N) pooled scores of the
    unattacked items. ``slack`` allows for the rounding of the benign scores. True where proved.
    """
    return upper < threshold(benign, k)[..., None] - slack


def uncertified_ahead(upper: Tensor, own: Tensor, slack: float = 0.0) -> Tensor:
    """u(q, y): injected images that might overtake item y. (..., C) and (..., N) -> (..., N)."""
    ordered = upper.sort(-1).values
    # searchsorted counts the bounds below own - slack; all others may be ahead.
    below = torch.searchsorted(ordered, (own - slack).contiguous(), right=False)
    return upper.shape[-1] - below


def certified_rank(upper: Tensor, benign: Tensor, slack: float = 0.0) -> Tensor:
    """Corollary 2a: worst rank (from 1) of every benign item under any injected patches.

    ``upper`` (..., C) bounds of the injected carriers, ``benign`` (..., N) -> (..., N).
    """
    ordered = benign.sort(-1).values
    below = torch.searchsorted(ordered, benign.contiguous(), right=False)
    rank = benign.shape[-1] - below  # items at least as good, itself included
    return rank + uncertified_ahead(upper, benign, slack)


def stays(lower: Tensor, others: Tensor, k: int, slack: float = 0.0) -> Tensor:
    """No patch on item y itself can push it out of the top K (demotion).

    ``lower`` (..., ) is Lo_A of y, ``others`` (..., N - 1) the scores of all other items.
    """
    return (others >= (lower - slack)[..., None]).sum(-1) <= k - 1


def evidence(scores: Tensor) -> Tensor:
    """e(q, x) = s_plain - s_min, the share of a score that hangs on one window (Theorem 3).

    Theorem 3: any rule that certifies an image x out of the top K also keeps out x with a small
    *genuine* picture of the concept in one window. So the clean price of a certificate is
    governed by this number on the true matches. ``scores`` (..., R + 1), plain view last.
    """
    return scores[..., -1] - scores[..., :-1].amin(-1)


def alarm(scores: Tensor, delta: float) -> Tensor:
    """Theorem 10's rule: raise an alarm where s_plain - s_min > delta. (..., R + 1) -> (...)."""
    return evidence(scores) > delta


def alarm_certain(upper: Tensor, tau: Tensor | float, delta: float) -> Tensor:
    """Theorem 10: every patch that lifts this carrier's plain score to ``tau`` sets off the alarm.

    ``upper`` is U_min of the clean carrier over the masked views alone (no plain view in it).
    """
    return upper < tau - delta


def random_mask_bound(hit_probability: float, lo: float = -1.0, hi: float = 1.0) -> float:
    """Proposition 9: how far a patch may move the *mean* score over random masks.

    ``hit_probability`` is the chance that a draw shows some token of the patch.
    """
    return (hi - lo) * hit_probability


def bernoulli_hit(ratio: float, tokens: int) -> float:
    """Chance that independent hiding with probability ``ratio`` shows one of ``tokens`` tokens."""
    return 1 - ratio**tokens
