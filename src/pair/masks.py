"""Token masks (PAIR section 4.1, equations 5-6).

A mask is a boolean tensor of shape (B, N) over the N = g*g tokens of an image, row by row.
``True`` means *visible* (m = 1 in the paper), ``False`` means hidden. Every image gets a mask
of its own: the result for one image never depends on its neighbours in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
from torch import Tensor

REDRAWS = 100


class MaskRule(Protocol):
    """Draws masks: ``rule(batch, grid, generator=..., device=...) -> (B, grid*grid) bool``."""

    @property
    def random(self) -> bool:
        """Whether two calls can differ."""
        ...

    def __call__(
        self,
        batch: int,
        grid: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor: ...


def _constant(value: bool):
    # A fact about the rule, not an option: no constructor argument, not part of the config.
    return field(default=value, init=False, repr=False, compare=False)


def _uniform(batch: int, n: int, generator: torch.Generator | None) -> Tensor:
    # Drawn where the generator lives, so that a CPU seed gives the same masks on every device.
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.rand(batch, n, generator=generator, device=device)


def _degenerate(mask: Tensor) -> Tensor:
    return mask.all(1) | ~mask.any(1)


def check_ratio(ratio: float) -> None:
    """Refuse mask ratios at which one of the two passes would see nothing."""
    if not isinstance(ratio, int | float) or not 0.0 < ratio < 1.0:
        raise ValueError(
            f"mask ratio must lie strictly between 0 and 1, got {ratio!r}: at 0 the second pass "
            "and at 1 the first pass would see nothing; use the rule 'none' for one open pass"
        )


@dataclass(frozen=True)
class Bernoulli:
    """Hide each token independently with probability ``ratio`` (equation 6, alpha)."""

    ratio: float = 0.5
    random: bool = _constant(True)

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def __call__(self, batch, grid, *, generator=None, device="cpu"):
        n = grid * grid
        mask = _uniform(batch, n, generator) > self.ratio
        # A draw that hides or shows everything leaves one pass without input. On 14 x 14 tokens
        # that has probability 2^-195; on toy grids it happens, and we draw again.
        for _ in range(REDRAWS):
            bad = _degenerate(mask)
            if not bool(bad.any()):
                return mask.to(device)
            mask[bad] = _uniform(int(bad.sum()), n, generator) > self.ratio
        # Ratios next to 0 or 1 would be drawn for ever: turn one token of such a row over.
        bad = _degenerate(mask).nonzero()[:, 0]
        token = _uniform(len(bad), n, generator).argmax(1)
        mask[bad, token] = ~mask[bad, token]
        return mask.to(device)


@dataclass(frozen=True)
class ExactCount:
    """Hide exactly ``round(ratio * N)`` tokens, chosen uniformly.

    ``shared=True`` uses one mask for the whole batch, as the authors' released code does; it
    breaks the independence of images and exists only to reproduce that code.
    """

    ratio: float = 0.5
    shared: bool = False
    random: bool = _constant(True)

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def __call__(self, batch, grid, *, generator=None, device="cpu"):
        n = grid * grid
        hidden = min(max(round(self.ratio * n), 1), n - 1)
        noise = _uniform(1 if self.shared else batch, n, generator)
        mask = torch.ones_like(noise, dtype=torch.bool)
        mask.scatter_(1, noise.argsort(1)[:, :hidden], False)
        return mask.expand(batch, n).clone().to(device)


@dataclass(frozen=True)
class FixedPattern:
    """One known mask for every image (the ablation "fixed mask" of Table 3).

    ``pattern`` is ``"checkerboard"``, ``"rows"``, ``"columns"`` or ``"seed:<int>"`` (one frozen
    random draw with exactly half of the tokens hidden).
    """

    pattern: str = "checkerboard"
    random: bool = _constant(False)

    def __post_init__(self) -> None:
        name = self.pattern
        seeded = name.startswith("seed:") and name.removeprefix("seed:").isdecimal()
        if name not in ("checkerboard", "rows", "columns") and not seeded:
            raise ValueError(
                f"unknown fixed pattern {name!r}: use checkerboard, rows, columns or seed:<int>"
            )

    def __call__(self, batch, grid, *, generator=None, device="cpu"):
        rows = torch.arange(grid).view(-1, 1).expand(grid, grid)
        cols = rows.T
        if self.pattern == "checkerboard":
            mask = (rows + cols) % 2 == 0
        elif self.pattern == "rows":
            mask = rows % 2 == 0
        elif self.pattern == "columns":
            mask = cols % 2 == 0
        else:
            seeded = torch.Generator().manual_seed(int(self.pattern.removeprefix("seed:")))
            mask = ExactCount(0.5)(1, grid, generator=seeded)
        return mask.reshape(1, -1).expand(batch, -1).clone().to(device)


@dataclass(frozen=True)
class NoMask:
    """Every token visible (the ablation "reconstruction" of Table 3; one pass only)."""

    random: bool = _constant(False)

    def __call__(self, batch, grid, *, generator=None, device="cpu"):
        return torch.ones(batch, grid * grid, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class WindowMix:
    """Training rule: hide one random rectangle of tokens, or a random exact share.

    With probability ``windows`` the hidden set of an image is one rectangle whose sides are
    drawn between ``low`` and ``high`` (shares of the grid side) anywhere on the grid; otherwise
    it is :class:`ExactCount`. Prepares a generator for covering masks.
    """

    ratio: float = 0.5
    windows: float = 0.5
    low: float = 0.35
    high: float = 0.75
    random: bool = _constant(True)

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if not 0 <= self.windows <= 1:
            raise ValueError(f"windows is a share between 0 and 1, got {self.windows}")
        if not 0 < self.low <= self.high < 1:
            raise ValueError(
                f"window sides need 0 < low <= high < 1, got low {self.low} and high {self.high}"
            )

    def __call__(self, batch, grid, *, generator=None, device="cpu"):
        mask = ExactCount(self.ratio)(batch, grid, generator=generator).view(batch, grid, grid)
        pick = _uniform(batch, 5, generator)
        for i in range(batch):
            use, h, w, y, x = pick[i].tolist()
            if use >= self.windows:
                continue
            # At least one token hidden; on toy grids also at least one left to see.
            sides = (round(grid * (self.low + (self.high - self.low) * s)) for s in (h, w))
            h, w = (min(max(side, 1), max(grid - 1, 1)) for side in sides)
            top, left = int(y * (grid - h + 1)), int(x * (grid - w + 1))
            mask[i] = True
            mask[i, top : top + h, left : left + w] = False
        return mask.view(batch, -1).to(device)


def complement(mask: Tensor) -> Tensor:
    """The mask of the second pass, m' = 1 - m (equation 13)."""
    return ~mask


def rule_from_config(config: dict) -> MaskRule:
    """Build a rule from ``{"rule": "bernoulli"|"exact"|"fixed"|"none"|"windows", ...}``."""
    kinds = {
        "bernoulli": Bernoulli,
        "exact": ExactCount,
        "fixed": FixedPattern,
        "none": NoMask,
        "windows": WindowMix,
    }
    options = dict(config)
    name = options.pop("rule", None)
    if name not in kinds:
        raise ValueError(f"unknown mask rule {name!r}: use one of {', '.join(kinds)}")
    known = [f.name for f in fields(kinds[name]) if f.init]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(
            f"mask rule {name!r} has no option {unknown[0]!r}; known: {', '.join(known) or 'none'}"
        )
    return kinds[name](**options)


def rule_to_config(rule: MaskRule) -> dict:
    """Inverse of :func:`rule_from_config`."""
    match rule:
        case Bernoulli():
            return {"rule": "bernoulli", "ratio": rule.ratio}
        case ExactCount():
            return {"rule": "exact", "ratio": rule.ratio, "shared": rule.shared}
        case FixedPattern():
            return {"rule": "fixed", "pattern": rule.pattern}
        case NoMask():
            return {"rule": "none"}
        case WindowMix():
            sides = {"low": rule.low, "high": rule.high}
            return {"rule": "windows", "ratio": rule.ratio, "windows": rule.windows, **sides}
    raise ValueError(f"{type(rule).__name__} is not one of the rules that a config can name")
