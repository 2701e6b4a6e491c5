"""Tests of attacks: the literal transcriptions among the benchmarks, and tiny models as files."""

import sys
from pathlib import Path

import pytest
import torch
from attack_models import photos

from pair.images import save_image
from pair.retrieval.clip import ClipConfig, SmallClip
from pair.retrieval.hashing import HashConfig, HashNet
from pair.retrieval.resnet import ResNetConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with two tiny models and some photos."""
    root = tmp_path_factory.mktemp("attack")
    torch.manual_seed(0)
    small = ResNetConfig(layers=(1, 1, 1, 1), width=8)
    words = ("<pad>", "<unknown>", "laptop", "photo")
    clip = ClipConfig(image_size=32, dim=8, backbone=small, text_width=16, text_heads=2,
                      text_depth=1, vocabulary=words)  # fmt: skip
    SmallClip(clip).save_pretrained(root / "clip")
    HashNet(HashConfig(image_size=32, bits=16, backbone=small)).save_pretrained(root / "csq")
    for name, seed in (("ads", 1), ("target", 5)):
        (root / name).mkdir()
        for i, image in enumerate(photos(3, seed)):
            save_image(root / name / f"{name}{i}.png", image)
    return root
