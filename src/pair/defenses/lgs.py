"""Local gradients smoothing (Naseer, Khan and Porikli 2019): dim blocks that are too busy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.defenses.base import Defense

LUMA = (0.299, 0.587, 0.114)


def gradient_magnitude(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W): first-order gradient of the luma, scaled to [0, 1] per image.

    Forward differences; the last row and column see a replicated border. A flat image gives 0.
    """
    luma = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
    grey = (images * luma.view(3, 1, 1)).sum(1, keepdim=True)
    x = F.pad(grey, (0, 1, 0, 1), mode="replicate")
    dx, dy = x[..., :-1, 1:] - grey, x[..., 1:, :-1] - grey
    g = (dx**2 + dy**2 + 1e-12).sqrt()  # the root has no derivative at 0
    low, high = g.amin((2, 3), keepdim=True), g.amax((2, 3), keepdim=True)
    return (g - low) / (high - low).clamp(min=1e-6)


class LGS(Defense):
    """x' = x * clip(1 - lambda * g, 0, 1), with g kept only in blocks of high mean gradient.

    Blocks of ``block`` pixels overlap by ``overlap`` and are laid out until they cover the whole
    image; a block that reaches beyond the border averages over its real pixels only. A block
    fires if its mean gradient exceeds ``threshold``, and a pixel is smoothed by ``smoothing``
    (lambda) if any block on it fires. Statistics are per image.

    ``bridge=False``: the derivative of this formula, block decisions constant (which is exact
    almost everywhere). ``bridge=True`` lets the gradient also pass the clip, whose derivative is
    0 wherever a pixel has gone black, and the decisions (sigmoid of temperature 0.02): an
    attacker should try both.
    """

    TEMPERATURE = 0.02

    def __init__(
        self,
        block: int = 15,
        overlap: int = 5,
        threshold: float = 0.1,
        smoothing: float = 2.3,
        bridge: bool = False,
    ):
        super().__init__()
        if not 0 <= overlap < block:
            raise ValueError(f"overlap must lie in [0, block), got {overlap} for block {block}")
        self.block, self.overlap, self.threshold = block, overlap, threshold
        self.smoothing, self.bridged = smoothing, bridge

    def defend(self, images, generator, join):
        g = gradient_magnitude(images)
        hard, soft = self._kept(g)
        keep = join(hard, soft) if self.bridged else hard
        factor = 1 - self.smoothing * g * keep
        clipped = factor.clamp(0, 1)
        return images * (join(clipped, lambda: factor) if self.bridged else clipped)

    def _kept(self, g: Tensor):
        """Which pixels lie in a block that fires: (B, 1, H, W) of 0/1, and its smooth stand-in."""
        h, w = g.shape[-2:]
        stride = self.block - self.overlap
        extra = [max(0, math.ceil((n - self.block) / stride)) * stride + self.block for n in (h, w)]
        pad = (0, extra[1] - w, 0, extra[0] - h)
        real = F.avg_pool2d(F.pad(torch.ones_like(g[:1]), pad), self.block, stride)
        mean = F.avg_pool2d(F.pad(g, pad), self.block, stride) / real  # (B, 1, rows, cols)
        ones = g.new_ones(1, 1, self.block, self.block)

        def cover(blocks: Tensor) -> Tensor:
            return F.conv_transpose2d(blocks, ones, stride=stride)[..., :h, :w]

        def soft() -> Tensor:  # "or" over the blocks on a pixel, as if they were independent
            return 1 - cover(F.logsigmoid((self.threshold - mean) / self.TEMPERATURE)).exp()

        return (cover((mean > self.threshold).to(g.dtype)) > 0).to(g.dtype), soft
