"""What an attack will cost, before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pair.attacks.advhash import AdvHashConfig, _adam
from pair.attacks.search import SHARES
from pair.attacks.tth import TTHConfig
from pair.attacks.wrappers import EOT


@dataclass(frozen=True)
class Cost:
    """Sample gradients (one image, one draw, forward and backward) and the time they take."""

    updates: int
    gradients: int
    seconds: float | None = None

    def __str__(self) -> str:
        text = (
            f"{counted(self.updates, 'update')}, at most "
            f"{counted(self.gradients, 'sample gradient')} (one forward "
            "and one backward pass each; one more forward where memory is saved)"
        )
        return text if self.seconds is None else f"{text}, {duration(self.seconds)} here"


def counted(n: int, what: str) -> str:
    """Such as "1 update" or "1,200 updates"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def duration(seconds: float) -> str:
    """About h:mm:ss."""
    if seconds < 1:
        return "less than a second"
    m, s = divmod(round(seconds), 60)
    return f"about {m // 60}:{m % 60:02d}:{s:02d}"


def measure(
    features: Any,
    images: Tensor,
    eot: int = 1,
    *,
    repeats: int = 2,
    micro_batch: int = 64,
    precision: str = "fp32",
    backward: bool = True,
) -> float:
    """Seconds per sample gradient: the best of ``repeats`` steps of at most one micro-batch.

    Without ``backward`` per forward pass, which is all that an attack without gradients needs.
    """
    batch = images[:micro_batch]
    draws = max(1, min(eot, micro_batch // len(batch)))
    function = EOT(features, draws, micro_batch=micro_batch, precision=precision)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        x = batch.clone().requires_grad_(backward)
        begin = time.perf_counter()
        with torch.set_grad_enabled(backward):
            value = function(x, torch.Generator().manual_seed(0)).square().sum()
        if backward:
            torch.autograd.grad(value, x)
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best / (len(batch) * draws)


def estimate(
    config: TTHConfig | AdvHashConfig, images: int, per_gradient: float | None = None
) -> Cost:
    """Upper bound of the cost of a configuration on ``images`` carriers or source photos.

    Restarts count with successive halving; TTH's retry rule could double the steps and is left
    out, because it hardly ever fires.
    """
    if isinstance(config, AdvHashConfig) and config.optimiser == "adam":
        config = _adam(config, images)
        if config.restarts:  # its own start takes part
            config = replace(config, restarts=("given", *config.restarts))
    if isinstance(config, AdvHashConfig):
        batches = -(-images // config.batch)
        updates = config.epochs * batches * config.iterations
        if config.budget is not None:
            updates = min(updates, config.budget)
        gradients = updates * min(config.batch, images) * config.eot
    else:
        updates = halved_steps(config)
        gradients = updates * min(config.carriers or images, images) * config.eot
    return Cost(updates, gradients, None if per_gradient is None else gradients * per_gradient)


def with_places(cost: Cost, grid: int, coarse_steps: int = 30, keep: int = 3) -> Cost:
    """The same with the search for a place before it (:func:`pair.attacks.search`), at most."""
    more = coarse_steps * (grid**2 + min(keep, grid**2))
    share = (cost.updates + more) / cost.updates
    seconds = None if cost.seconds is None else cost.seconds * share
    return Cost(cost.updates + more, round(cost.gradients * share), seconds)


def halved_steps(config: TTHConfig) -> int:
    """Updates of all restarts together."""
    alive, steps, first = max(1, len(config.restarts)), 0, 0
    if alive == 1:
        return config.steps
    for rung, share in enumerate(SHARES):
        last = rung == len(SHARES) - 1
        part = config.steps - first if last else round(share * config.steps)
        steps, first = steps + alive * part, first + part
        alive = 1 if rung >= len(SHARES) - 2 else (alive + 1) // 2
    return steps
