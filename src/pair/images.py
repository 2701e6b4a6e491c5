"""Images at the border: decode, orient, convert, resize. The only place where that happens.

Everywhere else an image is a float32 tensor (B, 3, H, W), RGB, in [0, 1].
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

TOLERANCE = 1e-6


def check_images(images: Tensor) -> Tensor:
    """Refuse anything but (B, 3, H, W) floats in [0, 1]; overshoots up to 1e-6 are clamped."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must have shape (B, 3, H, W), got {tuple(images.shape)}; "
            "add a batch dimension with images[None]"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [0, 1], got {images.dtype}; divide by 255")
    if images.numel():
        low, high = images.detach().aminmax()
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also catches NaN
            raise ValueError(
                f"image values must lie in [0, 1], found [{float(low):.6g}, {float(high):.6g}]"
            )
        if low < 0 or high > 1:
            images = images.clamp(0, 1)
    return images


def resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize of (B, 3, H, W) to (size, size) or (height, width)."""
    target = (size, size) if isinstance(size, int) else size
    if tuple(images.shape[-2:]) == target:
        return images
    return F.interpolate(images, target, mode="bilinear", antialias=True, align_corners=False)


def resize_crop(images: Tensor, size: int) -> Tensor:
    """Resize the short side to ``size``, keep the centre: (B, 3, size, size)."""
    h, w = images.shape[-2:]
    scale = size / min(h, w)
    h, w = max(size, round(h * scale)), max(size, round(w * scale))
    images = resize(images, (h, w))
    top, left = (h - size) // 2, (w - size) // 2
    return images[..., top : top + size, left : left + size]


def from_pil(picture: Image.Image) -> Tensor:
    """PIL image -> (3, H, W) float32 in [0, 1], RGB, upright."""
    picture = ImageOps.exif_transpose(picture)
    array = np.array(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).div_(255).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8-bit PIL image (rounded, not truncated)."""
    array = image.detach().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def load_image(path: str | os.PathLike[str]) -> Tensor:
    """Decode a file to (3, H, W) in [0, 1]."""
    with Image.open(Path(path)) as picture:
        picture.load()
        return from_pil(picture)


def load_batch(paths: list[Path], size: int) -> Tensor:
    """Decode files to one batch (B, 3, size, size): short side resized, centre cropped."""
    return torch.cat([resize_crop(load_image(p)[None], size) for p in paths]).clamp_(0, 1)


def quantise(images: Tensor) -> Tensor:
    """Round to 8 bits, as any stored image is."""
    return images.mul(255).round().div(255)
