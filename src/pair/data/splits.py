"""Which photo is used for what. One rule, so that no held-out photo ever reaches a training.

Caltech-101: per class, in a seeded order, 16 photos for galleries, 8 for queries where the class
has at least 60 photos, the rest for training. Background photos: 68 held out as advertisements,
the rest trains the generator. Imagenette: its own ``train`` and ``val``. Flickr8k: 100 held out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
BACKGROUND = "BACKGROUND_Google"
FACES = ("Faces", "Faces_easy")
GALLERY, QUERY, QUERY_FROM, ADVERTISEMENTS, FLICKR_HELD_OUT = 16, 8, 60, 68, 100
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Photo:
    """One file: its path, class name ('' if none), data set and split."""

    path: Path
    label: str
    dataset: str
    split: str


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def class_name(folder: str) -> str:
    """'grand_piano' -> 'grand piano'."""
    return folder.replace("_", " ").lower() if folder != "Leopards" else "leopard"


def caltech101(root: Path) -> Iterator[Photo]:
    """Photos of Caltech-101 laid out as ``root/<class>/<image>.jpg``."""
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        files = _files(folder)
        random.Random(f"caltech101/{folder.name}").shuffle(files)
        if folder.name == BACKGROUND:
            splits = ["ads"] * ADVERTISEMENTS
        elif folder.name in FACES:
            splits = []
        else:
            queries = QUERY if len(files) >= QUERY_FROM else 0
            splits = ["gallery"] * GALLERY + ["query"] * queries
        named = folder.name != BACKGROUND and folder.name not in FACES
        label = class_name(folder.name) if named else ""
        for i, path in enumerate(files):
            yield Photo(path, label, "caltech101", splits[i] if i < len(splits) else "train")


def imagenette(root: Path) -> Iterator[Photo]:
    """Photos of Imagenette laid out as ``root/{train,val}/<wnid>/<image>``."""
    for split in ("train", "val"):
        for wnid, name in IMAGENETTE.items():
            for path in _files(root / split / wnid):
                yield Photo(path, name.lower(), "imagenette", split)


def flickr8k(root: Path) -> Iterator[Photo]:
    """Unlabelled photos anywhere under ``root``."""
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    random.Random("flickr8k").shuffle(files)
    for i, path in enumerate(files):
        yield Photo(path, "", "flickr8k", "val" if i < FLICKR_HELD_OUT else "train")


DATASETS = {"caltech101": caltech101, "imagenette": imagenette, "flickr8k": flickr8k}
