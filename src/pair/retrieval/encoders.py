"""What a retrieval target is: a function from images to features, with its own preprocessing.

Your own encoder is any object with these members; nothing needs to be inherited or registered::

    class Mine:
        image_size, dim = 224, 512
        def encode_image(self, images): return my_model(normalise(resize(images)))
        def encode_text(self, texts): return my_text_model(texts)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ImageEncoder(Protocol):
    """Images (B, 3, H, W) in [0, 1] -> features (B, dim), differentiable, any scale."""

    image_size: int
    dim: int

    def encode_image(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class TextImageEncoder(ImageEncoder, Protocol):
    """An image encoder with a text tower in the same space; compared by cosine."""

    def encode_text(self, texts: Sequence[str]) -> Tensor: ...


@runtime_checkable
class HashEncoder(ImageEncoder, Protocol):
    """An image encoder whose features are the ``bits`` real hash outputs before the sign."""

    bits: int
