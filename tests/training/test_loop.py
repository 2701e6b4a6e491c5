"""The training loop: exact resume, kill -9, checkpoints, log, settings. All on a real tiny pack."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pair.purifier import Purifier
from pair.retrieval.clip import ClipConfig, SmallClip, build_vocabulary
from pair.retrieval.resnet import ResNetConfig
from pair.training.loop import Ema, LoopConfig, batch_rows, learning_rate, step_generator
from pair.training.run import run

LOOP = """
[loop]
steps = {steps}
batch_size = 4
warmup = 3
log_every = 1
val_every = 5
checkpoint_every = 4
{extra}
"""
GEOMETRY = (
    "model = {image_size = 24, patch_size = 8, width = 16, depth = 1, heads = 2, "
    "decoder_width = 16, decoder_depth = 1, decoder_heads = 2}\n"
)
TASKS = {
    # The paper's training: one pass, Adam; then everything that can be switched on, at once.
    "generator": ("", '[task]\nlr = 1e-3\nmask = {rule = "bernoulli"}\n' + GEOMETRY),
    "generator-all": (
        'ema = 0.9\nprecision = "bf16"\nschedule = "constant"',
        '[task]\noptimizer = "muon"\nlr = 1e-3\nsecond = 0.4\nwindows = 0.3\nmse = 2.0\n'
        'pooled = 0.5\nweight_decay = 0.1\ndiscriminator = "{critic}"\n' + GEOMETRY,
    ),
    "clip": ("", "[task]\nimage_size = 24\nsmall_size = 16\nwidth = 4\ndim = 8\n"),
    "csq": ("ema = 0.9", "[task]\nimage_size = 24\nsmall_size = 16\nwidth = 4\nbits = 16\n"),
}
every_task = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(autouse=True)
def threads():
    """``run`` sets the number of threads of the process; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def critic(tmp_path_factory):
    torch.manual_seed(0)
    config = ClipConfig(
        24, 8, ResNetConfig((1, 1, 1, 1), 4), vocabulary=tuple(build_vocabulary(["a tench"]))
    )
    folder = tmp_path_factory.mktemp("critic")
    SmallClip(config).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, critic):
    def write(name: str, steps: int = 14, extra: str = "", **changes: str) -> tuple[str, Path]:
        loop, task = TASKS[name]
        text = LOOP.format(steps=steps, extra=f"{loop}\n{extra}") + task
        text = text.replace("{critic}", str(critic))
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return name.partition("-")[0], path

    return write


def quiet(line: str) -> None:
    pass


def stop_after(lines: int):
    """An echo that interrupts the training when it prints for the n-th time."""
    left = [lines]

    def echo(line: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return echo


def checkpoint(out: Path) -> dict:
    return torch.load(out / "last.ckpt", weights_only=True)


def log(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_s", None)  # the only thing that may differ between equal runs
    return lines


def assert_same(a, b) -> None:
    """Bit for bit, through nested containers."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimisers, averages, best model and log of two finished runs are equal."""
    first, second = checkpoint(a), checkpoint(b)
    for state in (first, second):
        assert state.pop("seconds") > 0
    assert_same(first, second)
    assert_same(
        load_file(a / "best" / "model.safetensors"), load_file(b / "best" / "model.safetensors")
    )
    assert log(a) == log(b)


@every_task
def test_every_kind_trains_logs_validates_and_saves(name, recipe, pack_folder, tmp_path):
    kind, path = recipe(name)
    said: list[str] = []
    best = run(kind, path, pack_folder, tmp_path / "run", echo=said.append)
    assert best == tmp_path / "run" / "best"
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines if "val" not in line] == list(range(1, 15))
    assert [line["step"] for line in lines if "val" in line] == [5, 10, 14]
    for line in lines:
        assert all(math.isfinite(v) for v in line.get("val", line).values())
    config = json.loads((best / "config.json").read_text())
    scores = {line["step"]: line["val"]["score"] for line in lines if "val" in line}
    assert scores[config["training"]["step"]] == max(scores.values())
    assert config["recipe"] == path.name
    assert config["training"]["images_seen"] == 4 * config["training"]["step"]
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert described["loop"]["steps"] == 14
    assert {k: config["training"][k] for k in ("loop", "task", "inputs")} == described
    assert "14/14" in said[-2] and "images/s" in said[-2] and "min left" in said[-2]
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 14
    assert all(bool(torch.isfinite(v.float()).all()) for v in state["module"].values())


def test_a_generator_learns_and_its_best_model_loads(recipe, pack_folder, tmp_path):
    kind, path = recipe("generator", steps=60)
    best = run(kind, path, pack_folder, tmp_path / "run", echo=quiet)
    losses = [line["l_p"] for line in log(tmp_path / "run") if "l_p" in line]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    purifier = Purifier.from_pretrained(best)
    out = purifier(torch.rand(2, 3, 50, 40))
    assert out.shape == (2, 3, 24, 24)


@every_task
@pytest.mark.parametrize("lines", [3, 14])
def test_a_stopped_run_ends_in_the_same_weights(name, lines, recipe, pack_folder, tmp_path):
    kind, path = recipe(name)
    run(kind, path, pack_folder, tmp_path / "whole", echo=quiet)
    with pytest.raises(KeyboardInterrupt):
        run(kind, path, pack_folder, tmp_path / "parts", echo=stop_after(lines))
    said: list[str] = []
    run(kind, path, pack_folder, tmp_path / "parts", echo=said.append)
    assert (said[0].startswith("resuming at step")) == (lines > 4)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_same_seed_same_result_other_seed_other_result(recipe, pack_folder, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        kind, path = recipe("generator", extra=f"seed = {seed}")
        run(kind, path, pack_folder, tmp_path / out, echo=quiet)
        torch.rand(7)  # the state of the global source must not matter
    assert_same_run(tmp_path / "a", tmp_path / "b")
    a, c = (checkpoint(tmp_path / out)["module"]["mask_token"] for out in "ac")
    assert not torch.equal(a, c)


def test_kill_9_at_random_moments(recipe, pack_folder, tmp_path):
    """A real process, really killed, several times: nothing corrupt, same end as undisturbed."""
    kind, path = recipe("generator-all", steps=100, **{"val_every = 5": "val_every = 25"})
    run(kind, path, pack_folder, tmp_path / "whole", echo=quiet)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "pair", "train", kind, "--recipe", str(path)]
    command += ["--data", str(pack_folder), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    draw = random.Random()  # not seeded: another moment each time the tests run
    kills, reached = 0, 0
    for share in (0.3, 0.7):
        wanted = round(100 * share) + draw.randrange(-10, 10)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if steps_logged(out) >= wanted:
                time.sleep(draw.uniform(0, 0.05))
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        state = checkpoint(out)  # readable, and at most one interval behind
        assert state["step"] % 4 == 0 or state["step"] == 100
        assert state["step"] > wanted - 2 * 4
        assert state["step"] >= reached
        reached = state["step"]
    assert kills >= 1  # the last one may have been too late
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert f"resuming at step {reached} of 100" in finished.stdout or reached == 100
    assert_same_run(tmp_path / "whole", out)
    leftover = {p.name for p in out.iterdir()} | {p.name for p in (out / "best").iterdir()}
    assert leftover == {
        *("best", "config.json", "last.ckpt", "log.jsonl"),
        *("config.json", "model.safetensors"),
    }


def steps_logged(out: Path) -> int:
    try:
        lines = (out / "log.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def test_what_a_kill_leaves_behind_is_swept_up(recipe, pack_folder, tmp_path):
    """Half a checkpoint, half a model, a torn line and lines of steps that will run again."""
    kind, path = recipe("generator")
    run(kind, path, pack_folder, tmp_path / "whole", echo=quiet)
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        run(kind, path, pack_folder, out, echo=stop_after(12))
    kept = checkpoint(out)["step"]
    (out / "last.ckpt.4711.partial").write_bytes(b"half")
    (out / "best" / ".writing-x").mkdir()
    (out / "best" / ".writing-x" / "model.safetensors").write_bytes(b"half")
    with open(out / "log.jsonl", "a") as handle:
        handle.write('{"step": 999, "loss": 1.0}\n{"step": 2, "lo')
    run(kind, path, pack_folder, out, echo=quiet)
    assert 0 < kept < 14
    assert_same_run(tmp_path / "whole", out)
    assert not list(out.glob("*.partial")) and not list((out / "best").glob(".writing-*"))


def test_a_checkpoint_is_never_half_written(recipe, pack_folder, tmp_path, monkeypatch):
    kind, path = recipe("generator")
    with pytest.raises(KeyboardInterrupt):
        run(kind, path, pack_folder, tmp_path / "run", echo=stop_after(7))
    before = (tmp_path / "run" / "last.ckpt").read_bytes()

    def full_disk(state, handle):
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(kind, path, pack_folder, tmp_path / "run", echo=quiet)
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before


def test_a_finished_run_is_left_alone(recipe, pack_folder, tmp_path):
    kind, path = recipe("generator")
    run(kind, path, pack_folder, tmp_path / "run", echo=quiet)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert run(kind, path, pack_folder, tmp_path / "run", echo=quiet) == tmp_path / "run" / "best"
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_changed_settings_are_refused_by_name(recipe, pack_folder, tmp_path):
    kind, path = recipe("generator")
    with pytest.raises(KeyboardInterrupt):
        run(kind, path, pack_folder, tmp_path / "run", echo=stop_after(7))
    for changes, message in (
        ({"lr = 1e-3": "lr = 2e-3"}, r"task\.lr was 0\.001, now 0\.002"),
        ({"batch_size = 4": "batch_size = 5"}, r"loop\.batch_size was 4, now 5"),
        ({"heads = 2,": "heads = 4,"}, r"task\.model was"),
    ):
        kind, path = recipe("generator", **changes)
        with pytest.raises(ValueError, match=message) as caught:
            run(kind, path, pack_folder, tmp_path / "run", echo=quiet)
        assert "\n" not in str(caught.value)
    kind, path = recipe("generator")
    run(kind, path, pack_folder, tmp_path / "run", echo=quiet)  # the old settings still go on


def test_a_run_of_another_kind_is_refused(recipe, pack_folder, tmp_path):
    """The settings of both targets are of one type and may be equal."""
    _, path = recipe("clip")
    run("clip", path, pack_folder, tmp_path / "run", echo=quiet)
    with pytest.raises(ValueError, match="holds a run of another model") as caught:
        run("csq", path, pack_folder, tmp_path / "run", echo=quiet)
    assert "\n" not in str(caught.value)


def test_a_setting_that_did_not_exist_yet_counts_as_its_default(recipe, pack_folder, tmp_path):
    """A run that an older version started goes on, unless the new setting changes it."""
    kind, path = recipe("generator")
    with pytest.raises(KeyboardInterrupt):
        run(kind, path, pack_folder, tmp_path / "run", echo=stop_after(7))
    state = checkpoint(tmp_path / "run")
    config = json.loads(state["config"])
    del config["task"]["pooled"]
    torch.save({**state, "config": json.dumps(config)}, tmp_path / "run" / "last.ckpt")
    _, changed = recipe("generator", **{"lr = 1e-3": "lr = 1e-3\npooled = 1.0"})
    with pytest.raises(ValueError, match=r"task\.pooled was 0\.0, now 1\.0"):
        run(kind, changed, pack_folder, tmp_path / "run", echo=quiet)
    kind, path = recipe("generator")
    run(kind, path, pack_folder, tmp_path / "run", echo=quiet)


@pytest.mark.parametrize("content", [b"", b"garbage", "truncated"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(content, recipe, pack_folder, tmp_path):
    kind, path = recipe("generator")
    with pytest.raises(KeyboardInterrupt):
        run(kind, path, pack_folder, tmp_path / "run", echo=stop_after(7))
    last = tmp_path / "run" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:500] if content == "truncated" else content)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged: delete it to start") as caught:
        run(kind, path, pack_folder, tmp_path / "run", echo=quiet)
    assert "\n" not in str(caught.value)


def test_a_loss_that_explodes_stops_in_one_sentence(recipe, pack_folder, tmp_path):
    kind, path = recipe("generator", **{"lr = 1e-3": "lr = 1e30"})
    with pytest.raises(ValueError, match=r"not finite in step \d+: lower the learning rate"):
        run(kind, path, pack_folder, tmp_path / "run", echo=quiet)


# --- parts ---


def test_every_epoch_shows_every_photo_once():
    for seed in (0, 1):
        epoch = torch.cat([batch_rows(103, 10, seed, step) for step in range(10)])
        assert len(set(epoch.tolist())) == 100  # the last three are left for another epoch
        second = torch.cat([batch_rows(103, 10, seed, step) for step in range(10, 20)])
        assert not torch.equal(epoch, second)
    assert not torch.equal(batch_rows(103, 10, 0, 0), batch_rows(103, 10, 1, 0))
    assert sorted(batch_rows(3, 10, 0, 5).tolist()) == [0, 1, 2]  # fewer photos than a batch


def test_steps_have_random_sources_of_their_own():
    draws = [float(torch.rand(1, generator=step_generator(s, k))) for s in (0, 1) for k in range(9)]
    assert len(set(draws)) == 18
    again = float(torch.rand(1, generator=step_generator(1, 8)))
    assert again == draws[-1]


def test_learning_rate_schedules():
    cosine = LoopConfig(steps=100, warmup=10)
    assert [learning_rate(cosine, k) for k in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(cosine, 10) == 1.0
    assert learning_rate(cosine, 55) == pytest.approx(0.5)
    assert learning_rate(cosine, 99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    constant = LoopConfig(steps=100, warmup=0, schedule="constant")
    assert {learning_rate(constant, k) for k in range(100)} == {1.0}


def test_moving_average_is_the_naive_one():
    module = torch.nn.BatchNorm1d(2)
    ema = Ema(module, 0.9)
    wanted = module.weight.detach().clone()
    for step in range(30):
        with torch.no_grad():
            module.weight.add_(torch.tensor([1.0, -2.0]))
            module.num_batches_tracked.add_(1)
        ema.update(module, step)
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.shadow["weight"], wanted)
    assert int(ema.shadow["num_batches_tracked"]) == 30


def test_the_average_is_what_is_saved_and_training_goes_on_from_the_weights(
    recipe, pack_folder, tmp_path
):
    kind, path = recipe("csq")
    best = run(kind, path, pack_folder, tmp_path / "run", echo=quiet)
    state, saved = checkpoint(tmp_path / "run"), load_file(best / "model.safetensors")
    step = json.loads((best / "config.json").read_text())["training"]["step"]
    assert not torch.equal(state["ema"]["head.weight"], state["module"]["head.weight"])
    if step == 14:
        assert torch.equal(saved["head.weight"], state["ema"]["head.weight"].half())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"val_every": 0}, "val_every must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"warmup": -1}, "warmup must not be negative"),
        ({"clip_grad": -1.0}, "clip_grad must not be negative"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant, got 'linear'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
    ],
)
def test_bad_loop_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoopConfig(**settings)
