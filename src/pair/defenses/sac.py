"""SAC, Segment and Complete (Liu et al. 2022): a U-Net finds the patch, squares complete it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.defenses.localise import Localiser
from pair.defenses.network import Network, NetworkConfig, conv_bn, double_size

SIDES = (96, 80, 64, 48, 32)  # on 224 pixels; SAC used 125, 100, 75, 50, 25 on 500
GAMMA, DECAY, ROUNDS = 0.9, 0.7, 15


class UNet(Network):
    """Patch segmenter: (B, 3, H, W) in [0, 1] -> logits (B, 1, H, W); H, W multiples of 16."""

    kind = "sac"

    def __init__(self, config: NetworkConfig | None = None):
        super().__init__(config)
        w = self.config.width
        widths = [w, 2 * w, 4 * w, 8 * w, 8 * w]
        self.first = self._double(3, w)
        self.down = nn.ModuleList(self._double(a, b) for a, b in itertools.pairwise(widths))
        outs = [4 * w, 2 * w, w, w]
        self.up = nn.ModuleList(
            self._double(inside + skip, out)
            for inside, skip, out in zip([8 * w, *outs], widths[-2::-1], outs, strict=False)
        )
        self.last = nn.Conv2d(w, 1, 1)

    @staticmethod
    def _double(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(conv_bn(inside, outside), conv_bn(outside, outside))

    def forward(self, images: Tensor) -> Tensor:
        skips = [self.first(images)]
        for block in self.down:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for block in self.up:
            x = block(torch.cat([skips.pop(), double_size(x)], 1))
        return self.last(x)


def _box_sums(mask: Tensor, side: int) -> Tensor:
    """Sum over every side x side window: (B, H, W) int -> (B, H - side + 1, W - side + 1)."""
    total = F.pad(mask.cumsum(1).cumsum(2), (1, 0, 1, 0))
    return (
        total[:, side:, side:]
        - total[:, :-side, side:]
        - total[:, side:, :-side]
        + total[:, :-side, :-side]
    )


def complete_shape(mask: Tensor, sides: Sequence[int]) -> Tensor:
    """Union of the squares that a mask nearly is: (B, H, W) bool -> (B, H, W) bool.

    A placement of a square of side s has distance s^2 - inside + outside to the mask. Placements
    with distance / s^2 < 1 - gamma are accepted; gamma starts at 0.9 and is multiplied by 0.7
    until one is (at most 15 rounds, per image). Where none ever is, the mask stays as it was.
    Runs on box sums; sides that do not fit are left out.
    """
    _b, h, w = mask.shape
    sides = [s for s in sides if 0 < s <= min(h, w)]
    if not sides:
        return mask
    pixels = mask.long()
    total = pixels.sum((1, 2))[:, None, None]
    relative = [(s * s + total - 2 * _box_sums(pixels, s)).double() / s**2 for s in sides]
    best = torch.stack([r.amin((1, 2)) for r in relative]).amin(0)  # (B,)
    gammas = GAMMA * DECAY ** torch.arange(ROUNDS, dtype=torch.double, device=mask.device)
    accepts = best[:, None] < 1 - gammas  # (B, rounds)
    # The first round that accepts something; gamma 1 accepts nothing.
    first = torch.where(accepts.any(1), gammas[accepts.to(torch.uint8).argmax(1)], 1.0)
    covered = torch.zeros_like(mask)
    for s, r in zip(sides, relative, strict=True):
        corners = (r < 1 - first[:, None, None]).long()
        covered |= _box_sums(F.pad(corners, (s - 1,) * 4), s) > 0
    return torch.where(accepts.any(1)[:, None, None], covered, mask)


class Sac(Localiser):
    """Black out what the U-Net finds, completed to squares.

    ``sides`` are the squares' sides in pixels of the input; by default {96, 80, 64, 48, 32}/224
    of the shorter side, around the two patch sizes that PAIR measures (0.35 and 0.22).
    """

    def __init__(self, detector: UNet, sides: Sequence[int] | None = None, threshold: float = 0.5):
        super().__init__(detector, (0.0, 0.0, 0.0), threshold)
        self.sides = tuple(sides) if sides is not None else None

    def complete(self, mask: Tensor) -> Tensor:
        short = min(mask.shape[-2:])
        sides = self.sides or [max(1, round(s * short / 224)) for s in SIDES]
        return complete_shape(mask[:, 0], sides)[:, None]

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] = "sac-small", **options) -> Sac:
        return cls(UNet.from_pretrained(name), **options).eval()
