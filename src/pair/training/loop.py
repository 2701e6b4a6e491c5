"""The training loop: progress, JSONL log, validation, best and last checkpoints, exact resume.

What happens in step k depends only on the configuration and k (data order and augmentation are
drawn from ``(seed, k)``), so a run that was killed and resumed ends in the same weights as one
that was not. Checkpoints appear by rename: a kill costs at most one checkpoint interval.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoopConfig:
    """Settings common to all trainings."""

    steps: int = 10_000
    batch_size: int = 32
    lr: float = 1e-3
    warmup: int = 200
    schedule: str = "cosine"  # or "constant"
    ema: float = 0.0  # decay of the averaged weights that are validated and saved; 0 = off
    clip_grad: float = 1.0  # largest norm of the gradient; 0 = any
    precision: str = "fp32"  # or "bf16": autocast; twice as fast where the CPU has AVX512-BF16
    seed: int = 0
    log_every: int = 50
    val_every: int = 1000
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "val_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "clip_grad"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
        for name, known in (("schedule", ("cosine", "constant")), ("precision", ("fp32", "bf16"))):
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
) -> Path:
    """Run (or resume) a training in folder ``out``; returns the folder of the best model."""
    if task.size() < 1:
        raise ValueError("the pack holds no photos to train on")
    out.mkdir(parents=True, exist_ok=True)
    optimizers = task.optimizers()
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
    ema = Ema(task.module, config.ema) if config.ema else None
    described = {"loop": asdict(config), "task": _plain(task.config)}
    step, best, spent = _resume(out, task, optimizers, ema, described)
    if step:
        echo(f"resuming at step {step} of {config.steps}")
    start, first = time.perf_counter(), step
    task.module.train()
    with open(out / "log.jsonl", "a", buffering=1, encoding="utf-8") as log:  # flushed by line
        while step < config.steps:
            losses = _step(task, config, optimizers, peaks, step)
            if ema is not None:
                ema.update(task.module, step)
            step += 1
            last = step == config.steps
            seconds = time.perf_counter() - start
            if step % config.log_every == 0 or last:
                rate = (step - first) * config.batch_size / seconds
                figures = {k: round(float(v.detach()), 5) for k, v in losses.items()}
                record = {"step": step, **figures, "images_per_s": round(rate, 1)}
                log.write(json.dumps(record) + "\n")
                left = (config.steps - step) * config.batch_size / rate / 60
                shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
                echo(f"{step}/{config.steps}  {shown}  {rate:.1f} images/s  {left:.1f} min left")
            if step % config.val_every == 0 or last:
                figures = _validate(task, ema)
                log.write(json.dumps({"step": step, "val": figures}) + "\n")
                echo("  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()))
                if figures["score"] > best:
                    best = figures["score"]
                    history: dict[str, Any] = {
                        "step": step,
                        "images_seen": step * config.batch_size,
                        "seconds": round(spent + time.perf_counter() - start),
                        "validation": {k: round(v, 4) for k, v in figures.items()},
                        **described,
                    }
                    known = {**(facts or {}), "training": history}
                    _with_weights(task, ema, partial(task.save, out / "best", known))
            if step % config.checkpoint_every == 0 or last:
                seconds = spent + time.perf_counter() - start
                _checkpoint(out, task, optimizers, ema, described, step, best, seconds)
    if best == -math.inf:
        raise ValueError("no validation gave a score, so no model was saved")
    return out / "best"


def _step(task: Task, config: LoopConfig, optimizers, peaks, step: int) -> dict[str, Tensor]:
    """One update of the weights; returns the losses."""
    generator = step_generator(config.seed, step)
    rows = batch_rows(task.size(), config.batch_size, config.seed, step)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        losses = task.loss(rows, generator, step)
    if not bool(torch.isfinite(losses["loss"])):
        raise ValueError(f"the loss is not finite in step {step}: lower the learning rate")
    losses["loss"].backward()
    if config.clip_grad:
        nn.utils.clip_grad_norm_(task.module.parameters(), config.clip_grad)
    factor = learning_rate(config, step)
    for optimizer, lrs in zip(optimizers, peaks, strict=True):
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


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


def _checkpoint(out, task, optimizers, ema, described, step, best, seconds) -> None:
    state = {
        "step": step,
        "best": best,
        "seconds": seconds,
        "config": json.dumps(described, sort_keys=True),
        "module": task.module.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "ema": ema.shadow if ema is not None else None,
    }
    unfinished = out / f"last.ckpt.{os.getpid()}.partial"
    with open(unfinished, "wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(unfinished, out / "last.ckpt")


def _resume(out, task, optimizers, ema, described) -> tuple[int, float, float]:
    for stale in out.glob("last.ckpt.*.partial"):
        stale.unlink()
    for stale in (out / "best").glob(".writing-*"):
        shutil.rmtree(stale)
    path = out / "last.ckpt"
    if not path.is_file():
        (out / "log.jsonl").unlink(missing_ok=True)
        (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        return 0, -math.inf, 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = json.loads(state["config"])
    except Exception as error:  # the unpickler raises a dozen unrelated kinds
        raise ValueError(f"{path} is damaged: delete it to start {out} afresh") from error
    if change := _difference(saved, described, {"loop": LoopConfig(), "task": task.config}):
        raise ValueError(
            f"{out} holds a run with other settings ({change}): "
            "continue it with the same settings or choose another --out"
        )
    try:
        task.module.load_state_dict(state["module"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
    except (RuntimeError, ValueError) as error:  # equal settings, but of another kind
        raise ValueError(f"{out} holds a run of another model: choose another --out") from error
    if ema is not None:
        ema.shadow = state["ema"]
    _trim_log(out / "log.jsonl", state["step"])
    return state["step"], state["best"], state["seconds"]


def _difference(saved: dict, described: dict, configs: dict[str, Any]) -> str:
    """The first setting that differs, in words. A setting that did not exist had its default."""
    for table, settings in described.items():
        defaults = {
            f.name: f.default_factory() if f.default_factory is not MISSING else f.default
            for f in fields(configs[table])
        }
        for key, now in settings.items():
            then = saved[table].get(key, defaults[key])
            if then != now:
                return f"{table}.{key} was {then!r}, now {now!r}"
    return ""


def _trim_log(path: Path, step: int) -> None:
    """Drop lines of steps that will be run again, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    trimmed = path.with_suffix(".partial")
    trimmed.write_text("".join(line + "\n" for line in kept))
    os.replace(trimmed, path)


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
