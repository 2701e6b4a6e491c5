"""Half precision with scaled gradients: same result as fp32, exact resume, overflow, processes."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pair.training import precision
from pair.training.loop import LoopConfig, train
from pair.training.parallel import CPU
from pair.training.pgd import perturb
from pair.training.precision import Precision, ascent, precisely
from pair.training.run import run

LOOP = """[loop]
steps = {steps}
batch_size = 4
accumulate = 2
warmup = 3
ema = 0.9
log_every = 1
val_every = 5
checkpoint_every = 4
precision = "{precision}"
"""
TASK = (
    "[task]\nlr = 1e-3\nmodel = {image_size = 24, patch_size = 8, width = 16, depth = 1, "
    "heads = 2, decoder_width = 16, decoder_depth = 1, decoder_heads = 2}\n"
)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(tmp_path):
    def write(name: str = "fp16", steps: int = 14, more: str = ""):
        path = tmp_path / f"{name}.toml"
        path.write_text(LOOP.format(precision=name, steps=steps) + more + TASK)
        return path

    return write


def quiet(line: str) -> None:
    pass


def checkpoint(out):
    return torch.load(out / "last.ckpt", weights_only=True)


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "val" not in line]


def test_the_loss_is_that_of_single_precision(recipe, pack_folder, tmp_path):
    for name in ("fp32", "fp16"):
        run("generator", recipe(name, 60), pack_folder, tmp_path / name, echo=quiet)
    curves = [[line["loss"] for line in log(tmp_path / n)] for n in ("fp32", "fp16")]
    assert curves[0] != curves[1]  # it is another arithmetic
    for a, b in zip(*curves, strict=True):
        assert b == pytest.approx(a, rel=0.01)
    assert curves[1][-1] < 0.95 * curves[1][0]
    last = log(tmp_path / "fp16")[-1]
    assert last["scale"] == 2.0**16 and last["skipped"] == 0
    assert "scale" not in log(tmp_path / "fp32")[-1]
    state = checkpoint(tmp_path / "fp16")
    assert all(v.dtype == torch.float32 for v in state["module"].values())  # never the weights


@pytest.mark.parametrize("lines", [6, 9, 13])
def test_a_stopped_run_goes_on_exactly(lines, recipe, pack_folder, tmp_path, monkeypatch):
    """With a scale that overflows at first, is lowered, and grows again."""
    overflowing(monkeypatch, growth=3)
    run("generator", recipe(), pack_folder, tmp_path / "whole", echo=quiet)
    left = [lines]

    def stop(line: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("generator", recipe(), pack_folder, tmp_path / "parts", echo=stop)
    run("generator", recipe(), pack_folder, tmp_path / "parts", echo=quiet)
    first, second = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert first["scaler"] == second["scaler"] and first["scaler"]["skipped"] > 0
    for part in ("module", "ema"):
        assert all(torch.equal(first[part][k], second[part][k]) for k in first[part])
    for line in (whole := log(tmp_path / "whole")) + (parts := log(tmp_path / "parts")):
        line.pop("images_per_s")
    assert whole == parts
    assert len({line["scale"] for line in whole}) > 2  # down and up


def overflowing(monkeypatch, growth: int = 2000) -> None:
    """Scales that begin far too high for half precision."""
    real = torch.amp.GradScaler

    def made(device, enabled):
        return real(device, 2.0**26, growth_interval=growth, enabled=enabled)

    monkeypatch.setattr(precision.torch.amp, "GradScaler", made)


class Line:
    """Least squares; ``size`` of the inputs decides whether half precision can hold gradients."""

    config = LoopConfig()  # any dataclass

    def __init__(self, size: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = size * torch.rand(24, 5, generator=generator)
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def size(self) -> int:
        return len(self.x)

    def optimizers(self):
        parts = (self.module[:2], self.module[2])
        return [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in parts]

    def loss(self, rows, generator, step):
        return {"loss": (self.module(self.x[rows]).float() - 1).square().mean()}

    def validate(self):
        return {"score": 0.0}

    def save(self, folder, facts):
        folder.mkdir(parents=True)


def test_an_overflow_skips_the_step_and_halves_the_scale(tmp_path, monkeypatch):
    overflowing(monkeypatch)
    task = Line()
    weights, scales = [], []
    real = task.loss

    def spy(rows, generator, step):
        weights.append({k: v.detach().clone() for k, v in task.module.named_parameters()})
        return real(rows, generator, step)

    task.loss = spy
    config = LoopConfig(20, 12, warmup=0, precision="fp16", log_every=1, ema=0.9)
    train(task, config, tmp_path / "run", echo=quiet)
    lines = log(tmp_path / "run")
    scales = [2.0**26] + [line["scale"] for line in lines]
    skipped = [b < a for a, b in itertools.pairwise(scales)]
    assert skipped[0] and not skipped[-1] and lines[-1]["skipped"] == sum(skipped)
    for i in range(19):
        assert not skipped[i] or scales[i + 1] == scales[i] / 2
        moved = any(not torch.equal(weights[i][k], weights[i + 1][k]) for k in weights[i])
        assert moved is not skipped[i]  # both optimisers, or none
    assert all(bool(torch.isfinite(v).all()) for v in task.module.state_dict().values())
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_loss_beyond_every_scale_stops_in_one_sentence(tmp_path):
    task = Line()
    real = task.loss

    def steep(rows, generator, step):
        loss = real(rows, generator, step)["loss"]
        weight = task.module[0].weight
        return {"loss": loss + (weight.sum() - weight.sum().detach()).abs().sqrt()}  # slope: inf

    task.loss = steep
    with pytest.raises(ValueError, match="overflow in fp16 whatever their scale: use loop"):
        train(task, LoopConfig(99, 12, precision="fp16"), tmp_path / "run", echo=quiet)


def test_the_average_stays_where_it_was_in_a_skipped_step(tmp_path, monkeypatch):
    overflowing(monkeypatch)
    config = LoopConfig(1, 12, warmup=0, precision="fp16", ema=0.9)
    task = Line()
    before = {k: v.clone() for k, v in task.module.state_dict().items()}
    train(task, config, tmp_path / "run", echo=quiet)
    state = checkpoint(tmp_path / "run")
    assert state["scaler"]["skipped"] == 1
    assert all(torch.equal(before[k], v) for k, v in state["ema"].items())


@pytest.mark.parametrize("cut", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_are_one(cut, recipe, pack_folder, tmp_path):
    path, out = recipe(steps=6), tmp_path / "two"
    run("generator", path, pack_folder, tmp_path / "one", echo=quiet)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "pair", "train", "generator", "--recipe", str(path)]
    command += ["--data", str(pack_folder), "--out", str(out)]
    command += ["--set", f"loop.parallel={'fsdp' if cut else 'ddp'}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = checkpoint(tmp_path / "one"), checkpoint(out)
    assert first["scaler"] == second["scaler"]
    for part in ("module", "ema"):
        for key, value in first[part].items():
            torch.testing.assert_close(second[part][key], value, atol=2e-4, rtol=0)


def test_slopes_for_attacks_survive_half_precision():
    """A gradient below what fp16 can hold still has a sign; one above it counts as none."""
    x = torch.full((1, 3, 4, 4), 0.5)
    weight = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)

    tiny = torch.full_like(x, 3e-8).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        (plain,) = torch.autograd.grad(((tiny * 1e-3).half() * 1e-3).sum().float(), tiny)
        kept = ascent(((tiny * 1e-3).half() * 1e-3).sum().float(), tiny)
        assert float(kept.abs().max()) > 0
        assert float(kept.abs().max()) >= float(plain.abs().max())
        over = torch.ones(4, requires_grad=True)
        assert torch.equal(ascent((over.half() * 300).sum().float() * 300, over), torch.zeros(4))
        moved = perturb(x, lambda v: (v * weight).sum(), 0.1, 3, torch.Generator().manual_seed(0))
    assert float(((moved - x) * weight).sum()) > 0
    y = torch.ones(3, requires_grad=True)  # outside of fp16 nothing is multiplied
    assert torch.equal(ascent((y * 7).sum(), y), torch.full((3,), 7.0))


def test_losses_that_need_single_precision_get_it():
    seen = []

    def loss(a, b, label):
        seen.append((a.dtype, b.dtype, label.dtype, torch.is_autocast_enabled("cpu")))
        return a.sum()

    with torch.autocast("cpu", torch.float16):
        precisely(loss, torch.ones(2).half(), torch.ones(2).bfloat16(), torch.ones(2, dtype=int))
    assert seen == [(torch.float32, torch.float32, torch.int64, False)]


def test_without_fp16_nothing_is_scaled():
    plain = Precision("bf16", CPU)
    loss = torch.ones(())
    assert plain.scaled(loss) is loss and plain.unscale([]) and plain.state() == {}
    assert plain.figures() == {}
