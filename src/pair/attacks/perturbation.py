"""Invisible noise on the whole image: l_inf PGD per image (PAIR section 5.5), hub variant."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pair.attacks.objectives import Goal, HubGoal, TextGoal
from pair.attacks.optimise import Progress
from pair.attacks.wrappers import EOT


@dataclass
class PerturbationResult:
    """``images`` (B, 3, H, W) within ``epsilon`` of the originals; ``losses`` one per step."""

    images: Tensor
    losses: list[float]
    epsilon: float
    gradients_used: int
    seconds: float


def perturb(
    features: Any,
    images: Tensor,
    target: Tensor | Goal,
    *,
    epsilon: float = 4 / 255,
    step: float | None = None,
    steps: int = 100,
    eot: int = 1,
    form: str = "mean_embedding",
    momentum: float = 0.0,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    micro_batch: int = 64,
    progress: Progress | None = None,
) -> PerturbationResult:
    """Sign-gradient descent on every image for itself, projected to the l_inf ball and [0, 1].

    ``step`` defaults to 2.5 * epsilon / steps, but at least epsilon / 10. ``momentum`` averages
    l1-normalised gradients (MI-FGSM). The paper gives neither steps nor step size.
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must lie in (0, 1], got {epsilon}; 4/255 is the paper's")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    generator = generator or torch.Generator().manual_seed(0)
    goal: Goal = TextGoal(target) if isinstance(target, Tensor) else target
    function = EOT(features, eot, form, micro_batch=micro_batch)
    step = max(2.5 * epsilon / steps, epsilon / 10) if step is None else step
    low, high = (images - epsilon).clamp(0, 1), (images + epsilon).clamp(0, 1)
    x = images.clone()
    if random_start:
        noise = torch.rand(images.shape, generator=generator, device=generator.device)
        x = low + noise.to(images) * (high - low)
    velocity = torch.zeros_like(x)
    losses: list[float] = []
    begin = time.perf_counter()
    for k in range(steps + 1):
        last = k == steps
        x = x.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            each = goal(function(x, generator=generator))
        losses.append(float(each.detach().mean()))
        if progress is not None:
            progress(k, steps, losses[-1])
        if last:
            break
        (gradient,) = torch.autograd.grad(each.sum(), x)
        if momentum:
            size = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
            gradient = velocity = momentum * velocity + gradient / size
        x = torch.minimum(torch.maximum(x.detach() - step * gradient.sign(), low), high)
    used = steps * len(images) * eot
    return PerturbationResult(x, losses, epsilon, used, time.perf_counter() - begin)


def hub(features: Any, image: Tensor, queries: Tensor, **options: Any) -> PerturbationResult:
    """One image (1, 3, H, W) made near to many queries (Q, D) at once: an adversarial hub."""
    return perturb(features, image, HubGoal(queries), **options)
