"""Theorems 4-8 against worst-case adversaries who know everything and own every touched view."""

import pytest
import torch
import torch.nn.functional as F

from pair.certified import balls, query, votes
from pair.certified.covering import PatchFamily, pair_masks, visible_blocks, window_cover
from pair.certified.query import chord, hamming

COVER = window_cover(PatchFamily.square(7), 32, 4, views=4)
R, D, BITS = len(COVER), 6, 12
TRIALS = 10_000
EPS = 1e-5
PAIRS = COVER.patterns[:, :, None] | COVER.patterns[:, None]  # (P, R, R): hidden by the union


def space(name, g, *shape):
    """Random points: unit vectors or codes."""
    if name == "chord":
        return F.normalize(torch.randn(*shape, D, generator=g), dim=-1)
    return torch.randint(0, 2, (*shape, BITS), generator=g).float() * 2 - 1


def near(name, g, centre, shape):
    """Points around ``centre`` (..., d)."""
    if name == "chord":
        noise = 0.3 * torch.randn(*shape, D, generator=g)
        return F.normalize(centre + noise, dim=-1)
    flip = torch.rand(*shape, BITS, generator=g) < 0.1
    return torch.where(flip, -centre, centre)


def rounds(name, seed, trials=TRIALS):
    """Clean first and second rounds of a random but fairly consistent encoder."""
    g = torch.Generator().manual_seed(seed)
    centre = space(name, g, trials)
    first = near(name, g, centre[:, None], (trials, R))
    second = near(name, g, centre[:, None, None], (trials, R, R))
    second = torch.where(torch.ones(R, R).tril().bool()[..., None], second, second.transpose(1, 2))
    at = torch.arange(R)
    second[:, at, at] = first
    return first, second


def attack(name, first, second, seed):
    """Every view that shows some of the patch goes where the attacker wants: one common target
    (the views agree with each other), its neighbourhood, or anywhere."""
    g = torch.Generator().manual_seed(seed)
    n = len(first)
    which = torch.randint(len(COVER.patterns), (n,), generator=g)
    target = space(name, g, n)
    kind = seed % 3
    if kind == 0:
        f, s = target[:, None].expand_as(first), target[:, None, None].expand_as(second)
    elif kind == 1:
        f = near(name, g, target[:, None], (n, R))
        s = near(name, g, target[:, None, None], (n, R, R))
    else:
        f, s = space(name, g, n, R), space(name, g, n, R, R)
    clean1, clean2 = COVER.patterns[which], PAIRS[which]
    first2 = torch.where(clean1[..., None], first, f)
    second2 = torch.where(clean2[..., None], second, s)
    at = torch.arange(R)
    second2[:, at, at] = first2
    return first2, second2, COVER.patterns[which]


def metric(name):
    return chord if name == "chord" else hamming


NAMES = ["chord", "hamming"]


def test_pair_patterns_are_what_union_masks_cover():
    g, t = COVER.grid, COVER.token
    masks = pair_masks(COVER.visible).flatten(0, 1)
    both = type(COVER)(g, t, COVER.family, masks)
    pairs = {tuple(p) for p in PAIRS.flatten(1).tolist()}
    # A region may be covered by a union without being covered by either window: never less.
    for pattern in both.patterns.tolist():
        assert any(all(a <= b for a, b in zip(p, pattern, strict=True)) for p in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_theorem_4_accepted_means_close_to_a_clean_view(name):
    first, second = rounds(name, 0)
    d = metric(name)
    tau = 0.9 if name == "chord" else 4
    accepted = 0
    for seed in range(3):
        now, _, cov = attack(name, first, second, seed)
        width = query.diameter(now, d)
        gap = d(now[:, :1], first)  # to every clean masked view
        gap = torch.where(cov, gap, torch.inf).amin(1)
        assert bool((gap <= width + EPS).all())
        accepted += int((width <= tau).sum())
    assert accepted > 0
    answer = query.agree_or_reject(first[0], tau, d)
    assert answer.accepted == (float(query.diameter(first[0], d)) <= tau)
    assert torch.equal(answer.output, first[0, 0])


@pytest.mark.parametrize("name", NAMES)
def test_theorem_5_recovery_stays_near_clean_pixels(name):
    first, second = rounds(name, 1)
    d = metric(name)
    clean = query.double_masked_recovery(first, second, d)
    rows = torch.arange(len(first))
    for seed in range(6):
        now1, now2, cov = attack(name, first, second, seed)
        got = query.double_masked_recovery(now1, now2, d)
        for star in range(R):
            on = cov[:, star]
            to_pair = d(got.output, second[rows, got.view, star])
            assert bool((to_pair <= got.radius + EPS)[on].all())
            assert bool((got.radius <= clean.radii[:, star] + EPS)[on].all())
            to_view = d(got.output, first[:, star])
            limit = got.radius + clean.radii[:, star]
            assert bool((to_view <= limit + EPS)[on].all())
        assert bool((got.radius <= clean.live + EPS).all())  # liveness: never a surprise refusal


@pytest.mark.parametrize("name", NAMES)
def test_recovery_can_move_as_far_as_the_radius_says(name):
    """The bound is not loose by construction: for some attack D is at distance S."""
    first, second = rounds(name, 2, 2000)
    d = metric(name)
    now1, now2, cov = attack(name, first, second, 1)
    got = query.double_masked_recovery(now1, now2, d)
    rows = torch.arange(len(first))
    ratios = [
        (d(got.output, second[rows, got.view, s]) / got.radius.clamp(min=EPS))[cov[:, s]]
        for s in range(R)
    ]
    assert float(torch.cat(ratios).max()) > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_the_cheap_version_keeps_the_promise(name):
    first, second = rounds(name, 3, 400)
    d = metric(name)
    tau = 0.8 if name == "chord" else 4
    outcomes = set()
    for seed in range(3):
        now1, now2, cov = attack(name, first, second, seed)
        for i in range(len(first)):
            answer = query.recover(now1[i], lambda r, i=i, s=now2: s[i, r], tau, d)
            assert answer.cost <= R + R * (R - 1)
            outcomes.add((answer.accepted, answer.cost == R))
            if answer.accepted:
                clean = torch.cat([first[i][cov[i]], second[i][:, cov[i]].flatten(0, 1)])
                assert float(d(answer.output[None], clean).min()) <= tau + EPS
    assert {True, False} == {a for a, _ in outcomes}
    assert (True, True) in outcomes


def test_theorem_6_set_rules():
    g = torch.Generator().manual_seed(4)
    items = F.normalize(torch.randn(30, D, generator=g), dim=1)
    first, second = rounds("chord", 5, 3500)
    lists = query.top_k_lists(first @ items.T, 5)  # (T, R, N)
    possible = torch.stack([query.possible_members(m, COVER.patterns) for m in lists])
    certain = torch.stack([query.certain_members(m, COVER.patterns) for m in lists])
    assert bool(certain.any()) and bool((~possible).any())
    for seed in range(3):
        now, _, cov = attack("chord", first, second, seed)
        answered = query.top_k_lists(now @ items.T, 5)
        every, some = query.intersection(answered), query.union(answered)
        assert not bool((every & ~possible).any())
        assert not bool((certain & ~some).any())
        for star in range(R):
            on = cov[:, star]
            assert not bool((every & ~lists[:, star])[on].any())
            assert not bool((lists[:, star] & ~some)[on].any())


def ball(centre, rho, count, g):
    """Points of the unit sphere within chord ``rho`` of ``centre``, many on the rim."""
    towards = torch.randn(count, D, generator=g)
    towards = F.normalize(towards - (towards @ centre)[:, None] * centre, dim=1)
    share = torch.where(torch.rand(count, generator=g) < 0.5, 1.0, torch.rand(count, generator=g))
    half = torch.asin(share * rho / 2) * 2  # chord -> angle
    return half.cos()[:, None] * centre + half.sin()[:, None] * towards


def test_theorem_7_for_unit_features():
    g = torch.Generator().manual_seed(6)
    checked = 0
    for rho in (0.05, 0.2, 0.5):
        for _ in range(10):
            centre = F.normalize(torch.randn(D, generator=g), dim=0)
            items = F.normalize(torch.randn(25, D, generator=g), dim=1)
            points = ball(centre, rho, 400, g)
            assert bool((chord(points, centre) <= rho + EPS).all())
            scores = points @ items.T
            ahead = (scores[:, None] > scores[..., None]).sum(-1)  # (400, 25)
            tight = balls.overtakers(centre, items, rho + EPS)
            assert bool((ahead <= tight).all())
            far = chord(items, centre)
            loose = balls.overtakers_by_distance(far, rho + EPS)
            assert bool((ahead <= loose).all())
            rel = torch.arange(25) < 6
            table = [chord(items, p) for p in points]
            for k in (None, 10):
                low = balls.ap_lower(far[rel], far[~rel], rho + EPS, k)
                high = balls.ap_upper(far[rel], far[~rel], rho + EPS, k)
                real = torch.stack([balls.average_precision(t[rel], t[~rel], k) for t in table])
                assert bool((real >= low - 1e-6).all()) and bool((real <= high + 1e-6).all())
            checked += len(points)
    assert checked >= TRIALS


def test_theorem_7a_is_tighter_than_the_triangle():
    g = torch.Generator().manual_seed(7)
    centre = F.normalize(torch.randn(D, generator=g), dim=0)
    items = F.normalize(torch.randn(200, D, generator=g), dim=1)
    a = balls.overtakers(centre, items, 0.2)
    b = balls.overtakers_by_distance(chord(items, centre), 0.2)
    assert float(a.float().mean()) < float(b.float().mean())


def test_theorem_7_for_codes_is_exact_per_pair():
    g = torch.Generator().manual_seed(8)
    for _ in range(100):
        centre, items = space("hamming", g), space("hamming", g, 20)
        far = hamming(items, centre)
        for rho in (1, 2):
            bound = balls.overtakers_by_distance(far, rho)
            flips = torch.rand(100, BITS, generator=g).argsort(1) < rho
            points = torch.where(flips, -centre, centre)
            now = hamming(points[:, None], items[None])  # (100, 20)
            ahead = (now[:, None] < now[..., None]).sum(-1)
            assert bool((ahead <= bound).all())
        # One pair: flipping rho bits where y agrees and y' does not moves the gap by 2 rho.
        agree = (items[0] == centre) & (items[1] != centre)
        take = agree & (agree.cumsum(0) <= 2)
        moved = torch.where(take, -centre, centre)
        gap = hamming(items[1], moved) - hamming(items[0], moved)
        assert float(gap) == float(far[1] - far[0]) - 2 * int(take.sum())


def test_average_precision_against_the_ranking_metric():
    from pair.retrieval.metrics import average_precision

    g = torch.Generator().manual_seed(9)
    far, rel = torch.rand(20, generator=g), torch.arange(20) < 5
    expected = average_precision(-far[None], rel[None])
    assert float(balls.average_precision(far[rel], far[~rel])) == pytest.approx(float(expected))
    expected = average_precision(-far[None], rel[None], 8, denominator="min")
    assert float(balls.average_precision(far[rel], far[~rel], 8)) == pytest.approx(float(expected))


def test_worst_case_lets_the_attacker_choose_the_region():
    patterns = torch.tensor([[True, True, False], [False, False, True]])
    values = torch.tensor([0.2, 0.7, 0.5])
    assert float(balls.worst_case(values, patterns)) == 0.5
    assert float(balls.worst_case(values, patterns[:1])) == pytest.approx(0.7)


BLOCKS = visible_blocks(PatchFamily.square(4), 3, 24, 4)


def test_theorem_8_votes_hold():
    g = torch.Generator().manual_seed(10)
    for trial in range(100):
        strength = torch.rand(BITS, generator=g)
        sign = space("hamming", g)
        kept = torch.rand(len(BLOCKS), BITS, generator=g) < 0.5 + strength / 2
        bits = torch.where(kept, sign, -sign)
        items = space("hamming", g, 15)
        code, far = votes.vote(bits), votes.hamming_radius(bits, BLOCKS.patterns)
        overtake = votes.vote_overtakers(bits, BLOCKS.patterns, items)
        which = torch.randint(len(BLOCKS.patterns), (100,), generator=g)
        cov = BLOCKS.patterns[which][..., None]
        target = space("hamming", g, 100)[:, None]
        wish = target if trial % 2 else -code.expand(100, 1, -1)
        now = votes.vote(torch.where(cov, bits, wish))
        moved = now != code
        assert int(moved.sum(1).max()) <= far
        allowed = votes.flippable(bits, BLOCKS.patterns)[which]
        assert not bool((moved & ~allowed).any())
        distance = hamming(now[:, None], items[None])
        ahead = (distance[:, None] < distance[..., None]).sum(-1)
        assert bool((ahead <= overtake).all())


def test_theorem_8_is_tight_up_to_ties():
    """The attacker who owns the touched views flips every bit that is called flippable."""
    g = torch.Generator().manual_seed(11)
    bits = space("hamming", g, len(BLOCKS))
    code = votes.vote(bits)
    for pattern, free in zip(BLOCKS.patterns, votes.flippable(bits, BLOCKS.patterns), strict=True):
        now = votes.vote(torch.where(pattern[:, None], bits, -code))
        kept = bits[pattern].sum(0)
        tie = kept.abs() == (~pattern).sum()
        assert torch.equal((now != code)[~tie], free[~tie])
