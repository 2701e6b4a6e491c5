"""JPEG compression as a defense: the real codec forward, a differentiable one backward."""

from __future__ import annotations

import io
import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pair.defenses.base import Defense
from pair.images import from_pil, to_pil

# ITU-T T.81, Annex K: tables K.1 (luminance) and K.2 (chrominance), row by row.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
) + ((99,) * 8,) * 4
# JFIF: RGB -> Y, Cb, Cr, full range.
YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def check_quality(quality: int) -> int:
    if not (isinstance(quality, int) and 1 <= quality <= 100):
        raise ValueError(f"JPEG quality must be a whole number from 1 to 100, got {quality!r}")
    return quality


def quantisation(table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """A base table at a quality, by libjpeg's rule: (8, 8) of whole numbers from 1 to 255."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(table) * scale + 50) // 100).clamp(1, 255)


def dct_matrix() -> Tensor:
    """Orthonormal 8-point DCT-II: (frequency, position)."""
    k, n = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    matrix = torch.cos(math.pi * (2 * n + 1) * k / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def smooth_round(x: Tensor) -> Tensor:
    """round(x) + (x - round(x))^3: near rounding, with a derivative (Shin and Song 2017)."""
    whole = x.round().detach()
    return whole + (x - whole) ** 3


def _plane(plane: Tensor, table: Tensor) -> Tensor:
    """Quantise one plane (B, H, W), centred on 0, H and W multiples of 8."""
    d = dct_matrix().to(plane)
    b, h, w = plane.shape
    blocks = plane.view(b, h // 8, 8, w // 8, 8).transpose(2, 3)  # (B, h, w, 8, 8)
    q = table.to(plane)
    out = d.T @ (smooth_round(d @ blocks @ d.T / q) * q) @ d
    return out.transpose(2, 3).reshape(b, h, w)


def differentiable_jpeg(images: Tensor, quality: int = 75, clamp: bool = True) -> Tensor:
    """JPEG with 4:2:0 chroma, smooth rounding of the coefficients and no entropy coding.

    (B, 3, H, W) in [0, 1] -> the same, differentiable. Within about 1.5/255 of the real codec on
    average. ``clamp=False`` leaves overshoots in place, so that no gradient is lost to them.
    """
    check_quality(quality)
    h, w = images.shape[-2:]
    x = F.pad(images * 255, (0, -w % 16, 0, -h % 16), mode="replicate")
    matrix = torch.tensor(YCC, dtype=x.dtype, device=x.device)
    ycc = torch.einsum("ij,bjhw->bihw", matrix, x)
    y = _plane(ycc[:, 0] - 128, quantisation(LUMINANCE, quality)) + 128
    chroma = F.avg_pool2d(ycc[:, 1:], 2)  # (B, 2, H/2, W/2)
    chroma = _plane(chroma.flatten(0, 1), quantisation(CHROMINANCE, quality)).view_as(chroma)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    out = torch.cat([y[:, None], chroma], 1)
    out = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(matrix), out) / 255
    out = out[..., :h, :w]
    return out.clamp(0, 1) if clamp else out


def real_jpeg(images: Tensor, quality: int = 75) -> Tensor:
    """Each image through Pillow's encoder (4:2:0) and decoder, no gradient."""
    out = []
    for image in images.detach():
        buffer = io.BytesIO()
        to_pil(image).save(buffer, "JPEG", quality=quality, subsampling=2)
        with Image.open(buffer) as picture:
            out.append(from_pil(picture))
    return torch.stack(out).to(images)


class Jpeg(Defense):
    """The real codec at ``quality`` (Dziugaite et al. 2016: 75); BPDA through the smooth one."""

    bridged = True

    def __init__(self, quality: int = 75):
        super().__init__()
        self.quality = check_quality(quality)

    def defend(self, images, generator, join):
        real = real_jpeg(images, self.quality)
        return join(real, lambda: differentiable_jpeg(images, self.quality, clamp=False))
