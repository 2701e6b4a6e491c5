"""The training loop: progress, JSONL log, validation, best and last checkpoints, exact resume.

What happens in step k depends only on the configuration and k (data order and augmentation are
drawn from ``(seed, k)``), so a run that was killed and resumed ends in the same weights as one
that was not. Checkpoints appear by rename: a kill costs at most one checkpoint interval.

With ``accumulate = n`` a batch is computed in n slices, each with a random source of its own: one
after the other, or spread over the processes of ``torchrun``. Both give the same gradient.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pair import files
from pair.training import checkpoint, parallel
from pair.training.parallel import World
from pair.training.precision import FORMATS, Precision
from pair.training.shard import shard, whole
from pair.training.track import tracker

CHOICES = {
    "schedule": ("cosine", "constant"),
    "precision": tuple(FORMATS),
    "parallel": ("ddp", "fsdp"),
}


@dataclass(frozen=True)
class LoopConfig:
    """Settings common to all trainings."""

    steps: int = 10_000
    batch_size: int = 32  # of all processes together
    accumulate: int = 1  # slices of a batch; with torchrun a multiple of the processes
    warmup: int = 200
    schedule: str = "cosine"  # or "constant"
    ema: float = 0.0  # decay of the averaged weights that are validated and saved; 0 = off
    clip_grad: float = 1.0  # largest norm of the gradient; 0 = any
    parallel: str = "ddp"  # or "fsdp": several processes share the weights of one large model
    precision: str = "fp32"  # or "bf16", "fp16": autocast; fp16 (scaled gradients) for old GPUs
    seed: int = 0
    log_every: int = 50
    val_every: int = 1000
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "log_every", "val_every", "checkpoint_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into {self.accumulate} equal slices"
            )
        for name in ("warmup", "clip_grad"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )


class Task(Protocol):
    """A thing to train: a module, its optimisers, its loss and its validation."""

    config: Any
    module: nn.Module

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimisers with their peak learning rates."""
        ...

    def size(self) -> int:
        """Number of training photos."""
        ...

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """Losses of one batch; the entry "loss" is minimised, all entries are logged."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures on held-out photos; "score" (higher is better) picks the best checkpoint."""
        ...

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the model folder."""
        ...


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random source of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) & 0x7FFFFFFF)


def slice_generator(seed: int, step: int, part: int) -> torch.Generator:
    """The random source of slice ``part`` of a step; slice 0 has the one of the step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step + part * 479_001_599) % 2**31)


def batch_rows(size: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices of step ``step``: seeded epochs without repetition, last partial batch dropped."""
    per_epoch = max(1, size // batch)
    epoch, at = divmod(step, per_epoch)
    shuffled = torch.Generator().manual_seed((seed * 7_919 + epoch) & 0x7FFFFFFF)
    return torch.randperm(size, generator=shuffled)[at * batch : (at + 1) * batch]


def learning_rate(config: LoopConfig, step: int) -> float:
    """Factor on the peak learning rate in step ``step``."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Ema:
    """Exponential moving average of floating-point weights and buffers."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                self.shadow[key].lerp_(value, 1 - decay)
            else:
                self.shadow[key].copy_(value)


def train(
    task: Task,
    config: LoopConfig,
    out: Path,
    facts: dict[str, Any] | None = None,
    echo=print,
    *,
    world: World | None = None,
    inputs: dict[str, str] | None = None,
    track: str = "none",
) -> Path:
    """Run (or resume) a training in folder ``out``; returns the folder of the best model.

    ``inputs`` are the SHA-256 of what the settings only name (photos, start, discriminator): a
    run is not continued with others. ``track``: "tensorboard" or "wandb".
    """
    world = world or World()
    if task.size() < 1:
        raise ValueError("the pack holds no photos to train on")
    if config.accumulate % world.size:
        raise ValueError(
            f"{world.size} processes need loop.accumulate to be a multiple of {world.size}, "
            f"got {config.accumulate}"
        )
    if _cut(config, world):
        if not hasattr(task, "check_cut"):
            raise ValueError("this kind of model is too small to be cut: leave loop.parallel out")
        task.check_cut()
    if not world.first:
        return _run(task, config, out, facts or {}, lambda text: None, world, inputs or {}, "none")
    out.mkdir(parents=True, exist_ok=True)
    refusal = f"another training is writing to {out}: wait for it, stop it, or choose another --out"
    with files.sole_writer(out, refusal):
        return _run(task, config, out, facts or {}, echo, world, inputs or {}, track)


def _cut(config: LoopConfig, world: World) -> bool:
    """Whether the weights are cut into pieces; alone there is nothing to cut."""
    return config.parallel == "fsdp" and world.size > 1


def _run(
    task: Task,
    config: LoopConfig,
    out: Path,
    facts: dict[str, Any],
    echo,
    world: World,
    inputs: dict[str, str],
    track: str,
) -> Path:
    parallel.check_equal(world, task.module)
    cut = _cut(config, world)
    if cut:
        twin = copy.deepcopy(task.module).cpu() if world.first else None
        shard(world, task.module)
    optimizers = task.optimizers()
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
    ema = Ema(task.module, config.ema) if config.ema else None
    shadow = ema.shadow if ema is not None else None
    # How the work is spread is no part of the run: it may go on otherwise.
    spread = {k: v for k, v in asdict(config).items() if k != "parallel"}
    described = {"loop": spread, "task": _plain(task.config), "inputs": inputs}
    configs = {"loop": LoopConfig(), "task": task.config}
    precision = Precision(config.precision, world.device)
    at = checkpoint.load(out, task, optimizers, shadow, described, configs, precision)
    if not cut:
        parallel.check_equal(world, task.module)
    if world.first:
        checkpoint.sweep(out, described)
        checkpoint.trim_log(out / checkpoint.LOG, at.step)
    if at.step:
        echo(f"resuming at step {at.step} of {config.steps}")
    start, first, spent = time.perf_counter(), at.step, at.seconds
    curves = tracker(track, out, described)
    task.module.train()
    where = out / checkpoint.LOG if world.first else Path(os.devnull)
    with open(where, "a", buffering=1, encoding="utf-8") as log:  # flushed by line
        while at.step < config.steps:
            losses, done = _step(task, config, optimizers, peaks, at.step, world, precision)
            if ema is not None and done:
                ema.update(task.module, at.step)
            at.step += 1
            last = at.step == config.steps
            every = (config.log_every, config.val_every, config.checkpoint_every)
            due = [last or at.step % n == 0 for n in every]
            if due[0]:
                seconds = time.perf_counter() - start
                rate = (at.step - first) * config.batch_size / seconds
                figures = {
                    k: round(float(parallel.total(world, v.detach())), 5) for k, v in losses.items()
                } | precision.figures()
                record = {"step": at.step, **figures, "images_per_s": round(rate, 1)}
                log.write(json.dumps(record) + "\n")
                curves.log({**figures, "images_per_s": rate}, at.step)
                left = (config.steps - at.step) * config.batch_size / rate / 60
                shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
                echo(f"{at.step}/{config.steps}  {shown}  {rate:.1f} images/s  {left:.1f} min left")
            if due[1] and (world.first or cut):  # a model in pieces is validated by all
                figures = _validate(task, ema)
                log.write(json.dumps({"step": at.step, "val": figures}) + "\n")
                curves.log({f"val/{k}": v for k, v in figures.items()}, at.step)
                echo("  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()))
                if figures["score"] > at.best:
                    at.best = figures["score"]
                    history: dict[str, Any] = {
                        "step": at.step,
                        "images_seen": at.step * config.batch_size,
                        "seconds": round(spent + time.perf_counter() - start),
                        "validation": {k: round(v, 4) for k, v in figures.items()},
                        **described,
                    }
                    known = {**facts, "training": history}
                    write = partial(task.save, out / "best", known)
                    if cut:
                        weights = whole(task.module.state_dict() if ema is None else ema.shadow)
                        if twin is not None:
                            _with_module(task, twin, weights, write)
                    else:
                        _with_weights(task, ema, write)
            if due[2] and (world.first or cut):
                at.seconds = spent + time.perf_counter() - start
                checkpoint.save(
                    out, task, optimizers, shadow, described, at, world.first, precision
                )
    curves.close()
    if world.first and at.best == -math.inf:
        raise ValueError("no validation gave a score, so no model was saved")
    return out / "best"


def _step(
    task: Task,
    config: LoopConfig,
    optimizers,
    peaks,
    step: int,
    world: World,
    precision: Precision,
) -> tuple[dict[str, Tensor], bool]:
    """One update of the weights: this process's share of the losses, and whether there was an
    update. A step that overflowed in fp16 changes no weight; photos and schedule go on."""
    rows = batch_rows(task.size(), config.batch_size, config.seed, step)
    slices = list(rows.tensor_split(config.accumulate))
    cut = _cut(config, world)
    if not all(len(s) for s in slices):
        raise ValueError(f"{len(rows)} photos cannot be cut into {config.accumulate} slices")
    mine = range(world.rank, len(slices), world.size)
    if ahead := getattr(task, "prefetch", None):
        for i in mine:
            ahead(slices[i])
        soon = batch_rows(task.size(), config.batch_size, config.seed, step + 1)
        for i in mine:
            ahead(soon.tensor_split(config.accumulate)[i])
    losses: dict[str, Tensor] = {}
    for i in mine:
        generator = slice_generator(config.seed, step, i)
        with precision.autocast():
            found = task.loss(slices[i], generator, step)
        share = len(slices[i]) / len(rows)
        # Pieces of gradients are averaged on the way, ours are summed afterwards.
        precision.scaled(share * found["loss"] * (world.size if cut else 1)).backward()
        for key, value in found.items():
            losses[key] = losses.get(key, 0) + share * value.detach()
    if not bool(torch.isfinite(parallel.total(world, losses["loss"]))):
        raise ValueError(f"the loss is not finite in step {step}: lower the learning rate")
    if not cut:
        parallel.average_gradients(world, task.module.parameters())
        parallel.average_buffers(world, task.module)
    if told := getattr(task, "stepped", None):  # what a task remembers from step to step
        told({key: float(parallel.total(world, v)) for key, v in losses.items()})
    done = precision.unscale(optimizers)
    if config.clip_grad and done:
        nn.utils.clip_grad_norm_(task.module.parameters(), config.clip_grad)
    factor = learning_rate(config, step)
    for optimizer, lrs in zip(optimizers, peaks, strict=True):
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * factor
        if done:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, done


def _validate(task: Task, ema: Ema | None) -> dict[str, float]:
    task.module.eval()
    with torch.no_grad():
        figures = _with_weights(task, ema, task.validate)
    task.module.train()
    return figures


def _with_weights(task: Task, ema: Ema | None, call):
    """Call with the averaged weights in place, then put the trained ones back."""
    if ema is None:
        return call()
    kept = {k: v.detach().clone() for k, v in task.module.state_dict().items()}
    task.module.load_state_dict(ema.shadow)
    try:
        return call()
    finally:
        task.module.load_state_dict(kept)


def _with_module(task: Task, plain: nn.Module, weights: dict[str, Tensor], call) -> None:
    """Call with an ordinary module of these weights in the place of the one in pieces."""
    plain.load_state_dict(weights)
    kept, task.module = task.module, plain
    try:
        call()
    finally:
        task.module = kept


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config), default=str))


def weight_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], lr: float, decay: float
) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases, norms and embeddings without."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for _, p in parameters:
        (decayed if p.ndim > 1 else rest).append(p)
    return [
        {"params": decayed, "lr": lr, "weight_decay": decay},
        {"params": rest, "lr": lr, "weight_decay": 0.0},
    ]
