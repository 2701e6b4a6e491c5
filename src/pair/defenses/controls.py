"""Trivial controls: what any serious defense has to beat at the same clean recall."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from pair.defenses.base import Defense, uniform
from pair.images import resize


class Halve(Defense):
    """Resize to a share of each side (default one half) and back, antialiased."""

    def __init__(self, scale: float = 0.5):
        super().__init__()
        if not 0 < scale <= 1:
            raise ValueError(f"scale must lie in (0, 1], got {scale}")
        self.scale = scale

    def defend(self, images, generator, join):
        h, w = images.shape[-2:]
        small = resize(images, (max(1, round(h * self.scale)), max(1, round(w * self.scale))))
        return resize(small, (h, w)).clamp(0, 1)


class Blur(Defense):
    """Gaussian blur, ``sigma`` in pixels, borders replicated."""

    def __init__(self, sigma: float = 1.0):
        super().__init__()
        if sigma <= 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        self.sigma = sigma

    def defend(self, images, generator, join):
        radius = math.ceil(3 * self.sigma)
        at = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-0.5 * (at / self.sigma) ** 2)
        kernel = (kernel / kernel.sum()).expand(3, 1, -1)
        x = F.pad(images, (radius,) * 4, mode="replicate")
        x = F.conv2d(x, kernel[:, :, None], groups=3)
        return F.conv2d(x, kernel[..., None], groups=3).clamp(0, 1)


class MeanBlock(Defense):
    """Fill one square at a random place of each image with that image's mean colour.

    ``side`` is a share of the shorter side. The place is uniform over all that fit.
    """

    random = True

    def __init__(self, side: float = 0.5):
        super().__init__()
        if not 0 < side < 1:
            raise ValueError(f"side must lie strictly between 0 and 1, got {side}")
        self.side = side

    def defend(self, images, generator, join):
        b, _, h, w = images.shape
        side = max(1, round(self.side * min(h, w)))
        room = torch.tensor([h - side + 1, w - side + 1], device=images.device)
        corner = (uniform(b, 2, generator=generator, like=images) * room).long()  # (B, 2)
        top, left = corner[:, 0, None], corner[:, 1, None]
        rows, cols = (torch.arange(n, device=images.device) for n in (h, w))
        in_rows = (rows >= top) & (rows < top + side)  # (B, H)
        in_cols = (cols >= left) & (cols < left + side)  # (B, W)
        block = (in_rows[:, :, None] & in_cols[:, None, :])[:, None]  # (B, 1, H, W)
        return torch.where(block, images.mean((2, 3), keepdim=True), images)
