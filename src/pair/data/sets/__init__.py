"""Data sets in their genuine layouts. Each is one module and one line here.

``load(name, root)`` gives a :class:`Dataset` of plain :class:`Record` rows; ``prepare`` checks
everything, writes the index that ``load`` then reads, and counts.
"""

from __future__ import annotations

import os
from pathlib import Path

from pair.data.sets import (
    caltech101,
    coco2014,
    flickr30k,
    folder,
    huggingface,
    imagenet100,
    imagenette,
    lists,
    webdataset,
)
from pair.data.sets.base import (
    Dataset,
    Record,
    Source,
    index_path,
    read_index,
    write_index,
)

__all__ = [
    "SOURCES",
    "Dataset",
    "Record",
    "Source",
    "load",
    "named",
    "prepare",
    "searchable",
    "source",
]

SOURCES: dict[str, Source] = {
    module.SOURCE.name: module.SOURCE
    for module in (
        coco2014,
        flickr30k,
        imagenet100,
        caltech101,
        imagenette,
        folder,
        webdataset,
        huggingface,
    )
}


def source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"no data set {name!r}: use one of {', '.join(SOURCES)}")
    return SOURCES[name]


def load(
    name: str,
    root: str | os.PathLike[str],
    protocol: str | None = None,
    seed: int | None = None,
) -> Dataset:
    """A data set below ``root`` by one of its protocols (default: its first).

    Reads the index that ``pair data prepare`` wrote, else the folder itself (slower, same
    result). ``root`` may be an index file. Without ``seed``: the index's, or 0. Raises
    ``ValueError`` that says which file is missing and where it comes from.
    """
    kind = source(name)
    protocol, root = kind.protocol(protocol), Path(root)
    index = root if root.suffix == ".jsonl" else index_path(root, name, protocol)
    if index.is_file() or root.suffix == ".jsonl":
        found = read_index(index, None if index is root else root)
        if (found.name, found.protocol) != (name, protocol):
            raise ValueError(f"{index} is an index of {found.name} ({found.protocol})")
        if seed in (None, found.seed):
            return found
    return kind.read(root, protocol, seed or 0)


def named(spec: str) -> tuple[str, str | None, Path] | None:
    """``NAME:ROOT`` or ``NAME/PROTOCOL:ROOT`` -> name, protocol, root; None for anything else."""
    kind, colon, root = spec.partition(":")
    name, _, protocol = kind.partition("/")
    return (name, protocol or None, Path(root)) if colon and name in SOURCES else None


def searchable(kind: str) -> list[str]:
    """``NAME/PROTOCOL`` of all data sets that a "text" or "photo" search can be measured on."""
    return [f"{name}/{p}" for name, found in SOURCES.items() for p in found.search.get(kind, ())]


def prepare(
    name: str,
    root: str | os.PathLike[str],
    protocol: str | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
) -> tuple[Dataset, list[Path]]:
    """Read the folder itself, check it, write the index (and, for hashing, list files).

    Returns the data set and the files written: below ``root/pair``, or ``out`` (a folder) where
    the data may not be written to.
    """
    kind = source(name)
    protocol, root = kind.protocol(protocol), Path(root)
    found = kind.read(root, protocol, seed)
    index = index_path(root, name, protocol)
    if out is not None:
        index = Path(out) / index.name
    write_index(found, index)
    written = [index]
    if kind.lists and "database" in found.views:
        written += lists.write(found, index.with_suffix(""))
    return found, written
