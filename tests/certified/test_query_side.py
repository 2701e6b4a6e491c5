"""The query-side figures are bounds: a patched query never does worse than they say."""

import pytest
import torch
import torch.nn.functional as F

from pair.certified import CertifiedPurifier, PatchFamily, double_masked_recovery
from pair.certified.balls import average_precision
from pair.certified.covering import largest_block, visible_blocks
from pair.certified.query import chord, hamming, top_k_lists, union
from pair.certified.query_side import measure, measure_votes, other_class
from pair.certified.votes import vote
from pair.retrieval.hashing import binarise

from .tiny import SIZE, TOKEN, Encoder, cover, generator, hash_net, images


@pytest.mark.parametrize("binary", [False, True])
def test_patched_queries_stay_above_the_bounds(binary):
    side = 5
    model, encoder = CertifiedPurifier(generator(), cover(side, 9)), Encoder()
    # A gallery in two tight clusters: copies of two photos, so that something can be certified.
    base = images(2, seed=3)
    g = torch.Generator().manual_seed(4)
    crowd = base.repeat_interleave(12, 0) + 0.02 * torch.randn(24, 3, SIZE, SIZE, generator=g)
    gallery = encoder.encode_image(crowd.clamp(0, 1))
    relevant = torch.zeros(2, 24, dtype=torch.bool)
    relevant[0, :12] = relevant[1, 12:] = True
    clean = measure(model, encoder, base, gallery, relevant, binary=binary, k=5)
    assert bool((clean.cert_ap <= clean.ap + 1e-6).all())
    assert bool((clean.cert_ap > 0).all())
    assert bool((clean.radius <= clean.live).all())
    assert bool((clean.union_size >= 5).all())
    metric = hamming if binary else chord
    items = binarise(gallery) if binary else F.normalize(gallery, dim=-1)
    for _ in range(25):
        top, left = torch.randint(0, SIZE - side + 1, (2,), generator=g).tolist()
        now = base.clone()
        now[..., top : top + side, left : left + side] = torch.rand(
            3, side, side, generator=g
        ).round()
        with torch.no_grad():
            first, second = model.embed(encoder, now).masked, model.embed_pairs(encoder, now)
        if binary:
            first, second = binarise(first), binarise(second)
        got = double_masked_recovery(first, second, metric)
        for q in range(2):
            far = metric(items, got.output[q])
            ap = average_precision(far[relevant[q]], far[~relevant[q]])
            assert float(ap) >= float(clean.cert_ap[q]) - 1e-6
            shown = top_k_lists(torch.stack([-metric(items, z) for z in first[q]]), 5)
            if clean.union_hit[q]:
                assert bool((union(shown) & relevant[q]).any())
            assert float(got.radius[q]) <= float(clean.live[q]) + 1e-5
    assert set(clean.means()) >= {"diameter", "cert_ap", "union_hit"}


def test_another_class_cannot_be_lifted_above_its_bound():
    """Theorem 7c for a targeted attack, and the clean figures lie inside their bounds."""
    relevant = torch.eye(3, dtype=torch.bool).repeat_interleave(4, 1)  # (3, 12)
    targets = other_class(relevant)
    assert not bool((targets & relevant).any()) and targets.sum(1).tolist() == [4, 4, 4]
    gallery = torch.randn(12, 16, generator=torch.Generator().manual_seed(4))
    model = CertifiedPurifier(generator(), cover())
    found = measure(model, Encoder(), images(3), gallery, relevant, k=3)
    assert bool((found.target_ap <= found.cert_target_ap + 1e-6).all())
    assert bool((found.cert_ap <= found.ap + 1e-6).all())
    assert bool((found.intersection_size <= 3).all())
    assert bool((found.union_size >= found.intersection_size).all())


def test_voted_codes_hold_under_a_patch():
    family = PatchFamily.square(5)
    block = largest_block(family, SIZE, TOKEN)
    shown = visible_blocks(family, block, SIZE, TOKEN)
    model, net = CertifiedPurifier(generator(), shown), hash_net()
    x = images(1, seed=8)
    gallery = torch.randn(20, 16, generator=torch.Generator().manual_seed(2))
    relevant = (torch.arange(20) < 5)[None]
    figures = measure_votes(model, net, x, gallery, relevant, k=5)
    assert 0 <= float(figures.radius[0]) <= 16
    assert float(figures.cert_ap[0]) <= float(figures.ap[0])
    assert float(figures.cert_recall[0]) <= float(figures.recall[0])
    code = vote(binarise(model.embed(net, x).masked[0]))
    for seed in range(20):  # any content at any place flips no more bits than that
        seeded = torch.Generator().manual_seed(seed)
        top, left = torch.randint(0, SIZE - 4, (2,), generator=seeded).tolist()
        y = x.clone()
        y[..., top : top + 5, left : left + 5] = torch.rand(3, 5, 5, generator=seeded).round()
        now = vote(binarise(model.embed(net, y).masked[0]))
        assert int((now != code).sum()) <= float(figures.radius[0])


def test_blocks_of_which_a_patch_touches_a_minority():
    # 14 x 14 tokens of 8 px: t tokens per side allow 2 (t + b - 1)^2 < 196.
    assert [largest_block(PatchFamily.square(p)) for p in (13, 25, 39)] == [7, 6, 4]
    with pytest.raises(ValueError, match="prove nothing"):
        largest_block(PatchFamily.square(80))
    with pytest.raises(ValueError, match="prove nothing"):
        largest_block(PatchFamily.square(13, patches=2))
