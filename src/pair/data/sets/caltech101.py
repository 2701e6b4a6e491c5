"""Caltech-101, by the held-out rule of :mod:`pair.data.splits` that the shipped models obey."""

from __future__ import annotations

from pathlib import Path

from pair.data.sets.base import Dataset, Record, Source, need, verify
from pair.data.splits import caltech101

ORIGIN = "get caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02"


def read(root: Path, protocol: str, seed: int) -> Dataset:
    places = ["accordion", "101_ObjectCategories", "caltech-101/101_ObjectCategories"]
    found = need(root, places, "Caltech-101", ORIGIN)
    folder = root if found.name == places[0] else found
    records = [
        Record(
            f"{p.path.parent.name}/{p.path.stem}",
            p.path,
            (),
            (p.label,) if p.label else (),
            p.split,
        )
        for p in caltech101(folder)
    ]
    views: dict[str, tuple[str, ...]] = {"database": ("gallery", "train")}
    return verify(Dataset("caltech101", protocol, root, seed, tuple(records), views))


SOURCE = Source(
    "caltech101",
    "Caltech-101",
    "CC BY 4.0",
    {"shipped": "the split behind the shipped models: 16 gallery and 8 query photos a class"},
    read,
    {"shipped": {"photos": 9_144, "classes": 99}},
    search={"photo": ("shipped",)},
)
