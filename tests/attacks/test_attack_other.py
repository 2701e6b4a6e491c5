"""Goals, perturbations, the floor, black boxes, evaluation by draws, costs."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from attack_models import encoder, photos, purifier, seeded

from pair.attacks import objectives as goals
from pair.attacks.advhash import AdvHashConfig
from pair.attacks.blackbox import TopKOracle, nes, random_search
from pair.attacks.cost import Cost, estimate, halved_steps, measure
from pair.attacks.evaluate import best_of, draw_outputs, enters, score, transfer
from pair.attacks.floor import crops, floor, tiled, typographic
from pair.attacks.objectives import HubGoal, TextGoal
from pair.attacks.optimise import late_gain
from pair.attacks.patch import Patch
from pair.attacks.perturbation import hub, perturb
from pair.attacks.tth import TTHConfig, tth
from pair.attacks.wrappers import pipeline


def random(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


# --- goals ----------------------------------------------------------------------------------------


def test_text_goal_ignores_norms_and_keeps_draws_apart():
    z, e = random(2, 3, 8), random(8, seed=1)
    loss = TextGoal(e)(z)
    assert loss.shape == (2, 3)
    want = 1 - (z[1, 2] @ e) / (z[1, 2].norm() * e.norm())
    assert float(loss[1, 2]) == pytest.approx(float(want), abs=1e-6)
    torch.testing.assert_close(TextGoal(5 * e[None])(3 * z), loss)


def test_rank_hinge_is_about_entering_the_list():
    queries, gallery = random(5, 8), random(30, 8, seed=1)
    tau = goals.rank_thresholds(queries, gallery, 10)
    scores = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    assert torch.equal((scores >= tau[:, None]).sum(1), torch.full((5,), 10))
    goal = goals.RankHinge(queries, tau)
    near, far = F.normalize(queries, dim=1)[:1], -F.normalize(queries, dim=1)[:1]
    assert float(goals.RankHinge(queries[:1], tau[:1])(near)) < 0.01
    assert float(goal(near)) < float(goal(far))
    assert enters(torch.stack([near, far]), queries[:1], tau[:1])[:, 0, 0].tolist() == [True, False]


def test_selective_keeps_the_best_or_worst_draws():
    z, e = random(4, 2, 8), random(8, seed=1)
    each = TextGoal(e)(z)
    best = goals.Selective(TextGoal(e), 0.5)(z)
    worst = goals.Selective(TextGoal(e), 0.5, worst=True)(z)
    ordered = each.sort(0).values
    torch.testing.assert_close(best, ordered[:2].mean(0))
    torch.testing.assert_close(worst, ordered[2:].mean(0))
    with pytest.raises(ValueError, match="several draws"):
        goals.Selective(TextGoal(e))(z[0])


def test_hub_and_weighted_goals():
    q, z = random(6, 8), random(3, 8, seed=1)
    want = (1 - F.normalize(z, dim=1) @ F.normalize(q, dim=1).T).mean(1)
    torch.testing.assert_close(HubGoal(q)(z), want)
    both = goals.Together([(TextGoal(q[0]), 2.0), (HubGoal(q), 0.5)])(z)
    torch.testing.assert_close(both, 2 * TextGoal(q[0])(z).mean() + 0.5 * want.mean())


def test_selective_attacks_run_on_draws_kept_apart():
    features = pipeline(encoder(), purifier())
    goal = goals.Selective(TextGoal(encoder().encode_image(photos(1, 3))))
    config = TTHConfig(steps=6, eot=4, form="mean_loss", distortion=0, lr=0.05)
    result = tth(features, photos(2), goal, config=config)
    assert len(result.losses) == 7
    with pytest.raises(ValueError, match="several draws"):
        tth(features, photos(2), goal, config=TTHConfig(steps=2, eot=4))


# --- perturbations --------------------------------------------------------------------------------


def test_perturbation_stays_in_the_ball_and_lowers_every_loss():
    model, images = encoder(), photos(4)
    images[0, :, :4] = 0.0  # at the border of the range
    e = model.encode_image(photos(1, 3))
    result = perturb(model, images, e, steps=20)
    change = (result.images - images).abs()
    assert float(change.max()) <= 4 / 255 + 1e-6 and float(change.max()) > 3.9 / 255
    assert result.images.min() >= 0 and result.images.max() <= 1
    goal = TextGoal(e)
    gain = goal(model.encode_image(images)) - goal(model.encode_image(result.images))
    assert (gain > 0.01).all()
    assert result.gradients_used == 80 and len(result.losses) == 21
    fewer = perturb(model, images, e, steps=20, epsilon=1 / 255)
    assert fewer.losses[-1] > result.losses[-1]
    moved = perturb(model, images, e, steps=20, momentum=0.9)
    assert moved.losses[-1] < moved.losses[0]


def test_perturbations_are_independent_of_their_neighbours():
    model, images = encoder(dtype=torch.float64), photos(3, dtype=torch.float64)
    e = model.encode_image(photos(1, 3, torch.float64))
    together = perturb(model, images, e, steps=5, random_start=False).images
    alone = perturb(model, images[1:2], e, steps=5, random_start=False).images
    torch.testing.assert_close(together[1:2], alone)


def test_a_hub_comes_nearer_to_many_queries():
    model = encoder()
    queries = model.encode_image(photos(6, 9))
    before = float(HubGoal(queries)(model.encode_image(photos(1))))
    result = hub(model, photos(1), queries, steps=20, epsilon=8 / 255)
    assert float(HubGoal(queries)(model.encode_image(result.images))) < before - 0.01


def test_bad_perturbations_are_refused():
    for options in ({"epsilon": 0}, {"epsilon": 4}, {"steps": 0}):
        with pytest.raises(ValueError):
            perturb(encoder(), photos(1), torch.ones(16), **options)


# --- the floor ------------------------------------------------------------------------------------


def test_floor_finds_the_best_of_each_family():
    model = encoder()
    concept = photos(3, 5)
    patch = Patch.make("grey", 16, 32)
    e = model.encode_image(concept[:1])
    entries = floor(model, photos(2), e, patch, words="laptop", photos=list(concept), collages=8)
    families = {x.family: x for x in entries}
    assert set(families) == {"grey", "noise", "qr", "typographic", "collage", "tiled"}
    assert families["typographic"].candidates == 30 and families["collage"].candidates == 8
    losses = [x.loss for x in entries]
    assert losses == sorted(losses)
    best = entries[0]
    redo = score(model, photos(2), best.patch, TextGoal(e), 6)
    assert redo == pytest.approx(best.loss, abs=1e-6)
    assert {"grey", "noise", "qr"} == {x.family for x in floor(model, photos(2), e, patch)}


def test_floor_contents():
    styles = typographic("red car", 24, 24)
    assert len({tuple(s.flatten().tolist()) for s in styles}) == 30
    photo = photos(1)[0]
    many = crops([photo], 8, 8, 5, seeded(0))
    assert len(many) == 5 and all(c.shape == (3, 8, 8) for c in many)
    row = tiled(photo, 20, 20, 8)
    assert row.shape == (3, 20, 20) and torch.equal(row[:, :8, :8], row[:, 8:16, 8:16])
    with pytest.raises(ValueError, match="at least one photo"):
        crops([], 8, 8)


# --- black boxes ----------------------------------------------------------------------------------


def test_random_search_and_nes_lower_the_loss_without_gradients():
    model, images = encoder(), photos(2)
    e = model.encode_image(photos(1, 3))

    def features(x, generator=None):
        assert not torch.is_grad_enabled()
        return model.encode_image(x)

    patch = Patch.make("grey", 12, 32)
    squares = random_search(features, images, e, patch, queries=120)
    assert squares.losses == sorted(squares.losses, reverse=True)
    assert squares.losses[-1] < squares.losses[0] - 0.02
    assert squares.forwards == 240 and squares.gradients_used == 0
    assert set(squares.patch.content.unique().tolist()) <= {0.0, 1.0}
    redo = score(features, images, squares.patch, TextGoal(e))
    assert redo == pytest.approx(squares.losses[-1], abs=1e-6)
    low = nes(features, images, e, patch, parameters="dct:3", steps=10, directions=8)
    assert low.losses[-1] < low.losses[0] - 0.005
    assert low.forwards == 2 * (10 * 17 + 1)


def test_a_rank_oracle_sees_lists_only():
    queries = random(10, 8)
    tau = torch.zeros(10)
    z = F.normalize(queries[:2], dim=1)
    want = 1 - (z @ F.normalize(queries, dim=1).T > 0).float().mean(1)
    torch.testing.assert_close(TopKOracle(queries, tau)(z), want)


# --- draws ----------------------------------------------------------------------------------------


def test_draws_are_independent_and_rounded_to_8_bits():
    features = pipeline(encoder(), purifier())
    patch = Patch.make("noise", 10, 32, generator=seeded(0))
    out = draw_outputs(features, photos(3), patch, 5, seeded(1), micro_batch=4)
    assert out.shape == (5, 3, 16) and (out[0] - out[1]).abs().max() > 1e-3
    rounded = draw_outputs(features, photos(3), patch.quantised(), 5, seeded(1), eight_bits=False)
    torch.testing.assert_close(out, rounded, rtol=1e-4, atol=1e-5)
    plain = draw_outputs(encoder(), photos(3), None, 2)
    torch.testing.assert_close(plain[1], encoder().encode_image(photos(3)))


def test_best_of_n_is_the_mean_over_all_choices_of_draws():
    success = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    curve = best_of(success, (1, 2, 3, 4))
    for n in (1, 2, 3, 4):
        subsets = list(combinations(range(4), n))
        want = sum(success[list(s)].any(0).float().mean() for s in subsets) / len(subsets)
        assert curve[n] == pytest.approx(float(want))
    beyond = best_of(success, (10,))[10]
    assert beyond == pytest.approx(((1 - 0.75**10) + 0 + (1 - 0.5**10)) / 3)


def test_transfer_scores_each_victim_with_its_own_goal():
    a, b = encoder(seed=0), encoder(seed=1)
    aims = {n: TextGoal(m.encode_image(photos(1, 3))) for n, m in (("a", a), ("b", b))}
    config = TTHConfig(steps=60, distortion=0, lr=0.03)
    patch = tth(a, photos(2), aims["a"], config=config).patch
    losses = transfer({"a": a, "b": b}, photos(2), patch, aims)
    plain = transfer({"a": a, "b": b}, photos(2), Patch.make("qr", 0.35, 32), aims)
    assert plain["a"] - losses["a"] > plain["b"] - losses["b"]  # strongest where it was made


# --- convergence and cost -------------------------------------------------------------------------


def test_late_gain():
    assert late_gain([1 - min(k, 50) / 50 for k in range(101)]) == 0.0
    assert late_gain([1 - k / 100 for k in range(101)]) == pytest.approx(0.2, abs=0.03)
    assert late_gain([1.0] * 50) == float("inf")


def test_costs():
    assert estimate(TTHConfig.preset("paper"), 10).gradients == 300 * 7 * 10  # 21 k
    plain = TTHConfig.preset("std", restarts=())
    assert estimate(plain, 10).gradients == 500 * 20 * 10  # 100 k
    std = TTHConfig.preset("std")
    assert halved_steps(std) == 5 * 100 + 3 * 150 + 250
    hashing = AdvHashConfig(epochs=2, batch=10, iterations=100, eot=3)
    assert estimate(hashing, 25).updates == 2 * 3 * 100
    text = str(estimate(TTHConfig(steps=100), 10, 0.001))
    assert "1,000 sample gradients" in text and "about 0:00:01 here" in text
    said = str(Cost(1, 1, 0.2))
    assert said.startswith("1 update, at most 1 sample gradient (") and "less than a second" in said
    assert 0 < measure(pipeline(encoder(), purifier()), photos(2), 2, repeats=1) < 10
