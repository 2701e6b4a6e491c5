"""Tiny random models in folders, small pictures on disk, and collections of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.purifier import Purifier
from pair.retrieval.clip import ClipConfig, SmallClip, build_vocabulary
from pair.retrieval.hashing import HashConfig, HashNet
from pair.retrieval.resnet import ResNetConfig

TINY = ResNetConfig((1, 1, 1, 1), 8)


def save_models(folder: Path, seed: int = 0) -> dict[str, str]:
    """role -> folder name of a tiny random model."""
    torch.manual_seed(seed)
    clip = ClipConfig(
        image_size=32, dim=16, backbone=TINY, text_width=16, text_depth=1, text_heads=2,
        vocabulary=tuple(build_vocabulary(["a red green blue photo"])),
    )  # fmt: skip
    geometry = GeneratorConfig(
        image_size=32, patch_size=8, width=32, depth=1, heads=2,
        decoder_width=32, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    made = {
        "encoder": SmallClip(clip),
        "hasher": HashNet(HashConfig(32, 16, TINY, ("a", "b"), resize="short")),
        "purifier": Purifier(MaskedAutoencoder(geometry)),
    }
    for role, model in made.items():
        model.eval().save_pretrained(folder / role)
    return {role: str(folder / role) for role in made}


def draw(path: Path, number: int, size: tuple[int, int] = (40, 30)) -> Path:
    """A PNG of coloured blocks, another one for each number."""
    blocks = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path, "PNG")
    return path
