"""Means over queries and over groups, with bootstrap intervals that respect the groups.

The queries of one keyword share one patch: they are not independent, and an interval that
treats them so is far too narrow. The bootstrap here draws whole groups (keywords) with
replacement, and inside each drawn group its units (carrier images) where these are given.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Summary:
    """``micro``: every query counts the same. ``macro``: every group counts the same.

    ``groups`` maps each group to (mean, number of queries), in order of first appearance.
    """

    micro: Interval
    macro: Interval
    groups: dict[Hashable, tuple[float, int]]
    queries: int
    resamples: int
    seed: int


def rate_bound(units: int, level: float = 0.95) -> float:
    """Upper bound of a rate of which ``units`` independent units showed nothing:
    1 - (1 - level)^(1/units), about 3/units at 95 %."""
    if units < 1:
        raise ValueError(f"a bound needs at least one unit, got {units}")
    return 1 - (1 - level) ** (1 / units)


def summarise(
    values: Tensor,
    groups: Sequence[Hashable] | None = None,
    units: Sequence[Hashable] | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Summary:
    """Summary of per-query rates ``values`` (Q,) in [0, 1].

    ``groups`` (Q,) names the cluster of each query (its keyword); without it every query is its
    own. ``units`` (Q,) names the unit inside its group (the carrier) that is resampled too.
    Percentile bootstrap, seeded. Where all values are 0 (or all 1) a bootstrap cannot vary and
    the interval is the exact one-sided bound of :func:`rate_bound` over the groups.
    """
    if bool((values < 0).any()) or bool((values > 1).any()):
        raise ValueError("rates must lie in [0, 1]; for differences use paired()")
    summary = _bootstrap(values, groups, units, resamples, level, seed)
    bound = rate_bound(len(summary.groups), level)
    if bool((values == 0).all()):
        sure = Interval(0.0, 0.0, bound)
    elif bool((values == 1).all()):
        sure = Interval(1.0, 1 - bound, 1.0)
    else:
        return summary
    return Summary(sure, sure, summary.groups, summary.queries, resamples, seed)


def paired(
    first: Tensor,
    second: Tensor,
    groups: Sequence[Hashable] | None = None,
    units: Sequence[Hashable] | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Summary:
    """Summary of ``first - second`` (Q,), two methods measured on the same queries."""
    if first.shape != second.shape:
        raise ValueError(f"paired values differ in shape: {first.shape} and {second.shape}")
    return _bootstrap(first.double() - second.double(), groups, units, resamples, level, seed)


def _bootstrap(values, groups, units, resamples: int, level: float, seed: int) -> Summary:
    values = values.detach().cpu().double()
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values must be a vector with one entry per query, got {values.shape}")
    if not bool(values.isfinite().all()):
        raise ValueError("values contain NaN or infinity")
    names = list(range(len(values))) if groups is None else list(groups)
    if len(names) != len(values) or (units is not None and len(units) != len(values)):
        raise ValueError("groups and units need one entry per query")
    group_names, group = _numbers(names)
    # Units are numbered inside their group; without units a group is one unit.
    _, unit = _numbers(list(zip(names, units if units is not None else names, strict=True)))
    n_units = int(unit.max()) + 1
    count = torch.zeros(n_units, dtype=torch.float64).index_add_(0, unit, torch.ones_like(values))
    total = torch.zeros(n_units, dtype=torch.float64).index_add_(0, unit, values)
    owner = torch.zeros(n_units, dtype=torch.long).scatter_(0, unit, group)  # (U,) its group
    size = torch.bincount(owner, minlength=len(group_names))  # units per group
    members = owner.argsort(stable=True)  # units, group by group
    first = size.cumsum(0) - size

    group_count = torch.zeros(len(group_names), dtype=torch.float64).index_add_(0, owner, count)
    group_total = torch.zeros_like(group_count).index_add_(0, owner, total)
    means = group_total / group_count

    generator = torch.Generator().manual_seed(seed)
    micro, macro = [], []
    for _ in range(resamples):
        drawn = torch.randint(len(size), (len(size),), generator=generator)  # (G,)
        slots = size[drawn].repeat_interleave(size[drawn])  # units of each drawn group
        place = torch.arange(len(size)).repeat_interleave(size[drawn])  # which drawn group
        pick = (torch.rand(len(slots), generator=generator, dtype=torch.float64) * slots).long()
        chosen = members[first[drawn].repeat_interleave(size[drawn]) + pick]
        sums = torch.zeros(len(size), dtype=torch.float64).index_add_(0, place, total[chosen])
        counts = torch.zeros(len(size), dtype=torch.float64).index_add_(0, place, count[chosen])
        micro.append(sums.sum() / counts.sum())
        macro.append((sums / counts).mean())
    tail = (1 - level) / 2

    def interval(mean: Tensor, draws: list[Tensor]) -> Interval:
        ends = torch.stack(draws).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
        return Interval(float(mean), float(ends[0]), float(ends[1]))

    table = {
        name: (float(m), int(c)) for name, m, c in zip(group_names, means, group_count, strict=True)
    }
    return Summary(
        interval(values.mean(), micro),
        interval(means.mean(), macro),
        table,
        len(values),
        resamples,
        seed,
    )


def _numbers(names: list) -> tuple[list, Tensor]:
    """Distinct names in order of appearance, and the number of each entry."""
    known: dict = {}
    index = [known.setdefault(name, len(known)) for name in names]
    return list(known), torch.tensor(index)
