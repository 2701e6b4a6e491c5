"""Theorems 1, 2, 2a, 10 and Proposition 9 against worst-case adversaries on random views."""

import math

import pytest
import torch

from pair.certified.covering import PatchFamily, visible_blocks, window_cover
from pair.certified.database import (
    alarm,
    alarm_certain,
    bernoulli_hit,
    certified_out,
    certified_rank,
    evidence,
    random_mask_bound,
    stays,
    threshold,
)
from pair.certified.metrics import cert_asr, cert_asr_any, cert_average_precision, cert_recall
from pair.certified.pooling import (
    DeltaCap,
    LowestMean,
    Maximum,
    Median,
    Minimum,
    SoftMinimum,
    lower_bound,
    upper_bound,
    with_plain,
)
from pair.retrieval.metrics import average_precision, recall

TRIALS = 10_000
COVER = window_cover(PatchFamily.square(7), 32, 4, views=9)
BLOCKS = visible_blocks(PatchFamily.square(4), 3, 24, 4, stride=2)
POOLS = [
    (Minimum(), COVER.patterns),
    (Minimum(), with_plain(COVER.patterns)),
    (DeltaCap(0.0), with_plain(COVER.patterns)),
    (DeltaCap(0.2), with_plain(COVER.patterns)),
    (DeltaCap(float("inf")), with_plain(COVER.patterns)),
    (LowestMean(2), COVER.patterns),
    (SoftMinimum(20.0), with_plain(COVER.patterns)),
    (Maximum(), COVER.patterns),
    (Median(), BLOCKS.patterns),
]


def rand(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def attacked(clean, patterns, seed, extreme=False):
    """Scores after a patch at a random region: everything outside Cov(L) is the attacker's."""
    g = torch.Generator().manual_seed(seed)
    pattern = patterns[torch.randint(len(patterns), clean.shape[:-1], generator=g)]
    wish = torch.rand(clean.shape, generator=g) * 2 - 1
    if extreme:
        wish = wish.sign()
    return torch.where(pattern, clean, wish)


@pytest.mark.parametrize(("pool", "patterns"), POOLS)
def test_theorem_1_no_adversary_leaves_the_bounds(pool, patterns):
    clean = rand(0, TRIALS, patterns.shape[1])
    high = upper_bound(pool, clean, patterns)
    low = lower_bound(pool, clean, patterns)
    for seed in range(4):
        pooled = pool(attacked(clean, patterns, seed, extreme=seed % 2 == 0))
        assert bool((pooled <= high).all())
        assert bool((pooled >= low).all())


@pytest.mark.parametrize(("pool", "patterns"), POOLS)
def test_theorem_1_the_bounds_are_attained(pool, patterns):
    clean = rand(1, 200, patterns.shape[1])
    best = torch.stack([pool(torch.where(p, clean, torch.ones(()))) for p in patterns]).amax(0)
    worst = torch.stack([pool(torch.where(p, clean, -torch.ones(()))) for p in patterns]).amin(0)
    assert torch.equal(best.clamp(max=1), upper_bound(pool, clean, patterns))
    assert torch.equal(worst.clamp(min=-1), lower_bound(pool, clean, patterns))


def test_minimal_patterns_give_the_same_bounds():
    clean = rand(2, 500, len(COVER))
    for bound in (upper_bound, lower_bound):
        for pool in (Minimum(), Maximum(), LowestMean(3)):
            every = bound(pool, clean, COVER.patterns)
            assert torch.equal(every, bound(pool, clean, COVER.minimal))


def test_what_each_pool_promises():
    clean = rand(3, 500, len(COVER))
    up = upper_bound(Minimum(), clean, COVER.patterns)
    assert bool((up <= clean.amax(-1)).all()) and bool((up < 1).all())
    assert bool((lower_bound(Minimum(), clean, COVER.patterns) == -1).all())
    down = lower_bound(Maximum(), clean, COVER.patterns)
    assert bool((down >= clean.amin(-1)).all()) and bool((down > -1).all())
    assert bool((upper_bound(Maximum(), clean, COVER.patterns) == 1).all())
    # The unmasked view costs nothing; a cap costs exactly delta; without a cap nothing is proved.
    both = torch.cat([clean, rand(4, 500, 1)], 1)
    cover = with_plain(COVER.patterns)
    assert torch.equal(upper_bound(DeltaCap(0), both, cover), up)
    assert torch.allclose(upper_bound(DeltaCap(0.2), both, cover), (up + 0.2).clamp(max=1))
    assert bool((upper_bound(DeltaCap(float("inf")), both, cover) == 1).all())


def test_averaging_two_views_needs_two_covers():
    # Multiplicity is 1 in the corners, so the second lowest view may be the attacker's.
    clean = rand(5, 100, len(COVER))
    up = upper_bound(LowestMean(2), clean, COVER.patterns)
    assert bool((up > upper_bound(Minimum(), clean, COVER.patterns)).all())


def test_a_soft_minimum_gives_a_patch_little_more_than_the_strict_rule():
    clean = rand(7, 500, len(COVER) + 1)
    cover, sharp = with_plain(COVER.patterns), 30.0
    strict = upper_bound(DeltaCap(0.0), clean, cover)
    soft = upper_bound(SoftMinimum(sharp), clean, cover)
    assert bool((soft >= strict - 1e-6).all())
    assert bool((soft <= strict + math.log(len(COVER)) / sharp + 1e-6).all())
    with pytest.raises(ValueError, match="positive"):
        SoftMinimum(0.0)


def test_a_median_over_small_blocks_is_two_sided():
    clean = 0.5 + 0.01 * rand(6, 100, len(BLOCKS))
    assert bool((upper_bound(Median(), clean, BLOCKS.patterns) < 0.6).all())
    assert bool((lower_bound(Median(), clean, BLOCKS.patterns) > 0.4).all())


def test_patterns_must_fit_the_scores():
    with pytest.raises(ValueError, match="with_plain"):
        upper_bound(Minimum(), rand(0, 5, len(COVER) + 1), COVER.patterns)
    with pytest.raises(ValueError, match="cannot average"):
        LowestMean(10)(rand(0, 5, 4))
    with pytest.raises(ValueError, match="delta"):
        DeltaCap(-0.1)


@pytest.mark.parametrize("delta", [0.0, 0.2])
def test_theorem_2_certified_carriers_never_enter(delta):
    """1,000 databases x 12 carriers, all injected together with the worst patches at once."""
    k, cover = 5, with_plain(COVER.patterns)
    pool = DeltaCap(delta)
    benign = pool(0.6 + 0.4 * rand(7, 1000, 40, len(COVER) + 1))
    clean = 0.7 * rand(8, 1000, 12, len(COVER) + 1)
    upper = upper_bound(pool, clean, cover)
    safe = certified_out(upper, benign, k)
    assert 0.05 < float(safe.double().mean()) < 0.95  # both kinds occur
    for seed in range(3):
        injected = pool(attacked(clean, cover, seed, extreme=True))
        merged = torch.cat([benign, injected], 1)
        # Ties count for the attacker: he is in if fewer than k benign items are strictly above.
        above = (benign[:, None] > injected[..., None]).sum(-1)
        assert not bool((safe & (above < k)).any())
        exact = safe.all(1)
        top = merged.topk(k, dim=1).indices
        assert bool((top[exact] < 40).all())
    # Tight: whoever is not certified does enter with some admissible views (against U itself).
    reach = (benign[:, None] > upper[..., None]).sum(-1) < k
    assert torch.equal(reach, ~safe)


def test_corollary_2a_bounds_every_rank():
    pool, cover, k = DeltaCap(0.1), with_plain(COVER.patterns), 5
    benign = pool(0.6 + 0.4 * rand(9, 1000, 30, len(COVER) + 1))
    clean = 0.7 * rand(10, 1000, 8, len(COVER) + 1)
    upper = upper_bound(pool, clean, cover)
    worst = certified_rank(upper, benign)
    relevant = rand(11, 1000, 30) > 0.6
    promised = cert_recall(upper, benign, relevant, k)
    ap = cert_average_precision(upper, benign, relevant)
    gained = torch.cat([relevant, torch.zeros(1000, 8, dtype=torch.bool)], 1)
    for seed in range(3):
        merged = torch.cat([benign, pool(attacked(clean, cover, seed, extreme=True))], 1)
        rank = (merged[:, None] >= benign[..., None]).sum(-1)
        assert bool((rank <= worst).all())
        got = recall(merged, gained, k, ties="pessimistic")
        assert bool((got >= promised).all())
        real = average_precision(merged, gained, ties="pessimistic")
        assert bool((real >= ap - 1e-12).all())
    # And it is attained when all carriers reach their bounds.
    merged = torch.cat([benign, upper], 1)
    assert torch.equal((merged[:, None] >= benign[..., None]).sum(-1), worst)


def test_demotion_of_a_relevant_item():
    pool, k = Maximum(), 5
    own = 0.7 + 0.25 * rand(12, TRIALS, len(COVER))
    others = rand(13, TRIALS, 12)
    safe = stays(lower_bound(pool, own, COVER.patterns), others, k)
    assert 0.05 < float(safe.double().mean()) < 0.95
    for seed in range(3):
        score = pool(attacked(own, COVER.patterns, seed, extreme=True))
        out = (others >= score[:, None]).sum(1) >= k
        assert not bool((safe & out).any())


def test_theorem_10_the_alarm_cannot_be_avoided():
    cover = with_plain(COVER.patterns)
    clean = 0.5 * rand(14, TRIALS, len(COVER) + 1)
    upper = upper_bound(Minimum(), clean[:, :-1], COVER.patterns)
    tau, delta = 0.6, 0.15
    sure = alarm_certain(upper, tau, delta)
    assert 0.05 < float(sure.double().mean()) < 0.95
    for seed in range(4):
        now = attacked(clean, cover, seed, extreme=seed % 2 == 0)
        shown = now[:, -1] >= tau
        assert bool(alarm(now, delta)[sure & shown].all())
        assert bool((sure & shown).any())
    assert torch.allclose(evidence(clean), clean[:, -1] - clean[:, :-1].amin(1))


def test_proposition_9_bounds_the_mean_over_masks():
    """Exact expectation over all Bernoulli masks of 8 tokens, random view functions."""
    g = torch.Generator().manual_seed(0)
    masks = torch.cartesian_prod(*[torch.tensor([0, 1])] * 8).bool()  # True = visible
    ratio = 0.7
    weight = torch.where(masks, 1 - ratio, ratio).prod(1)
    for _ in range(50):
        tokens = torch.randperm(8, generator=g)[:3]
        hit = masks[:, tokens].any(1)
        clean = torch.rand(256, generator=g) * 2 - 1
        bound = random_mask_bound(bernoulli_hit(ratio, 3))
        assert float(weight[hit].sum()) == pytest.approx(bernoulli_hit(ratio, 3), abs=1e-6)
        for wish in (1.0, -1.0):
            now = torch.where(hit, torch.full_like(clean, wish), clean)
            assert abs(float((weight * (now - clean)).sum())) <= bound + 1e-6
    assert random_mask_bound(bernoulli_hit(0.5, 25)) > 1.99  # PAIR's masks: says nothing


def test_threshold_needs_k_items():
    assert float(threshold(torch.tensor([3.0, 1.0, 2.0]), 2)) == 2
    assert float(threshold(torch.tensor([3.0]), 2)) == -torch.inf
    with pytest.raises(ValueError, match="at least 1"):
        threshold(torch.ones(3), 0)


def test_success_bounds_count_ties_against_us():
    benign = torch.tensor([[0.9, 0.5, 0.1]])
    upper = torch.tensor([[0.5, 0.4999, 0.95]])
    assert cert_asr(upper, benign, 2).tolist() == pytest.approx([2 / 3])
    assert cert_asr_any(upper, benign, 2).tolist() == [1.0]
    assert cert_asr(upper[:, 1:2], benign, 2, slack=0.001).tolist() == [1.0]
