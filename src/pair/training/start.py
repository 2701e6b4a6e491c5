"""Where a training starts from: weights of ours or of others, by name, and what they are.

A generator starts from a model folder of this package, from a folder or repository of
transformers' ViTMAE (``facebook/vit-mae-base``) or from Meta's ``mae_visualize_*.pth``. A
discriminator is a small CLIP or, as ``open_clip:ARCHITECTURE/WEIGHTS``, any model of open_clip.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from pair import hub
from pair.checkpoints import PICKLED, from_hf_vitmae, from_meta_mae
from pair.generator import MaskedAutoencoder
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.openclip import OpenClip, fit

OPEN_CLIP = "open_clip:"
NOTICE = (
    "the weights of MAE (Meta) are licensed CC BY-NC 4.0: what is made from them may not be used "
    "commercially"
)
NON_COMMERCIAL = "CC BY-NC 4.0 (made from the weights of MAE)"


def generator(name: str) -> tuple[MaskedAutoencoder, str]:
    """The generator of that name, and its licence where it binds what is made from it."""
    path = Path(name)
    if path.suffix in (".pth", ".pt"):
        return from_meta_mae(path), NON_COMMERCIAL
    folder = hub.resolve(name, (hub.CONFIG, hub.WEIGHTS, PICKLED))
    if hub.kind_of(folder):
        config = hub.read_config(folder, "generator")
        licence = config.get("licence", "")
        return Purifier.from_pretrained(folder).autoencoder, str(licence)
    return from_hf_vitmae(folder), NON_COMMERCIAL


def open_clip(spec: str) -> OpenClip:
    """See :meth:`pair.retrieval.openclip.OpenClip.from_spec`."""
    return OpenClip.from_spec(spec)


class Critic(Protocol):
    """The frozen image encoder of L_s, for images that need not lie in [0, 1]."""

    module: nn.Module
    pooled: bool  # whether features before the projection exist

    def encode_text(self, texts: list[str]) -> Tensor: ...

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...


class SmallCritic:
    """A small CLIP: its embedding and the features before its projection."""

    pooled = True

    def __init__(self, clip: SmallClip):
        self.clip = clip.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module: nn.Module = self.clip

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.clip.encode_text(texts)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        clip = self.clip
        x = ((images - clip.mean) / clip.std).contiguous(memory_format=torch.channels_last)
        pooled = clip.backbone(x)
        return clip.image_projection(pooled), pooled


class OpenClipCritic:
    """A model of open_clip: its embedding. Images of its own size are not resized."""

    pooled = False

    def __init__(self, clip: OpenClip):
        self.clip = clip
        self.module: nn.Module = clip

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.clip.encode_text(texts)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        clip = self.clip
        # As OpenClip.preprocess, but the losses see reconstructions before they are clamped.
        x = fit(images, clip.size, clip.resize_mode, clip.interpolation, clip.fill)
        return clip.model.encode_image((x - clip.mean) / clip.std), None


def critic(name: str) -> Critic:
    """The discriminator of that name."""
    if name.startswith(OPEN_CLIP):
        return OpenClipCritic(open_clip(name.removeprefix(OPEN_CLIP)))
    return SmallCritic(SmallClip.from_pretrained(name))


def digest(module: nn.Module) -> str:
    """SHA-256 of all weights and buffers."""
    total = hashlib.sha256()
    for key, value in module.state_dict().items():
        total.update(key.encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
