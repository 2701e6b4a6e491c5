"""Print and photograph a patch: random rotation, scale, brightness, contrast, blur, JPEG.

For patches that shall survive the physical world. Everything is differentiable except JPEG,
whose gradient passes straight through.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pair.images import from_pil, to_pil


@dataclass(frozen=True)
class PrintTransform:
    """Ranges of one random print; drawn anew for each image and call.

    ``rotation`` in degrees (+-), ``scale`` as a range of factors (at most 1, the patch keeps its
    box), ``brightness`` added (+-), ``contrast`` as a range of factors, ``blur`` the largest
    Gaussian sigma in pixels, ``jpeg`` the quality (None: no JPEG).
    """

    rotation: float = 10.0
    scale: tuple[float, float] = (0.85, 1.0)
    brightness: float = 0.1
    contrast: tuple[float, float] = (0.8, 1.2)
    blur: float = 0.8
    jpeg: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be a range within (0, 1], got {self.scale}")

    def __call__(
        self, content: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """content (B, 3, h, w), mask (B, h, w) -> the same, as the camera sees them."""
        b = len(content)
        device = generator.device if generator is not None else torch.device("cpu")
        draw = torch.rand(5, b, generator=generator, device=device).to(content)
        angle = (2 * draw[0] - 1) * math.radians(self.rotation)
        factor = self.scale[0] + draw[1] * (self.scale[1] - self.scale[0])
        content, mask = self._turn(content, mask, angle, factor)
        gain = self.contrast[0] + draw[2] * (self.contrast[1] - self.contrast[0])
        lift = (2 * draw[3] - 1) * self.brightness
        content = (content - 0.5) * gain.view(-1, 1, 1, 1) + 0.5 + lift.view(-1, 1, 1, 1)
        if self.blur > 0:
            content = torch.stack(
                [_blur(c, float(s)) for c, s in zip(content, draw[4] * self.blur, strict=True)]
            )
        content = content.clamp(0, 1)
        if self.jpeg is not None:
            content = content + (_jpeg(content, self.jpeg) - content).detach()
        return content, mask

    def _turn(
        self, content: Tensor, mask: Tensor, angle: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.rotation == 0 and self.scale == (1.0, 1.0):
            return content, mask
        h, w = content.shape[-2:]
        cos, sin = angle.cos() / factor, angle.sin() / factor
        zero = torch.zeros_like(cos)
        # Sampling coordinates run over [-1, 1] on both axes: aspect enters the rotation.
        rows = [cos, -sin * h / w, zero, sin * w / h, cos, zero]
        theta = torch.stack(rows, 1).view(-1, 2, 3)
        both = torch.cat([content, mask[:, None].to(content)], 1)
        grid = F.affine_grid(theta, list(both.shape), align_corners=False)
        seen = F.grid_sample(both, grid, padding_mode="border", align_corners=False)
        inside = (grid.abs() <= 1).all(-1).to(content)  # outside the sheet there is no patch
        return seen[:, :3], seen[:, 3] * inside


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of one (3, h, w) with mirrored-edge padding."""
    if sigma < 0.05:
        return image
    radius = min(max(1, math.ceil(3 * sigma)), min(image.shape[1:]) - 1)
    at = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = F.pad(image[:, None], (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1))
    return F.conv2d(x, kernel.view(1, 1, -1, 1))[:, 0]


def _jpeg(images: Tensor, quality: int) -> Tensor:
    out = []
    for image in images.detach():
        buffer = io.BytesIO()
        to_pil(image).save(buffer, format="JPEG", quality=quality)
        with Image.open(buffer) as picture:
            out.append(from_pil(picture))
    return torch.stack(out).to(images)
