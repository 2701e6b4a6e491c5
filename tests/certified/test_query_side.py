"""The query-side figures are bounds: a patched query never does worse than they say."""

import pytest
import torch
import torch.nn.functional as F

from pair.certified import CertifiedPurifier, double_masked_recovery
from pair.certified.balls import average_precision
from pair.certified.query import chord, hamming, top_k_lists, union
from pair.certified.query_side import measure
from pair.retrieval.hashing import binarise

from .tiny import SIZE, Encoder, cover, generator, images


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
