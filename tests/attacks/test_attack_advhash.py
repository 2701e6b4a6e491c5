"""AdvHash against a literal transcription of the published algorithm."""

from dataclasses import replace
from itertools import pairwise

import literal
import pytest
import torch
from attack_models import encoder, photos, purifier, seeded

from pair.attacks.advhash import PRESETS, AdvHashConfig, advhash, advhash_patch
from pair.attacks.cost import estimate
from pair.attacks.objectives import HashGoal, HashHinge, anchor_code
from pair.attacks.patch import Patch
from pair.attacks.search import _boxes
from pair.attacks.tth import TTHConfig, tth
from pair.attacks.wrappers import pipeline
from pair.generator import IMAGENET_MEAN, IMAGENET_STD
from pair.masks import FixedPattern

DOUBLE = torch.float64
BITS = 16


def code(seed: int = 2, dtype=torch.float32) -> torch.Tensor:
    return torch.where(torch.randn(BITS, generator=seeded(seed)) > 0, 1.0, -1.0).to(dtype)


@pytest.mark.parametrize("epochs", [1, 2])
def test_equals_the_published_algorithm_in_pixel_space(epochs):
    model, images, target = encoder(BITS, dtype=DOUBLE), photos(7, dtype=DOUBLE), code(dtype=DOUBLE)
    config = AdvHashConfig(epochs=epochs, batch=3, iterations=60, size=0.4)
    patch = advhash_patch(32, config, seeded(1))
    patch = Patch(patch.content.to(DOUBLE), patch.mask, patch.placement, 32)
    result = advhash(model, images, target, config=config, patch=patch, generator=seeded(5))
    corner = patch.placement.at(1, (32, 32), patch.size)[0]
    content, _, losses = literal.advhash(
        images, patch.content, corner, target, model.encode_image, config, seeded(5)
    )
    torch.testing.assert_close(result.patch.content, content, rtol=0, atol=1e-9)
    # Ours evaluates once more at the end of each mini-batch; the common part is the same.
    assert result.curves["objective"][: len(losses[:60])] == pytest.approx(losses[:60], abs=1e-9)
    assert result.curves["agreement"][-1] > result.curves["agreement"][0]


def test_compat_equals_the_published_algorithm_in_normalised_space():
    model, images, target = encoder(BITS, dtype=DOUBLE), photos(6, dtype=DOUBLE), code(dtype=DOUBLE)
    mean, std = (torch.tensor(v, dtype=DOUBLE).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    config = AdvHashConfig(epochs=2, batch=3, iterations=40, size=0.4, compat=True)
    patch = advhash_patch(32, config, seeded(1))
    patch = Patch(patch.content.to(DOUBLE), patch.mask, patch.placement, 32)
    result = advhash(
        model.features_of, images, target, config=config, patch=patch, generator=seeded(5)
    )
    low, high = -0.485 / 0.229, (1 - 0.406) / 0.225
    assert (round(low, 3), round(high, 3)) == (-2.118, 2.640)
    _, started, losses = literal.advhash(
        (images - mean) / std,
        patch.content,
        patch.placement.at(1, (32, 32), patch.size)[0],
        target,
        lambda x: model.features_of(x * std + mean),
        config,
        seeded(5),
        low,
        high,
    )
    assert result.curves["objective"][:40] == pytest.approx(losses[:40], abs=1e-9)
    shown = (started * std + mean).clamp(0, 1)
    torch.testing.assert_close(result.patch.content, shown, rtol=0, atol=1e-9)


def test_places_and_sizes_of_the_published_patch():
    patch = advhash_patch(224, AdvHashConfig())
    assert patch.size == (50, 50)
    assert patch.placement.at(1, (224, 224), (50, 50)) == [(150, 150)]  # ends at pixel 200
    assert advhash_patch(224, AdvHashConfig.preset("paper")).size == (49, 49)
    small = advhash_patch(112, AdvHashConfig())
    assert small.size == (25, 25) and small.placement.top == 75


def test_presets():
    assert set(PRESETS) == {"paper", "released", "std", "strong", "max"}
    assert AdvHashConfig.preset("released").compat
    assert AdvHashConfig.preset("paper").eot == 7
    assert {AdvHashConfig.preset(n).optimiser for n in ("paper", "released")} == {"sign"}
    assert {AdvHashConfig.preset(n).optimiser for n in ("std", "strong", "max")} == {"adam"}
    with pytest.raises(ValueError, match="unknown preset"):
        AdvHashConfig.preset("hard")


def test_adam_is_at_least_as_good_as_the_published_attack_at_equal_cost():
    model, images, target = encoder(BITS), photos(6), code()

    def agreement(patch):
        with torch.no_grad():
            signs = model.encode_image(patch.quantised().apply(images)).sign()
        return float((signs == target).float().mean())

    sign = AdvHashConfig(epochs=2, batch=3, iterations=60, size=0.4, budget=240)
    published = advhash(model, images, target, config=sign, generator=seeded(0))
    adam = AdvHashConfig.preset("std", eot=1, batch=3, size=0.4, budget=240, restarts=())
    ours = advhash(model, images, target, config=adam, generator=seeded(0))
    assert ours.gradients_used == 240 * 3 >= published.gradients_used
    assert agreement(ours.patch) >= agreement(published.patch) > 0.6
    assert ours.config["optimiser"] == "adam" and ours.patch.placement == published.patch.placement


def test_adam_restarts_and_their_cost():
    model, images, target = encoder(BITS), photos(4), code()
    config = AdvHashConfig.preset("std", eot=1, budget=20, batch=2, size=0.4)
    result = advhash(model, images, target, config=config, generator=seeded(0))
    assert result.gradients_used == estimate(config, 4).gradients
    assert set(result.curves) == {"given", "grey", "dct"}
    with pytest.raises(ValueError, match="optimiser must be"):
        advhash(model, images, target, config=AdvHashConfig(optimiser="sgd"))
    with pytest.raises(ValueError, match="published code"):
        advhash(model, images, target, config=AdvHashConfig(optimiser="adam", compat=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_strong_preset_does_not_lose_to_restarts_at_equal_cost(seed):
    """Same photos, place and sample gradients: shrinking against the starts of ``std``."""
    model, images, target = encoder(BITS), photos(6), code(seed + 2)

    def agreement(patch):
        with torch.no_grad():
            outputs = model.encode_image(patch.quantised().apply(images))
        return float((1 - (outputs.tanh() * target).mean()) / 2)

    options = {"eot": 1, "batch": 3, "size": 0.3, "placement": "centre"}
    strong = AdvHashConfig.preset("strong", budget=255, **options)
    before = AdvHashConfig.preset("std", budget=150, **options)
    assert estimate(strong, 6).gradients == estimate(before, 6).gradients
    start = advhash_patch(32, strong, seeded(3))
    assert start.placement.kind == "centre" and start.size == (9, 9)
    found = [advhash(model, images, target, config=c, patch=start, generator=seeded(seed))
             for c in (strong, before)]  # fmt: skip
    assert found[0].gradients_used == found[1].gradients_used == estimate(strong, 6).gradients
    assert found[0].patch.size == start.size and found[0].patch.placement == start.placement
    assert agreement(found[0].patch) <= agreement(found[1].patch) + 0.005
    assert agreement(found[0].patch) < agreement(start) - 0.05


def test_a_patch_shrinks_within_itself_towards_its_place():
    model, images, target = encoder(BITS), photos(4), code()
    config = AdvHashConfig.preset("strong", eot=1, budget=30, batch=2, snapshots=(25,),
                                  placement="advhash")  # fmt: skip
    start = advhash_patch(32, config, seeded(1))
    steps = []
    result = advhash(model, images, target, config=config, patch=start, generator=seeded(2),
                     progress=lambda step, total, _: steps.append((step, total)))  # fmt: skip
    boxes = _boxes(start, (32, 32), 0.5, 8)
    assert boxes[0][1] == (16, 16) and boxes[-1] == ((22, 22), (7, 7))
    for (outer, large), (inner, small) in pairwise(boxes):
        for a, n, b, m in zip(outer, large, inner, small, strict=True):
            assert 0 <= a <= b and b + m <= a + n <= 32
    assert result.patch.size == (7, 7) and result.patch.placement == start.placement
    assert len(result.losses) == 11 and len(result.curves["stage loss"]) == len(boxes)
    assert result.curves["stage side"][0] == 0.5 and result.curves["stage side"][-1] == 7 / 32
    assert steps[0] == (0, 30) and steps[-1] == (30, 30) and result.gradients_used == 60
    shown = [p.size[0] for _, p in sorted(result.snapshots.items())]
    assert shown == [size[0] for _, size in boxes[:-1]] + [7] and 25 in result.snapshots
    with pytest.raises(ValueError, match="no restarts"):
        advhash(model, images, target, config=replace(config, restarts=("grey",)))
    whole = _boxes(start, (32, 32), 0.1, 8)  # not larger than the patch: nothing to cut
    assert whole == [((22, 22), (7, 7))]


def test_shrinking_resumes(tmp_path):
    model, images = encoder(BITS), photos(4)
    config = AdvHashConfig.preset("strong", eot=1, budget=24, batch=2)

    def run(progress=None, **options):
        return advhash(model, images, code(), config=config, generator=seeded(1),
                       progress=progress, **options)  # fmt: skip

    def kill(step, steps, loss):
        if step == 19:
            raise Killed

    file = tmp_path / "run.checkpoint"
    with pytest.raises(Killed):
        run(kill, checkpoint=file, checkpoint_every=3)
    resumed, whole = run(checkpoint=file, checkpoint_every=3), run()
    assert torch.equal(resumed.patch.content, whole.patch.content)
    assert resumed.losses == whole.losses and resumed.curves == whole.curves


def test_success_ends_a_mini_batch_and_evaluation_ends_the_attack():
    model, images = encoder(BITS), photos(4)
    near = model.encode_image(images[:1])[0].sign()
    config = AdvHashConfig(epochs=5, batch=4, iterations=400, size=0.6)
    seen = []

    def evaluate(patch):
        seen.append(patch)
        return 0.9

    result = advhash(model, images[:1].repeat(4, 1, 1, 1), near, config=config, evaluate=evaluate)
    assert result.stopped == "success" and len(seen) == 1
    assert result.curves["agreement"][-1] <= 1
    patched = result.patch.apply(images[:1])
    assert (model.encode_image(patched)[0].sign() == near).float().mean() >= 0.9


def test_the_first_update_always_happens():
    """The published loop starts with an average product of 0, whatever the codes are."""
    model, images = encoder(BITS), photos(1)
    config = AdvHashConfig(epochs=1, batch=1, iterations=5, size=0.3, margin=1e-9)
    patch = advhash_patch(32, config, seeded(0))
    with torch.no_grad():
        reached = model.encode_image(patch.apply(images))[0].sign()
    result = advhash(model, images, reached, config=config, patch=patch)
    assert 1 <= len(result.losses) - 1 < 5
    assert not torch.equal(result.patch.content, patch.content)


def test_nearer_images_weigh_more():
    """With a step that only the aggregation decides: two images that pull apart."""
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])

    def features(x, generator=None):  # bits rise with the patch on black, fall on white
        dark = (x[:, 0, -1, 0] < 0.5).to(x)
        level = x[:, :, :4, 4:].mean((1, 2, 3))
        push = 0.02 * (level - 0.5) * (2 * dark - 1)
        near = torch.tensor([1.0, 1.0, 1.0, -1.0]) * 0.05
        far = -near
        return torch.where(dark[:, None] > 0, near, far) + push[:, None]

    target = torch.ones(4)
    patch = Patch.make("grey", 4, 8, "top-right")
    config = AdvHashConfig(epochs=1, batch=2, iterations=1, average=1)
    result = advhash(features, images, target, config=config, patch=patch)
    assert result.patch.content.mean() > 0.5  # the dark image agrees in 3 bits, the white in 1
    flipped = advhash(features, images, -target, config=config, patch=patch)
    assert flipped.patch.content.mean() > 0.5  # now the white one is nearer, and pulls down less
    mean = AdvHashConfig(epochs=1, batch=2, iterations=1, average=1, weighting="mean")
    assert advhash(features, images, target, config=mean, patch=patch).gradients_used == 2


def test_an_attack_through_a_known_mask():
    defended = pipeline(encoder(BITS), purifier(FixedPattern()))
    images = photos(3)
    config = AdvHashConfig(epochs=1, batch=3, iterations=40, size=0.5, step=4 / 255)
    result = advhash(defended, images, code(), config=config, generator=seeded(1))
    assert result.losses[-1] < result.losses[0] - 0.01


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [5, 13, 27])
def test_resumed_equals_undisturbed(tmp_path, kill_at):
    features, images = pipeline(encoder(BITS), purifier()), photos(4)
    config = AdvHashConfig(epochs=2, batch=2, iterations=8, size=0.4, eot=2, snapshots=(6, 20))

    def run(progress=None, **options):
        return advhash(
            features, images, code(), config=config, generator=seeded(1), progress=progress,
            **options,
        )  # fmt: skip

    def kill(step, steps, loss):
        if step == kill_at:
            raise Killed

    whole = run()
    file = tmp_path / "run.checkpoint"
    with pytest.raises(Killed):
        run(kill, checkpoint=file, checkpoint_every=3)
    resumed = run(checkpoint=file, checkpoint_every=3)
    assert resumed.curves == whole.curves and resumed.losses == whole.losses
    assert torch.equal(resumed.patch.content, whole.patch.content)
    assert torch.equal(resumed.snapshots[20].content, whole.snapshots[20].content)
    assert resumed.gradients_used == whole.gradients_used == 2 * 2 * 8 * 2 * 2


def test_a_budget_is_kept():
    config = AdvHashConfig(epochs=5, batch=2, iterations=10, budget=13, size=0.4)
    result = advhash(encoder(BITS), photos(4), code(), config=config)
    assert result.gradients_used == 13 * 2 and result.stopped == "budget"


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"\+1 and -1"):
        advhash(encoder(BITS), photos(2), torch.zeros(BITS))
    with pytest.raises(ValueError, match="source images"):
        advhash(encoder(BITS), photos(2)[0], code())


# --- losses ---------------------------------------------------------------------------------------


def test_the_bit_mask_by_hand():
    outputs = torch.tensor([[2.0, -2.0, 0.1, -0.1]])
    target = torch.tensor([1.0, 1.0, 1.0, -1.0])
    goal = HashGoal(target)
    assert goal.active(outputs).tolist() == [[0.0, 1.0, 1.0, 1.0]]  # |tanh 2 - 1| = .04 < .3
    tanh = outputs.tanh()[0]
    want = -(tanh[1] + tanh[2] - tanh[3]) / 3
    assert float(goal(outputs)) == pytest.approx(float(want))
    done = HashGoal(target)(10 * target[None])
    assert float(done) == 0.0
    soft = HashGoal(target, alpha=0.01)(outputs)
    want = -((0.01 * outputs).tanh()[0] * target)[1:].sum() / 3
    assert float(soft) == pytest.approx(float(want))


def test_the_hinge_by_hand_and_with_adam():
    target = torch.tensor([1.0, -1.0])
    loss = HashHinge(target, 0.5)(torch.tensor([[0.2, -3.0], [-1.0, 0.0]]))
    torch.testing.assert_close(loss, torch.tensor([0.3, 2.0]))
    model, c = encoder(BITS), code()
    config = TTHConfig(steps=40, lr=0.05, distortion=0, retry=False)
    result = tth(model, photos(3), HashHinge(c), config=config)
    assert result.losses[-1] < 0.8 * result.losses[0]


def test_anchor_by_majority():
    codes = torch.tensor([[1.0, 1, -1, 1], [1, -1, -1, -1], [1, 1, -1, -1], [-1, -1, -1, 1]])
    assert anchor_code(codes).tolist() == [1, 1, -1, 1]  # ties are +1
    assert anchor_code(codes[:3]).tolist() == [1, 1, -1, -1]
