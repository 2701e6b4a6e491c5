"""What a data set is: records, parts, an index file; and how each kind of source is declared.

A source (one module each) turns a folder in its genuine layout into a :class:`Dataset` by one of
its *protocols*, that is, ways to split it. Splits are seeded, so they are the same everywhere;
``prepare`` also writes them down as an index, which is then read instead of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pair.files import write_atomic

FORMAT = 1
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True, slots=True)
class Record:
    """One photo: where its bytes lie, what is said about it, what it is used for.

    ``path`` is a file; with ``size`` >= 0 its bytes ``offset .. offset + size`` (a shard); a
    folder of Hugging Face's ``datasets`` with ``offset`` as row number.
    """

    id: str
    path: Path
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    split: str = "train"
    offset: int = 0
    size: int = -1


@dataclass(frozen=True)
class Dataset:
    """Records of one data set under one protocol. ``views`` name parts made of several splits."""

    name: str
    protocol: str
    root: Path
    seed: int
    records: tuple[Record, ...]
    views: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader of results must know

    def __len__(self) -> int:
        return len(self.records)

    def part(self, name: str) -> list[Record]:
        """Records of a split ("train", "val", "test", "query", "gallery") or a view."""
        splits = self.views.get(name, (name,))
        found = [r for r in self.records if r.split in splits]
        if not found:
            known = ", ".join(sorted({r.split for r in self.records} | self.views.keys()))
            raise ValueError(f"{self.name} ({self.protocol}) has no part {name!r}: it has {known}")
        return found

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all labels, sorted."""
        return tuple(sorted({label for r in self.records for label in r.labels}))

    def counts(self) -> dict[str, int]:
        """Records per split and view, captions, classes."""
        splits = Counter(r.split for r in self.records)
        out = {"photos": len(self.records), **{k: splits[k] for k in sorted(splits)}}
        out |= {k: sum(splits[s] for s in v) for k, v in self.views.items()}
        out["captions"] = sum(len(r.captions) for r in self.records)
        out["classes"] = len(self.classes)
        return out

    def fingerprint(self) -> str:
        """SHA-256 of ids, splits, captions and labels; where the files lie does not count."""
        digest = hashlib.sha256()
        for r in self.records:
            digest.update(repr((r.id, r.split, r.captions, r.labels)).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """A kind of data set: its protocols (the first is the default) and how to read its folder."""

    name: str
    title: str
    licence: str
    protocols: dict[str, str]
    read: Callable[[Path, str, int], Dataset]
    published: dict[str, dict[str, int]] = field(default_factory=dict)
    lists: bool = False  # hashing lists are usual for it
    # "text" and "photo" -> the protocols that such a search is measured by, the usual one first
    search: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def protocol(self, name: str | None) -> str:
        if name is None:
            return next(iter(self.protocols))
        if name not in self.protocols:
            raise ValueError(
                f"{self.name} has no protocol {name!r}: use one of {', '.join(self.protocols)}"
            )
        return name


def need(root: Path, candidates: Sequence[str], title: str, origin: str) -> Path:
    """The first candidate that exists below ``root``; else one sentence on what to get where."""
    if not root.is_dir():
        raise ValueError(f"{title}: {root} is not a folder")
    for name in candidates:
        if (root / name).exists():
            return root / name
    others = f" (also looked for {', '.join(candidates[1:])})" if len(candidates) > 1 else ""
    raise ValueError(f"{title} in {root} lacks {candidates[0]}{others}: {origin}")


def files_of(folder: Path) -> set[str]:
    """Names of the pictures directly in a folder, by one listing."""
    with os.scandir(folder) as entries:
        return {e.name for e in entries if Path(e.name).suffix.lower() in SUFFIXES}


def all_present(wanted: Iterable[str], folder: Path, title: str, origin: str) -> None:
    """Refuse where a picture that the annotations name is not in ``folder``."""
    there = files_of(folder)
    if lost := sorted(set(wanted) - there):
        more = f" and {len(lost) - 1:,} more" if len(lost) > 1 else ""
        raise ValueError(f"{title}: {folder / lost[0]} is missing{more}: {origin}")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is cut off or not JSON, fetch it again: {error}") from error


def seeded_split(ids: Iterable[str], sizes: dict[str, int], seed: int, salt: str) -> dict[str, str]:
    """id -> split: ``ids`` in a seeded order are dealt out in the given sizes.

    Where there are not exactly as many ids as the sizes add up to, the sizes are scaled: each
    but the first gets its share, at least one; the first gets the rest.
    """
    order = sorted(ids)
    if len(order) < len(sizes):
        raise ValueError(f"{salt}: {len(order)} photos cannot fill {len(sizes)} splits")
    random.Random(f"{salt}/{seed}").shuffle(order)
    total = sum(sizes.values())
    names, out, at = list(sizes), {}, 0
    for name in names[1:]:
        count = max(1, sizes[name] * len(order) // total)
        out.update(dict.fromkeys(order[at : at + count], name))
        at += count
    out.update(dict.fromkeys(order[at:], names[0]))
    return out


def verify(dataset: Dataset) -> Dataset:
    """Refuse duplicate ids, records without what their protocol needs, and empty captions."""
    seen: set[str] = set()
    for r in dataset.records:
        if r.id in seen:
            raise ValueError(f"{dataset.name}: the id {r.id!r} occurs twice")
        seen.add(r.id)
        if not all(c.strip() for c in r.captions):
            raise ValueError(f"{dataset.name}: {r.id} has an empty caption")
    if not dataset.records:
        raise ValueError(f"{dataset.name}: no photos in {dataset.root}")
    return dataset


# --- the index file ----------------------------------------------------------------------------


def index_path(root: Path, name: str, protocol: str) -> Path:
    return root / "pair" / f"{name}.{protocol}.jsonl"


def write_index(dataset: Dataset, path: Path) -> None:
    """One JSON line on the whole, one per record; paths relative to the root where possible."""
    head = {
        "format": FORMAT,
        "name": dataset.name,
        "protocol": dataset.protocol,
        "seed": dataset.seed,
        "root": str(dataset.root.resolve()),
        "views": dataset.views,
        "notes": dataset.notes,
        "photos": len(dataset),
        "sha256": dataset.fingerprint(),
    }
    lines = [json.dumps(head), *(json.dumps(row) for row in _rows(dataset))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def _rows(dataset: Dataset) -> Iterator[list[Any]]:
    for r in dataset.records:
        inside = r.path.is_relative_to(dataset.root)
        path = r.path.relative_to(dataset.root) if inside else r.path
        yield [r.id, path.as_posix(), r.split, r.captions, r.labels, r.offset, r.size]


def read_index(path: Path, root: Path | None = None) -> Dataset:
    """The data set of an index file; ``root`` where the photos have moved since."""
    if not path.is_file():
        raise ValueError(f"no index {path}: make it with 'pair data prepare'")
    try:
        first, *rest = path.read_text("utf-8").splitlines()
        head = json.loads(first)
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}, this version reads {FORMAT}")
        base = Path(root or head["root"])
        records = []
        for line in rest:
            name, where, split, captions, labels, offset, size = json.loads(line)
            records.append(
                Record(name, base / where, tuple(captions), tuple(labels), split, offset, size)
            )
        views = {k: tuple(v) for k, v in head["views"].items()}
        dataset = Dataset(
            head["name"], head["protocol"], base, head["seed"], tuple(records), views,
            tuple(head["notes"]),
        )  # fmt: skip
        if len(records) != head["photos"] or dataset.fingerprint() != head["sha256"]:
            raise ValueError("its records do not match its checksum")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the index {path} is damaged, prepare it again: {error}") from error
    return dataset
