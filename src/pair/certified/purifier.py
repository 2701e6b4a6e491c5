"""Views of an image from each of which one window was removed and rebuilt.

View r depends on the image only through the tokens that mask r shows (assumption A1). A patch
that lies inside the window of mask r therefore cannot change view r at all: Lemma 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.certified.covering import Cover, PatchFamily, pair_masks, window_cover
from pair.generator import MaskedAutoencoder, patchify
from pair.images import check_images, resize
from pair.purifier import Purifier
from pair.retrieval.encoders import ImageEncoder
from pair.tokens import Selection

FILLS = ("window", "whole", "mean", "blur", "drop")


@dataclass
class Views:
    """Unit features of a batch: ``plain`` (B, d) unpurified, ``masked`` (B, R, d)."""

    plain: Tensor
    masked: Tensor

    def scores(self, queries: Tensor) -> Tensor:
        """Cosines with unit queries (Q, d): (Q, B, R + 1), the plain view last."""
        stacked = torch.cat([self.masked, self.plain[:, None]], 1)  # (B, R + 1, d)
        return torch.einsum("qd,brd->qbr", queries, stacked)

    def __getitem__(self, rows) -> Views:
        return Views(self.plain[rows], self.masked[rows])


class CertifiedPurifier(nn.Module):
    """One view per mask of a covering set: ``views(images)`` (B, 3, H, W) -> (B, R, 3, S, S).

    ``fill`` says what takes the place of a hidden window:

    - ``"window"``: the generator's rebuilding, pasted into the untouched visible pixels;
    - ``"whole"``: the generator's image everywhere;
    - ``"mean"``: the generator's mean colour; ``"blur"``: a blur of the visible pixels;
    - ``"drop"``: mean colour, and the encoder also leaves the window out of its pooling (for
      encoders with ``encode_visible`` or a convolutional ``backbone``).

    Deterministic; no view depends on the other images of the batch, up to the rounding that
    :func:`pair.certified.soundness.measure_slack` measures. Images of another size are resized
    first, and the guarantee is about the resized image (A4).
    """

    colour: Tensor

    def __init__(
        self,
        generator: MaskedAutoencoder,
        cover: Cover,
        *,
        fill: str = "window",
        chunk: int = 64,
    ):
        super().__init__()
        if fill not in FILLS:
            raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}")
        c = generator.config
        if (cover.grid, cover.token) != (c.grid, c.patch_size):
            raise ValueError(
                f"the windows are for {cover.grid} x {cover.grid} tokens of {cover.token} px, "
                f"the generator has {c.grid} x {c.grid} of {c.patch_size} px"
            )
        self.autoencoder, self.cover = generator, cover
        self.fill, self.chunk = fill, chunk
        self.register_buffer("colour", torch.tensor(c.mean).view(3, 1, 1), persistent=False)

    @property
    def image_size(self) -> int:
        return self.autoencoder.config.image_size

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "pair-small",
        *,
        patch: float | PatchFamily = 0.35,
        views: int = 9,
        fill: str = "window",
    ) -> CertifiedPurifier:
        """A generator by name with windows for ``patch`` (share of the side, or a family)."""
        return cls.covering(Purifier.from_pretrained(name).autoencoder, patch, views, fill=fill)

    @classmethod
    def covering(
        cls,
        generator: MaskedAutoencoder,
        patch: float | PatchFamily = 0.35,
        views: int = 9,
        *,
        fill: str = "window",
    ) -> CertifiedPurifier:
        """Windows for ``patch`` (share of the side, or a family) on the generator's token grid."""
        c = generator.config
        if not isinstance(patch, PatchFamily):
            patch = PatchFamily.share(patch, c.image_size)
        cover = window_cover(patch, c.image_size, c.patch_size, views)
        return cls(generator.eval().requires_grad_(False), cover, fill=fill)

    def prepare(self, images: Tensor) -> Tensor:
        """Check and resize to (B, 3, S, S): the last step an attacker's pixels share."""
        return resize(check_images(images), self.image_size)

    def views(self, images: Tensor) -> Tensor:
        x = self.prepare(images)
        visible = self.cover.visible.to(x.device)
        return self.render(*_pairs(x, visible)).unflatten(0, (len(x), len(visible)))

    def forward(self, images: Tensor) -> Tensor:
        return self.views(images)

    def render(self, x: Tensor, visible: Tensor) -> Tensor:
        """One view each: images (M, 3, S, S) and masks (M, N) -> (M, 3, S, S) in [0, 1].

        Nothing is computed from hidden tokens, so even NaN there does not reach the result.
        """
        shown = self.pixels(visible)  # (M, 1, S, S)
        if self.fill in ("window", "whole"):
            filled = self._generate(x, visible).clamp(0, 1)
        elif self.fill == "blur":
            filled = self._blur(torch.where(shown, x, torch.zeros_like(x)), shown)
        else:
            filled = self.colour.expand_as(x)
        return filled if self.fill == "whole" else torch.where(shown, x, filled)

    def pixels(self, visible: Tensor) -> Tensor:
        """Token masks (M, N) -> pixel masks (M, 1, S, S)."""
        g, p = self.cover.grid, self.cover.token
        return visible.view(-1, 1, g, g).repeat_interleave(p, 2).repeat_interleave(p, 3)

    def embed(self, encoder: ImageEncoder, images: Tensor) -> Views:
        """Unit features of the plain image and of every view."""
        x = self.prepare(images)
        plain = F.normalize(encoder.encode_image(x), dim=-1)
        visible = self.cover.visible.to(x.device)
        masked = self.encode(encoder, *_pairs(x, visible))
        return Views(plain, masked.unflatten(0, (len(x), len(visible))))

    def embed_pairs(self, encoder: ImageEncoder, images: Tensor) -> Tensor:
        """Unit features of the second round, each view hiding two masks: (B, R, R, d)."""
        x = self.prepare(images)
        r = len(self.cover)
        rows, cols = torch.triu_indices(r, r)
        masks = pair_masks(self.cover.visible)[rows, cols].to(x.device)  # (R(R+1)/2, N)
        if not bool(masks.any(1).all()):
            raise ValueError("two windows together hide the whole image: use more views")
        half = self.encode(encoder, *_pairs(x, masks)).unflatten(0, (len(x), len(masks)))
        full = half.new_empty(len(x), r, r, half.shape[-1])
        full[:, rows, cols], full[:, cols, rows] = half, half
        return full

    def encode(self, encoder: ImageEncoder, x: Tensor, visible: Tensor) -> Tensor:
        """Unit features (M, d) of one view per row."""
        parts = []
        for images, masks in zip(x.split(self.chunk), visible.split(self.chunk), strict=True):
            view = self.render(images, masks)
            if self.fill == "drop":
                features = encode_visible(encoder, view, self.pixels(masks))
            else:
                features = encoder.encode_image(view)
            parts.append(F.normalize(features, dim=-1))
        return torch.cat(parts)

    def _generate(self, x: Tensor, visible: Tensor) -> Tensor:
        model = self.autoencoder
        tokens = patchify(x, self.cover.token)
        out = torch.zeros_like(tokens)
        for rows in _same_count(visible):  # equal counts need no packing
            for part in rows.split(self.chunk):
                seen, hidden = Selection.of(visible[part]), Selection.of(~visible[part])
                states = model.states(seen.take(tokens[part]), seen)
                if self.fill == "whole":
                    out[part] = model.predict(states)
                elif hidden.count:  # visible tokens keep their pixels: predict the window only
                    out[part] = hidden.put(out[part], model.predict(states, hidden))
        return model.to_image(out)

    def _blur(self, x: Tensor, shown: Tensor) -> Tensor:
        """Gaussian-weighted mean of the visible pixels, the mean colour where none is near."""
        size = self.image_size
        at = torch.arange(size, dtype=x.dtype, device=x.device)
        kernel = torch.exp(-((at[:, None] - at) ** 2) / (2 * (size / 16) ** 2))
        weight = kernel @ shown.to(x.dtype) @ kernel
        tiny = 1e-3
        return (kernel @ x @ kernel + tiny * self.colour) / (weight + tiny)


def encode_visible(encoder: ImageEncoder, images: Tensor, shown: Tensor) -> Tensor:
    """Features of images (M, 3, S, S) whose hidden pixels, ``~shown``, the encoder leaves out.

    Uses the encoder's own ``encode_visible(images, shown)`` where it has one (a ViT drops its
    tokens); a convolutional encoder averages its last map over the visible share of each cell.
    The hidden pixels must already have been replaced: a map's cells see beyond their borders.
    """
    if hasattr(encoder, "encode_visible"):
        return encoder.encode_visible(images, shown)
    backbone = getattr(encoder, "backbone", None)
    if not hasattr(backbone, "feature_map"):
        raise ValueError("fill 'drop' needs an encoder with encode_visible or a ResNet backbone")
    size = encoder.image_size
    images = resize(images, size)
    cells = backbone.feature_map((images - encoder.mean) / encoder.std)  # type: ignore
    weight = F.adaptive_avg_pool2d(shown.to(cells.dtype), cells.shape[-2:])  # (M, 1, h, w)
    pooled = (cells * weight).sum((2, 3)) / weight.sum((2, 3))
    head = getattr(encoder, "image_projection", None) or encoder.head  # type: ignore
    return head(pooled)


def _pairs(x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Every image with every mask, image by image: (B*R, 3, S, S) and (B*R, N)."""
    return x.repeat_interleave(len(visible), 0), visible.repeat(len(x), 1)


def _same_count(visible: Tensor) -> Iterator[Tensor]:
    counts = visible.sum(1)
    for count in counts.unique():
        yield (counts == count).nonzero()[:, 0]
