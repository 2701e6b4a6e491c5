"""EOT, BPDA and their relatives against what they are defined as."""

import pytest
import torch
from attack_models import encoder, photos, purifier, seeded
from torch import nn

from pair.attacks.objectives import TextGoal
from pair.attacks.wrappers import (
    BPDA,
    EOT,
    FirstPass,
    KnownMask,
    OnePassSurrogate,
    SecondPassBPDA,
    adaptive,
    as_features,
    pipeline,
)
from pair.images import resize
from pair.masks import Bernoulli, ExactCount, FixedPattern
from pair.retrieval.retriever import DefendedRetriever, Retriever

TARGET = torch.randn(16, generator=torch.Generator().manual_seed(7))


def gradient(function, images, seed, goal=None):
    goal = goal or TextGoal(TARGET)
    x = images.clone().requires_grad_(True)
    loss = goal(function(x, generator=seeded(seed))).mean()
    return torch.autograd.grad(loss, x)[0], float(loss.detach())


# --- EOT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [ExactCount(0.5), Bernoulli(0.5)], ids=["exact", "bernoulli"])
@pytest.mark.parametrize("micro", [64, 4, 3], ids=["one slice", "draw by draw", "across draws"])
@pytest.mark.parametrize("save", [True, False])
def test_mean_loss_is_the_average_over_single_draws(rule, micro, save):
    """Same masks: n calls one after the other with one generator."""
    features = pipeline(encoder(), purifier(rule))
    images, n = photos(4), 5
    eot = EOT(features, n, "mean_loss", micro_batch=micro, checkpoint=save)
    found, loss = gradient(eot, images, 3)
    generator, goal = seeded(3), TextGoal(TARGET)
    total, losses = torch.zeros_like(images), []
    for _ in range(n):
        x = images.clone().requires_grad_(True)
        one = goal(features(x, generator=generator)).mean()
        total += torch.autograd.grad(one, x)[0] / n
        losses.append(float(one.detach()))
    assert found.abs().max() > 0
    torch.testing.assert_close(found, total, rtol=1e-3, atol=1e-7)
    assert loss == pytest.approx(sum(losses) / n, rel=1e-5)


@pytest.mark.parametrize("micro", [64, 3])
def test_mean_embedding_averages_features_before_the_loss(micro):
    features = pipeline(encoder(), purifier())
    images, n = photos(4), 5
    found, _ = gradient(EOT(features, n, micro_batch=micro), images, 3)
    x, generator = images.clone().requires_grad_(True), seeded(3)
    mean = torch.stack([features(x, generator=generator) for _ in range(n)]).mean(0)
    loss = TextGoal(TARGET)(mean).mean()
    torch.testing.assert_close(found, torch.autograd.grad(loss, x)[0], rtol=1e-3, atol=1e-7)


def test_the_two_forms_differ():
    features = pipeline(encoder(), purifier())
    a, _ = gradient(EOT(features, 4), photos(), 0)
    b, _ = gradient(EOT(features, 4, "mean_loss"), photos(), 0)
    assert (a - b).norm() > 1e-3 * a.norm()


def test_draws_are_fresh_and_the_generator_moves_on_as_in_a_loop():
    features = pipeline(encoder(), purifier())
    apart = EOT(features, 6, "mean_loss", micro_batch=5)
    loop, together = seeded(1), seeded(1)
    images = photos(4).requires_grad_(True)
    out = apart(images, together)
    assert out.shape == (6, 4, 16)
    one_by_one = torch.stack([features(images, generator=loop) for _ in range(6)])
    torch.testing.assert_close(out, one_by_one, rtol=1e-4, atol=1e-5)
    assert torch.equal(loop.get_state(), together.get_state())
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_without_a_generator_the_global_one_is_replayed():
    features = pipeline(encoder(), purifier())
    images = photos(4).requires_grad_(True)
    results = []
    for save in (True, False):
        torch.manual_seed(5)
        eot = EOT(features, 4, "mean_loss", micro_batch=4, checkpoint=save)
        loss = TextGoal(TARGET)(eot(images)).mean()
        results.append(torch.autograd.grad(loss, images)[0])
    torch.testing.assert_close(*results)


class _Saved:
    """Bytes that the forward pass keeps for the backward pass."""

    def __init__(self):
        self.bytes = 0

    def __enter__(self):
        def pack(t):
            self.bytes += t.numel() * t.element_size()
            return t

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


def kept(n: int, save: bool) -> int:
    images = photos(4).requires_grad_(True)
    eot = EOT(pipeline(encoder(), purifier()), n, micro_batch=8, checkpoint=save)
    with _Saved() as saved:
        eot(images, seeded(0)).sum()
    return saved.bytes


def test_memory_does_not_grow_with_the_number_of_draws():
    images = 4 * 3 * 32 * 32 * 4  # one input, which every slice refers to
    few, many = kept(4, True), kept(32, True)
    assert many - few <= 16 * images  # references to the same input, counted once per slice
    assert many < kept(4, False)  # far below what even 4 draws keep without recomputation
    assert kept(32, False) > 7 * kept(4, False)


@pytest.mark.parametrize(("held", "forwards"), [(None, 7), (8, 6), (15, 5), (16, 4)])
def test_images_that_fit_into_memory_are_not_computed_twice(held, forwards):
    sizes = []

    def features(images, generator=None):
        sizes.append(len(images))
        return images.flatten(1)[:, :16] * torch.rand(1, generator=generator)

    images = photos(4)
    eot = EOT(features, 4, micro_batch=4, held=held)
    found, _ = gradient(eot, images, 3)
    assert len(sizes) == forwards and set(sizes) == {4}
    want, _ = gradient(EOT(features, 4, checkpoint=False), images, 3)
    torch.testing.assert_close(found, want)


def test_draws_share_batches():
    calls = []

    def features(x, generator=None):
        calls.append(len(x))
        return x.flatten(1)

    EOT(features, 20, micro_batch=64)(photos(4))
    assert calls == [40, 40]  # 2 calls in place of 20


def test_half_precision_points_the_same_way():
    features = pipeline(encoder(), purifier())
    full, _ = gradient(EOT(features, 4), photos(), 3)
    half, _ = gradient(EOT(features, 4, precision="bf16"), photos(), 3)
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    assert torch.cosine_similarity(full.flatten(), half.flatten(), dim=0) > 0.9


def test_bad_settings_are_refused():
    for n, form, micro in ((0, "mean_loss", 1), (1, "median", 1), (1, "mean_loss", 0)):
        with pytest.raises(ValueError):
            EOT(encoder(), n, form, micro_batch=micro)
    with pytest.raises(ValueError, match="precision"):
        EOT(encoder(), 1, precision="int8")


# --- pipelines ------------------------------------------------------------------------------------


def test_sources_of_features():
    model, images = encoder(), photos()
    want = model.encode_image(images)
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))

    def plain(x):
        return model.encode_image(x)

    for source in (model, model.encode_image, plain, Retriever(model)):
        torch.testing.assert_close(as_features(source)(images, generator=seeded(0)), want)
    assert as_features(head)(images, generator=None).shape == (4, 4)
    eot = EOT(model, 3)
    torch.testing.assert_close(as_features(eot)(images, generator=None), want)


def test_a_pipeline_is_the_defended_retriever():
    model, defense, images = encoder(), purifier(), photos()
    retriever = DefendedRetriever(Retriever(model), defense)
    a = pipeline(model, defense)(images, generator=seeded(2))
    torch.testing.assert_close(a, retriever.features(images, generator=seeded(2)))
    b = as_features(retriever)(images, generator=seeded(2))
    torch.testing.assert_close(a, b)


# --- BPDA -----------------------------------------------------------------------------------------


def rounded(images, generator=None):
    return images.mul(4).round().div(4)


def test_bpda_has_the_value_of_the_defense_and_the_gradient_of_the_surrogate():
    images, weights = photos(), torch.randn(4, 3, 32, 32, generator=seeded(0))

    def surrogate(x, generator=None):
        return x.sin()

    for replacement, slope in ((surrogate, images.cos()), (None, torch.ones_like(images))):
        x = images.clone().requires_grad_(True)
        out = BPDA(rounded, replacement)(x)
        assert torch.equal(out, rounded(images))
        (found,) = torch.autograd.grad((out * weights).sum(), x)
        torch.testing.assert_close(found, slope * weights)
    x = images.clone().requires_grad_(True)
    (plain,) = torch.autograd.grad((rounded(x) * weights).sum(), x)
    assert not plain.any()  # what BPDA is for


def test_bpda_identity_follows_a_change_of_size():
    images = photos()
    x = images.clone().requires_grad_(True)
    out = BPDA(lambda i: rounded(resize(i, 16)))(x)
    (found,) = torch.autograd.grad(out.sum(), x)
    y = images.clone().requires_grad_(True)
    (want,) = torch.autograd.grad(resize(y, 16).sum(), y)
    torch.testing.assert_close(found, want)


def test_second_pass_bpda_has_the_gradient_of_the_first_pass():
    p, images = purifier(), photos()
    weights = torch.randn(4, 3, 32, 32, generator=seeded(0))
    mask = p.draw_mask(4, seeded(6))
    x = images.clone().requires_grad_(True)
    out = SecondPassBPDA(p)(x, seeded(6))
    torch.testing.assert_close(out, p(images, mask=mask))
    (found,) = torch.autograd.grad((out * weights).sum(), x)
    y = images.clone().requires_grad_(True)
    first = p.autoencoder(y, mask)
    torch.testing.assert_close(found, torch.autograd.grad((first * weights).sum(), y)[0])
    with pytest.raises(ValueError, match="one pass"):
        SecondPassBPDA(purifier(passes=1))


def test_stand_ins_for_a_purifier():
    p, images = purifier(), photos()
    mask = p.draw_mask(4, seeded(3))
    torch.testing.assert_close(FirstPass(p)(images, seeded(3)), p.steps(images, mask=mask)[0])
    known = KnownMask(p, mask[0])
    torch.testing.assert_close(known(images, seeded(1)), known(images, seeded(2)))
    torch.testing.assert_close(known(images), p(images, mask=mask[0]))
    assert torch.equal(known.inverted().mask, ~mask[0])
    one = OnePassSurrogate(p)
    assert torch.equal(one(images, seeded(1)), one(images, seeded(2)))
    all_seen = torch.ones(4, 16, dtype=torch.bool)
    torch.testing.assert_close(one(images), p.autoencoder(images, all_seen).clamp(0, 1))


# --- what a defense declares ----------------------------------------------------------------------


def test_adaptive_takes_the_declared_gradient():
    seen = adaptive(encoder(), purifier())
    assert (seen.gradient, seen.samples, seen.penalty) == ("eot", 7, None)
    assert adaptive(encoder(), purifier(FixedPattern())).samples == 1
    with pytest.raises(ValueError, match="declares no gradient"):
        adaptive(encoder(), rounded)


def test_adaptive_adds_the_detector_to_the_objective():
    from pair.defenses.base import Defense

    class Detecting(Defense):
        def defend(self, images, generator, join):
            return images / 2

        def detector_loss(self, images, patch_mask):
            return (images * patch_mask).sum()

    model, images = encoder(), photos()
    seen = adaptive(model, Detecting(), fooling_weight=3.0)
    torch.testing.assert_close(seen.features(images), model.encode_image(images / 2))
    cover = torch.zeros(1, 1, 32, 32)
    cover[..., :2, :2] = 1
    want = 3 * images[:, :, :2, :2].sum()
    torch.testing.assert_close(seen.penalty(images, cover), want)
