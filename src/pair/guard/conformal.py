"""Thresholds with a false-alarm budget, from clean pictures set aside.

If a clean picture is exchangeable with the n held-out ones, the chance that its p-value is at
most ``a`` is at most ``a``, whatever the statistic and for every n (split conformal prediction).
That is a statement about clean pictures of the same kind as the hold-out; nothing is promised
about attacked ones, nor about clean pictures of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def threshold(clean: Sequence[float], budget: float) -> float:
    """The ceil((n + 1)(1 - budget))-th smallest clean value: alarm above it. Infinite where n is
    too small for the budget."""
    _check(budget)
    rank = math.ceil((len(clean) + 1) * (1 - budget) - 1e-9)
    return float(np.sort(np.asarray(clean, float))[rank - 1]) if rank <= len(clean) else math.inf


def p_value(value: float, clean: Sequence[float]) -> float:
    """(1 + number of clean values at least as large) / (n + 1)."""
    return (1 + int((np.asarray(clean, float) >= value).sum())) / (len(clean) + 1)


def combined(p_values: Sequence[float]) -> float:
    """One p-value of several, however they depend on each other (Bonferroni)."""
    return min(1.0, len(p_values) * min(p_values))


def needed(budget: float, statistics: int) -> int:
    """Clean pictures without which no alarm is possible at this budget."""
    _check(budget)
    return max(0, math.ceil(statistics / budget - 1e-9) - 1)


def _check(budget: float) -> None:
    if not 0 < budget < 1:
        raise ValueError(f"the false-alarm budget must lie between 0 and 1, got {budget}")
