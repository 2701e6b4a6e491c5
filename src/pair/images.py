"""Images at the border: decode, orient, convert, resize. The only place where that happens.

Everywhere else an image is a float32 tensor (B, 3, H, W), RGB, in [0, 1].
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from pair.decode import MAX_PIXELS, ImageError, decode
from pair.files import write_atomic
from pair.picture import Picture

__all__ = [
    "MAX_PIXELS",
    "WRITABLE",
    "ImageError",
    "check_images",
    "decode",
    "from_pil",
    "load_batch",
    "load_image",
    "quantise",
    "resize",
    "resize_crop",
    "save_image",
    "shrink",
    "to_pil",
]

TOLERANCE = 1e-6
STRIP = 4_000_000  # pixels that are floats at a time while a picture is made smaller
LONG = 16_384  # above this many pixels a side the half-way result is kept small instead
Bands = list[tuple[int, int, Tensor]]  # see _bands
WRITABLE = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG",
    ".png": "PNG", ".webp": "WEBP",
}  # fmt: skip


def check_images(images: Tensor) -> Tensor:
    """Refuse anything but (B, 3, H, W) floats in [0, 1]; overshoots up to 1e-6 are clamped."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must have shape (B, 3, H, W), got {tuple(images.shape)}; "
            "add a batch dimension with images[None]"
        )
    if 0 in images.shape[-2:]:
        raise ValueError(f"images need at least one pixel, got shape {tuple(images.shape)}")
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
    if target[1] == 1 < target[0]:  # torch (seen in 2.13) repeats the first value down the column
        return resize(images.transpose(-1, -2), target[::-1]).transpose(-1, -2)
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
    """PIL image of any mode -> (3, H, W) float32 in [0, 1], RGB on white, upright."""
    return Picture(ImageOps.exif_transpose(picture)).pixels()


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8-bit PIL image (rounded, not truncated)."""
    array = image.detach().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def load_image(
    source: str | os.PathLike[str] | bytes,
    *,
    size: int | tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Decode a file (or its bytes) to (3, H, W) in [0, 1], RGB, upright; see :mod:`pair.decode`.

    ``size`` gives what ``resize`` would make of the image, without ever holding the full picture
    as floats. Raises :class:`ImageError` for anything that is not a whole picture of at most
    ``max_pixels`` pixels, ``OSError`` if there is no such file or it cannot be read.
    """
    picture = decode(source, max_pixels=max_pixels)
    return picture.upright(picture.pixels()) if size is None else shrink(picture, size)


def shrink(picture: Picture, size: int | tuple[int, int]) -> Tensor:
    """``resize`` of a decoded picture, strip by strip: upright (3, height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    if picture.orientation >= 5:
        height, width = width, height
    h, w = picture.stored_size
    if picture.opaque_bytes and max(h, w) <= LONG:
        return picture.upright(_shrink_bytes(picture, height, width))
    # Antialiased bilinear resizing is separable: strips of rows are first made narrower, then
    # the rows become fewer; the other way round for tall pictures. Either keeps the half-way
    # result small.
    step = max(1, STRIP // max(h, w))
    if w >= h:
        boxes = [(0, y, w, min(h, y + step)) for y in range(0, h, step)]
        strips = [resize(picture.pixels(b)[None], (b[3] - b[1], width)) for b in boxes]
        half = torch.cat(strips, -2)
    else:
        boxes = [(x, 0, min(w, x + step), h) for x in range(0, w, step)]
        strips = [resize(picture.pixels(b)[None], (height, b[2] - b[0])) for b in boxes]
        half = torch.cat(strips, -1)
    return picture.upright(resize(half, (height, width))[0].clamp_(0, 1))


def _shrink_bytes(picture: Picture, height: int, width: int) -> Tensor:
    """:func:`shrink` for ordinary pictures, as stored, by products with bands of weights.

    Few bytes are floats at a time, which is several times faster than turning all of them into
    floats first; same result up to rounding.
    """
    h, w = picture.stored_size
    channels = len(picture.main.getbands())
    whole = picture.samples(0, h) if h * w <= STRIP else None

    def rows(low: int, high: int) -> Tensor:
        part = picture.samples(low, high) if whole is None else whole[low:high]
        return torch.from_numpy(part.reshape(high - low, -1).astype(np.float32))

    # Measured: with more results at a time most of the products would be with zeros.
    steps = [16 if old < 3 * new else 4 for old, new in ((h, height), (w, width))]
    if 6 * h // height * w * channels > STRIP:
        steps[0] = 1
    half = _fewer(rows, _bands(h, height, steps[0])).view(w, channels * height)
    out = _fewer(lambda low, high: half[low:high], _bands(w, width, steps[1]))
    return out.view(channels, height, width).div_(255).clamp_(0, 1).expand(3, -1, -1)


def _fewer(rows: Callable[[int, int], Tensor], bands: Bands) -> Tensor:
    """Filter rows (old, columns), asked for as they are needed, to (columns, new)."""
    filtered = torch.cat([weights @ rows(low, high) for low, high, weights in bands])
    return filtered.t().contiguous()


@lru_cache(128)
def _bands(old: int, new: int, step: int) -> Bands:
    """Weights of the antialiased bilinear filter from ``old`` to ``new`` rows.

    For every ``step`` results: the rows [low, high) that they need and weights (step, rows).
    Single precision throughout, because that is what torch's ``interpolate`` does.
    """
    f = np.float32
    scale = f(old) / f(new)
    support = max(scale, f(1))
    centre = (np.arange(new, dtype=f) + f(0.5)) * scale
    first = np.maximum((centre - support + f(0.5)).astype(int), 0)
    last = np.minimum((centre + support + f(0.5)).astype(int), old)
    bands = []
    for a in range(0, new, step):
        starts, ends, middles = (x[a : a + step, None] for x in (first, last, centre))
        low, high = int(starts[0, 0]), int(ends[-1, 0])
        at = np.arange(low, high)
        weights = f(1) - np.abs((at.astype(f) - middles + f(0.5)) * (f(1) / support))
        weights[(at < starts) | (at >= ends)] = 0
        np.maximum(weights, 0, out=weights)
        weights /= weights.sum(1, keepdims=True)
        bands.append((low, high, torch.from_numpy(weights)))
    return bands


def save_image(
    path: str | os.PathLike[str],
    image: Tensor,
    *,
    size: tuple[int, int] | None = None,
    quality: int = 95,
    mtime_ns: int | None = None,
) -> None:
    """Write (3, H, W) in [0, 1] as .jpg, .png or .webp; the file appears whole or not at all.

    ``size`` = (height, width) resizes first, one channel at a time. JPEG and WebP are written
    with ``quality`` (JPEG without chroma subsampling), PNG without loss. No metadata is written.
    """
    image = check_images(image[None])
    kind = WRITABLE.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"cannot write {path}: the name must end in .jpg, .png or .webp")
    options: dict[str, Any] = {} if kind == "PNG" else {"quality": quality}
    if kind == "JPEG":
        options["subsampling"] = 0
    bands = [
        resize(band, size or tuple(band.shape[-2:])).mul(255).round_().clamp_(0, 255).byte()
        for band in image.detach().cpu().split(1, dim=1)
    ]
    picture = Image.merge("RGB", [Image.fromarray(band[0, 0].numpy()) for band in bands])
    data = io.BytesIO()
    try:
        picture.save(data, kind, **options)
    except (OSError, ValueError) as error:  # JPEG ends at 65,535 pixels a side, WebP at 16,383
        h, w = picture.height, picture.width
        raise ValueError(f"cannot write {path}: {kind} cannot hold {w} x {h} pixels") from error
    write_atomic(path, data.getvalue(), mtime_ns=mtime_ns)


def load_batch(paths: list[Path], size: int) -> Tensor:
    """Decode files to one batch (B, 3, size, size): short side resized, centre cropped."""
    return torch.cat([resize_crop(load_image(p)[None], size) for p in paths]).clamp_(0, 1)


def quantise(images: Tensor) -> Tensor:
    """Round to 8 bits, as any stored image is."""
    return images.mul(255).round().div(255)
