"""Random models of a few thousand weights: they let the whole machinery run in seconds.

What they score means nothing; a scenario at the scale ``smoke`` says so in its tables.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pair import hub
from pair.data import embedded
from pair.data.prompts import TRAIN_TEMPLATES, sentences
from pair.defenses.denoise import ArnNet, CafdNet
from pair.defenses.network import Network, NetworkConfig
from pair.defenses.patchzero import PyramidNet
from pair.defenses.sac import UNet
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.purifier import Purifier
from pair.retrieval.clip import ClipConfig, SmallClip, build_vocabulary
from pair.retrieval.hashing import HashConfig, HashNet
from pair.retrieval.resnet import ResNetConfig

NETWORKS: dict[str, type[Network]] = {
    "sac": UNet, "patchzero": PyramidNet, "arn": ArnNet, "cafd": CafdNet,
}  # fmt: skip


def folder(name: str, root: Path, size: int) -> Path:
    """The folder of a random model that stands in for ``name``; made on first use."""
    out = root / f"{name}-{size}"
    if not (out / hub.CONFIG).is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(name.encode()))
            build(name, size).save_pretrained(out)
    return out


def build(name: str, size: int):
    """A random model of the kind that the name begins with."""
    kind = name.partition("-")[0]
    backbone = ResNetConfig(layers=(1, 1, 1, 1), width=8)
    if kind == "clip":
        words = tuple(build_vocabulary(sentences(embedded.labels(), TRAIN_TEMPLATES)))
        return SmallClip(
            ClipConfig(size, 16, backbone, text_width=16, text_depth=1, vocabulary=words)
        ).eval()
    if kind == "csq":
        return HashNet(HashConfig(size, 16, backbone, tuple(embedded.labels()))).eval()
    if kind == "pair":
        small = GeneratorConfig(
            size, 8 if size % 8 == 0 else size // 4, 32, 1, 2, 32, 1, 2
        )  # fmt: skip
        return Purifier(MaskedAutoencoder(small)).eval()
    if kind in NETWORKS:
        return NETWORKS[kind](NetworkConfig(image_size=size, width=4)).eval()
    raise ValueError(f"there is no tiny stand-in for a model {name!r}")
