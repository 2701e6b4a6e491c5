"""Projected gradient ascent on whole images, as adversarial trainings need it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pair.training.precision import ascent


def perturb(
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    bound: float,
    steps: int,
    generator: torch.Generator,
    norm: str = "linf",
    step: float | None = None,
) -> Tensor:
    """PGD that *raises* ``loss`` (images -> scalar) from a random start; stays in [0, 1].

    ``norm="l2"`` bounds the root mean square of the change of each image by ``bound``.
    ``step`` defaults to 2.5 * bound / steps. An image whose loss has no gradient left stays put.
    """
    noise = torch.rand(images.shape, generator=generator).to(images) * 2 - 1
    delta = _project(noise * bound, bound, norm)
    step = 2.5 * bound / steps if step is None else step
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            value = loss((images + delta).clamp(0, 1))
        grad = ascent(value, delta)
        rms = grad.square().mean((1, 2, 3), keepdim=True).sqrt()
        way = grad.sign() if norm == "linf" else grad / rms.clamp(min=1e-12)
        delta = _project(delta + step * way, bound, norm)
    return (images + delta).clamp(0, 1).detach()


def _project(delta: Tensor, bound: float, norm: str) -> Tensor:
    if norm == "linf":
        return delta.clamp(-bound, bound)
    rms = delta.square().mean((1, 2, 3), keepdim=True).sqrt()
    return delta * (bound / rms.clamp(min=1e-12)).clamp(max=1)
