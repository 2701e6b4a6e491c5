"""Pictures into a collection: read ahead, skip what is there, purify, embed, commit.

Reading threads hash and decode the next pictures while the models compute; rows are committed in
groups. Memory holds a few batches of small views, and one full-size picture per thread.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pair import files
from pair.guard import sources
from pair.guard.models import Features, Models
from pair.guard.pipeline import image_seed
from pair.guard.sources import Source, Unreadable
from pair.guard.stores import Row, Store, chunks
from pair.images import ImageError, decode

if TYPE_CHECKING:
    from pair.guard.collection import Collection

WORKERS = 2
FAILURES = "failures.jsonl"


@dataclass
class AddReport:
    """Counts of a run: ``seen = added + present + repeated + failed`` when it ran to its end."""

    seen: int = 0
    added: int = 0
    present: int = 0  # in the collection before, or put there by another writer meanwhile
    repeated: int = 0  # same content as another source of this run
    failed: int = 0  # listed in ``failures``
    stopped: bool = False
    failures: Path | None = None


@dataclass
class Item:
    """A picture on its way: what will be its row, its views, or the reason why there are none."""

    source: Source
    row: Row | None = None
    views: list[Tensor] | None = None
    reason: str = ""


def add(
    collection: Collection,
    paths: Sequence[str | os.PathLike[str]],
    *,
    failures: str | os.PathLike[str] | None = None,
    part: tuple[int, int] = (1, 1),
    batch_size: int = 32,
    commit_rows: int = 256,
    index: bool = True,
    committed: Callable[[list[Row]], None] = lambda rows: None,
    progress: Callable[[AddReport], None] = lambda report: None,
    stop: Callable[[], bool] = lambda: False,
) -> AddReport:
    """See :meth:`pair.guard.collection.Collection.add`."""
    number, of = part
    if not 1 <= number <= of:
        raise ValueError(f"part {number} of {of} does not exist")
    if batch_size < 1 or commit_rows < 1:
        raise ValueError("batch_size and commit_rows must be at least 1")
    models, store = collection.models, collection.store
    report = AddReport()
    log = Path(failures) if failures else default_failures(collection.uri)
    started = int(time.time())

    def fail(uri: str, reason: str) -> None:
        report.failed, report.failures = report.failed + 1, log
        append(log, {"uri": uri, "reason": reason, "run": started})

    waiting: list[Row] = []
    known: set[str] = set()  # ids of this run; 32 bytes a picture

    def commit() -> None:
        if waiting:
            inserted = store.insert(waiting)
            report.added += inserted
            report.present += len(waiting) - inserted
            committed(list(waiting))
            waiting.clear()
        progress(report)

    found = (s for i, s in enumerate(sources.find(paths)) if i % of == number - 1)
    reader = Reader(models, store, collection.root, collection.layout.fields)
    for items in ahead(reader, chunks(found, batch_size)):
        report.seen += len(items)
        fresh = []
        for item in items:
            if item.reason:
                fail(item.source.uri, item.reason)
            elif item.row is not None and item.row.id in known:
                report.repeated += 1
            elif item.views is None:
                report.present += 1
            elif item.row is not None:
                known.add(item.row.id)
                fresh.append(item)
        if fresh:
            waiting += rows_of(models, collection.record, fresh)
        if len(waiting) >= commit_rows:
            commit()
        else:
            progress(report)
        if stop():
            report.stopped = True
            break
    commit()
    if index and report.added:
        collection.optimise()
    return report


class Reader:
    """Turns sources into items: bytes, hash, decoded views. Runs in threads."""

    def __init__(self, models: Models, store: Store, root: str, fields: dict[str, str]):
        self.models, self.store, self.root, self.fields = models, store, root, fields

    def __call__(self, found: Iterable[Source | Unreadable]) -> list[Item]:
        items, contents = [], {}
        for entry in found:
            if isinstance(entry, Unreadable):
                items.append(Item(Source(entry.uri, bytes), reason=entry.reason))
                continue
            item = Item(entry)
            items.append(item)
            try:
                data = entry.read()
            except OSError as error:
                item.reason = f"the file cannot be read: {error.strerror or error}"
                continue
            digest = hashlib.sha256(data).hexdigest()
            meta, item.reason = settle(entry.meta, self.fields)
            uri = relative(entry.uri, self.root)
            item.row = Row(id=digest[:32], uri=uri, sha256=digest, meta=meta)
            contents[id(item)] = data
        there = self.store.existing([i.row.id for i in items if i.row is not None])
        for item in items:
            if item.row is not None and not item.reason and item.row.id not in there:
                self._decode(item, contents.pop(id(item)))
        return items

    def _decode(self, item: Item, data: bytes) -> None:
        assert item.row is not None
        try:
            picture = decode(data)
            item.views = self.models.views(picture)
            item.row.height, item.row.width = picture.size
        except ImageError as error:
            item.reason = error.reason
        except (RuntimeError, MemoryError):  # torch's and Python's words for it
            item.reason = "there is not enough memory to scale this picture"


def ahead(
    reader: Callable[[list[Any]], list[Item]], batches: Iterator[list[Any]], depth: int = WORKERS
) -> Iterator[list[Item]]:
    """Read up to ``depth`` batches ahead of the one that is handed out, in order."""
    waiting: deque[Future[list[Item]]] = deque()
    pool = ThreadPoolExecutor(depth)
    try:
        for batch in batches:
            waiting.append(pool.submit(reader, batch))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def rows_of(models: Models, record: dict[str, Any], items: list[Item]) -> list[Row]:
    """Complete rows of decoded items: purified, embedded, signed."""
    count = len(items[0].views or [])
    views = [torch.stack([item.views[v] for item in items if item.views]) for v in range(count)]
    seed = None if record["seed"] == "secret" else int(record["seed"])
    rows = [item.row for item in items if item.row is not None]
    seeds = None if seed is None else [image_seed(seed, row.sha256) for row in rows]
    features: Features = models.features(views, seeds=seeds)
    now = int(time.time() * 1e6)
    prints = {r: record["models"].get(r, {}).get("fingerprint", "") for r in record["models"]}
    model = "+".join(p for r, p in prints.items() if r != "purifier")
    for i, row in enumerate(rows):
        row.added, row.seed = now, record["seed"]
        row.model, row.purifier = model, prints.get("purifier", "")
        for name in ("vector", "vector_raw", "code", "code_raw"):
            values = getattr(features, name)
            setattr(row, name, None if values is None else values[i])
    return rows


def settle(meta: dict[str, Any], fields: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Metadata with declared fields in their types, or the reason why that is impossible."""
    out = dict(meta)
    for name, kind in fields.items():
        if (value := out.get(name)) is None:
            out.pop(name, None)
            continue
        try:
            out[name] = _convert(value, kind)
        except (ValueError, TypeError, KeyError):
            return out, f"the metadata {name} should be of type {kind}, got {str(value)[:40]!r}"
    return out, ""


def _convert(value: Any, kind: str) -> Any:
    if kind == "str":
        return value if isinstance(value, str) else json.dumps(value)
    if kind == "bool":
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
    return int(value) if kind == "int" else float(value)


def relative(uri: str, root: str) -> str:
    """``uri`` as it is stored: relative to the root, if it lies below."""
    if root and uri.startswith(root.rstrip(os.sep) + os.sep):
        return Path(os.path.relpath(uri, root)).as_posix()
    return uri


def read(uri: str, root: str) -> bytes:
    """The bytes of a stored picture. Raises ``OSError`` if it is not there any more."""
    return sources.read(uri if os.path.isabs(uri) or not root else os.path.join(root, uri))


def default_failures(uri: str) -> Path:
    """In the folder of a local collection, else here."""
    folder = Path(uri.rpartition("#")[0])
    return (folder if folder.is_dir() else Path()) / FAILURES


def append(path: Path, row: dict[str, Any]) -> None:
    """As :func:`pair.files.append_line`, but a full disk is left for the commit to report."""
    try:
        files.append_line(path, row)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
