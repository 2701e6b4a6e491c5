"""TTH against a literal transcription of the published algorithm, and its variants."""

from dataclasses import replace

import literal
import pytest
import torch
import torch.nn.functional as F
from attack_models import encoder, photos, purifier, seeded

from pair.attacks.objectives import FoolDetector, TextGoal
from pair.attacks.optimise import Schedule
from pair.attacks.patch import Patch
from pair.attacks.search import SHARES, Start, location_search, successive_halving
from pair.attacks.tth import PRESETS, TTHConfig, tth
from pair.attacks.wrappers import pipeline

DOUBLE = torch.float64


def target(model, seed=3, dtype=torch.float32):
    return model.encode_image(photos(1, seed, dtype))


def start(side: int = 11, dtype=torch.float32) -> Patch:
    patch = Patch.make("qr", side, 32)
    return Patch(patch.content.to(dtype), patch.mask, patch.placement, 32)


@pytest.mark.parametrize("lam", [1.0, 0.0])
def test_equals_the_published_algorithm(lam):
    model = encoder(dtype=DOUBLE)
    carriers, e_t, patch = photos(5, dtype=DOUBLE), target(model, dtype=DOUBLE), start(11, DOUBLE)
    config = TTHConfig(steps=80, distortion=lam)
    result = tth(model, carriers, e_t, config=config, patch=patch)
    content, losses = literal.tth(model.encode_image, carriers, e_t, patch.content, 80, lam=lam)
    assert len(result.losses) == len(losses) == 81
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(losses), rtol=1e-7, atol=0)
    torch.testing.assert_close(result.patch.content, content, rtol=0, atol=1e-7)
    assert losses[-1] < 0.7 * losses[0]  # and it attacks


def test_is_at_least_as_good_as_the_published_algorithm_in_single_precision():
    model, carriers = encoder(), photos(5)
    e_t, patch = target(model), start()
    result = tth(model, carriers, e_t, patch=patch)
    content, losses = literal.tth(model.encode_image, carriers, e_t, patch.content, 300)
    assert result.losses[-1] <= losses[-1] + 1e-3
    with torch.no_grad():
        z = model.encode_image(patch.with_content(content).apply(carriers))
    assert float((1 - F.cosine_similarity(z, e_t)).mean()) == pytest.approx(losses[-1], abs=1e-5)


def test_defaults_come_from_the_facts():
    config = TTHConfig()
    assert (config.steps, config.lr, config.distortion, config.size) == (300, 0.01, 1.0, 0.35)
    result = tth(encoder(), photos(2), torch.ones(16), config=TTHConfig(steps=1))
    assert result.patch.size == (11, 11)  # int(0.35 * 32)
    assert result.patch.placement.kind == "top-right"
    schedule = Schedule(0.01)
    for k in (0, 9, 10, 25, 299):
        assert schedule(k) == pytest.approx(0.01 * 0.95 ** (k // 10))
    assert schedule(300) == pytest.approx(0.00215, abs=1e-5)


def test_presets():
    assert {"paper", "released", "std", "strong", "max"} == set(PRESETS)
    assert TTHConfig.preset("paper").eot == 7 and TTHConfig.preset("released").eot == 1
    budgets = [
        (TTHConfig.preset(n).steps, TTHConfig.preset(n).eot) for n in ("std", "strong", "max")
    ]
    assert budgets == [(500, 20), (1000, 50), (2000, 100)]
    assert TTHConfig.preset("std", steps=3).steps == 3
    with pytest.raises(ValueError, match="unknown preset"):
        TTHConfig.preset("hard")


def test_the_rule_against_divergence():
    """A target that the start already meets: a large step doubles the loss at once."""
    model, carriers, patch = encoder(dtype=DOUBLE), photos(1, dtype=DOUBLE), start(11, DOUBLE)
    with torch.no_grad():
        z = model.encode_image(patch.apply(carriers))
    e_t = z + 0.05 * torch.randn(z.shape, generator=seeded(0), dtype=DOUBLE) * z.norm() / 4
    first = float((1 - F.cosine_similarity(z, e_t)).mean())
    assert first > 1e-4  # TTH's bound: below it nothing counts as divergence
    config = TTHConfig(steps=20, lr=0.3)
    result = tth(model, carriers, e_t, config=config, patch=patch)
    _, losses = literal.tth(model.encode_image, carriers, e_t, patch.content, 20, lr=0.3)
    assert result.trials > 1 and len(result.losses) == 20 * 2 ** (result.trials - 1) + 1
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(losses), rtol=1e-6, atol=0)
    assert result.gradients_used > len(result.losses)  # failed trials were paid for
    stubborn = tth(
        model, carriers, e_t, config=TTHConfig(steps=20, lr=0.3, retry=False), patch=patch
    )
    assert stubborn.trials == 1 and stubborn.losses[-1] > result.losses[-1]


def test_an_attack_through_a_purifier_with_fresh_masks_lowers_the_loss():
    features = pipeline(encoder(), purifier())
    e_t = target(encoder())
    config = TTHConfig(steps=25, lr=0.05, schedule="cosine", distortion=0, eot=3, micro_batch=5)
    result = tth(features, photos(3), e_t, config=config, generator=seeded(4))
    assert result.gradients_used == 25 * 3 * 3
    assert result.forwards == 26 * 3 * 3
    assert sum(result.losses[-5:]) < 0.9 * sum(result.losses[:5])
    again = tth(features, photos(3), e_t, config=config, generator=seeded(4))
    assert again.losses == result.losses
    other = tth(features, photos(3), e_t, config=config, generator=seeded(5))
    assert other.losses != result.losses
    assert result.record()["seeds"] == {"optimise": 4}


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [3, 10, 17])
def test_resumed_equals_undisturbed(tmp_path, kill_at):
    features, images = pipeline(encoder(), purifier()), photos(3)
    e_t, file = target(encoder()), tmp_path / "run.checkpoint"
    config = TTHConfig(steps=20, eot=2, lr=0.03, snapshots=(5, 15))

    def run(progress=None, **options):
        return tth(
            features, images, e_t, config=config, generator=seeded(1), progress=progress, **options
        )

    def kill(step, steps, loss):
        if step == kill_at:
            raise Killed

    whole = run()
    with pytest.raises(Killed):
        run(kill, checkpoint=file, checkpoint_every=4)
    resumed = run(checkpoint=file, checkpoint_every=4)
    assert resumed.losses == whole.losses
    assert torch.equal(resumed.patch.content, whole.patch.content)
    assert list(resumed.snapshots) == [5, 15]
    for k in (5, 15):
        assert torch.equal(resumed.snapshots[k].content, whole.snapshots[k].content)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model, file = encoder(), tmp_path / "c"
    tth(model, photos(2), target(model), config=TTHConfig(steps=4), checkpoint=file,
        checkpoint_every=2)  # fmt: skip
    with pytest.raises(ValueError, match=r"another run.*images"):
        tth(model, photos(3), target(model), config=TTHConfig(steps=4), checkpoint=file)
    with pytest.raises(ValueError, match="config"):
        tth(model, photos(2), target(model), config=TTHConfig(steps=5), checkpoint=file)
    file.write_text("nonsense")
    with pytest.raises(ValueError, match="not a checkpoint"):
        tth(model, photos(2), target(model), checkpoint=file)


def test_snapshots_are_the_patches_of_shorter_runs():
    model, e_t = encoder(), target(encoder())
    config = TTHConfig(steps=12, snapshots=(0, 5, 12))
    result = tth(model, photos(2), e_t, config=config)
    short = tth(model, photos(2), e_t, config=TTHConfig(steps=5))
    assert torch.equal(result.snapshots[5].content, short.patch.content)
    assert torch.equal(result.snapshots[12].content, result.patch.content)
    assert torch.equal(result.snapshots[0].content, Patch.make("qr", 0.35, 32).content)


def test_a_plateau_stops_only_when_asked():
    model = encoder()
    e_t = target(model)
    whole = tth(model, photos(2), e_t, config=TTHConfig(steps=150))
    assert len(whole.losses) == 151 and whole.stopped == "budget"
    early = tth(model, photos(2), e_t, config=TTHConfig(steps=150, plateau=(10, 0.1)))
    assert early.stopped == "plateau" and 20 <= len(early.losses) < 151
    assert early.losses == whole.losses[: len(early.losses)]


def test_a_few_carriers_per_update_cost_less_and_reach_all_of_them():
    images, target = photos(6), torch.randn(16, generator=seeded(5))
    model = encoder()
    seen = []

    def features(batch, generator=None):
        seen.append(batch)
        return model.encode_image(batch)

    config = TTHConfig(
        steps=60, lr=0.05, carriers=2, distortion=0.0, retry=False, schedule="constant"
    )
    result = tth(features, images, target, config=config, generator=seeded(0))
    assert result.gradients_used == 60 * 2 and {len(b) for b in seen} == {2}
    kept = images[:, :, -1, 0]  # outside the patch (bottom left) every carrier shows itself
    met = {int((b[i, :, -1, 0] - kept).abs().sum(1).argmin()) for b in seen for i in range(2)}
    assert met == set(range(6))

    def loss(patch):
        return float(TextGoal(target)(model.encode_image(patch.apply(images))).mean())

    start = Patch.make(config.start, config.size, 32, config.placement)
    everything = tth(model, images, target, config=replace(config, carriers=None, steps=20))
    assert everything.gradients_used == result.gradients_used
    assert loss(result.patch) < loss(start) - 0.5 * (loss(start) - loss(everything.patch))
    with pytest.raises(ValueError, match="carriers must lie in 1 to 6"):
        tth(model, images, target, config=replace(config, carriers=7))


def test_distortion_keeps_the_patch_near_its_start():
    model, patch = encoder(), start()
    e_t = target(model)
    moved = []
    for lam in (0.0, 1.0, 100.0):
        result = tth(model, photos(3), e_t, config=TTHConfig(steps=60, distortion=lam), patch=patch)
        moved.append(float(((result.patch.content - patch.content) ** 2).sum()))
    assert moved[0] > moved[1] > moved[2]


def test_a_warm_start_continues_from_the_given_patch():
    model, e_t = encoder(), target(encoder())
    config = TTHConfig(steps=60, distortion=0)
    cold = tth(model, photos(3), e_t, config=config)
    warm = tth(model, photos(3), e_t, config=TTHConfig(steps=5, lr=1e-3), patch=cold.patch)
    assert warm.losses[0] == pytest.approx(cold.losses[-1], abs=1e-6)


@pytest.mark.parametrize("space", ["tiles:4", "dct:5"])
def test_parametrisations_attack_and_keep_their_structure(space):
    model, e_t = encoder(), target(encoder())
    config = TTHConfig(steps=60, lr=0.03, distortion=0, start="grey", parameters=space)
    result = tth(model, photos(3), e_t, config=config)
    content = result.patch.content
    assert result.losses[-1] < 0.9 * result.losses[0]
    assert content.min() >= 0 and content.max() <= 1 and content.std() > 0.01
    if space == "tiles:4":
        assert torch.equal(content[:, :4, :4], content[:, 4:8, 4:8])
    with pytest.raises(ValueError, match="unknown parametrisation"):
        tth(model, photos(1), e_t, config=TTHConfig(parameters="wavelets"))


def test_per_image_patches_equal_separate_attacks():
    model, images = encoder(dtype=DOUBLE), photos(3, dtype=DOUBLE)
    e_t, patch = target(model, dtype=DOUBLE), start(11, DOUBLE)
    config = TTHConfig(steps=30, scope="per-image")
    result = tth(model, images, e_t, config=config, patch=patch)
    assert len(result.patches) == 3
    for i in range(3):
        alone = tth(model, images[i : i + 1], e_t, config=TTHConfig(steps=30), patch=patch)
        # Adam's epsilon is not blind to scale, hence the tolerance.
        torch.testing.assert_close(
            result.patches[i].content, alone.patch.content, rtol=0, atol=1e-5
        )
    shared = tth(model, images, e_t, config=TTHConfig(steps=30), patch=patch)
    assert result.losses[-1] < shared.losses[-1]
    torch.testing.assert_close(
        result.apply(images)[1], result.patches[1].apply(images[1:2])[0], rtol=0, atol=0
    )
    assert torch.equal(shared.apply(images), shared.patch.apply(images))
    with pytest.raises(ValueError):
        result.apply(images[:2])  # three patches
    with pytest.raises(ValueError, match="scope"):
        tth(model, images, e_t, config=TTHConfig(scope="each"), patch=patch)


def test_a_detector_in_the_objective_is_fooled():
    model, e_t = encoder(), target(encoder())

    def detector(images):  # sees bright pixels
        return 10 * (images.mean(1) - 0.5)

    config = TTHConfig(steps=60, lr=0.03, distortion=0, start="noise")
    plain = tth(model, photos(3), e_t, config=config)
    fooled = tth(model, photos(3), e_t, config=config, penalty=FoolDetector(detector, 1.0))
    assert fooled.patch.content.mean() < plain.patch.content.mean() - 0.1
    assert fooled.losses[-1] < fooled.losses[0]  # and the goal is still pursued


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="carriers"):
        tth(encoder(), photos(1)[0], torch.ones(16))
    with pytest.raises(ValueError, match="schedule"):
        tth(encoder(), photos(1), torch.ones(16), config=TTHConfig(schedule="linear"))
    with pytest.raises(ValueError, match="loss is nan"):
        tth(lambda x: x.flatten(1) * float("nan"), photos(1), torch.ones(3 * 32 * 32))


# --- restarts and places --------------------------------------------------------------------------


def test_successive_halving_spends_the_budget_on_the_better_starts():
    model, e_t, images = encoder(), target(encoder()), photos(3)
    config = TTHConfig(steps=40, lr=0.03, schedule="cosine", distortion=0)
    good = tth(model, images, e_t, config=config).patch  # already optimised
    grey = Patch.make("grey", 0.35, 32)
    black = grey.with_content(torch.zeros_like(grey.content))
    starts = {"black": Start(black), "good": Start(good), "grey": Start(grey)}
    result = successive_halving(model, images, e_t, starts, config, generator=seeded(3))
    rungs = {name: len(curve) for name, curve in result.curves.items()}
    assert rungs["good"] == 3 and sorted(rungs.values()) == [1, 2, 3]
    assert result.patch.notes["start"] == "good"
    assert len(result.losses) == 41
    first, second, third = (round(s * 40) for s in SHARES)
    assert result.gradients_used == 3 * (3 * first + 2 * second + third)
    assert result.seeds["select"] != result.seeds["optimise"]


def test_presets_with_restarts_run_all_starts():
    config = TTHConfig.preset("std", steps=10, eot=2)
    model, e_t = pipeline(encoder(), purifier()), target(encoder())
    result = tth(model, photos(2), e_t, config=config, generator=seeded(0))
    assert set(result.curves) == {"grey", "qr", "noise", "dct", "tiles"}
    assert len(result.losses) == 11
    given = Patch.make("noise", 9, 32, "centre", generator=seeded(0))
    result = tth(model, photos(2), e_t, config=config, patch=given, generator=seeded(0))
    assert set(result.curves) == {"given", *config.restarts}
    assert result.patch.size == (9, 9) and result.patch.placement.kind == "centre"


def test_restarts_resume(tmp_path):
    model, e_t = pipeline(encoder(), purifier()), target(encoder())
    config = TTHConfig.preset("std", steps=10, eot=1, restarts=("grey", "qr"))
    count = 0

    def kill(step, steps, loss):
        nonlocal count
        count += 1
        if count == 14:
            raise Killed

    whole = tth(model, photos(2), e_t, config=config, generator=seeded(0))
    options = {"generator": seeded(0), "checkpoint": tmp_path / "c", "checkpoint_every": 1}
    with pytest.raises(Killed):
        tth(model, photos(2), e_t, config=config, progress=kill, **options)
    options["generator"] = seeded(0)
    resumed = tth(model, photos(2), e_t, config=config, **options)
    assert resumed.losses == whole.losses
    assert torch.equal(resumed.patch.content, whole.patch.content)


def test_location_search_finds_the_place_that_matters():
    model, images = encoder(), photos(2)

    def corner(x, generator=None):  # looks at the lower left only
        seen = torch.zeros_like(x)
        seen[:, :, 20:, :12] = x[:, :, 20:, :12]
        return model.features_of(seen)

    e_t = corner(photos(1, 3))
    config = TTHConfig(steps=20, lr=0.05, distortion=0)
    patch = Patch.make("grey", 8, 32)
    result = location_search(
        corner, images, e_t, patch, config, grid=3, coarse_steps=4, keep=2, hill=4, hill_every=10
    )
    place = result.patch.placement
    assert place.top >= 16 and place.left <= 12
    assert len(result.losses) == 21
    elsewhere = tth(corner, images, e_t, config=config, patch=patch)  # top right: never seen
    assert result.losses[-1] < elsewhere.losses[-1] - 0.01
    assert result.gradients_used == 2 * ((9 + 2) * 4 + 20)


def test_goals_of_every_kind_can_be_targets():
    model = encoder()
    e_t = target(model)
    a = tth(model, photos(2), e_t, config=TTHConfig(steps=5))
    b = tth(model, photos(2), TextGoal(e_t), config=TTHConfig(steps=5))
    assert a.losses == b.losses
