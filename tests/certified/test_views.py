"""The assumptions on real networks: non-interference, determinism, and real gradient attacks."""

import pytest
import torch
import torch.nn.functional as F

from pair.certified import (
    CertifiedPurifier,
    DeltaCap,
    PatchFamily,
    double_masked_recovery,
    upper_bound,
    window_cover,
    with_plain,
)
from pair.certified.purifier import FILLS, encode_visible
from pair.certified.query import chord
from pair.certified.soundness import interference, measure_slack

from .tiny import SIZE, TOKEN, Encoder, cover, generator, hash_net, images

CONVOLUTIONAL = {"drop"}


def encoder(fill):
    return hash_net() if fill in CONVOLUTIONAL else Encoder()


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("side", [5, 7, 13])
def test_no_view_reads_what_it_hides(fill, side):
    model = CertifiedPurifier(generator(), cover(side), fill=fill)
    seeded = torch.Generator().manual_seed(0)
    assert interference(model, images(2), seeded) == []


@pytest.mark.parametrize("fill", FILLS)
def test_features_ignore_hidden_pixels_bit_by_bit(fill):
    model, target = CertifiedPurifier(generator(), cover(), fill=fill), encoder(fill)
    x = images(1)
    for r, mask in enumerate(model.cover.visible):
        shown = model.pixels(mask[None])
        tainted = torch.where(shown, x, torch.full_like(x, float("nan")))
        clean, now = (model.encode(target, i, mask[None]) for i in (x, tainted))
        assert bool(now.isfinite().all()), r
        assert torch.equal(clean, now), r


def test_interference_finds_a_leak():
    class Leaky(CertifiedPurifier):
        def render(self, x, visible):
            return super().render(x, visible) * 0.9 + 0.1 * x.mean((1, 2, 3), keepdim=True)

    class Multiplied(CertifiedPurifier):  # 0 * NaN is NaN
        def render(self, x, visible):
            return x * self.pixels(visible)

    for kind in (Leaky, Multiplied):
        model = kind(generator(), cover(), fill="mean")
        assert interference(model, images(1)) == list(range(len(model.cover)))


@pytest.mark.parametrize("fill", FILLS)
def test_a_patch_anywhere_leaves_its_covering_views_alone(fill):
    """Lemma 1 on pixels: patches of the family at random places, one and two rounds."""
    model, target = CertifiedPurifier(generator(), cover(9, 4), fill=fill), encoder(fill)
    g = torch.Generator().manual_seed(1)
    x = images(1)
    with torch.no_grad():
        clean = model.embed(target, x)
        pairs = model.embed_pairs(target, x)
        for _ in range(6):
            top, left = torch.randint(0, SIZE - 9 + 1, (2,), generator=g).tolist()
            patched = x.clone()
            patched[..., top : top + 9, left : left + 9] = torch.rand(3, 9, 9, generator=g)
            now, now_pairs = model.embed(target, patched), model.embed_pairs(target, patched)
            rows, cols = torch.meshgrid(torch.arange(top, top + 9), torch.arange(left, left + 9),
                                        indexing="ij")  # fmt: skip
            shown = model.pixels(model.cover.visible)[:, 0, rows, cols]  # (R, 9, 9)
            covering = ~shown.flatten(1).any(1)
            assert bool(covering.any())
            assert torch.equal(now.masked[0, covering], clean.masked[0, covering])
            assert torch.equal(now_pairs[0, covering], pairs[0, covering])
            assert not torch.equal(now.masked[0, ~covering], clean.masked[0, ~covering])


def test_views_have_the_promised_shape_and_keep_visible_pixels():
    model = CertifiedPurifier(generator(), cover())
    x = images(3)
    views = model.views(x)
    assert views.shape == (3, 9, 3, SIZE, SIZE)
    assert float(views.min()) >= 0 and float(views.max()) <= 1
    shown = model.pixels(model.cover.visible)
    assert torch.equal(torch.where(shown, views, 0.0), torch.where(shown, x[:, None], 0.0))
    assert torch.equal(views[1], model.views(x[1:2])[0]) or torch.allclose(
        views[1], model.views(x[1:2])[0], atol=1e-5
    )
    assert model.views(torch.rand(1, 3, 50, 40)).shape == (1, 9, 3, SIZE, SIZE)


def test_whole_image_fill_shows_no_original_pixel():
    model = CertifiedPurifier(generator(), cover(), fill="whole")
    x = images(1)
    assert not bool((model.views(x)[0] == x).all(1).any())


@pytest.mark.parametrize("fill", FILLS)
def test_results_do_not_depend_on_the_batch_beyond_the_slack(fill):
    model, target = CertifiedPurifier(generator(), cover(), fill=fill), encoder(fill)
    photos = images(33)
    slack = measure_slack(model, target, photos, batches=(1, 7, 32))
    assert 0 <= slack < 1e-4
    one = CertifiedPurifier(generator(), cover(), fill=fill, chunk=5)
    with torch.no_grad():
        a, b = model.embed(target, photos).masked, one.embed(target, photos).masked
    assert float((a - b).norm(dim=-1).max()) <= max(slack, 1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="fill must be"):
        CertifiedPurifier(generator(), cover(), fill="grey")
    with pytest.raises(ValueError, match="the generator has"):
        CertifiedPurifier(generator(), window_cover(PatchFamily.square(20), 112, 8))
    with pytest.raises(ValueError, match="encode_visible"):
        x = images(1)
        encode_visible(Encoder(), x, torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        CertifiedPurifier(generator(), cover()).views(images(1) * 2)
    wide = window_cover(PatchFamily.square(9, patches=2), SIZE, TOKEN, k=2)
    with pytest.raises(ValueError, match="together hide the whole image"):
        CertifiedPurifier(generator(), wide).embed_pairs(Encoder(), images(1))


def test_dropping_nothing_is_the_encoder_itself():
    net, x = hash_net(), images(2)
    everything = torch.ones(2, 1, SIZE, SIZE, dtype=torch.bool)
    assert torch.allclose(encode_visible(net, x, everything), net.encode_image(x), atol=1e-5)


def attack(model, target, x, query, place, side, steps, memberwise):
    """Projected sign-gradient ascent on the pooled score, or on all views (log-sum-exp)."""
    top, left = place
    box = torch.zeros_like(x, dtype=torch.bool)
    box[..., top : top + side, left : left + side] = True
    patch = torch.full_like(x, 0.5).requires_grad_(True)
    pool, best = DeltaCap(0.1), -2.0
    for step in range(steps):
        y = torch.where(box, patch, x)
        scores = model.embed(target, y).scores(query[None])[0]  # (B, R + 1)
        pooled = pool(scores)
        best = max(best, float(pooled.detach().max()))
        goal = -torch.logsumexp(-10 * scores, -1) if memberwise else pooled
        (slope,) = torch.autograd.grad(goal.sum(), patch)
        with torch.no_grad():
            size = 0.2 * (1 - step / steps)
            patch.add_(size * slope.sign()).clamp_(0, 1)
    return best


@pytest.mark.parametrize("memberwise", [False, True])
@pytest.mark.parametrize("fill", ["window", "mean"])
def test_a_gradient_attack_never_beats_its_certificate(memberwise, fill):
    side, steps = 9, 12
    model, target = CertifiedPurifier(generator(), cover(side, 4), fill=fill), Encoder()
    query = F.normalize(target.encode_text(["accordion"]), dim=-1)[0]
    x = images(1, seed=5)
    with torch.no_grad():
        scores = model.embed(target, x).scores(query[None])[0]
    patterns = with_plain(model.cover.minimal)
    slack = measure_slack(model, target, x)
    ceiling = float(upper_bound(DeltaCap(0.1), scores, patterns, slack=slack))
    start = float(DeltaCap(0.1)(scores))
    reached = [
        attack(model, target, x, query, place, side, steps, memberwise)
        for place in ((0, 0), (11, 12), (23, 23), (5, 20))
    ]
    assert max(reached) <= ceiling
    assert max(reached) > start  # the attack does work, it just cannot pass the ceiling


def test_the_same_attack_passes_where_nothing_is_certified():
    """Control: a patch larger than the declared family is not bound by the certificate."""
    model, target = CertifiedPurifier(generator(), cover(5, 16), fill="mean"), Encoder()
    query = F.normalize(target.encode_text(["accordion"]), dim=-1)[0]
    x = images(1, seed=5)
    with torch.no_grad():
        scores = model.embed(target, x).scores(query[None])[0]
    ceiling = float(upper_bound(DeltaCap(0.1), scores, with_plain(model.cover.minimal)))
    assert attack(model, target, x, query, (2, 2), 28, 25, False) > ceiling


def test_query_recovery_under_a_gradient_attack():
    side = 5
    model, target = CertifiedPurifier(generator(), cover(side, 9)), Encoder()
    x = images(1, seed=6)
    with torch.no_grad():
        clean1, clean2 = model.embed(target, x).masked, model.embed_pairs(target, x)
    goal = F.normalize(torch.randn(target.dim, generator=torch.Generator().manual_seed(3)), dim=0)
    box = torch.zeros_like(x, dtype=torch.bool)
    box[..., 12:17, 9:14] = True
    patch = x.clone().requires_grad_(True)
    for _ in range(8):
        views = model.embed(target, torch.where(box, patch, x)).masked
        (slope,) = torch.autograd.grad((views @ goal).sum(), patch)
        with torch.no_grad():
            patch.add_(0.2 * slope.sign()).clamp_(0, 1)
    y = torch.where(box, patch.detach(), x)
    with torch.no_grad():
        got = double_masked_recovery(model.embed(target, y).masked, model.embed_pairs(target, y))
    clean = double_masked_recovery(clean1, clean2)
    covering = ~(model.pixels(model.cover.visible) & box).flatten(1).any(1)
    star = int(covering.nonzero()[0])
    assert float(chord(got.output[0], clean2[0, int(got.view), star])) <= float(got.radius) + 1e-5
    assert float(got.radius) <= float(clean.radii[0, star]) + 1e-5
