"""Recipes: every bad one is refused in one sentence, through the command, with exit code 2."""

from pathlib import Path

import pytest

from pair.training.generator import GeneratorTraining
from pair.training.loop import LoopConfig
from pair.training.run import KINDS, read_recipe
from pair.training.targets import TargetTraining

CONFIGS = Path(__file__).parents[2] / "configs"


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("generator", "[loop", "not valid TOML"),
        ("generator", b"\xff\xfe", "not valid TOML"),
        ("generator", "[lopp]\nsteps = 3", "unknown table [lopp]; known: [loop], [task]"),
        ("generator", "loop = 3", "[loop] must be a table, got 3"),
        ("generator", "task = [1]", "[task] must be a table"),
        ("clip", "task = 7", "[task] must be a table, got 7"),
        ("generator", "[loop]\nstep = 3", "unknown setting 'step'; known: accumulate"),
        ("generator", '[loop]\nsteps = "3"', "steps must be int, got '3' (str)"),
        ("generator", "[loop]\nsteps = 2.5", "steps must be int, got 2.5 (float)"),
        ("generator", "[loop]\nsteps = true", "steps must be int, got True (bool)"),
        ("generator", "[loop]\nema = true", "ema must be float, got True (bool)"),
        ("generator", "[loop]\nval_every = 0", "[loop]: val_every must be at least 1"),
        ("generator", "[loop]\nlr = 0.1", "the learning rate belongs in [task]"),
        ("generator", '[loop]\nschedule = "linear"', "schedule must be one of"),
        ("generator", "[task]\nmodel = 5", "[task].model must be a table, got 5"),
        ("generator", "[task.model]\nwidht = 5", "[task].model: unknown setting 'widht'"),
        ("generator", "[task.model]\nheads = 5", "width 192 is not a multiple of 5 heads"),
        ("generator", '[task.model]\nmean = "grey"', "mean must be list, got 'grey' (str)"),
        ("generator", '[task]\nmask = "bernoulli"', "mask must be dict, got 'bernoulli' (str)"),
        ("generator", '[task]\nmask = {rule = "magic"}', "unknown mask rule 'magic'"),
        ("generator", '[task]\noptimizer = "sgd"', "optimizer must be adam or muon, got 'sgd'"),
        ("generator", "[task]\nsecond = 0.7\nwindows = 0.7", "shares of the steps"),
        ("generator", "[task]\nbeta = -1.0", "beta must not be negative"),
        (
            "generator",
            '[task]\ndiscriminator = "nowhere"\nmodel = {image_size = 24}',
            "no model 'nowhere'",
        ),
        ("generator", '[task]\ninit = "nowhere"\nmodel = {image_size = 24}', "no model 'nowhere'"),
        ("generator", "[task.model]\nimage_size = 64", "pixels a side, the generator needs 64"),
        ("clip", "[task]\nbalance = 2.0", "balance must lie between 0 and 1"),
        ("csq", "[task]\nbits = 0", "bits must be at least 1"),
        ("pizza", "", "cannot train 'pizza': use one of generator, clip, csq"),
    ],
)
def test_bad_recipes(kind, text, message, tmp_path, pack_folder, pair):
    path = write(tmp_path, text)
    code, _, said = pair(
        *("train", kind, "--recipe", path, "--data", pack_folder, "--out", tmp_path / "run")
    )
    assert code == 2
    assert message in said
    assert said.startswith("pair: ") and said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "run").exists()  # nothing was started


def test_missing_recipes_and_packs(tmp_path, pack_folder, pair):
    out = ("--out", tmp_path / "run")
    code, _, said = pair(
        *("train", "clip", "--recipe", tmp_path / "no.toml", "--data", pack_folder, *out)
    )
    assert code == 2 and "no recipe" in said and "configs/small/clip.toml" in said
    path = write(tmp_path, "")
    code, _, said = pair(*("train", "clip", "--recipe", path, "--data", tmp_path / "no", *out))
    assert code == 2 and "holds no finished pack: run 'pair data pack' first" in said


def test_settings_without_a_recipe_are_named_by_their_option():
    for change, place in (("loop.stepz=3", "[loop]"), ("task.widht=3", "[task]")):
        with pytest.raises(ValueError, match=r"--set \[.*\]: unknown setting") as caught:
            read_recipe(None, "generator", [change])
        assert str(caught.value).startswith(f"--set {place}")


def test_values_arrive_with_their_types(tmp_path):
    path = write(
        tmp_path,
        "[loop]\nsteps = 7\nema = 0\n[task]\nlr = 1\n[task.model]\nwidth = 32\nheads = 4\n"
        "mean = [0.5, 0.5, 0.5]\n",
    )
    loop, task = read_recipe(path, "generator")
    assert isinstance(loop, LoopConfig) and isinstance(task, GeneratorTraining)
    assert (loop.steps, loop.ema, task.lr) == (7, 0.0, 1.0)
    assert isinstance(loop.ema, float) and isinstance(task.lr, float)
    assert (task.model.width, task.model.heads, task.model.mean) == (32, 4, (0.5, 0.5, 0.5))
    assert task.model.image_size == 112  # the rest keeps its default


def test_targets_know_the_length_of_the_loop(tmp_path):
    _, task = read_recipe(write(tmp_path, "[loop]\nsteps = 77"), "clip")
    assert isinstance(task, TargetTraining) and task.steps == 77
    _, task = read_recipe(write(tmp_path, "[loop]\nsteps = 77\n[task]\nsteps = 5"), "csq")
    assert task.steps == 5


def test_paper_defaults():
    """Section 5.1: Adam, learning rate 1e-5, beta 1, half of the tokens, one pass."""
    task = GeneratorTraining()
    assert (task.optimizer, task.lr, task.beta) == ("adam", 1e-5, 1.0)
    assert task.mask["ratio"] == 0.5
    assert (task.second, task.windows, task.mse, task.pooled) == (0.0, 0.0, 0.0, 0.0)
    assert LoopConfig().batch_size == 32


SHIPPED = sorted((CONFIGS / "small").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_for_some_kind(path):
    fits = []
    for kind in KINDS:
        try:
            loop, _ = read_recipe(path, kind)
        except ValueError:
            continue
        fits.append(kind)
        assert loop.steps >= loop.val_every >= 1
    assert fits
