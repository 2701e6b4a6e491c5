"""Masks against equations 5, 6 and 13, their statistics and their bookkeeping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pair.masks import (
    Bernoulli,
    ExactCount,
    FixedPattern,
    NoMask,
    WindowMix,
    complement,
    rule_from_config,
    rule_to_config,
)

RULES = [
    Bernoulli(0.3),
    ExactCount(0.75),
    ExactCount(0.5, shared=True),
    FixedPattern("checkerboard"),
    FixedPattern("rows"),
    FixedPattern("columns"),
    FixedPattern("seed:3"),
    NoMask(),
    WindowMix(0.5, 0.7),
]
RANDOM = [rule for rule in RULES if rule.random]
names = pytest.mark.parametrize("rule", RULES, ids=repr)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bernoulli_is_equation_6():
    alpha, batch, n = 0.3, 5, 196
    u = torch.rand(batch, n, generator=seeded(0))
    naive = torch.zeros(batch, n, dtype=torch.bool)
    for b in range(batch):
        for i in range(n):
            naive[b, i] = bool(u[b, i] > alpha)  # m_i = 1 if rand(0, 1) > alpha, else 0
    assert torch.equal(Bernoulli(alpha)(batch, 14, generator=seeded(0)), naive)


def test_complement_is_equation_13_and_a_partition():
    mask = Bernoulli(0.5)(4, 7, generator=seeded(0))
    other = complement(mask)
    for m, inverse in zip(mask.flatten().tolist(), other.flatten().tolist(), strict=True):
        assert inverse == (1 if m == 0 else 0)
    assert bool((mask ^ other).all())
    assert torch.equal(complement(other), mask)


@names
@pytest.mark.parametrize("grid", [4, 14])
def test_every_rule_gives_one_boolean_row_per_image(rule, grid):
    mask = rule(3, grid, generator=seeded(1))
    assert mask.shape == (3, grid * grid)
    assert mask.dtype == torch.bool
    mask[0] = False  # rows are memory of their own: writing to one leaves the others alone
    assert bool(mask[1].any())


@names
def test_a_seed_fixes_the_masks_and_only_random_rules_need_one(rule):
    first = rule(4, 14, generator=seeded(5))
    assert torch.equal(first, rule(4, 14, generator=seeded(5)))
    differs = not torch.equal(first, rule(4, 14, generator=seeded(6)))
    assert differs == rule.random


@pytest.mark.parametrize("rule", RANDOM, ids=repr)
def test_calls_are_fresh_and_leave_the_global_source_alone_when_given_one(rule):
    generator = seeded(0)
    assert not torch.equal(rule(2, 14, generator=generator), rule(2, 14, generator=generator))
    assert not torch.equal(rule(2, 14), rule(2, 14))
    before = torch.get_rng_state()
    rule(2, 14, generator=generator)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rule", [Bernoulli(), ExactCount(), WindowMix()], ids=repr)
def test_each_image_has_a_mask_of_its_own(rule):
    mask = rule(8, 14, generator=seeded(0))
    assert len({tuple(row.tolist()) for row in mask}) == 8


def test_shared_masks_are_shared():
    mask = ExactCount(0.5, shared=True)(8, 14, generator=seeded(0))
    assert len({tuple(row.tolist()) for row in mask}) == 1


@pytest.mark.parametrize("rule", [Bernoulli(0.4), ExactCount(0.4)], ids=repr)
def test_the_mask_of_the_first_image_does_not_depend_on_the_batch_size(rule):
    alone = rule(1, 14, generator=seeded(9))
    assert torch.equal(alone[0], rule(16, 14, generator=seeded(9))[0])


@pytest.mark.parametrize(
    ("ratio", "hidden"), [(0.5, 98), (0.75, 147), (0.2, 39), (0.001, 1), (0.999, 195)]
)
def test_exact_count_hides_exactly_that_many(ratio, hidden):
    mask = ExactCount(ratio)(6, 14, generator=seeded(0))
    assert (~mask).sum(1).tolist() == [hidden] * 6


def test_exact_count_hides_every_token_equally_often():
    share = (~ExactCount(0.25)(4000, 4, generator=seeded(0))).float().mean(0)
    # Standard deviation sqrt(.25 * .75 / 4000) = .0068: five of them.
    assert float((share - 0.25).abs().max()) < 5 * 0.0068


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_bernoulli_statistics(ratio):
    hidden = (~Bernoulli(ratio)(2000, 14, generator=seeded(0))).float()
    count = hidden.sum(1)
    spread = (196 * ratio * (1 - ratio)) ** 0.5
    assert abs(float(count.mean()) - 196 * ratio) < 5 * spread / 2000**0.5
    assert abs(float(count.std()) / spread - 1) < 0.1  # counts vary, unlike ExactCount's
    per_token = hidden.mean(0)
    assert float((per_token - ratio).abs().max()) < 5 * (ratio * (1 - ratio) / 2000) ** 0.5
    # Neighbouring tokens are independent.
    together = (hidden[:, :-1] * hidden[:, 1:]).mean()
    assert abs(float(together) - ratio**2) < 0.01


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(1e-9, 1 - 1e-9),
    grid=st.integers(2, 6),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["bernoulli", "exact", "windows"]),
)
def test_no_draw_leaves_a_pass_without_input(ratio, grid, seed, kind):
    mask = rule_from_config({"rule": kind, "ratio": ratio})(8, grid, generator=seeded(seed))
    assert bool(mask.any(1).all())  # pass 1 sees something
    assert bool((~mask).any(1).all())  # and so does pass 2


def test_degenerate_draws_really_occur_and_are_replaced():
    raw = torch.rand(500, 4, generator=seeded(0)) > 0.5
    assert bool((raw.all(1) | ~raw.any(1)).any())
    mask = Bernoulli(0.5)(500, 2, generator=seeded(0))
    assert not bool((mask.all(1) | ~mask.any(1)).any())
    keep = ~(raw.all(1) | ~raw.any(1))
    assert torch.equal(mask[keep], raw[keep])  # the good draws stand


def test_patterns():
    board = FixedPattern("checkerboard")(2, 3)[1].view(3, 3).int().tolist()
    assert board == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    rows = FixedPattern("rows")(1, 3).view(3, 3).int().tolist()
    assert rows == [[1, 1, 1], [0, 0, 0], [1, 1, 1]]
    columns = FixedPattern("columns")(1, 3).view(3, 3).int().tolist()
    assert columns == [[1, 0, 1], [1, 0, 1], [1, 0, 1]]
    drawn = FixedPattern("seed:4")(1, 14)
    assert int(drawn.sum()) == 98
    assert not torch.equal(drawn, FixedPattern("seed:5")(1, 14))
    assert bool(NoMask()(2, 5).all())


def test_windows_are_rectangles_within_the_given_sides():
    masks = WindowMix(0.5, windows=1.0, low=0.3, high=0.6)(200, 14, generator=seeded(0))
    sides = set()
    for hidden in (~masks).view(200, 14, 14):
        rows, cols = hidden.any(1).nonzero()[:, 0], hidden.any(0).nonzero()[:, 0]
        h, w = int(rows[-1] - rows[0]) + 1, int(cols[-1] - cols[0]) + 1
        assert int(hidden.sum()) == h * w  # a filled rectangle
        sides |= {h, w}
    assert sides == set(range(round(14 * 0.3), round(14 * 0.6) + 1))
    covered = (~masks).any(0)
    assert bool(covered.all())  # they reach every corner
    mixed = WindowMix(0.5, windows=0.0)(20, 14, generator=seeded(0))
    assert (~mixed).sum(1).tolist() == [98] * 20


@names
def test_config_round_trip(rule):
    config = rule_to_config(rule)
    assert rule_from_config(config) == rule
    assert rule_to_config(rule_from_config(config)) == config
    assert rule_from_config(config).random == rule.random


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rule": "bernouli"}, "unknown mask rule 'bernouli'"),
        ({}, "unknown mask rule None"),
        ({"rule": "bernoulli", "rato": 0.5}, "has no option 'rato'; known: ratio"),
        ({"rule": "none", "ratio": 0.5}, "known: none"),
        ({"rule": "bernoulli", "random": False}, "has no option 'random'"),
        ({"rule": "bernoulli", "ratio": 0}, "strictly between 0 and 1, got 0"),
        ({"rule": "exact", "ratio": 1.0}, "strictly between 0 and 1"),
        ({"rule": "exact", "ratio": "half"}, "strictly between 0 and 1, got 'half'"),
        ({"rule": "fixed", "pattern": "spiral"}, "unknown fixed pattern 'spiral'"),
        ({"rule": "fixed", "pattern": "seed:x"}, "unknown fixed pattern 'seed:x'"),
        ({"rule": "windows", "low": 0.0}, "0 < low <= high < 1"),
        ({"rule": "windows", "high": 1.5}, "0 < low <= high < 1"),
        ({"rule": "windows", "windows": 2.0}, "share between 0 and 1"),
    ],
)
def test_bad_rules_are_refused_in_one_sentence(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        rule_from_config(config)
    assert "\n" not in str(caught.value)


def test_a_rule_of_ones_own_has_no_config():
    def mine(batch, grid, *, generator=None, device="cpu"):
        return torch.ones(batch, grid * grid, dtype=torch.bool)

    with pytest.raises(ValueError, match="not one of the rules"):
        rule_to_config(mine)
