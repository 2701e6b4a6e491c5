"""The certified index returns the exact certified ranking, however it is filled."""

import pytest
import torch
import torch.nn.functional as F

from pair.certified import CertifiedIndex, DeltaCap, Minimum, certified_out, upper_bound, with_plain
from pair.certified.index import Hit

from .tiny import cover

N, R, D = 120, 9, 16


def features(seed=0, n=N, spread=0.5):
    g = torch.Generator().manual_seed(seed)
    plain = F.normalize(torch.randn(n, D, generator=g), dim=1)
    noise = spread * torch.rand(n, R, 1, generator=g) * torch.randn(n, R, D, generator=g)
    return plain, F.normalize(plain[:, None] + noise, dim=-1)


def query(seed=1):
    return F.normalize(torch.randn(D, generator=torch.Generator().manual_seed(seed)), dim=0)


@pytest.mark.parametrize("delta", [0.0, 0.1, float("inf")])
@pytest.mark.parametrize("exact", [True, False])
def test_search_equals_the_full_ranking(delta, exact):
    plain, masked = features()
    index = CertifiedIndex(D, R, delta=delta, exact=exact)
    assert index.add(plain, masked) == list(range(N))
    for seed in range(5):
        q = query(seed)
        scores = DeltaCap(delta)(index.scores(q, range(N)))
        order = scores.argsort(descending=True, stable=True)[:10].tolist()
        hits = index.search(q, 10)
        assert [h.item for h in hits] == order
        assert [h.score for h in hits] == pytest.approx(scores[order].tolist())


def test_lazy_certification_gives_the_same_answer_for_less():
    plain, masked = features(spread=0.1)
    asked = []

    def certify(items):
        asked.extend(items)
        return masked[items]

    full, lazy = CertifiedIndex(D, R), CertifiedIndex(D, R, certify=certify)
    full.add(plain, masked)
    lazy.add(plain)
    for seed in range(3):
        assert lazy.search(query(seed), 5) == full.search(query(seed), 5)
    assert len(asked) == len(set(asked)) == lazy.certified < N  # each item once, not all
    assert lazy.bytes < full.bytes
    before = len(asked)
    lazy.search(query(0), 5)
    assert len(asked) == before  # cached


def test_injected_images_cannot_flood_the_shortlist():
    """500 images with perfect plain scores and one bad view each do not displace anything."""
    plain, masked = features(spread=0.1)
    q = query(2)
    bad = masked.new_zeros(500, R, D)
    bad[:] = q
    bad[:, 3] = -q
    table = {i: v for i, v in enumerate(torch.cat([masked, bad]))}
    index = CertifiedIndex(D, R, certify=lambda items: torch.stack([table[i] for i in items]))
    index.add(plain)
    alone = [h.item for h in index.search(q, 10)]
    index.add(q.expand(500, D))
    assert [h.item for h in index.search(q, 10)] == alone


def test_hits_name_the_window_they_hang_on():
    plain, masked = features(spread=0.05)
    masked[7, 4] = -plain[7]
    index = CertifiedIndex(D, R, delta=float("inf"))
    index.add(plain, masked)
    best = index.search(plain[7], 1)[0]
    assert isinstance(best, Hit)
    assert (best.item, best.window) == (7, 4)
    assert best.plain > 0.99 and best.lowest < -0.99


def test_theorem_2_holds_for_the_rounded_vectors():
    plain, masked = features()
    carriers, views = features(seed=5, n=40)
    pattern = cover().minimal
    index = CertifiedIndex(D, R)
    index.add(plain, masked)
    index.add(carriers, views)
    for seed in range(5):
        q = query(seed)
        table = index.scores(q, range(N + 40))
        upper = upper_bound(DeltaCap(0.0), table[N:], with_plain(pattern))
        safe = certified_out(upper, DeltaCap(0.0)(table[:N]), 10)
        assert bool(safe.any())
        # The attacker owns all views but one covering set, and the plain view.
        attacked = CertifiedIndex(D, R)
        attacked.add(plain, masked)
        keep = pattern[seed % len(pattern)]
        now = torch.where(keep[None, :, None], views, q.expand_as(views))
        ids = attacked.add(q.expand(40, D), now)
        shown = {h.item for h in attacked.search(q, 10)}
        assert not shown & {i for i, s in zip(ids, safe, strict=True) if s}


def test_int8_is_small_and_close():
    plain, masked = features()
    exact, small = CertifiedIndex(D, R, exact=True), CertifiedIndex(D, R)
    exact.add(plain, masked)
    small.add(plain, masked)
    assert small.bytes < 0.5 * exact.bytes
    a, b = (i.scores(query(), range(N)) for i in (exact, small))
    assert float((a - b).abs().max()) < 0.02
    assert torch.equal(Minimum()(exact.scores(query(), [3])), Minimum()(a[3:4]))


def test_refusals():
    plain, masked = features(n=3)
    with pytest.raises(ValueError, match="views of the items"):
        CertifiedIndex(D, R).add(plain)
    with pytest.raises(ValueError, match="must have shape"):
        CertifiedIndex(D, R + 1).add(plain, masked)
    index = CertifiedIndex(D, R)
    assert index.search(query(), 5) == []
    index.add(plain, masked)
    assert len(index.search(query(), 5)) == 3
    with pytest.raises(ValueError, match="query must have shape"):
        index.search(query()[:3])
