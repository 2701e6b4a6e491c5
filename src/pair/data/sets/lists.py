"""The list files of HashNet, CSQ and DeepHash: ``<path> <0/1> x classes``, one line per photo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pair.data.sets.base import Dataset, Record
from pair.files import write_atomic

NAMES = {"train": "train.txt", "query": "test.txt", "database": "database.txt"}


def find(root: Path) -> Path | None:
    """A folder ``lists`` with somebody's train.txt and test.txt below the data set, if any."""
    folder = root / "lists"
    return folder if all((folder / NAMES[k]).is_file() for k in ("train", "query")) else None


def read(path: Path) -> dict[str, tuple[int, ...]]:
    """Stem of the file name -> indices of its labels."""
    out: dict[str, tuple[int, ...]] = {}
    width = 0
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        name, *bits = line.split()
        if not bits or set(bits) - {"0", "1"}:
            raise ValueError(f"{path}, line {number}: expected a path and one 0 or 1 per class")
        if width and len(bits) != width:
            raise ValueError(f"{path}, line {number}: {len(bits)} classes, above it {width}")
        width = len(bits)
        stem = Path(name).stem
        if stem in out:
            raise ValueError(f"{path}, line {number}: {stem} occurs twice")
        out[stem] = tuple(i for i, bit in enumerate(bits) if bit == "1")
    return out


def apply(folder: Path, records: Sequence[Record], title: str) -> list[Record]:
    """The given lists decide: train.txt trains, test.txt queries, database.txt (or the rest) is
    searched. Photos in no list are left out where database.txt exists. The labels must agree."""
    given = {k: read(folder / n) for k, n in NAMES.items() if (folder / n).is_file()}
    by_id = {r.id: r for r in records}
    order = sorted({label for r in records for label in r.labels})
    for name, rows in given.items():
        for stem, columns in rows.items():
            if stem not in by_id:
                raise ValueError(f"{folder / NAMES[name]} lists {stem}, which {title} lacks")
            if max(columns, default=0) >= len(order):
                raise ValueError(
                    f"{folder / NAMES[name]} has more classes than the {len(order)} of {title}"
                )
            if {order[i] for i in columns} != set(by_id[stem].labels):
                raise ValueError(
                    f"{folder / NAMES[name]} gives {stem} other labels than {title}: its columns "
                    "must be the class names in alphabetical order"
                )
    if both := sorted(given["train"].keys() & given["query"].keys()):
        raise ValueError(f"{folder}: {both[0]} is in both train.txt and test.txt")
    out = []
    for r in records:
        if r.id in given["query"]:
            out.append(replace(r, split="query"))
        elif r.id in given["train"]:
            out.append(replace(r, split="train"))
        elif "database" not in given or r.id in given["database"]:
            out.append(replace(r, split="gallery"))
    return out


def write(dataset: Dataset, folder: Path) -> list[Path]:
    """Write the three lists of a data set with labels and a database; returns the files."""
    order = {name: i for i, name in enumerate(dataset.classes)}
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for part, name in NAMES.items():
        lines = []
        for r in dataset.part(part):
            bits = ["0"] * len(order)
            for label in r.labels:
                bits[order[label]] = "1"
            lines.append(f"{r.path.relative_to(dataset.root).as_posix()} {' '.join(bits)}\n")
        write_atomic(folder / name, "".join(lines).encode())
        out.append(folder / name)
    return out
