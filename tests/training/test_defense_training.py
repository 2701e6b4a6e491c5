"""Every defense that is trained: a few steps on a tiny pack, and its parts against formulas."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "defenses"))

from defense_models import CLASSES, SIZE, save_models

from pair.data.pack import Pack
from pair.defenses import make
from pair.retrieval.clip import SmallClip
from pair.training import crafted
from pair.training.adversarial import (
    AdversarialTraining,
    AtTask,
    HardnessTraining,
    HmTask,
    gradual_adversary,
    hardness,
    softhard,
)
from pair.training.cards import card
from pair.training.denoiser import CafdTask, DenoiserTraining, PixelCritic, frozen
from pair.training.detector import PatchZeroTask, SacTask
from pair.training.loop import LoopConfig, train
from pair.training.pgd import perturb
from pair.training.run import KINDS, read_recipe

ASSETS = Path(__file__).parents[2] / "src" / "pair" / "assets" / "models"
RECIPES = [
    recipe
    for recipe in sorted((Path(__file__).parents[2] / "configs" / "small").glob("*.toml"))
    if recipe.stem.split("-")[0] in ("sac", "patchzero", "at", "hm", "arn", "cafd")
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("defense-training")
    save_models(root)
    rng = np.random.default_rng(0)
    rows, images = [], []
    for i in range(48):
        k = i % len(CLASSES)
        base = np.zeros((36, 36, 3), np.uint8)
        base[:, :, k % 3] = 90 + 12 * k
        base[8 * (k // 3) : 8 * (k // 3) + 12, 4:30] = 220
        images.append(base + rng.integers(0, 30, base.shape, dtype=np.uint8))
        split = "val" if i >= 36 else "train"
        rows.append([f"{i}.jpg", CLASSES[k], "imagenette", split])
    (root / "pack").mkdir()
    np.save(root / "pack" / "images.npy", np.stack(images))
    (root / "pack" / "index.json").write_text(json.dumps({"size": 36, "rows": rows}))
    return root


@pytest.fixture(scope="module")
def pack(root):
    return Pack.open(root / "pack")


def settings(which, root, **changes):
    clip, csq = str(root / "clip"), str(root / "csq")
    base = {
        "sac": {"clip": clip, "csq": csq, "bank": 8, "craft_steps": 2, "validation": 6},
        "at": {"init": clip, "validation": 8},
        "hm": {"init": clip, "validation": 8, "classes": 3, "per_class": 2, "inner_steps": 2},
        "arn": {"target": clip, "inner_steps": 2, "validation": 6, "width": 4},
    }
    base["patchzero"], base["cafd"] = base["sac"], base["arn"]
    options = dict(base[which])
    if which in ("sac", "patchzero"):
        options |= {"width": 4, "image_size": SIZE}
    if which in ("arn", "cafd"):
        options |= {"image_size": SIZE}
    return KINDS[which][0](**{**options, **changes})


CASES = [
    ("sac", {}),
    ("sac", {"adaptive": 1.0, "inner_steps": 2}),
    ("patchzero", {"adaptive": 0.5, "inner_steps": 2}),
    ("at", {"clean": 0.5}),
    ("at", {"kind": "csq", "init": "@csq"}),
    ("hm", {}),
    ("hm", {"kind": "csq", "init": "@csq", "ics": 0.5}),
    ("arn", {}),
    ("cafd", {}),
    ("cafd", {"kind": "csq", "target": "@csq"}),
]


@pytest.mark.parametrize("kind, changes", CASES, ids=str)
def test_a_few_steps_and_a_loadable_model(kind, changes, root, pack, tmp_path):
    changes = {k: str(root / v[1:]) if str(v)[0] == "@" else v for k, v in changes.items()}
    torch.manual_seed(0)
    task = KINDS[kind][1](settings(kind, root, **changes), pack)
    before = {k: v.clone() for k, v in task.module.state_dict().items()}
    loop = LoopConfig(steps=3, batch_size=6, warmup=1, val_every=3, checkpoint_every=2)
    best = train(task, loop, tmp_path / "run", {"recipe": "x.toml"}, echo=lambda _: None)
    after = task.module.state_dict()
    assert any(not torch.equal(before[k], v) for k, v in after.items())
    assert all(bool(torch.isfinite(v).all()) for v in after.values())
    x = torch.rand(2, 3, SIZE, SIZE)
    if kind in ("at", "hm"):
        which = changes.get("kind", "clip")
        defense = make(kind, clip=str(best), csq=str(best))
        raw = SmallClip.from_pretrained(root / "clip") if which == "clip" else task.model
        tower = defense.harden(raw)
        assert not tower.training and tower.encode_image(x).shape == (2, 16)
        if which == "clip":  # the text side of an index stays valid
            texts = ["a photo of a cat"]
            expected = raw.encode_text(texts)
            torch.testing.assert_close(tower.encode_text(texts), expected, atol=2e-2, rtol=2e-2)
    else:
        assert make(kind, name=str(best))(x).shape == x.shape
    config = json.loads((best / "config.json").read_text())
    assert f"pair train {kind} " in card("some", config)
    figures = config["training"]["validation"]
    assert figures and all(np.isfinite(v) for v in figures.values())


@pytest.mark.parametrize("kind", ["sac", "patchzero", "at", "hm", "arn", "cafd"])
def test_all_train_in_half_precision(kind, root, pack, tmp_path):
    losses = {}
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        task = KINDS[kind][1](settings(kind, root), pack)
        loop = LoopConfig(
            steps=2, batch_size=6, warmup=1, val_every=2, log_every=1, precision=precision
        )
        train(task, loop, tmp_path / precision, echo=lambda _: None)
        lines = (tmp_path / precision / "log.jsonl").read_text().splitlines()
        losses[precision] = [json.loads(x)["loss"] for x in lines if "loss" in json.loads(x)]
        assert all(bool(torch.isfinite(v).all()) for v in task.module.state_dict().values())
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.1)


@pytest.mark.parametrize("kind", ["sac", "hm", "arn"])
def test_a_run_cut_in_two_ends_in_the_same_weights(kind, root, pack, tmp_path):
    def run(out, stops):
        for steps in stops:
            torch.manual_seed(0)
            task = KINDS[kind][1](settings(kind, root), pack)
            loop = LoopConfig(steps=4, batch_size=6, warmup=1, val_every=4, checkpoint_every=2)
            if steps == 4:
                train(task, loop, out, echo=lambda _: None)
                continue

            def interrupt(rows, generator, step, task=task, real=task.loss, steps=steps):
                if step == steps:
                    raise KeyboardInterrupt
                return real(rows, generator, step)

            task.loss = interrupt
            with pytest.raises(KeyboardInterrupt):
                train(task, loop, out, echo=lambda _: None)
        return task.module.state_dict()

    whole, cut = run(tmp_path / "a", [4]), run(tmp_path / "b", [2, 4])
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_parse(recipe):
    kind = recipe.stem.split("-")[0]
    loop, task = read_recipe(recipe, kind)
    assert loop.steps >= 500 and isinstance(task, KINDS[kind][0])


def test_squares_lie_where_they_say():
    masks, boxes = crafted.squares(20, 40, 0.2, 0.5, torch.Generator().manual_seed(0))
    for mask, (top, left, side) in zip(masks, boxes, strict=True):
        assert 8 <= side <= 20 and int(mask.sum()) == side * side
        assert bool(mask[0, top : top + side, left : left + side].all())


def test_crafting_moves_only_the_patch_and_reaches_its_goal(root, pack):
    found = crafted.victims(str(root / "clip"), str(root / "csq"), sorted(CLASSES), False)
    assert [v.hashing for v in found] == [False, True]
    generator = torch.Generator().manual_seed(0)
    images = pack.batch(torch.arange(4), SIZE)
    mask, _ = crafted.squares(4, SIZE, 0.5, 0.5, generator)
    start = torch.rand(4, 3, SIZE, SIZE, generator=generator)
    for victim in found:
        objective = victim.objective(4, generator)
        made = crafted.craft(images, mask, start, objective, 20, 0.1)
        assert torch.equal(made * (1 - mask), images * (1 - mask))
        assert float(made.min()) >= 0 and float(made.max()) <= 1
        first = objective(images * (1 - mask) + start * mask)
        assert float(objective(made)) < float(first) - 1e-3


def test_validation_never_sees_the_classes_of_training(root):
    labels = sorted(CLASSES)
    train_side, held = (
        crafted.victims(str(root / "clip"), "", labels, flag)[0].targets for flag in (False, True)
    )
    assert len(train_side) + len(held) == len(labels) and len(held) == 2
    assert not any(torch.equal(a, b) for a in train_side for b in held)


def test_detector_figures_know_right_from_wrong(root, pack):
    """A perfect detector scores 1; one that sees nothing, and one that sees everything, do not."""
    task = SacTask(settings("sac", root), pack)

    class Fixed:
        def __init__(self, answer):
            self.answer = answer

        def masks(self, x):
            return self.answer(x)

    clean = {p.sum().item(): torch.zeros(1, SIZE, SIZE) for p in task.photos}
    seeded = torch.Generator().manual_seed(1)
    for kind in crafted.KINDS:
        patched, masks = crafted.paste(task.photos, list(task.unseen[kind]), seeded)
        clean |= {p.sum().item(): m for p, m in zip(patched, masks, strict=True)}

    answers = {
        "oracle": lambda x: torch.stack([clean[p.sum().item()] for p in x]) > 0,
        "blind": lambda x: torch.zeros_like(x[:, :1], dtype=torch.bool),
        "everything": lambda x: torch.ones_like(x[:, :1], dtype=torch.bool),
    }
    scores = {}
    for name, answer in answers.items():
        task.defense = lambda answer=answer: Fixed(answer)
        scores[name] = task.validate()
    assert scores["oracle"]["score"] == 1 and scores["oracle"]["recall_pgd"] == 1
    assert scores["blind"]["score"] == 0 and scores["blind"]["precision_qr"] == 0
    assert scores["everything"]["covered_clean"] == 1 and scores["everything"]["recall_qr"] == 1
    assert scores["everything"]["score"] < 0


def test_patchzero_weighs_patch_pixels(root, pack):
    task = PatchZeroTask(settings("patchzero", root), pack)
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., 0, 0] = 1
    logits = torch.full((1, 1, 4, 4), -2.0)
    miss, false = float(F.softplus(torch.tensor(2.0))), float(F.softplus(torch.tensor(-2.0)))
    pixels = (26.04 * miss + 15 * 1.04 * false) / (26.04 + 15 * 1.04)
    loss = task.segmentation_loss(logits, masks)
    assert float(loss) == pytest.approx(pixels + miss, rel=1e-5)


def test_hardness_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    a, p, n = torch.randn(3, 5, 7, generator=generator)
    for i in range(5):
        u, v, w = (z[i] / z[i].norm() for z in (a, p, n))
        expected = float((u - v).norm() - (u - w).norm())
        assert float(hardness(a, p, n)[i]) == pytest.approx(expected, abs=1e-5)
    same, opposite = torch.ones(1, 4), -torch.ones(1, 4)
    assert float(hardness(same, same, opposite)) == pytest.approx(-2, abs=1e-5)
    assert float(hardness(same, opposite, same)) == pytest.approx(2, abs=1e-5)


def test_gradual_adversary():
    assert gradual_adversary(0.5, 0.2) == pytest.approx(-0.2)
    assert gradual_adversary(0.2, 0.2) == pytest.approx(-0.2)
    assert gradual_adversary(0.05, 0.2) == pytest.approx(-0.05)
    assert gradual_adversary(torch.tensor(0.0), 0.2) == 0


def test_softhard_draws_among_the_harder_ones():
    distances = torch.tensor([[0.1, 0.5, 0.9, 0.3, 0.8, 1.2]])
    same = torch.tensor([[True, True, True, False, False, False]])
    drawn = [softhard(distances, same, ~same, torch.Generator().manual_seed(s)) for s in range(40)]
    # Nearest negative 0.3, farthest positive 0.9.
    assert {int(p) for p, _ in drawn} == {1, 2} and {int(n) for _, n in drawn} == {3, 4}
    easy = torch.tensor([[0.1, 0.2, 0.9, 1.0, 1.1, 1.2]])
    positive, negative = softhard(
        easy,
        torch.tensor([[True, True, False, False, False, False]]),
        torch.tensor([[False, False, True, True, True, True]]),
        torch.Generator().manual_seed(0),
    )
    assert int(positive) in (0, 1) and int(negative) in (2, 3, 4, 5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_perturbations_stay_in_their_ball_and_raise_the_loss(norm):
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    weight = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))

    def loss(v):
        return (v * weight).sum()

    y = perturb(x, loss, 0.05, 5, torch.Generator().manual_seed(2), norm)
    change = y - x
    size = change.abs().amax() if norm == "linf" else change.square().mean((1, 2, 3)).sqrt().amax()
    assert float(size) <= 0.05 + 1e-6
    assert float(loss(y) - loss(x)) > 0.9 * 0.05 * float(weight.abs().sum()) * (
        3 if norm == "linf" else 2.3
    )


def test_at_learns_from_images_that_its_own_loss_finds_worse(root, pack, monkeypatch):
    seen = []

    def spy(images, loss, *rest, **options):
        made = perturb(images, loss, *rest, **options)
        seen.append((float(loss(images).detach()), float(loss(made).detach())))
        assert not task.model.training and float((made - images).abs().max()) <= 4 / 255 + 1e-6
        return made

    monkeypatch.setattr("pair.training.adversarial.perturb", spy)
    for kind in ("clip", "csq"):
        init = str(root / kind)
        task = AtTask(AdversarialTraining(kind=kind, init=init, validation=8), pack)
        task.loss(torch.arange(12), torch.Generator().manual_seed(0), 0)
        assert task.model.training
    assert len(seen) == 2 and all(attacked > calm for calm, attacked in seen)


def test_hm_raises_hardness_towards_its_goal_and_remembers(root, pack):
    config = HardnessTraining(
        init=str(root / "csq"),
        kind="csq",
        classes=3,
        per_class=4,
        validation=8,
        epsilon=0.1,
        inner_step=0.02,
    )
    task = HmTask(config, pack)
    task.module.train()
    first = task.loss(torch.arange(4), torch.Generator().manual_seed(0), 0)
    assert float(first["goal"]) == pytest.approx(-0.2)
    triplet = float(first["loss"].detach())
    task.stepped({k: float(v.detach()) for k, v in first.items()})
    assert float(task.module.previous) == pytest.approx(triplet)
    task.module.previous.fill_(0.05)
    assert float(task.loss(torch.arange(4), torch.Generator(), 1)["goal"]) == pytest.approx(-0.05)


def test_cafd_attack_moves_class_activations_without_labels(root, pack):
    task = CafdTask(
        DenoiserTraining(SIZE, 4, target=str(root / "clip"), validation=6, inner_steps=4), pack
    )
    x = task.photos
    y = task.away(x, torch.Generator().manual_seed(0))
    target = task.target
    weights = target.class_weights(target.features(x))

    def gap(v):
        return float(
            target.activation(target.features(v) - target.features(x), weights).square().mean()
        )

    noise = (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).sign()
    assert gap(y) > 2 * gap((x + noise * 8 / 255).clamp(0, 1))
    # Class scores through the map are the target's own scores of the pooled embedding.
    z = target.embed(x)
    texts = F.normalize(target.model.encode_text([f"a photo of a {n}" for n in sorted(CLASSES)]))
    torch.testing.assert_close(
        target.features(x).mean((2, 3)) @ target.weights.T, z @ texts.T, atol=1e-4, rtol=1e-4
    )


def test_the_generator_side_never_trains_its_critic():
    critic, x = PixelCritic(4), torch.rand(2, 3, 16, 16, requires_grad=True)
    frozen(critic)(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in critic.parameters())


@pytest.mark.parametrize("kind", ["at", "hm", "arn"])
def test_unknown_target_kinds_are_refused(kind, root, pack):
    with pytest.raises(ValueError, match="'clip' or 'csq'"):
        KINDS[kind][1](settings(kind, root, kind="dog"), pack)


def test_cards_say_at_which_step_of_the_run_the_best_was():
    for path in sorted(ASSETS.glob("*/config.json")):
        config = json.loads(path.read_text())
        (told,) = [
            x for x in card("some", config).splitlines() if " images in " in x and " steps" in x
        ]
        run = config["training"]
        early = f"{run['step']:,} steps, the best state of a run of {run['loop']['steps']:,};"
        assert (early in told) is (run["step"] < run["loop"]["steps"])
        assert told.partition(";")[0] in path.with_name("README.md").read_text()
