"""Number formats of a training: fp32, bf16, and fp16 with scaled gradients.

Half precision (fp16) has no room for small gradients, so the loss is multiplied by a scale before
the backward pass and the gradients are divided by it afterwards. Where a gradient overflows, the
step is skipped and the scale is halved; after 2,000 steps without overflow it is doubled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST = 2.0**-14  # a scale below it means that no scale helps
INSIDE = 2.0**10  # for gradients that are only followed, not averaged: see ``ascent``


class Precision:
    """Autocast and, for fp16, the scale of the gradients. ``skipped`` counts lost steps."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device, self.skipped = name, device, 0
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        kind = FORMATS[self.name]
        # fp32 is no type that autocast knows; where it is off, any will do.
        there = torch.bfloat16 if kind is torch.float32 else kind
        return torch.autocast(self.device.type, there, enabled=self.name != "fp32")

    def scaled(self, loss: Tensor) -> Tensor:
        """What is to be differentiated in the place of ``loss``."""
        return self.scaler.scale(loss)

    def unscale(self, optimizers: list[torch.optim.Optimizer]) -> bool:
        """Divide the gradients by the scale, and adapt that. False: they overflowed, skip the step.

        All optimisers of a step are skipped together: their gradients come from one loss.
        Gradients that were summed over processes overflow in all of them, pieces tell each other.
        """
        if not self.scaler.is_enabled():
            return True
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        before = self.scaler.get_scale()
        self.scaler.update()
        after = self.scaler.get_scale()
        if after >= before:
            return True
        self.skipped += 1
        if after < LEAST:
            raise ValueError(
                "the gradients overflow in fp16 whatever their scale: use loop.precision = 'bf16' "
                "or lower the learning rate"
            )
        return False

    def figures(self) -> dict[str, float]:
        """For the log."""
        if not self.scaler.is_enabled():
            return {}
        return {"scale": self.scaler.get_scale(), "skipped": self.skipped}

    def state(self) -> dict[str, Any]:
        """For the checkpoint; empty without a scale."""
        if not self.scaler.is_enabled():
            return {}
        return {**self.scaler.state_dict(), "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        if state and self.scaler.is_enabled():
            kept = dict(state)
            self.skipped = int(kept.pop("skipped"))
            self.scaler.load_state_dict(kept)


def half(device: torch.device) -> bool:
    """Whether fp16 is what is computed in just now."""
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def ascent(loss: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``loss`` with respect to ``x``, up to a positive factor.

    For attacks inside a step, which use its sign or its direction. In fp16 the factor keeps small
    values; what overflows all the same counts as no slope.
    """
    if not half(x.device):
        return torch.autograd.grad(loss, x)[0]
    (grad,) = torch.autograd.grad(loss * INSIDE, x)
    return torch.where(grad.isfinite(), grad, torch.zeros_like(grad))


def precisely(loss: Callable[..., Tensor], *values: Any) -> Tensor:
    """``loss(*values)`` in single precision: cross-entropies of bits are not safe in less, and
    GPUs refuse them there."""
    tensors = [v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
    device = next(v.device for v in values if isinstance(v, Tensor))
    with torch.autocast(device.type, enabled=False):
        return loss(*tensors)
