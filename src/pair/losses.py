"""Training losses of the generator (PAIR equations 14-17)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

C1 = 1e-4  # (0.01)^2 for images in [0, 1]
C2 = 9e-4  # (0.03)^2


def _tokens(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, C, N, patch*patch)."""
    b, c, h, w = images.shape
    if h % patch or w % patch:
        raise ValueError(f"{h} x {w} pixels do not divide into tokens of side {patch}")
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.transpose(3, 4).reshape(b, c, -1, patch * patch)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def patch_ssim(x: Tensor, y: Tensor, patch: int, per_channel: bool = True) -> Tensor:
    """SSIM of each token (equation 16): (B, 3, H, W) twice, in [0, 1] -> (B, N).

    One uniform window per token. ``per_channel`` takes the statistics of each colour channel and
    averages the three values; otherwise one set of statistics covers all channels (the literal
    reading of "average pixel value"). Variances divide by the number of pixels. Computed in
    float32 (float64 stays); equal inputs give exactly 1.
    """
    if x.shape != y.shape:
        raise ValueError(f"the images differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    a, b = _tokens(_precise(x), patch), _tokens(_precise(y), patch)  # (B, C, N, P)
    if not per_channel:
        a, b = (t.transpose(1, 2).flatten(2)[:, None] for t in (a, b))  # (B, 1, N, C*P)
    mu_a, mu_b = a.mean(-1), b.mean(-1)
    da, db = a - mu_a[..., None], b - mu_b[..., None]
    var_a, var_b, cov = (da * da).mean(-1), (db * db).mean(-1), (da * db).mean(-1)
    top = (2 * mu_a * mu_b + C1) * (2 * cov + C2)
    bottom = (mu_a**2 + mu_b**2 + C1) * (var_a + var_b + C2)
    return (top / bottom).mean(1)


def patch_loss(x: Tensor, y: Tensor, patch: int, per_channel: bool = True) -> Tensor:
    """L_p, the mean of 1 - SSIM over tokens (equation 15). Scalar."""
    return (1 - patch_ssim(x, y, patch, per_channel)).mean()


def semantic_loss(z: Tensor, z_rebuilt: Tensor) -> Tensor:
    """L_s = 1 - cos(D(x), D(x')) averaged over the batch (equation 17). Scalar in [0, 2]."""
    return (1 - F.cosine_similarity(_precise(z), _precise(z_rebuilt), dim=-1)).mean()


def total_loss(l_p: Tensor, l_s: Tensor, beta: float = 1.0) -> Tensor:
    """L = L_p + beta * L_s (equation 14)."""
    return l_p + beta * l_s
