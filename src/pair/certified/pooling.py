"""Monotone pooling of view scores, and what a patch can do to the pooled score (Theorem 1).

Scores come as (..., V): one value per view, in [lo, hi]. Where a rule uses the unpurified image,
that is the *last* column; it belongs to no Cov(L), so the attacker always controls it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Pool(Protocol):
    """``pool(scores (..., V)) -> (...)``, non-decreasing in every coordinate."""

    def __call__(self, scores: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Minimum:
    """The worst view: promotion-proof."""

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.amin(-1)


@dataclass(frozen=True)
class Maximum:
    """The best view: demotion-proof."""

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.amax(-1)


@dataclass(frozen=True)
class LowestMean:
    """Mean of the ``count`` lowest views. Promotion-proof where |Cov(L)| >= count for every L."""

    count: int = 2

    def __call__(self, scores: Tensor) -> Tensor:
        if not 1 <= self.count <= scores.shape[-1]:
            raise ValueError(f"cannot average {self.count} of {scores.shape[-1]} views")
        return scores.topk(self.count, dim=-1, largest=False).values.mean(-1)


@dataclass(frozen=True)
class SoftMinimum:
    """min(plain, smooth minimum of the masked views); the plain view is the last column.

    -log(mean exp(-sharpness * s)) / sharpness exceeds the minimum of R views by at most
    log(R) / sharpness, so that is all that it gives to a patch beyond the strict rule.
    """

    sharpness: float = 40.0

    def __post_init__(self) -> None:
        if not self.sharpness > 0:
            raise ValueError(f"the sharpness must be positive, got {self.sharpness}")

    def __call__(self, scores: Tensor) -> Tensor:
        masked = -self.sharpness * scores[..., :-1]
        mean = torch.logsumexp(masked, -1) - math.log(masked.shape[-1])
        return torch.minimum(scores[..., -1], -mean / self.sharpness)


@dataclass(frozen=True)
class Median:
    """The lower median of the views: two-sided where a patch touches fewer than half of them."""

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.median(-1).values


@dataclass(frozen=True)
class DeltaCap:
    """min(plain, lowest masked view + delta); the plain view is the last column.

    ``delta = 0`` is the strict rule, ``delta = inf`` no defence: one patch may lift a score by
    at most ``delta`` over what some view without the patch gives.
    """

    delta: float = 0.0

    def __post_init__(self) -> None:
        if not self.delta >= 0:
            raise ValueError(f"delta must be at least 0, got {self.delta}")

    def __call__(self, scores: Tensor) -> Tensor:
        return torch.minimum(scores[..., -1], scores[..., :-1].amin(-1) + self.delta)


def with_plain(patterns: Tensor) -> Tensor:
    """Add the plain view, which no pattern protects: (P, R) -> (P, R + 1)."""
    return torch.cat([patterns, patterns.new_zeros(len(patterns), 1)], 1)


def upper_bound(
    pool: Pool, scores: Tensor, patterns: Tensor, hi: float = 1.0, slack: float = 0.0
) -> Tensor:
    """U_A = max over L of A(s_r if r in Cov(L) else hi): the most any patch can reach.

    Theorem 1, for clean ``scores`` (..., V) and the sets Cov(L) as ``patterns`` (P, V). Assumes
    A1 (views do not see what they hide), A2 (``patterns`` holds every Cov(L)), A3 (deterministic
    views, up to ``slack`` >= 0) and a monotone ``pool``. Attained by some views: no better
    bound follows from the clean views alone.
    """
    return _extreme(pool, scores, patterns, hi + slack, slack, upper=True)


def lower_bound(
    pool: Pool, scores: Tensor, patterns: Tensor, lo: float = -1.0, slack: float = 0.0
) -> Tensor:
    """Lo_A = min over L of A(s_r if r in Cov(L) else lo): the least any patch can leave."""
    return _extreme(pool, scores, patterns, lo - slack, slack, upper=False)


def _extreme(
    pool: Pool, scores: Tensor, patterns: Tensor, value: float, slack: float, upper: bool
) -> Tensor:
    if patterns.shape[-1] != scores.shape[-1]:
        raise ValueError(
            f"{scores.shape[-1]} views but patterns for {patterns.shape[-1]}: "
            "use with_plain for scores that end with the plain view"
        )
    best = None
    shifted = scores + slack if upper else scores - slack
    for pattern in patterns.to(scores.device):  # few: memory stays that of one score table
        reached = pool(torch.where(pattern, shifted, torch.full_like(scores, value)))
        pick = torch.maximum if upper else torch.minimum
        best = reached if best is None else pick(best, reached)
    assert best is not None
    # A cap may lift a score beyond what the scale allows.
    return best.clamp(max=value) if upper else best.clamp(min=value)
