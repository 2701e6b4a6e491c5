"""Imagenette: ten easy classes of ImageNet; its own train and val."""

from __future__ import annotations

from pathlib import Path

from pair.data.sets.base import Dataset, Record, Source, need, verify
from pair.data.splits import IMAGENETTE, imagenette

ORIGIN = "get imagenette2-320.tgz from https://github.com/fastai/imagenette"


def read(root: Path, protocol: str, seed: int) -> Dataset:
    places = [f"{d}train" for d in ("", "imagenette2/", "imagenette2-320/", "imagenette2-160/")]
    folder = need(root, places, "Imagenette", ORIGIN).parent
    for side in ("train", "val"):
        for wnid in IMAGENETTE:
            need(folder, [f"{side}/{wnid}"], "Imagenette", ORIGIN)
    records = [
        Record(f"{p.split}/{p.path.stem}", p.path, (), (p.label,), p.split)
        for p in imagenette(folder)
    ]
    return verify(Dataset("imagenette", protocol, root, seed, tuple(records)))


SOURCE = Source(
    "imagenette",
    "Imagenette",
    "ImageNet's terms: research and teaching only",
    {"own": "its own train and val"},
    read,
    {"own": {"photos": 13_394, "train": 9_469, "val": 3_925, "classes": 10}},
)
