"""Batched augmentation on tensors; every draw comes from the generator that is passed in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def to_float(raw: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float in [0, 1]."""
    return raw.permute(0, 3, 1, 2).float().div_(255)


def crop_flip(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random crop of side ``size`` and horizontal flip, per image: no resampling."""
    b, _, h, w = images.shape
    tops = torch.randint(0, h - size + 1, (b,), generator=generator).tolist()
    lefts = torch.randint(0, w - size + 1, (b,), generator=generator).tolist()
    flips = (torch.rand(b, generator=generator) < 0.5).tolist()
    out = images.new_empty(b, 3, size, size)
    for i, (top, left, flip) in enumerate(zip(tops, lefts, flips, strict=True)):
        crop = images[i, :, top : top + size, left : left + size]
        out[i] = crop.flip(-1) if flip else crop
    return out


def resized_crop(
    images: Tensor,
    size: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.3, 1.0),
) -> Tensor:
    """Random area and aspect crop, resized to ``size``, flipped half of the time, per image."""
    b = len(images)
    u = torch.rand(b, 5, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * u[:, 0]
    ratio = torch.exp((u[:, 1] - 0.5) * 2 * 0.2877)  # 3/4 .. 4/3, log-uniform
    half_w = (area * ratio).sqrt().clamp(max=1.0)
    half_h = (area / ratio).sqrt().clamp(max=1.0)
    x = (u[:, 2] * 2 - 1) * (1 - half_w)
    y = (u[:, 3] * 2 - 1) * (1 - half_h)
    half_w = torch.where(u[:, 4] < 0.5, -half_w, half_w)
    theta = torch.zeros(b, 2, 3)  # drawn where the generator lives
    theta[:, 0, 0], theta[:, 0, 2] = half_w, x
    theta[:, 1, 1], theta[:, 1, 2] = half_h, y
    grid = F.affine_grid(theta, [b, 3, size, size], align_corners=False).to(images.device)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def jitter(images: Tensor, generator: torch.Generator, strength: float = 0.3) -> Tensor:
    """Brightness, contrast and saturation by factors in 1 +- strength."""
    u = 1 + (torch.rand(3, len(images), 1, 1, 1, generator=generator) * 2 - 1) * strength
    u = u.to(images.device)
    images = images * u[0]
    grey = images.mean((1, 2, 3), keepdim=True)
    images = grey + (images - grey) * u[1]
    luma = images.mean(1, keepdim=True)
    return (luma + (images - luma) * u[2]).clamp(0, 1)


def blur(images: Tensor, generator: torch.Generator, share: float = 0.3) -> Tensor:
    """Downscale and upscale a share of the images (factor 0.25 .. 0.6), as thumbnails are."""
    pick = (torch.rand(len(images), generator=generator) < share).to(images.device)
    factor = 0.25 + 0.35 * float(torch.rand(1, generator=generator))
    if not bool(pick.any()):
        return images
    size = images.shape[-1]
    small = F.interpolate(
        images[pick], (round(size * factor),) * 2, mode="bilinear", antialias=True
    )
    out = images.clone()
    out[pick] = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    return out
