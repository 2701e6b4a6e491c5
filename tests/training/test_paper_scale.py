"""Training as at full size, on miniatures: data sets, starts of others, slices, processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pair import files
from pair.data.sets import SOURCES
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.purifier import Purifier
from pair.training import start
from pair.training.cards import card
from pair.training.generator import GeneratorTask, GeneratorTraining
from pair.training.loop import LoopConfig, train
from pair.training.parallel import World
from pair.training.run import KINDS, open_photos, read_recipe, run
from pair.training.track import tracker

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
TINY = GeneratorConfig(24, 8, 16, 1, 2, 16, 1, 2)
MODEL = (
    "model = {image_size = 24, patch_size = 8, width = 16, depth = 1, heads = 2, "
    "decoder_width = 16, decoder_depth = 1, decoder_heads = 2}\n"
)
LOOP = "[loop]\nsteps = 6\nbatch_size = 4\nwarmup = 0\nval_every = 3\ncheckpoint_every = 2\n"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(path: Path, task: str, loop: str = LOOP) -> Path:
    path.write_text(f"{loop}[task]\n{task}")
    return path


def quiet(line: str) -> None:
    pass


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "last.ckpt", weights_only=True)["module"]


def assert_close(a: Path, b: Path, tolerance: float = 2e-5) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, atol=tolerance, rtol=0)


# --- data sets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        ["coco2014:{}/coco2014", "flickr30k:{}/flickr30k"],
        ["imagenette:{}/imagenette"],
        ["webdataset:{}/webdataset"],
        ["caltech101:{}/caltech101"],
        ["{}/folder"],
    ],
    ids=lambda d: "+".join(x.rpartition("/")[2] for x in d),
)
def test_a_generator_trains_from_data_sets(data, miniatures, tmp_path):
    names = [name.format(miniatures) for name in data]
    recipe = write(tmp_path / "r.toml", f"lr = 1e-3\n{MODEL}")
    best = run("generator", recipe, names, tmp_path / "run", echo=quiet)
    config = json.loads((best / "config.json").read_text())
    assert len(config["training"]["inputs"]["photos"]) == 64
    told = card("mine", config)
    shipped = {"caltech101", "imagenette"}.issuperset(config["photos"])
    assert ("Apache-2.0" in told) is shipped  # we claim nothing about the models of others
    assert shipped or all(f"| {name} | {n} |" in told for name, n in config["photos"].items())
    assert Purifier.from_pretrained(best)(torch.rand(1, 3, 30, 30)).shape == (1, 3, 24, 24)


def test_decoding_in_a_worker_changes_nothing(miniatures, tmp_path):
    recipe = write(tmp_path / "r.toml", f"lr = 1e-3\n{MODEL}")
    for workers in (0, 1):
        data = [f"flickr30k:{miniatures}/flickr30k"]
        run("generator", recipe, data, tmp_path / f"{workers}", echo=quiet, workers=workers)
    assert_close(tmp_path / "0", tmp_path / "1", 0)


@pytest.mark.parametrize(
    "data",
    ["imagenet100:{}/imagenet100", "coco2014/leakfree:{}/coco2014", "folder/classes:{}/classes"],
)
def test_hash_networks_train_from_data_sets(data, miniatures, tmp_path):
    recipe = write(
        tmp_path / "r.toml",
        'backbone = "resnet18"\nfrom_scratch = true\nimage_size = 32\ntop_k = 20\n'
        "validate_on = 30\n",
        LOOP.replace("steps = 6", "steps = 2"),
    )
    best = run("csq-paper", recipe, [data.format(miniatures)], tmp_path / "run", echo=quiet)
    config = json.loads((best / "config.json").read_text())
    assert 2 <= len(config["model"]["classes"]) <= 100
    assert "`pair train csq-paper --recipe r.toml`" in card("mine", config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["nowhere"], "name a data set as NAME:FOLDER with NAME one of coco2014"),
        (["coco2014/magic:x"], "coco2014 has no protocol 'magic'"),
        (["{pack}", "imagenette:{mini}/imagenette"], "packs cannot be mixed"),
        (["index.jsonl"], "no index index.jsonl"),
    ],
)
def test_photos_that_cannot_be_opened(data, message, miniatures, pack_folder):
    names = [d.format(pack=pack_folder, mini=miniatures) for d in data]
    with pytest.raises(ValueError, match=message):
        open_photos(names, 24)


def test_tasks_that_need_a_pack_say_so(miniatures, tmp_path):
    recipe = write(tmp_path / "r.toml", "")
    with pytest.raises(ValueError, match="this training reads a pack"):
        run("clip", recipe, [f"imagenette:{miniatures}/imagenette"], tmp_path / "run", echo=quiet)


# --- starts and discriminators of others ------------------------------------------------------


@pytest.fixture(scope="module")
def vitmae(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            image_size=24, patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2, decoder_intermediate_size=64,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit-mae-tiny")
    model.save_pretrained(folder)
    return folder


def test_training_starts_from_a_folder_of_transformers(vitmae, pack_folder, tmp_path):
    said: list[str] = []
    out = tmp_path / "run"
    recipe = write(tmp_path / "r.toml", "lr = 1e-4\n")
    best = run(
        "generator", recipe, pack_folder, out, echo=said.append, changes=[f"task.init={vitmae}"]
    )
    assert "CC BY-NC 4.0" in said[0]  # said aloud, and written down:
    config = json.loads((best / "config.json").read_text())
    assert "CC BY-NC 4.0" in config["licence"] and config["model"]["width"] == 16
    assert "CC BY-NC 4.0" in card("mine", config) and "Apache" not in card("mine", config)
    assert config["training"]["inputs"].keys() == {"photos", "init"}
    again, licence = start.generator(str(best))  # and inherited
    assert "CC BY-NC" in licence and again.config.image_size == 24
    # The weights behind the name changed: the run is not continued from others.
    state = torch.load(out / "last.ckpt", weights_only=True)
    told = json.loads(state["config"])
    told["inputs"]["init"] = "0" * 64
    torch.save({**state, "config": json.dumps(told)}, out / "last.ckpt")
    with pytest.raises(ValueError, match=r"its init had the SHA-256 000000000000\.\.\., now"):
        run("generator", recipe, pack_folder, out, echo=quiet, changes=[f"task.init={vitmae}"])


def test_photos_are_decoded_at_the_size_of_the_start(vitmae, miniatures):
    settings = GeneratorTraining(init=str(vitmae), augment="none")
    photos = open_photos([f"flickr30k:{miniatures}/flickr30k"], settings.photo_side)
    assert photos.side == 112  # the default geometry, until the start is known
    task = GeneratorTask(settings, photos)
    assert photos.side == 24 and task.held_out.shape[-2:] == (24, 24)
    assert bool(torch.isfinite(task.loss(torch.arange(4), torch.Generator(), 0)["loss"]))


def test_training_starts_from_a_file_of_meta(pack_folder, tmp_path, monkeypatch):
    from pair import checkpoints

    monkeypatch.setattr(checkpoints, "HEADS", {16: 2})
    monkeypatch.setattr(checkpoints, "DECODER_HEADS", {16: 2})
    model = MaskedAutoencoder(TINY)
    torch.save({"model": model.state_dict()}, tmp_path / "mae_visualize_vit_tiny.pth")
    found, licence = start.generator(str(tmp_path / "mae_visualize_vit_tiny.pth"))
    assert "CC BY-NC" in licence and torch.equal(found.mask_token, model.mask_token)


def test_other_photos_are_another_run(miniatures, tmp_path):
    recipe = write(tmp_path / "r.toml", f"lr = 1e-3\n{MODEL}")
    run("generator", recipe, [miniatures / "folder"], tmp_path / "run", echo=quiet)
    with pytest.raises(ValueError, match="its photos had the SHA-256"):
        run("generator", recipe, [miniatures / "classes"], tmp_path / "run", echo=quiet)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A folder that open_clip reads as local-dir:."""
    try:
        import open_clip
        from safetensors.torch import save_file
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"open_clip cannot be imported beside this build of torch: {error}")
    vision = {"image_size": 24, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder = tmp_path_factory.mktemp("tiny-clip")
    (folder.parent / "architectures").mkdir()
    (folder.parent / "architectures" / "tiny-critic.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder.parent / "architectures")
    model = open_clip.create_model("tiny-critic")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.integration
def test_an_open_clip_model_as_discriminator(tiny_clip, miniatures, tmp_path):
    recipe = write(tmp_path / "r.toml", f"lr = 1e-3\nretrieval = 4\n{MODEL}")
    spec = f"open_clip:local-dir:{tiny_clip}"
    changes = [f"task.discriminator={spec}"]
    data = [f"flickr30k:{miniatures}/flickr30k"]
    run("generator", recipe, data, tmp_path / "run", echo=quiet, changes=changes)
    lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all("l_s" in x for x in lines if "val" not in x)
    for line in (x["val"] for x in lines if "val" in x):
        assert line["score"] == line["recall_at_10"] <= 1
    critic = start.critic(spec)
    images = torch.rand(2, 3, 24, 24, requires_grad=True)
    embedding, pooled = critic.look(images)
    assert pooled is None
    wanted = start.open_clip(f"local-dir:{tiny_clip}").encode_image(images)
    torch.testing.assert_close(embedding, wanted)
    embedding.sum().backward()
    assert images.grad is not None and not any(p.requires_grad for p in critic.module.parameters())
    critic.look(images.detach() * 2 - 0.5)  # unclamped reconstructions are looked at as they are
    with pytest.raises(ValueError, match="pooled needs a small CLIP"):
        run("generator", recipe, data, tmp_path / "b", echo=quiet,
            changes=[*changes, "task.pooled=1.0"])  # fmt: skip


@pytest.mark.integration
def test_fine_tuned_clip_is_read_by_open_clip(pair, tiny_clip, miniatures, tmp_path):
    recipe = write(
        tmp_path / "r.toml",
        f'model = "open_clip:local-dir:{tiny_clip}"\nimage_size = 24\nlr = 1e-3\n',
        LOOP.replace("steps = 6", "steps = 20\nlog_every = 4"),
    )
    data = [f"flickr30k:{miniatures}/flickr30k"]
    best = run("clip-paper", recipe, data, tmp_path / "run", echo=quiet)
    lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines if "val" not in x]
    assert losses[-1] < losses[0]
    before, after = (start.open_clip(f"local-dir:{f}") for f in (tiny_clip, best))
    images = torch.rand(1, 3, 24, 24)
    assert not torch.allclose(before.encode_image(images), after.encode_image(images))
    record = json.loads((best / "training.json").read_text())
    assert len(record["sha256"]) == 64 and record["training"]["inputs"].keys() == {
        "photos",
        "model",
    }
    code, out, _ = pair("models", "publish", best, "--name", "tuned", "--out", tmp_path / "models")
    assert code == 0 and "tuned: clip-paper" in out
    published = tmp_path / "models" / "tuned"
    told = (published / "README.md").read_text()
    assert "`pair train clip-paper --recipe r.toml`, starting from `open_clip:local-dir:" in told
    again = start.open_clip(f"local-dir:{published}")
    torch.testing.assert_close(again.encode_image(images), after.encode_image(images))


@pytest.mark.parametrize(
    ("spec", "message"),
    [("ViT-B-32", "names no weights: write open_clip:ViT-B-32/TAG"),
     ("local-dir:/nowhere", "open_clip")],
)  # fmt: skip
def test_open_clip_names(spec, message):
    with pytest.raises(ValueError, match=message):
        start.critic(f"open_clip:{spec}")


# --- memory and slices ------------------------------------------------------------------------


def test_recomputing_activations_changes_nothing(pack_folder, tmp_path):
    for name in ("true", "false"):
        recipe = write(tmp_path / "r.toml", f"lr = 1e-3\nrecompute = {name}\n{MODEL}")
        run("generator", recipe, pack_folder, tmp_path / name, echo=quiet)
    assert_close(tmp_path / "true", tmp_path / "false", 1e-6)


class Line:
    """Least squares without randomness: the mean over slices is the mean over the batch."""

    config = LoopConfig()  # any dataclass

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(24, 5, generator=generator)
        self.module = nn.Linear(5, 1)
        nn.init.constant_(self.module.weight, 0.1)
        nn.init.zeros_(self.module.bias)

    def size(self) -> int:
        return len(self.x)

    def optimizers(self):
        return [torch.optim.SGD(self.module.parameters(), lr=0.1)]

    def loss(self, rows, generator, step):
        return {"loss": (self.module(self.x[rows]) - 1).square().mean()}

    def validate(self):
        return {"score": 0.0}

    def save(self, folder, facts):
        folder.mkdir(parents=True)


def test_slices_are_the_batch(tmp_path):
    tasks = []
    for n in (1, 3):
        task = Line()
        train(task, LoopConfig(8, 12, n, warmup=0), tmp_path / f"{n}", echo=quiet)
        tasks.append(task)
    torch.testing.assert_close(tasks[0].module.weight, tasks[1].module.weight)
    with pytest.raises(ValueError, match="12 cannot be cut into 5 equal slices"):
        LoopConfig(batch_size=12, accumulate=5)


def test_two_processes_are_one(pack_folder, tmp_path):
    """torchrun with two processes: the weights of one process that computes the same slices;
    and a run that one process began, two processes end."""
    loop = LOOP.replace("batch_size = 4", "batch_size = 4\naccumulate = 2\nema = 0.9")
    recipe = write(tmp_path / "r.toml", f"lr = 1e-3\nsecond = 0.3\n{MODEL}", loop)
    run("generator", recipe, pack_folder, tmp_path / "one", echo=quiet)

    left = [4]

    def stop(line: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    one_step = "loop.log_every=1"
    with pytest.raises(KeyboardInterrupt):
        run("generator", recipe, pack_folder, tmp_path / "handed", echo=stop, changes=[one_step])
    assert 0 < torch.load(tmp_path / "handed" / "last.ckpt", weights_only=True)["step"] < 6
    for name, more in (("two", []), ("handed", ["--set", one_step])):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node=2", "-m", "pair", "train", "generator"]
        command += ["--recipe", str(recipe), "--data", str(pack_folder)]
        command += ["--out", str(tmp_path / name), *more]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=400, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("validation") >= 1  # one process talks, the other is silent
        assert ("resuming at step" in done.stdout) is (name == "handed")
        assert_close(tmp_path / "one", tmp_path / name)
    states = [torch.load(tmp_path / n / "last.ckpt", weights_only=True) for n in ("one", "two")]
    for key, value in states[0]["ema"].items():
        torch.testing.assert_close(states[1]["ema"][key], value, atol=2e-5, rtol=0)
    logs = [
        [json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    assert logs[0][-2]["loss"] == pytest.approx(logs[1][-2]["loss"], abs=1e-4)


def torchrun(recipe: Path, data: Path, out: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "pair", "train", "generator", "--recipe", str(recipe)]
    return [*command, "--data", str(data), "--out", str(out), *more]


ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_model_in_pieces_is_one(pack_folder, tmp_path):
    """FSDP over two processes: the weights, moments and average of one process, saved whole; and
    a run that one process began goes on in pieces."""
    loop = LOOP.replace("batch_size = 4", "batch_size = 4\naccumulate = 2\nema = 0.9")
    recipe = write(tmp_path / "r.toml", f"lr = 1e-3\nsecond = 1.0\n{MODEL}", loop)
    one, cut = tmp_path / "one", tmp_path / "cut"
    run("generator", recipe, pack_folder, one, echo=quiet)
    left = [2]

    def stop(line: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # between the checkpoint of step 2 and that of step 4
        run("generator", recipe, pack_folder, cut, echo=stop, changes=["loop.log_every=3"])
    begun = torch.load(cut / "last.ckpt", weights_only=True)
    assert begun["step"] == 2
    pieces = ["--set", "loop.parallel=fsdp", "--set", "loop.log_every=3"]
    done = subprocess.run(
        torchrun(recipe, pack_folder, cut, *pieces), capture_output=True, text=True, timeout=1800,
        check=False, env=ALONE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming at step 2" in done.stdout and done.stdout.count("validation") == 2
    assert_close(one, cut)
    states = [torch.load(f / "last.ckpt", weights_only=True) for f in (one, cut)]
    for key, value in states[0]["ema"].items():
        torch.testing.assert_close(states[1]["ema"][key], value, atol=2e-5, rtol=0)
    for a, b in zip(*(s["optimizers"][0]["state"].values() for s in states), strict=True):
        for key in a:
            torch.testing.assert_close(b[key], a[key], atol=2e-5, rtol=1e-3)
    best = [Purifier.from_pretrained(f / "best").autoencoder.state_dict() for f in (one, cut)]
    for key, value in best[0].items():
        torch.testing.assert_close(best[1][key], value, atol=1e-3, rtol=0)  # stored in fp16


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Processes that a process has started, oldest first."""
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks processes up in /proc")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_kill_9_of_two_processes(parallel, pack_folder, tmp_path):
    """First one of two processes is killed, whatever it is doing (torchrun ends the other), then
    all at once: the same command ends in the weights of a run that nobody disturbed."""
    loop = LOOP.replace("steps = 6", "steps = 60\nlog_every = 1").replace(
        "batch_size = 4", "batch_size = 4\naccumulate = 2\nema = 0.9"
    )
    recipe = write(tmp_path / "r.toml", f"lr = 1e-3\n{MODEL}", loop)
    run("generator", recipe, pack_folder, tmp_path / "one", echo=quiet)
    out = tmp_path / "killed"
    command = torchrun(recipe, pack_folder, out, "--set", f"loop.parallel={parallel}")
    for wanted in (15, 40):
        process = subprocess.Popen(
            command, env=ALONE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 1800
        while process.poll() is None and time.monotonic() < deadline:
            log = out / "log.jsonl"
            if log.is_file() and log.read_text().count('"loss"') >= wanted:
                break
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        workers = children(process.pid)
        assert len(workers) == 2
        for pid in workers[1:] if wanted == 15 else [process.pid, *workers]:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=1800) != 0
        while any(running(pid) for pid in workers):
            time.sleep(0.05)  # until the lock of the folder is free
        reached = torch.load(out / "last.ckpt", weights_only=True)["step"]
        assert wanted - 3 <= reached < 60
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, check=False, env=ALONE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resuming at step {reached} of 60" in done.stdout
    assert_close(tmp_path / "one", out)
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "val" not in x] == list(range(1, 61))  # each step once


def test_small_models_are_not_cut(tmp_path):
    with pytest.raises(ValueError, match="parallel must be one of ddp, fsdp, got 'tensor'"):
        LoopConfig(parallel="tensor")
    train(Line(), LoopConfig(4, 4, parallel="fsdp"), tmp_path / "run", echo=quiet)  # alone: no-op
    two = World(0, 2)
    with pytest.raises(ValueError, match="too small to be cut"):
        train(Line(), LoopConfig(4, 4, 2, parallel="fsdp"), tmp_path / "b", echo=quiet, world=two)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"second": 0.3}, "task.second must be 0 or 1"), ({"optimizer": "muon"}, "whole matrices")],
)
def test_what_cannot_be_cut_is_said(settings, message, pack):
    task = GeneratorTask(GeneratorTraining(TINY, **settings), pack)
    with pytest.raises(ValueError, match=message):
        task.check_cut()


def test_processes_need_slices(tmp_path):
    with pytest.raises(
        ValueError, match=r"3 processes need loop\.accumulate to be a multiple of 3"
    ):
        train(Line(), LoopConfig(8, 12, 2), tmp_path / "run", echo=quiet, world=World(0, 3))


# --- the folder of a run ----------------------------------------------------------------------


def test_one_training_at_a_time(pack_folder, tmp_path):
    recipe = write(tmp_path / "r.toml", f"lr = 1e-3\n{MODEL}")
    out = tmp_path / "run"
    out.mkdir()
    with (
        files.sole_writer(out, "held"),
        pytest.raises(ValueError, match=r"another training is writing to .*run: wait for it"),
    ):
        run("generator", recipe, pack_folder, tmp_path / "run", echo=quiet)
    run("generator", recipe, pack_folder, tmp_path / "run", echo=quiet)  # free again


def test_trackers(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown tracker 'paper': use one of none, tensorboard"):
        tracker("paper", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(ValueError, match=rf"pip install {name}"):
            tracker(name, tmp_path, {})


def test_tensorboard_gets_the_curves(pack_folder, tmp_path):
    pytest.importorskip("tensorboard")
    recipe = write(tmp_path / "r.toml", f"lr = 1e-3\n{MODEL}")
    run("generator", recipe, pack_folder, tmp_path / "run", echo=quiet, track="tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_settings_from_the_command_line(tmp_path):
    recipe = write(tmp_path / "r.toml", f"lr = 1e-3\n{MODEL}")
    changes = ["loop.steps=7", "task.model.heads=4", "task.init=org/name", 'task.mask.rule="none"']
    loop, task = read_recipe(recipe, "generator", changes)
    assert (loop.steps, task.model.heads, task.init, task.mask) == (
        7,
        4,
        "org/name",
        {"rule": "none"},
    )
    assert read_recipe(None, "generator")[0] == LoopConfig()
    for change, message in (("steps=7", "write loop.KEY=VALUE"), ("loop.pace=7", "'pace'")):
        with pytest.raises(ValueError, match=message):
            read_recipe(recipe, "generator", [change])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_recipes_of_the_paper_are_valid_and_explain_themselves(path):
    text = path.read_text()
    kind = path.stem.partition("-")[0]
    kind = {"csq": "csq-paper", "clip": "clip-paper"}.get(kind, kind)
    loop, task = read_recipe(path, kind)
    assert loop.steps > 1000 and text.startswith("# ")
    assert task.photo_side >= 224 or (kind == "generator" and task.init)
    if "pair train" in text:
        assert f"pair train {kind} --recipe configs/paper/{path.name}" in text
        for name in (w.partition(":")[0] for w in text.split() if ":COCO" in w or ":FLICKR" in w):
            source, _, protocol = name.partition("/")
            SOURCES[source].protocol(protocol or None)
    assert kind in KINDS


def test_the_paper_recipe_is_the_paper():
    loop, task = read_recipe(CONFIGS / "generator.toml", "generator")
    assert loop.steps == 104_566 * 100 // 32 + 1 or loop.steps == round(104_566 * 100 / 32)
    assert (loop.batch_size, task.lr, task.beta, task.optimizer) == (32, 1e-5, 1.0, "adam")
    assert task.mask == {"rule": "bernoulli", "ratio": 0.5} and task.second == 0
    assert (loop.schedule, loop.warmup, task.augment) == ("constant", 0, "none")
