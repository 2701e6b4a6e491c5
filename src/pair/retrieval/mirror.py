"""A picture and its mirror image, encoded together: steadier features without training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.retrieval.encoders import TextImageEncoder


class Mirrored(nn.Module):
    """``encoder`` on each image and on its mirror image: unit features (B, 2 * dim) whose cosine
    with ``encode_text`` is the mean of the two cosines. Twice the encoder's cost.

    Whatever the encoder does not see in an image it does not see in the mirrored one, so views
    that hide a window hide it here too.
    """

    def __init__(self, encoder: TextImageEncoder):
        super().__init__()
        self.encoder = encoder
        self.image_size, self.dim = encoder.image_size, 2 * encoder.dim

    def encode_image(self, images: Tensor) -> Tensor:
        both = [self.encoder.encode_image(x) for x in (images, images.flip(-1))]
        return torch.cat([F.normalize(x, dim=-1) for x in both], -1) / 2**0.5

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.twice(self.encoder.encode_text(texts))

    @staticmethod
    def twice(features: Tensor) -> Tensor:
        """Text features (T, dim) as queries for mirrored images: (T, 2 * dim), unit length."""
        return F.normalize(features, dim=-1).repeat(1, 2) / 2**0.5

    @staticmethod
    def upright(features: Tensor) -> Tensor:
        """The unit features of the image alone: (..., 2 * dim) -> (..., dim)."""
        return F.normalize(features[..., : features.shape[-1] // 2], dim=-1)
