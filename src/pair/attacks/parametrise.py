"""What the optimiser moves: pixels, one repeated tile, or low frequencies of the patch.

Each has ``init(content) -> parameter``, ``render(parameter) -> content (3, h, w)`` and
``project(parameter)``, which puts the parameter back into its range in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Parametrisation(Protocol):
    def init(self, content: Tensor) -> Tensor: ...
    def render(self, parameter: Tensor) -> Tensor: ...
    def project(self, parameter: Tensor) -> None: ...


@dataclass(frozen=True)
class Pixels:
    """Every pixel for itself, clamped to [0, 1] between steps."""

    def init(self, content: Tensor) -> Tensor:
        return content

    def render(self, parameter: Tensor) -> Tensor:
        return parameter

    def project(self, parameter: Tensor) -> None:
        parameter.clamp_(0, 1)


@dataclass(frozen=True)
class Tiles:
    """One (3, tile, tile) tile repeated over the patch: whichever tokens a mask shows, it is there.

    Use the purifier's token size, and an aligned place, for tiles that coincide with tokens.
    """

    height: int
    width: int
    tile: int

    def init(self, content: Tensor) -> Tensor:
        t = self.tile
        tall, wide = math.ceil(self.height / t) * t, math.ceil(self.width / t) * t
        rows = torch.arange(tall, device=content.device) % self.height
        cols = torch.arange(wide, device=content.device) % self.width
        full = content[:, rows][:, :, cols].view(3, tall // t, t, wide // t, t)
        return full.mean((1, 3))

    def render(self, parameter: Tensor) -> Tensor:
        t = self.tile
        repeats = (1, math.ceil(self.height / t), math.ceil(self.width / t))
        return parameter.repeat(repeats)[:, : self.height, : self.width]

    def project(self, parameter: Tensor) -> None:
        parameter.clamp_(0, 1)


def dct_basis(n: int, k: int) -> Tensor:
    """First ``k`` rows of the orthonormal DCT-II matrix of size n: (k, n)."""
    at = (torch.arange(n, dtype=torch.float64) + 0.5) * math.pi / n
    basis = torch.cos(torch.arange(k, dtype=torch.float64)[:, None] * at) * (2 / n) ** 0.5
    basis[0] /= 2**0.5
    return basis.float()


@dataclass(frozen=True)
class LowFrequency:
    """``k`` x ``k`` low-frequency DCT coefficients per channel (DiffBreak's idea).

    The rendered contents are clamped to [0, 1]; gradients pass straight through that clamp.
    """

    height: int
    width: int
    k: int = 12

    def _bases(self, device: torch.device) -> tuple[Tensor, Tensor]:
        k = min(self.k, self.height, self.width)
        return dct_basis(self.height, k).to(device), dct_basis(self.width, k).to(device)

    def init(self, content: Tensor) -> Tensor:
        rows, cols = self._bases(content.device)
        return rows @ content @ cols.T  # (3, k, k)

    def render(self, parameter: Tensor) -> Tensor:
        rows, cols = self._bases(parameter.device)
        content = rows.T @ parameter @ cols
        return content + (content.clamp(0, 1) - content).detach()

    def project(self, parameter: Tensor) -> None:
        pass


def parametrisation(name: str, height: int, width: int) -> Parametrisation:
    """``pixels``, ``tiles:<side>`` or ``dct:<k>``."""
    kind, _, number = name.partition(":")
    if kind == "pixels" and not number:
        return Pixels()
    if kind == "tiles" and number.isdigit():
        return Tiles(height, width, int(number))
    if kind == "dct" and (number.isdigit() or not number):
        return LowFrequency(height, width, int(number or 12))
    raise ValueError(f"unknown parametrisation {name!r}: use pixels, tiles:<side> or dct:<k>")
