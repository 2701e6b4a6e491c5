"""Each sanity check passes where it should and fails where it should."""

import json

import pytest
import torch
from attack_models import encoder, photos, purifier, seeded

from pair.attacks import sanity
from pair.attacks.objectives import TextGoal
from pair.attacks.patch import Patch
from pair.attacks.tth import TTHConfig, tth
from pair.attacks.wrappers import BPDA, pipeline

TARGET = TextGoal(torch.randn(16, generator=seeded(7)))
PATCH = Patch.make("noise", 12, 32, generator=seeded(0))


def test_s1_needs_genuine_photos_and_the_undefended_model():
    assert sanity.s1_unbounded(0.7, 0.6, 0.99).passed
    assert not sanity.s1_unbounded(0.5, 0.6, 0.99).passed
    assert not sanity.s1_unbounded(0.7, 0.6, 0.90).passed


def test_s2_takes_the_median_of_eight_masks():
    assert sanity.s2_known_mask([0.85] * 5 + [0.0] * 3, 0.94).passed
    assert not sanity.s2_known_mask([0.80] * 8, 0.94).passed
    assert sanity.s2_known_mask([0.9] * 7, 0.94).passed is None


def test_s3_notices_a_fall_and_forgives_noise():
    rising = [[0.1 + 0.1 * i + 0.02 * (c % 3) for c in range(20)] for i in range(4)]
    assert sanity.s3_monotone(rising).passed
    falling = [rising[0], rising[2], rising[1]]
    assert not sanity.s3_monotone(falling).passed
    generator = seeded(0)
    noisy = (0.5 + 0.1 * torch.randn(4, 20, generator=generator)).tolist()
    assert sanity.s3_monotone(noisy).passed
    assert sanity.s3_monotone(rising[:1]).passed is None


def test_s4_compares_with_finite_differences():
    p, model = purifier(dtype=torch.float64), encoder(dtype=torch.float64)
    images = photos(2, dtype=torch.float64) * 0.5 + 0.25
    mask = p.draw_mask(2, seeded(1))

    def loss(x):
        return TARGET(model.features_of(p.autoencoder(x, mask))).sum()

    check = sanity.s4_finite_differences(loss, images, directions=8)
    assert check.passed and check.value < 1e-5

    def wrong(x):
        return loss(BPDA(lambda i: i**2)(x))

    assert not sanity.s4_finite_differences(wrong, images, directions=8).passed
    flat = sanity.s4_finite_differences(lambda x: (x > 2).double().sum() + 0 * x.sum(), images)
    assert not flat.passed


def test_s5_sees_noise():
    def steady(generator):
        return torch.ones(50) + 0.1 * torch.randn(50, generator=generator)

    def noise(generator):
        return torch.randn(500, generator=generator)

    assert sanity.s5_agreement(steady).value > 0.9
    assert not sanity.s5_agreement(noise, at="step 150").passed


def test_s6_and_s7_name_the_stronger_attack():
    good = sanity.s6_strongest(0.5, {"transfer": 0.2, "collage": 0.52}, slack=0.03)
    assert good.passed and "collage" in good.note
    assert not sanity.s6_strongest(0.5, {"collage": 0.6}).passed
    assert sanity.s6_strongest(0.5, {}).passed is None
    check = sanity.s7_full_gradient(0.4, {"identity": 0.5})
    assert check.name == "S7" and check.passed is False


def test_s8_flags_an_unfinished_run():
    assert sanity.s8_converged([1 - min(k, 50) / 50 for k in range(101)]).passed
    short = sanity.s8_converged([1 - k / 100 for k in range(101)])
    assert short.passed is False and short.note == "budget-limited"
    assert sanity.s8_converged([1.0] * 20).passed is False


def test_s9_counts_values_that_no_draw_reaches():
    features = pipeline(encoder(), purifier())
    assert sanity.s9_zero_gradient(features, photos(1), PATCH, TARGET, draws=16).passed

    def blind(x, generator=None):  # never sees the left half of the patch
        seen = x.clone()
        seen[:, :, :, :26] = 0
        return encoder().features_of(seen)

    check = sanity.s9_zero_gradient(blind, photos(1), PATCH, TARGET, draws=2)
    assert check.value == pytest.approx(0.5) and not check.passed


def test_s10_compares_what_both_sides_see():
    features = pipeline(encoder(), purifier())
    assert sanity.s10_same_forward(features, features, photos(3)).passed
    other = pipeline(encoder(), lambda x: x.flip(3))
    assert not sanity.s10_same_forward(encoder(), other, photos(3)).passed


def test_s11_and_s12_find_reuse():
    assert sanity.s11_seeds({"optimise": [1, 2], "select": [3], "evaluate": [4]}).passed
    shared = sanity.s11_seeds({"optimise": [1, 2], "evaluate": [2]})
    assert not shared.passed and "seed 2" in shared.note
    assert sanity.s12_text_leak(["a cow"], ["one cow"]).passed
    leak = sanity.s12_text_leak(["A cow ", "x"], ["a cow"])
    assert not leak.passed and "a cow" in leak.note


def test_a_finished_attack_is_checked():
    model, images = encoder(), photos(2)
    goal = TextGoal(model.encode_image(photos(1, 3)))
    features = pipeline(model, purifier())
    config = TTHConfig(steps=30, eot=2, lr=0.05, schedule="cosine", distortion=0, size=0.5)
    result = tth(features, images, goal, config=config)
    checks = sanity.of_attack(
        result,
        features,
        images,
        goal,
        evaluation=features,
        seeds={"optimise": [0], "select": [1], "evaluate": [2]},
        captions=["a laptop"],
        queries=["one laptop"],
        start=Patch.make("qr", 0.5, 32),
        directions=8,
        draws=8,
    )
    named = {c.name for c in checks}
    assert named == {"S4", "S5", "S8", "S9", "S10", "S11", "S12"}
    assert [c.note for c in checks if c.name == "S5"] == ["step 0", "final patch"]
    by_name = {c.name: c for c in checks}
    for name in ("S4", "S9", "S10", "S11", "S12"):
        assert by_name[name].passed, by_name[name]
    wrong = sanity.of_attack(
        result, features, images, goal, evaluation=model, seeds={"optimise": [0]}, directions=2,
        draws=2,
    )  # fmt: skip
    assert not next(c for c in wrong if c.name == "S10").passed
    assert "S12" not in {c.name for c in wrong}


def test_s4_of_an_attack_wants_a_gradient_that_belongs_to_its_values():
    """A clamp that lets gradients through has no derivative; without it, in float64, it agrees."""
    model, images = encoder(), photos(2)
    goal = TextGoal(model.encode_image(photos(1, 3)))

    def bright(straight):  # leaves [0, 1] in many pixels
        def defend(x, generator=None):
            y = 1.6 * x - 0.3
            return y + (y.clamp(0, 1) - y).detach() if straight else y.clamp(0, 1)

        return defend

    attacked = pipeline(model, bright(True))
    exact = pipeline(encoder(dtype=torch.float64), bright(False))
    config = TTHConfig(steps=4, lr=0.05, distortion=0, size=0.5, snapshots=(2,))
    result = tth(attacked, images, goal, config=config)

    def checks(**options):
        rows = sanity.of_attack(
            result, attacked, images, goal, evaluation=attacked, seeds={"optimise": [0]},
            directions=8, draws=2, **options,
        )  # fmt: skip
        return {c.name: c for c in rows}

    assert not checks()["S4"].passed
    check = checks(exact=exact)["S4"]
    assert check.passed and check.threshold == 1e-5 and "exact" in check.note
    wrong = pipeline(encoder(seed=1, dtype=torch.float64), BPDA(lambda x: x**2))
    assert not checks(exact=wrong)["S4"].passed
    assert checks()["S5"].note == "final patch"
    assert checks(middle=result.snapshots[2])["S5"].note == "half of the run"


def test_a_record_has_all_twelve():
    checks = [sanity.s11_seeds({"optimise": [1]}), sanity.s8_converged([1.0, 0.0, 0.0, 0.0, 0.0])]
    rows = sanity.records(checks)
    assert [r["name"] for r in rows] == [f"S{i}" for i in range(1, 13)]
    assert rows[0]["passed"] is None and rows[10]["passed"] is True
    assert json.loads(json.dumps(rows)) == rows
    assert not sanity.trustworthy(checks)
    every = [sanity.Check(name, 1.0, 1.0, True) for name in sanity.TITLES]
    assert sanity.trustworthy(every)
    twice = [*every, sanity.Check("S5", 0.1, 0.3, False, "half way")]
    assert not sanity.trustworthy(twice)
    with pytest.raises(ValueError, match="S1 to S12"):
        sanity.complete([sanity.Check("S13", None, None, True)])
