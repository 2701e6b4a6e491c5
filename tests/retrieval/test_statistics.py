"""Macro and micro means, and the coverage of the cluster bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pair.retrieval.statistics import paired, rate_bound, summarise


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), min_size=1, max_size=20))
def test_means_equal_the_naive_ones(rows):
    groups, values = [g for g, _ in rows], [v for _, v in rows]
    result = summarise(torch.tensor(values, dtype=torch.float64), groups, resamples=20)
    per_group = {g: np.mean([v for h, v in rows if h == g]) for g in groups}
    assert result.micro.mean == pytest.approx(np.mean(values))
    assert result.macro.mean == pytest.approx(np.mean(list(per_group.values())))
    assert {g: m for g, (m, _) in result.groups.items()} == pytest.approx(per_group)
    assert sum(n for _, n in result.groups.values()) == result.queries == len(rows)
    for interval in (result.micro, result.macro):
        assert 0 <= interval.low <= interval.high <= 1


def test_equals_a_naive_bootstrap_over_groups():
    g = torch.Generator().manual_seed(0)
    groups = [i // 5 for i in range(60)]
    values = torch.rand(60, generator=g) * 0.3 + torch.tensor(groups) / 20
    got = summarise(values, groups, resamples=4000).macro
    rng = np.random.default_rng(0)
    means = np.array([values[i * 5 : i * 5 + 5].mean() for i in range(12)])
    naive = [rng.choice(means, 12).mean() for _ in range(4000)]
    assert got.low == pytest.approx(np.quantile(naive, 0.025), abs=0.01)
    assert got.high == pytest.approx(np.quantile(naive, 0.975), abs=0.01)


def test_groups_widen_the_interval_of_dependent_queries():
    values = torch.tensor([0.0, 1.0]).repeat_interleave(50)  # two keywords, all or nothing
    alone = summarise(values).micro
    grouped = summarise(values, ["a"] * 50 + ["b"] * 50).micro
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


def test_units_inside_groups_add_their_own_variance():
    g = torch.Generator().manual_seed(0)
    groups = [i // 30 for i in range(240)]
    units = [i // 5 % 6 for i in range(240)]  # 6 carriers per keyword, the same names in each
    effect = torch.rand(8, 6, generator=g)
    values = torch.stack([effect[a, b] for a, b in zip(groups, units, strict=True)])
    plain, nested = summarise(values, groups).macro, summarise(values, groups, units).macro
    assert nested.mean == plain.mean
    assert nested.high - nested.low > plain.high - plain.low


def test_interval_covers_the_truth_about_as_often_as_it_says():
    g = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(60):
        rates = torch.rand(25, 1, generator=g)  # the truth: a mean rate of one half
        values = (torch.rand(25, 8, generator=g) < rates).double().flatten()
        groups = [i // 8 for i in range(200)]
        interval = summarise(values, groups, resamples=200, seed=trial).macro
        covered += interval.low <= 0.5 <= interval.high
    assert 50 <= covered <= 60  # 95 % of 60 is 57; below 50 has probability 1e-4


def test_same_seed_same_interval_another_seed_another():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    assert summarise(values, seed=1) == summarise(values, seed=1)
    assert summarise(values, seed=1).micro != summarise(values, seed=2).micro


def test_nothing_seen_is_not_nothing_possible():
    assert rate_bound(59) < 0.05 < rate_bound(58)  # 59 units without a hit show "below 5 %"
    zero = summarise(torch.zeros(100), [i // 10 for i in range(100)], resamples=10)
    assert zero.macro.low == 0 and zero.macro.high == pytest.approx(rate_bound(10))
    full = summarise(torch.ones(10), resamples=10)
    assert full.micro.high == 1 and full.micro.low == pytest.approx(1 - rate_bound(10))


def test_paired_difference_is_narrower_than_two_separate_ones():
    g = torch.Generator().manual_seed(0)
    base = torch.rand(200, generator=g)
    better = (base + 0.1 + 0.02 * torch.randn(200, generator=g)).clamp(0, 1)
    difference = paired(better, base).micro
    assert difference.low > 0
    separate = summarise(better).micro
    assert difference.high - difference.low < (separate.high - separate.low) / 3


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.tensor([2.0]), {}, r"\[0, 1\]"),
        (torch.zeros(0), {}, "one entry per query"),
        (torch.tensor([float("nan")]), {}, "NaN"),
        (torch.zeros(3), {"groups": ["a"]}, "one entry per query"),
    ],
)
def test_bad_values_are_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        summarise(values, **options)
