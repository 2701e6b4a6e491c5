"""Baselines trained as at full size, on miniatures: photos of data sets, captions, several labels,
targets of open_clip and hash networks of ``pair train csq-paper``."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pair.bench import tiny
from pair.bench.models import Models
from pair.bench.scenario import Row, Settings
from pair.defenses import make
from pair.retrieval.hashing import HashNet
from pair.training import towers
from pair.training.adversarial import AdversarialTraining, AtTask, HardnessTraining, HmTask
from pair.training.run import KINDS, open_photos, read_recipe, run
from pair.training.start import open_clip

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
LOOP = (
    "[loop]\nsteps = {steps}\nbatch_size = 4\nwarmup = 0\nval_every = 2\ncheckpoint_every = 2\n"
    "log_every = 1\n[task]\n"
)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> str:
    """A folder of open_clip, 32 pixels."""
    path = Path(__file__).parents[2] / "scripts" / "miniature_weights.py"
    spec = importlib.util.spec_from_file_location("miniature_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("open-clip")
    try:
        module.open_clip_model(folder)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"open_clip cannot be imported beside this build of torch: {error}")
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return str(tiny.folder("clip-scale", tmp_path_factory.mktemp("clip"), 32))


@pytest.fixture(scope="module")
def labelled(miniatures, miniature_script, tmp_path_factory) -> dict[str, str]:
    """Photos with one label and with several, as ``--data`` names them."""
    coco = tmp_path_factory.mktemp("coco")
    miniature_script.coco2014(coco, 120, 80)  # of few photos hardly any train
    return {
        "imagenet100": f"imagenet100:{miniatures / 'imagenet100'}",
        "coco2014": f"coco2014/leakfree:{coco}",
    }


@pytest.fixture(scope="module")
def hashing(labelled, tmp_path_factory) -> dict[str, str]:
    """What ``pair train csq-paper`` writes."""
    root = tmp_path_factory.mktemp("csq")
    recipe = root / "csq.toml"
    recipe.write_text(
        LOOP.format(steps=2) + 'backbone = "resnet18"\nfrom_scratch = true\nimage_size = 32\n'
        "bits = 16\ntop_k = 20\nvalidate_on = 20\n"
    )
    return {
        name: str(run("csq-paper", recipe, [spec], root / name, echo=quiet))
        for name, spec in labelled.items()
    }


def recipe(path: Path, task: str, steps: int = 4) -> Path:
    path.write_text(LOOP.format(steps=steps) + task)
    return path


SETTINGS = {
    "at": "validation = 4\ninner_steps = 2\nlr = 1e-3\n",
    "hm": "validation = 4\ninner_steps = 2\nlr = 1e-3\nclasses = 4\nper_class = 1\n",
}


@pytest.mark.parametrize("which", ["small", pytest.param("open", marks=pytest.mark.integration)])
@pytest.mark.parametrize("kind", ["at", "hm"])
def test_clip_is_hardened_on_captions(kind, which, miniatures, tmp_path, request):
    init = request.getfixturevalue("opened" if which == "open" else "small")
    data = [f"flickr30k:{miniatures / 'flickr30k'}"]
    path = recipe(tmp_path / "r.toml", f'init = "{init}"\n{SETTINGS[kind]}')
    best = run(kind, path, data, tmp_path / "run", echo=quiet)
    before, after = towers.load("clip", init), towers.load("clip", str(best))
    texts = ["a dog in the snow", "two people"]
    exact = {"atol": 0, "rtol": 0} if which == "open" else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(after.text(texts), before.text(texts), **exact)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(before.encode(images), after.encode(images), atol=1e-3)
    # A stopped run ends in the same weights.
    left = [4]

    def stop(line: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(kind, path, data, tmp_path / "parts", echo=stop)
    run(kind, path, data, tmp_path / "parts", echo=quiet)
    states = [torch.load(tmp_path / n / "last.ckpt", weights_only=True) for n in ("run", "parts")]
    assert all(torch.equal(states[0]["module"][k], v) for k, v in states[1]["module"].items())
    # The benchmark finds it under the name of the row, and the row loads it.
    name = f"clip-small-{kind}"
    clip = init if which == "small" else f"open_clip:local-dir:{init}"
    settings = Settings(clip=clip, shipped=False, image_size=32, models={name: str(best)})
    models = Models(settings, tmp_path / "bench")
    row = Row(kind.upper(), kind)
    hardened = models.defense(row).harden(models.clip())
    with torch.no_grad():
        torch.testing.assert_close(hardened.encode_image(images), after.encode(images))
    assert len(models.facts(row, False)[name]) == 64
    record = best / ("training.json" if which == "open" else "config.json")
    assert json.loads(record.read_text())["hardened"] == kind


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["at", "hm"])
def test_two_processes_harden_as_one(kind, opened, miniatures, tmp_path):
    """No batch norm: the same slices give the same weights; in half precision, with its scale."""
    data = f"flickr30k:{miniatures / 'flickr30k'}"
    path = tmp_path / "r.toml"
    loop = LOOP.format(steps=3).replace("[task]", 'accumulate = 2\nprecision = "fp16"\n[task]')
    task = SETTINGS[kind].replace("1e-3", "1e-4")
    path.write_text(f'{loop}init = "{opened}"\n{task}')
    run(kind, path, [data], tmp_path / "one", echo=quiet)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "pair", "train", kind, "--recipe", str(path), "--data", data]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=900,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / n / "last.ckpt", weights_only=True) for n in ("one", "two"))
    assert one["scaler"] == two["scaler"]
    for key, value in one["module"].items():
        torch.testing.assert_close(two["module"][key], value, atol=5e-4, rtol=0)


@pytest.mark.parametrize("name", ["imagenet100", "coco2014"])
@pytest.mark.parametrize("kind", ["at", "hm"])
def test_hash_networks_of_the_paper_are_hardened(kind, name, hashing, labelled, tmp_path):
    init, data = hashing[name], [labelled[name]]
    more = SETTINGS[kind].replace("per_class = 1", "per_class = 2")
    path = recipe(tmp_path / "r.toml", f'kind = "csq"\ninit = "{init}"\n{more}')
    best = run(kind, path, data, tmp_path / "run", echo=quiet)
    before, after = HashNet.from_pretrained(init), HashNet.from_pretrained(best)
    assert torch.equal(before.centres, after.centres) and before.config == after.config
    key = "layer4.1.conv2.weight"
    weights = [n.backbone.state_dict()[key] for n in (before, after)]
    assert not torch.equal(*weights) and not torch.equal(weights[1], weights[1].half().float())
    hardened = make(kind, clip="none", csq=str(best)).harden(before)
    with torch.no_grad():
        x = torch.rand(2, 3, 40, 40)
        torch.testing.assert_close(hardened.encode_image(x), after.encode_image(x))


def test_several_labels_count_all(hashing, labelled):
    """The centre of a photo is that of all its labels, and like photos share one at least."""
    photos = open_photos([labelled["coco2014"]], 36)
    config = AdversarialTraining(kind="csq", init=hashing["coco2014"], validation=4)
    task = AtTask(config, photos)
    names = task.model.config.classes
    for at, row in enumerate(task.rows.tolist()):
        own = photos.labels[row].split(";")
        assert {names[i] for i in task.labels[at].nonzero()[:, 0].tolist()} == set(own)
        if len(own) == 1:
            assert torch.equal(task.targets[at], task.model.centres[names.index(own[0])])
    assert any(";" in photos.labels[i] for i in task.rows.tolist())
    triplets = HmTask(
        HardnessTraining(kind="csq", init=hashing["coco2014"], validation=4, classes=5), photos
    )
    rows, anchors, positives, negatives = triplets.triplets(torch.Generator().manual_seed(0))
    assert anchors is None and not bool((positives & negatives).any())
    for i, a in enumerate(rows.tolist()):
        for j, b in enumerate(rows.tolist()):
            shared = bool((triplets.labels[a] & triplets.labels[b]).any())
            assert bool(positives[i, j]) == (shared and i != j)
            assert bool(negatives[i, j]) == (not shared)


def test_captions_answer_their_own_photos(small, miniatures):
    photos = open_photos([f"flickr30k:{miniatures / 'flickr30k'}"], 36)
    task = AtTask(AdversarialTraining(init=small, validation=3), photos)
    assert task.captioned and photos.side == 36 and task.matches.shape == (3, 3)
    rows = torch.arange(5)
    texts, same = task.pick_caption(rows, torch.Generator().manual_seed(0))
    assert texts.shape == (5, 16) and bool(same.diagonal().all()) and torch.equal(same, same.T)
    found = [
        int((torch.nn.functional.normalize(task.tower.text(list(photos.captions[i])), dim=-1)
             @ texts[at]).amax() > 0.999)
        for at, i in enumerate(task.rows[rows].tolist())
    ]  # fmt: skip
    assert found == [1] * 5
    photos.captions = []
    with pytest.raises(ValueError, match="neither class names nor captions"):
        AtTask(AdversarialTraining(init=small), photos)


DETECTOR = "bank = 4\ncraft_steps = 2\nvalidation = 3\nwidth = 4\nadaptive = 0.5\ninner_steps = 2\n"
DENOISER = "inner_steps = 2\nvalidation = 3\nwidth = 4\n"
BASELINES = {"sac": DETECTOR, "patchzero": DETECTOR, "arn": DENOISER, "cafd": DENOISER}


@pytest.mark.parametrize("which", ["small", pytest.param("open", marks=pytest.mark.integration)])
@pytest.mark.parametrize("kind", BASELINES)
def test_detectors_and_denoisers(kind, which, hashing, miniatures, tmp_path, request):
    init = request.getfixturevalue("opened" if which == "open" else "small")
    data = [f"flickr30k:{miniatures / 'flickr30k'}"]
    if kind in ("sac", "patchzero"):
        data.append(f"imagenet100:{miniatures / 'imagenet100'}")
        named = f'clip = "{init}"\ncsq = "{hashing["imagenet100"]}"\n'
    else:
        named = f'target = "{init}"\n'
    path = recipe(tmp_path / "r.toml", f"image_size = 32\n{named}{BASELINES[kind]}")
    best = run(kind, path, data, tmp_path / "run", echo=quiet)
    assert make(kind, name=str(best))(torch.rand(2, 3, 40, 40)).shape == (2, 3, 40, 40)
    inputs = json.loads((best / "config.json").read_text())["training"]["inputs"]
    assert inputs.keys() > {"photos"} and all(len(v) == 64 for v in inputs.values())


@pytest.mark.integration
def test_patch_tokens_pool_to_directions(opened):
    """The map of a vision transformer lives in the space of its embedding, token by token."""
    tower = towers.load("clip", opened)
    assert isinstance(tower, towers.OpenTower) and tower.size == 32
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = tower.feature_map(images)
        visual = open_clip(f"local-dir:{opened}").model.visual
        visual.output_tokens = True
        pooled, tokens = visual(tower.model.preprocess(images))
    assert found.shape == (2, 16, 4, 4)
    torch.testing.assert_close(found[1, :, 2, 3], tokens[1, 2 * 4 + 3] @ visual.proj)
    torch.testing.assert_close(tower.encode(images), pooled)
    directions = tower.directions(["a dog", "a cat"])
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(2))


def test_targets_that_cannot_be_used_are_refused(hashing, small, miniatures, tmp_path):
    data = [f"flickr30k:{miniatures / 'flickr30k'}"]
    for kind, task, message in (
        ("at", f'kind = "csq"\ninit = "{hashing["imagenet100"]}"\n', "no training or no held-out"),
        ("at", 'init = "open_clip:ViT-B-32"\n', "names no weights|open_clip cannot be used"),
        ("sac", f'image_size = 32\ncsq = "{hashing["imagenet100"]}"\nclip = "{small}"\n',
         "too few to hold some out"),
        ("cafd", f'kind = "dog"\ntarget = "{small}"\n', "kind must be 'clip' or 'csq'"),
    ):  # fmt: skip
        path = recipe(tmp_path / "r.toml", task)
        with pytest.raises(ValueError, match=message):
            run(kind, path, data, tmp_path / "run", echo=quiet)


ROWS = {
    "at-clip": ("at", "clip-small-at"), "at-csq": ("at", "csq-small-at"),
    "hm-clip": ("hm", "clip-small-hm"), "sac": ("sac", ""), "sac-self": ("sac", "sac-small"),
    "patchzero": ("patchzero", ""), "patchzero-adaptive": ("patchzero", "patchzero-small"),
    "arn": ("arn", "arn-small"), "cafd": ("cafd", "cafd-small"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_for_every_trained_row(name):
    """At 224 pixels, and with the name under which the benchmark takes its model."""
    kind, model = ROWS[name]
    path = CONFIGS / f"{name}.toml"
    loop, task = read_recipe(path, kind)
    assert isinstance(task, KINDS[kind][0]) and loop.steps > 1000
    assert getattr(task, "image_size", 224) == 224
    assert not model or f"--set models.{model}=" in path.read_text()


def test_every_row_of_the_tables_has_its_recipe():
    from pair.bench.models import RECIPES
    from pair.bench.scenario import at_scale, load

    named = {model for _, model in ROWS.values() if model}
    for table in ("table1", "table2", "table3", "table4", "table5", "alpha"):
        scenario = at_scale(load(table), "paper")
        models = Models(Settings(), Path("nowhere"))
        for row in scenario.rows:
            wanted = set(models.named(row).values()) & RECIPES.keys()
            wanted -= {n for n in wanted if n.startswith("csq") != (scenario.kind == "hash")
                       and n.partition("-")[0] in ("csq", "clip")}  # fmt: skip
            assert wanted <= named, (table, row.label)
