"""The optimisation loop that the gradient attacks share: schedule, checkpoint, resume, plateau."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pair.attacks.patch import Patch
from pair.files import write_atomic

Progress = Callable[[int, int, float], None]  # step, steps, loss


@dataclass
class AttackResult:
    """What an attack returns: the patch and everything needed to judge and repeat the run.

    ``losses`` is the goal's loss before each update (without distortion), plus the final one.
    ``gradients_used`` counts sample gradients: updates x carriers x draws. ``snapshots`` maps a
    step to the patch after that many updates.
    """

    patch: Patch
    losses: list[float]
    config: dict[str, Any]
    seeds: dict[str, int]
    gradients_used: int
    forwards: int
    seconds: float
    stopped: str = "budget"
    trials: int = 1
    snapshots: dict[int, Patch] = field(default_factory=dict)
    patches: list[Patch] = field(default_factory=list)  # per-image scope: one per carrier
    curves: dict[str, list[float]] = field(default_factory=dict)  # further curves, by name

    @property
    def best_loss(self) -> float:
        return min(self.losses)

    def late_gain(self, share: float = 0.2) -> float:
        """Share of the whole gain that the last ``share`` of the steps brought (S8)."""
        return late_gain(self.losses, share)

    def apply(self, images: Tensor) -> Tensor:
        """The images (B, 3, H, W) it was made for, patched; per-image scope: each with its own."""
        if self.config.get("scope") != "per-image":
            return self.patch.apply(images)
        pairs = zip(self.patches, images, strict=True)
        return torch.cat([patch.apply(image[None]) for patch, image in pairs])

    def record(self) -> dict[str, Any]:
        """Plain data for an evaluation record."""
        return {
            "config": self.config,
            "seeds": self.seeds,
            "steps": len(self.losses) - 1,
            "gradients_used": self.gradients_used,
            "forwards": self.forwards,
            "seconds": round(self.seconds, 3),
            "stopped": self.stopped,
            "trials": self.trials,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "late_gain": self.late_gain(),
        }


def late_gain(losses: list[float], share: float = 0.2) -> float:
    """Gain of the last ``share`` of a loss curve over its whole gain (medians of windows)."""
    window = max(1, len(losses) // 20)

    def level(at: int) -> float:
        part = sorted(losses[max(0, at - window) : at] or losses[:1])
        return part[len(part) // 2]

    first, last = level(window), level(len(losses))
    before = level(max(window, round(len(losses) * (1 - share))))
    total = first - last
    return (before - last) / total if total > 0 else math.inf


@dataclass(frozen=True)
class Schedule:
    """Learning rate of update k (counted from ``offset``) out of ``total``."""

    lr: float
    kind: str = "step"  # "step" | "cosine" | "constant"
    decay: float = 0.95
    every: int = 10
    total: int = 300
    offset: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("step", "cosine", "constant"):
            raise ValueError(f"schedule must be step, cosine or constant, got {self.kind!r}")

    def __call__(self, step: int) -> float:
        step += self.offset
        if self.kind == "step":
            return self.lr * self.decay ** (step // self.every)
        if self.kind == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(step / max(1, self.total), 1)))
        return self.lr


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Tensors and plain values to a file that appears by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue(), durable=False)


def load_state(path: Path | None, key: dict[str, Any] | None) -> dict[str, Any] | None:
    """The state of an unfinished run; refuses one that other settings or data began."""
    if path is None or not path.is_file():
        return None
    try:
        state = torch.load(path, weights_only=True)
        found = state["key"]
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of an attack: {error}") from error
    if key is not None and found != key:
        names = sorted(k for k in key.keys() | found.keys() if key.get(k) != found.get(k))
        raise ValueError(
            f"{path} belongs to another run (different: {', '.join(names)}); "
            "delete it or name another checkpoint"
        )
    return state


@dataclass
class Trace:
    """Result of :func:`minimise`."""

    parameter: Tensor
    losses: list[float]
    updates: int
    stopped: str
    snapshots: dict[int, Tensor]
    seconds: float


def minimise(
    parameter: Tensor,
    loss: Callable[[Tensor], tuple[Tensor, float]],
    *,
    steps: int,
    schedule: Schedule,
    generator: torch.Generator,
    project: Callable[[Tensor], None],
    key: dict[str, Any],
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    plateau: tuple[int, float] | None = None,
    diverged: Callable[[list[float]], bool] | None = None,
    snapshots: tuple[int, ...] = (),
    progress: Progress | None = None,
) -> Trace:
    """Adam on ``parameter`` for ``steps`` updates; ``project`` is applied before each evaluation.

    ``loss(parameter)`` returns the value to minimise and the one to log. ``plateau=(window,
    share)`` stops when the last ``window`` steps improved the logged loss by less than ``share``
    of the gain so far; without it every step is run. A run that is killed and started again with
    the same ``checkpoint`` ends in the same result as an undisturbed one.
    """
    parameter = parameter.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([parameter], lr=schedule.lr)
    losses: list[float] = []
    kept: dict[int, Tensor] = {}
    first, spent, stopped = 0, 0.0, "budget"
    if state := load_state(checkpoint, key):
        parameter.data.copy_(state["parameter"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        losses, kept, first = state["losses"], state["snapshots"], state["step"]
        spent = state["seconds"]
    begin = time.perf_counter() - spent
    for step in range(first, steps + 1):
        with torch.no_grad():
            project(parameter)
        if step in snapshots:
            kept[step] = parameter.detach().clone()
        due = step > first and (step % checkpoint_every == 0 or step == steps)
        if checkpoint is not None and due:
            save_state(
                checkpoint,
                {
                    "key": key,
                    "step": step,
                    "parameter": parameter.detach(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "losses": losses,
                    "snapshots": kept,
                    "seconds": time.perf_counter() - begin,
                },
            )
        last = step == steps
        with torch.set_grad_enabled(not last):
            value, logged = loss(parameter)
        losses.append(logged)
        if progress is not None:
            progress(step, steps, logged)
        if not math.isfinite(logged):
            raise ValueError(f"the loss is {logged} after {step} steps: lower the learning rate")
        if last:
            break
        if diverged is not None and diverged(losses):
            stopped = "diverged"
            break
        if plateau is not None and _flat(losses, *plateau):
            stopped = "plateau"
            break
        optimizer.param_groups[0]["lr"] = schedule(step)
        (parameter.grad,) = torch.autograd.grad(value, parameter)
        optimizer.step()
    return Trace(
        parameter.detach(),
        losses,
        len(losses) - 1,
        stopped,
        kept,
        time.perf_counter() - begin,
    )


def _flat(losses: list[float], window: int, share: float) -> bool:
    if len(losses) < 2 * window:
        return False
    recent = sum(losses[-window:]) / window
    earlier = sum(losses[-2 * window : -window]) / window
    gain = losses[0] - recent
    return earlier - recent < share * max(gain, 0.0)
