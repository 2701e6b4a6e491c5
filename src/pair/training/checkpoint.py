"""The folder of a run: one training at a time, a checkpoint by rename, exact resume."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pair.training.precision import Precision
from pair.training.shard import load_optimizer, load_weights, piece, whole

LAST, LOG, CONFIG = "last.ckpt", "log.jsonl", "config.json"


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    best: float = -math.inf
    seconds: float = 0.0


def save(
    out: Path,
    task: Any,
    optimizers: list[torch.optim.Optimizer],
    shadow: dict[str, Tensor] | None,
    described: dict[str, Any],
    at: Progress,
    writes: bool = True,
    precision: Precision | None = None,
) -> None:
    """Write the checkpoint; a kill at any moment leaves the old one or the new one.

    Where the weights are cut, all processes call this and one ``writes``.
    """
    state = {
        "step": at.step,
        "best": at.best,
        "seconds": at.seconds,
        "config": json.dumps(described, sort_keys=True),
        "module": whole(task.module.state_dict()),
        "optimizers": [whole(o.state_dict()) for o in optimizers],
        "ema": whole(shadow),
        "scaler": precision.state() if precision is not None else {},
    }
    if not writes:
        return
    unfinished = out / f"{LAST}.{os.getpid()}.partial"
    with open(unfinished, "wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(unfinished, out / LAST)


def sweep(out: Path, described: dict[str, Any]) -> None:
    """Remove what a kill left behind; begin a new log where there is no checkpoint."""
    for stale in out.glob(f"{LAST}.*.partial"):
        stale.unlink()
    for stale in [*out.glob(".best.writing-*"), *(out / "best").glob(".writing-*")]:
        shutil.rmtree(stale)
    if not (out / LAST).is_file():
        (out / LOG).unlink(missing_ok=True)
        (out / CONFIG).write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def load(
    out: Path,
    task: Any,
    optimizers: list[torch.optim.Optimizer],
    shadow: dict[str, Tensor] | None,
    described: dict[str, Any],
    configs: dict[str, Any],
    precision: Precision | None = None,
) -> Progress:
    """Put the state of the last checkpoint in place; refuses one of another training."""
    path = out / LAST
    if not path.is_file():
        return Progress()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = json.loads(state["config"])
    except Exception as error:  # the unpickler raises a dozen unrelated kinds
        raise ValueError(f"{path} is damaged: delete it to start {out} afresh") from error
    if change := difference(saved, described, configs):
        raise ValueError(
            f"{out} holds a run with other settings ({change}): "
            "continue it with the same settings or choose another --out"
        )
    try:
        load_weights(task.module, state["module"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, kept)
    except (RuntimeError, ValueError) as error:  # equal settings, but of another kind
        raise ValueError(f"{out} holds a run of another model: choose another --out") from error
    if shadow is not None:
        for key, value in state["ema"].items():
            shadow[key].copy_(piece(value, shadow[key]))
    if precision is not None:
        precision.load(state.get("scaler", {}))
    return Progress(state["step"], state["best"], state["seconds"])


def difference(saved: dict, described: dict, configs: dict[str, Any]) -> str:
    """The first setting that differs, in words. A setting that did not exist had its default."""
    for table, config in configs.items():
        defaults = {
            f.name: f.default_factory() if f.default_factory is not MISSING else f.default
            for f in fields(config)
        }
        for key, now in described[table].items():
            then = saved[table].get(key, defaults[key])
            if then != now:
                return f"{table}.{key} was {then!r}, now {now!r}"
    # What the settings name may have changed behind the name. Older runs did not write it down.
    for key, now in described.get("inputs", {}).items():
        then = saved.get("inputs", {}).get(key, now)
        if then != now:
            return f"its {key} had the SHA-256 {then[:12]}..., now {now[:12]}..."
    return ""


def trim_log(path: Path, step: int) -> None:
    """Drop lines of steps that will be run again, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    trimmed = path.with_suffix(".partial")
    trimmed.write_text("".join(line + "\n" for line in kept), "utf-8")
    os.replace(trimmed, path)
