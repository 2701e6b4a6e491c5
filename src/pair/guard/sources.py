"""Where pictures come from: files, folders, lists, WebDataset shards.

A list is a .txt file with a path per line, or a .csv or .jsonl file whose column ``path`` names
the file and whose other columns become metadata; relative paths are relative to the list. A shard
is a .tar file: members with the same name up to the first dot belong together, the picture with
its ``.json`` (metadata), ``.txt`` (metadata "text") and ``.cls`` (metadata "class"). ``{000..127}``
in a name counts.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pair.guard.plan import named_like_image

LISTS = (".txt", ".csv", ".jsonl")
MAX_BYTES = 256 * 2**20  # of one file
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TEXTS = {".json", ".txt", ".cls"}


@dataclass
class Source:
    """One picture to come: its uri, how to get its bytes, and what is known about it."""

    uri: str
    read: Callable[[], bytes]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Unreadable:
    """A source that cannot even be listed."""

    uri: str
    reason: str


def find(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Source | Unreadable]:
    """All sources below ``paths``, folders in order of name.

    Raises ``ValueError`` if a path does not exist.
    """
    given = [Path(p) for path in paths for p in expand(os.fspath(path))]
    for path in given:
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
    for path in given:
        yield from _find(Path(os.path.abspath(path)))


def expand(text: str) -> list[str]:
    """``a-{08..10}.tar`` -> ``a-08.tar``, ``a-09.tar``, ``a-10.tar``."""
    if os.path.exists(text) or not _BRACES.search(text):
        return [text]
    pieces = _BRACES.split(text)
    ranges = []
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        ranges.append([f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)])
    return [
        "".join(itertools.chain(*itertools.zip_longest(pieces[::3], numbers, fillvalue="")))
        for numbers in itertools.product(*ranges)
    ]


def read(uri: str) -> bytes:
    """The bytes behind a uri of :func:`find`."""
    if os.path.isfile(uri):
        return read_file(uri)
    shard, mark, member = uri.partition(".tar#")
    if not mark:
        raise FileNotFoundError(2, "No such file", uri)
    with tarfile.open(shard + ".tar") as tar:
        try:
            handle = tar.extractfile(member)
        except KeyError:
            handle = None
        if handle is None:
            raise FileNotFoundError(2, "No such member of the shard", uri)
        return handle.read(MAX_BYTES + 1)


def read_file(path: str) -> bytes:
    """Refuses pipes and the like, which could be read for ever."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, "this is not a regular file")
    if status.st_size > MAX_BYTES:
        raise OSError(0, f"the file has more than {MAX_BYTES >> 20} MB")
    with open(path, "rb") as handle:
        return handle.read()


def _find(path: Path) -> Iterator[Source | Unreadable]:
    if path.is_dir():
        yield from _folder(path)
    elif path.suffix.lower() == ".tar":
        yield from _shard(path)
    elif path.suffix.lower() in LISTS:
        yield from _list(path)
    else:
        yield _file(path)


def _file(path: Path, meta: dict[str, Any] | None = None) -> Source:
    return Source(str(path), lambda: read_file(str(path)), meta or {})


def _folder(path: Path) -> Iterator[Source | Unreadable]:
    """Pictures and shards below a folder; links to folders are not followed."""
    errors: list[OSError] = []
    for where, folders, names in os.walk(path, onerror=errors.append):
        folders.sort()
        for name in sorted(names):
            if named_like_image(name):
                yield _file(Path(where, name))
            elif name.endswith(".tar"):
                yield from _shard(Path(where, name))
        while errors:
            error = errors.pop()
            yield Unreadable(str(error.filename), f"the folder cannot be read: {error.strerror}")


def _list(path: Path) -> Iterator[Source | Unreadable]:
    for number, row in _list_rows(path):
        name = row.pop("path", None) or row.pop("uri", None)
        if not isinstance(name, str) or not name:
            yield Unreadable(f"{path}:{number}", "the line names no file (column 'path')")
        else:
            yield _file(Path(os.path.abspath(path.parent / name)), row)


def _list_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        if path.suffix.lower() == ".csv":
            for number, row in enumerate(csv.DictReader(handle), 2):
                yield number, {k: v for k, v in row.items() if k and v not in (None, "")}
            return
        for number, line in enumerate(handle, 1):
            text = line.strip()
            if not text:
                continue
            if path.suffix.lower() == ".txt":
                yield number, {"path": text}
                continue
            try:
                found = json.loads(text)
            except (ValueError, RecursionError):
                found = None
            yield number, found if isinstance(found, dict) else {}


def _shard(path: Path) -> Iterator[Source | Unreadable]:
    """Members are read in order, once; the samples of a shard must lie together, as they do."""
    try:
        with tarfile.open(path, "r|*") as tar:
            key = ""
            parts: dict[str, bytes] = {}
            for member in tar:
                if not member.isfile():
                    continue
                folder, base = os.path.split(member.name)
                stem, _, suffix = base.partition(".")
                if (this := f"{folder}/{stem}") != key:
                    yield from _sample(path, parts)
                    key, parts = this, {}
                tail = os.path.splitext(suffix and f".{suffix}")[1] or f".{suffix}"
                wanted = named_like_image(base) or tail.lower() in _TEXTS
                if wanted and member.size > MAX_BYTES:
                    yield Unreadable(
                        f"{path}#{member.name}", f"the file has more than {MAX_BYTES >> 20} MB"
                    )
                elif wanted:
                    handle = tar.extractfile(member)
                    parts[member.name] = b"" if handle is None else handle.read()
            yield from _sample(path, parts)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Unreadable(str(path), f"the shard is damaged or cut off: {error}")


def _sample(path: Path, parts: dict[str, bytes]) -> Iterator[Source | Unreadable]:
    meta: dict[str, Any] = {}
    for name, data in parts.items():
        suffix = os.path.splitext(name)[1].lower()
        text = data.decode("utf-8", "replace")
        if suffix == ".txt":
            meta["text"] = text.strip()
        elif suffix == ".cls":
            meta["class"] = text.strip()
        elif suffix == ".json":
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):
                yield Unreadable(f"{path}#{name}", "the metadata is not JSON")
                continue
            meta.update(values if isinstance(values, dict) else {"json": values})
    for name, data in parts.items():
        if named_like_image(name):
            yield Source(f"{path}#{name}", partial(bytes, data), meta)
