"""Certified hashing by bit votes over small visible blocks (Theorem 8)."""

from __future__ import annotations

import torch
from torch import Tensor


def vote(bits: Tensor) -> Tensor:
    """Majority code of the views: (..., V, K) of +-1 -> (..., K); a tie counts as -1."""
    return torch.where(bits.sum(-2) > 0, 1.0, -1.0)


def flippable(bits: Tensor, patterns: Tensor) -> Tensor:
    """Bits that a patch might flip, per region: clean ``bits`` (V, K), (P, V) -> (P, K).

    Theorem 8: with T(L) the views that region L touches (the complement of Cov(L)) and W the sum
    of the untouched votes, bit k is safe at L if \\|W_k\\| > \\|T(L)\\|. Assumes A1-A3.
    """
    clean = patterns.to(bits.dtype)
    kept = clean @ bits  # (P, K), W_k^L
    touched = (1 - clean).sum(1, keepdim=True)  # (P, 1), |T(L)|
    return kept.abs() <= touched


def hamming_radius(bits: Tensor, patterns: Tensor) -> int:
    """Most bits that one patch can flip: one region must serve all bits, so the max is outside."""
    return int(flippable(bits, patterns).sum(1).max())


def vote_overtakers(bits: Tensor, patterns: Tensor, items: Tensor) -> Tensor:
    """How many database codes might be ahead of each one: codes (N, K) of +-1 -> (N,).

    At region L, y' can beat y only if d_F(H, y') - d_F(H, y) <= Ham_U(y, y') with F the fixed
    and U the flippable bits. The count is the largest over regions.
    """
    code = vote(bits)
    worst = torch.zeros(len(items), dtype=torch.long)
    for free in flippable(bits, patterns).unique(dim=0):
        fixed = (items[:, ~free] != code[~free]).sum(1)  # (N,)
        u = items[:, free]
        apart = (u.shape[1] - u @ u.T) / 2 if u.shape[1] else torch.zeros(len(items), len(items))
        may = (fixed[None] - fixed[:, None]) <= apart  # [y, y']
        may.fill_diagonal_(False)
        worst = torch.maximum(worst, may.sum(1))
    return worst
