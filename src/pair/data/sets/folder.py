"""Your own pictures: a folder of any depth, with or without captions, with or without classes.

Captions come from ``captions.csv`` (columns ``image`` and ``caption``, a row per caption) or from
``captions.jsonl`` / ``metadata.jsonl`` (``{"file_name": ..., "text": ...}``, ``captions`` for a
list). First-level folders named train, val, test, query or gallery are taken as splits.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pair.data.sets.base import SUFFIXES, Dataset, Record, Source, seeded_split, verify

CAPTIONS = ("captions.csv", "captions.jsonl", "metadata.jsonl")
SPLITS = ("train", "val", "test", "query", "gallery", "validation")
FILE_KEYS = ("image", "file_name", "filename", "file", "path")
TEXT_KEYS = ("caption", "text", "captions", "sentences")


def pick(row: dict[str, Any], keys: tuple[str, ...], where: str) -> Any:
    """The value of the first key that the row has."""
    for key in keys:
        if row.get(key) not in (None, ""):
            return row[key]
    raise ValueError(f"{where}: expected one of the fields {', '.join(keys)}")


def texts_of(value: Any) -> list[str]:
    """A caption or a list of captions, as strings without surplus spaces."""
    values = value if isinstance(value, list | tuple) else [value]
    return [" ".join(str(v).split()) for v in values]


def _captions(path: Path) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    with open(path, newline="", encoding="utf-8-sig") as handle:
        rows: Iterable[Any] = csv.DictReader(handle) if path.suffix == ".csv" else handle
        for number, given in enumerate(rows, 1):
            where = f"{path}, {'row' if path.suffix == '.csv' else 'line'} {number}"
            if isinstance(given, str):
                if not given.strip():
                    continue
                try:
                    given = json.loads(given)  # noqa: PLW2901
                except ValueError as error:
                    raise ValueError(f"{where} is not JSON: {error}") from error
                if not isinstance(given, dict):
                    raise ValueError(f"{where} is no JSON object")
            name = Path(str(pick(given, FILE_KEYS, where))).as_posix()
            out.setdefault(name, []).extend(texts_of(pick(given, TEXT_KEYS, where)))
    return out


def _pictures(root: Path) -> list[Path]:
    """All pictures below ``root`` but those in hidden folders, in order."""
    out = []
    for place, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        out += [
            Path(place, n) for n in sorted(names)
            if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")
        ]  # fmt: skip
    return out


def read(root: Path, protocol: str, seed: int) -> Dataset:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    files = [p.relative_to(root) for p in _pictures(root)]
    if not files:
        raise ValueError(f"{root} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    said = {}
    for name in CAPTIONS:
        if (root / name).is_file():
            said = _captions(root / name)
            present = {p.as_posix() for p in files}
            if lost := sorted(said.keys() - present):
                raise ValueError(f"{root / name} has a caption for {lost[0]}, which is not there")
            break
    named = all(len(p.parts) > 1 and p.parts[0] in SPLITS for p in files)
    ids = {p: p.with_suffix("").as_posix() for p in files}
    if len(set(ids.values())) < len(files):
        ids = {p: p.as_posix() for p in files}
    if named:
        splits = {ids[p]: p.parts[0].replace("validation", "val") for p in files}
    elif protocol == "classes":
        splits = {}
        for label in {p.parent.as_posix() for p in files}:
            own = [ids[p] for p in files if p.parent.as_posix() == label]
            if len(own) < 3:
                raise ValueError(
                    f"{root / label} holds {len(own)} pictures: a class needs three at least "
                    "(training, gallery, query), or use the protocol plain"
                )
            sizes = {"train": 80, "gallery": 10, "query": 10}
            splits |= seeded_split(own, sizes, seed, f"folder/{label}")
    elif len(files) == 1:
        splits = {ids[files[0]]: "test"}
    else:
        sizes = {"train": 95, "val": 5}
        splits = seeded_split(ids.values(), sizes, seed, "folder")
    records = []
    for p in files:
        label = p.parent.relative_to(p.parts[0]).as_posix() if named else p.parent.as_posix()
        if protocol == "classes" and label == ".":
            raise ValueError(f"{root / p} lies in no class folder: use the protocol plain")
        labels = (label,) if protocol == "classes" else ()
        captions = tuple(said.get(p.as_posix(), ()))
        records.append(Record(ids[p], root / p, captions, labels, splits[ids[p]]))
    views: dict[str, tuple[str, ...]] = {}
    if protocol == "classes":
        views = {"database": ("gallery", "train")}
    return verify(Dataset("folder", protocol, root, seed, tuple(records), views))


SOURCE = Source(
    "folder",
    "Your own pictures",
    "yours",
    {
        "plain": "pictures anywhere below, captions where a file has them; 95 % train, 5 % val",
        "classes": "folders are class names; 80 % train, 10 % gallery, 10 % query of each",
    },
    read,
    search={"text": ("plain",), "photo": ("classes",)},
)
