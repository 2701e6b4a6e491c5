"""Ranking metrics against oracles that anyone can read, and against torchmetrics."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pair.retrieval import metrics, scores
from pair.retrieval.hashing import binarise
from pair.retrieval.scores import Hamming, Product, SameLabel

# ---- oracles: one query, one fixed order --------------------------------------------------------


def naive_ap(hits: list[bool], k: int, denominator: str) -> float:
    found, total = 0, 0.0
    for place, hit in enumerate(hits[:k], start=1):
        if hit:
            found += 1
            total += found / place
    below = found if denominator == "hits" else min(sum(hits), k)
    return total / below if below else 0.0


def orders(score: list[float], relevant: list[bool], ties: str):
    """Every order of the items that the tie rule allows, as lists of hits."""
    if ties == "stable":
        index = sorted(range(len(score)), key=lambda i: -score[i])  # Python's sort is stable
        yield [relevant[i] for i in index]
    elif ties in ("pessimistic", "optimistic"):
        late = 1 if ties == "pessimistic" else -1
        index = sorted(range(len(score)), key=lambda i: (-score[i], late * relevant[i]))
        yield [relevant[i] for i in index]
    else:
        groups = [
            [relevant[i] for i in range(len(score)) if score[i] == value]
            for value in sorted(set(score), reverse=True)
        ]
        for parts in itertools.product(*(itertools.permutations(g) for g in groups)):
            yield [hit for part in parts for hit in part]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


ranking = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=120, deadline=None)
@given(ranking, st.integers(1, 8), st.sampled_from(metrics.TIES))
def test_every_metric_equals_brute_force_over_tie_orders(items, k, ties):
    score, relevant = [float(s) for s, _ in items], [r for _, r in items]
    every = list(orders(score, relevant, ties))
    s, r = torch.tensor([score]), torch.tensor([relevant])
    for denominator in metrics.DENOMINATORS:
        got = metrics.average_precision(s, r, k, ties=ties, denominator=denominator)
        assert float(got) == pytest.approx(mean(naive_ap(o, k, denominator) for o in every))
    got_any = float(metrics.recall(s, r, k, ties=ties))
    assert got_any == pytest.approx(mean(any(o[:k]) for o in every))
    got_each = float(metrics.recall(s, r, k, ties=ties, each=True))
    assert got_each == pytest.approx(mean(sum(o[:k]) / max(1, sum(o)) for o in every))
    got_precision = float(metrics.precision_at_k(s, r, k, ties=ties))
    assert got_precision == pytest.approx(mean(sum(o[:k]) / k for o in every))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from(metrics.TIES))
def test_codes_counted_equal_codes_sorted(seed, k, ties):
    g = torch.Generator().manual_seed(seed)
    query, gallery = (binarise(torch.randn(n, 8, generator=g)) for n in (5, 50))
    labels = [torch.randint(0, 4, (n,), generator=g) for n in (5, 50)]
    relevant = SameLabel(*labels)
    counted = metrics.average_precision(Hamming(query, gallery), relevant, k, ties=ties)
    ordered = metrics.average_precision(query @ gallery.T, relevant[:5], k, ties=ties)
    torch.testing.assert_close(counted, ordered)


@settings(max_examples=60, deadline=None)
@given(ranking, st.sampled_from(metrics.TIES))
def test_item_ranks_equal_brute_force(items, ties):
    score = [float(s) for s, _ in items]
    n = len(score)
    got = metrics.item_ranks(torch.tensor([score]), torch.arange(n)[None], ties=ties)[0]
    for i in range(n):
        alone = [j == i for j in range(n)]
        wanted = mean(o.index(True) + 1 for o in orders(score, alone, ties))
        assert float(got[i]) == pytest.approx(wanted)


def test_published_tie_example():
    # One relevant item of three equal ones: AP is 1, 1/2 or 1/3 with equal probability.
    s, r = torch.zeros(1, 3), torch.tensor([[False, False, True]])
    assert metrics.mean_average_precision(s, r) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert metrics.mean_average_precision(s, r, ties="pessimistic") == pytest.approx(1 / 3)
    assert metrics.mean_average_precision(s, r, ties="optimistic") == 1.0
    assert metrics.mean_average_precision(s, r, ties="stable") == pytest.approx(1 / 3)


def test_no_rounding_beyond_one():
    # 1,000 relevant items in one tie, then none: the sum over harmonic numbers is not exact.
    codes = Hamming(torch.ones(3, 8), torch.cat([torch.ones(997, 8), -torch.ones(5, 8)]))
    relevant = torch.arange(1002).expand(3, -1) < 997
    for ties in metrics.TIES:
        for k in (7, 100, 997, 1002):
            ap = metrics.average_precision(codes, relevant, k, ties=ties)
            assert bool((ap <= 1).all()) and ap.tolist() == pytest.approx([1.0] * 3)


def test_denominators_differ_as_documented():
    s = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    r = torch.tensor([[True, False, True, True]])
    assert metrics.mean_average_precision(s, r, 2) == 1.0  # one hit of one in the top 2
    assert metrics.mean_average_precision(s, r, 2, denominator="min") == 0.5
    assert metrics.mean_average_precision(s, ~r.logical_or(~r), 2) == 0.0  # no hit still counts


def test_agrees_with_torchmetrics():
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    g = torch.Generator().manual_seed(3)
    s = torch.rand(20, 100, generator=g)
    r = torch.rand(20, 100, generator=g) < 0.1
    r[0] = False  # torchmetrics: empty_target_action "neg" counts it as 0, as we do
    index = torch.arange(20)[:, None].expand_as(s)

    def theirs(metric) -> float:
        return float(metric(s.flatten(), r.flatten(), indexes=index.flatten()))

    for k in (1, 10, 100):
        for ties in metrics.TIES:
            ours = metrics.mean_average_precision(s, r, k, ties=ties)
            assert ours == pytest.approx(theirs(retrieval.RetrievalMAP(top_k=k)), abs=1e-6)
        assert metrics.recall_at_k(s, r, k) == pytest.approx(
            theirs(retrieval.RetrievalHitRate(top_k=k)), abs=1e-6
        )
        assert metrics.recall_at_k(s, r, k, each=True) == pytest.approx(
            theirs(retrieval.RetrievalRecall(top_k=k)), abs=1e-6
        )
        assert float(metrics.precision_at_k(s, r, k).mean()) == pytest.approx(
            theirs(retrieval.RetrievalPrecision(top_k=k)), abs=1e-6
        )
    # With ties torchmetrics keeps input order for mAP: our rule "stable".
    s = (s * 5).round()
    ours = metrics.mean_average_precision(s, r, ties="stable")
    flat = torch.stack([s, r.float()], 2)
    naive = mean(
        naive_ap(next(orders(*map(list, zip(*row.tolist(), strict=True)), "stable")), 100, "hits")
        for row in flat
    )
    assert ours == pytest.approx(naive)


def test_chunks_do_not_change_anything(monkeypatch):
    g = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(30, 6, generator=g), torch.randn(70, 6, generator=g)
    relevant = torch.rand(30, 70, generator=g) < 0.2
    matrix = Product(query, gallery)
    whole = metrics.average_precision(matrix, relevant, 9), metrics.recall(matrix, relevant, 3)
    monkeypatch.setattr(scores, "CELLS", 100)
    parts = metrics.average_precision(matrix, relevant, 9), metrics.recall(matrix, relevant, 3)
    torch.testing.assert_close(whole, parts)


def test_top_is_exact_and_stable():
    g = torch.Generator().manual_seed(0)
    s = torch.randint(0, 4, (40, 200), generator=g).float()
    for k in (1, 7, 150, 200, 500):
        wanted = s.argsort(dim=1, descending=True, stable=True)[:, :k]
        assert torch.equal(scores.top(s, k), wanted)
    with pytest.raises(ValueError, match="NaN"):
        scores.top(torch.tensor([[float("nan"), 1.0]]), 1)


def test_multi_label_relevance_is_one_shared_label():
    query = torch.tensor([[1, 0, 1], [0, 0, 0]])
    gallery = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 1, 1]])
    assert SameLabel(query, gallery)[0:2].tolist() == [[True, False, True], [False] * 3]


def test_targeted_map_is_map_with_the_target_label():
    g = torch.Generator().manual_seed(0)
    codes = [binarise(torch.randn(n, 16, generator=g)) for n in (6, 40)]
    labels = torch.randint(0, 3, (40,), generator=g)
    matrix = Hamming(*codes)
    got = metrics.targeted_average_precision(matrix, labels, 2, 10)
    wanted = metrics.average_precision(matrix, (labels == 2).expand(6, -1), 10)
    torch.testing.assert_close(got, wanted)
    hot = torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(metrics.targeted_average_precision(matrix, hot, 2, 10), wanted)


def test_perfect_attack_and_no_attack():
    gallery = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.3]])  # own images 0 and 1, rank 1
    own = torch.tensor([0, 1])
    strong = metrics.insertion_ranks(gallery, torch.tensor([[1.0, 0.95], [0.9, 0.0]]), own)
    assert strong.before.tolist() == [1, 1]
    assert strong.after.tolist() == [3, 2]
    assert strong.inserted.tolist() == [[1, 2], [1, 5]]
    assert strong.clean(1).tolist() == [1, 1] and strong.relevant(1).tolist() == [0, 0]
    assert strong.irrelevant(2).tolist() == [1, 1]
    assert strong.irrelevant(2, each=True).tolist() == [1, 0.5]
    weak = metrics.insertion_ranks(gallery, torch.full((2, 2), -1.0), own)
    assert torch.equal(weak.before, weak.after) and not weak.irrelevant(3).any()
    # In a tie the defender's worst case: the advertisement is shown, the own image is not.
    tied = metrics.insertion_ranks(gallery, torch.tensor([[0.9], [0.8]]), own)
    assert tied.after.tolist() == [2, 2] and tied.inserted.tolist() == [[1], [1]]


def test_inserted_ranks_agree_with_recall_on_the_joint_gallery():
    g = torch.Generator().manual_seed(1)
    gallery, ads = torch.rand(25, 60, generator=g), torch.rand(25, 4, generator=g) + 0.3
    own = torch.randint(0, 60, (25,), generator=g)
    ranks = metrics.insertion_ranks(gallery, ads, own)
    both = torch.cat([gallery, ads], 1)
    is_ad = torch.arange(64).expand(25, -1) >= 60
    for each in (False, True):
        torch.testing.assert_close(
            ranks.irrelevant(10, each), metrics.recall(both, is_ad, 10, each=each)
        )
    is_own = torch.zeros(25, 64, dtype=torch.bool).scatter_(1, own[:, None], True)
    torch.testing.assert_close(ranks.relevant(10), metrics.recall(both, is_own, 10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.recall(torch.ones(2, 3), torch.ones(2, 4).bool(), 1), "differ"),
        (lambda: metrics.recall(torch.ones(2, 3), torch.ones(2, 3).bool(), 0), "at least 1"),
        (lambda: metrics.recall(torch.ones(2, 3), torch.ones(2, 3).bool(), 1, ties="x"), "tie"),
        (lambda: metrics.recall(torch.ones(0, 3), torch.ones(0, 3).bool(), 1), "at least one"),
        (
            lambda: metrics.average_precision(
                torch.ones(1, 1), torch.ones(1, 1).bool(), denominator="all"
            ),
            "denominator",
        ),
        (lambda: Hamming(torch.zeros(1, 4), torch.ones(1, 4)), r"\+1 and -1"),
        (lambda: Product(torch.zeros(1, 4), torch.ones(1, 5)), "equally long"),
        (lambda: SameLabel(torch.zeros(3), torch.ones(1, 5)), "labels"),
        (lambda: metrics.recall(torch.full((1, 2), torch.nan), torch.ones(1, 2).bool(), 1), "NaN"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_paper_scale_takes_seconds_and_little_memory():
    resource = pytest.importorskip("resource")
    g = torch.Generator().manual_seed(0)
    centres = binarise(torch.randn(100, 64, generator=g))
    labels = [torch.randint(0, 100, (n,), generator=g) for n in (5_000, 128_000)]
    codes = []
    for own in labels:
        flip = torch.rand(len(own), 64, generator=g) < 0.2
        codes.append(torch.where(flip, -centres[own], centres[own]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    score = metrics.mean_average_precision(Hamming(*codes), SameLabel(*labels), 1000)
    seconds = time.process_time() - start  # of the processor: other work does not count
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert 0.5 < score < 1.0
    assert grown < 1_500_000, f"{grown / 1e6:.2f} GB"  # the full matrix would be 2.6 GB
    assert seconds < 120, f"{seconds:.0f} s"
