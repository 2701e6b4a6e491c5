"""An audit of many pictures: resumable, with a report at the end.

In ``out``: ``work.jsonl`` and ``clean.jsonl`` (findings so far), ``failures.jsonl``, and at the end
``audit.json``, ``audit.csv`` and ``audit.html``. Work of other settings is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pair import files
from pair.guard import conformal, ingest, sources
from pair.guard.audit import STATISTICS, Auditor, Finding
from pair.guard.collection import Collection
from pair.guard.pipeline import image_seed, make_folder
from pair.guard.sources import Source, Unreadable
from pair.guard.stores import chunks
from pair.images import ImageError, decode, shrink

ARRAYS = ("heat", "drops", "plain", "clean")


@dataclass
class Audit:
    """``findings`` with the most suspicious first."""

    findings: list[Finding]
    clean: list[Finding]
    budget: float
    thresholds: dict[str, float] = field(default_factory=dict)
    failed: int = 0
    stopped: bool = False
    read: Callable[[str], bytes] = sources.read

    @property
    def alarms(self) -> int:
        return sum(f.alarm for f in self.findings)

    @property
    def one_window(self) -> int:
        """Hits that lose more than delta with one window. Counted apart from the alarms: no
        budget holds for them, and a patch that lifts a picture by more cannot avoid it."""
        return sum(f.one_window for f in self.findings)

    @property
    def said(self) -> str:
        """What was found: "3 alarms, 5 hits that hang on one window"."""
        hanging = "hit that hangs" if self.one_window == 1 else "hits that hang"
        alarms = [f"{self.alarms} alarm{'' if self.alarms == 1 else 's'}"] if self.clean else []
        return ", ".join([*alarms, f"{self.one_window} {hanging} on one window"])

    @property
    def powerless(self) -> int:
        """Clean pictures that an alarm needs, if there are fewer (0: enough)."""
        wanted = conformal.needed(self.budget, len(STATISTICS))
        return wanted if len(self.clean) < wanted else 0


def audit(
    source: Collection | Sequence[str | os.PathLike[str]],
    auditor: Auditor,
    out: str | os.PathLike[str],
    *,
    clean: Sequence[str | os.PathLike[str]] = (),
    budget: float = 0.01,
    seed: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda count: None,
    stop: Callable[[], bool] = lambda: False,
) -> Audit:
    """Examine the pictures of a collection, or of files, folders, lists and shards.

    ``clean``: pictures known to be untouched, of the same kind, for the thresholds; without them
    there is a ranking by ``drop`` but no alarm. The same call goes on where one was stopped.
    """
    conformal.needed(budget, 1)  # refuses a budget outside (0, 1) before any work
    if clean and next(sources.find(clean), None) is None:  # hours before it is needed
        raise ValueError(_no_clean(clean))
    out = Path(out)
    make_folder(out)
    pictures = _of_collection(source) if isinstance(source, Collection) else sources.find(source)
    read = source.read if isinstance(source, Collection) else sources.read
    log = out / "failures.jsonl"
    log.unlink(missing_ok=True)
    run = _Run(auditor, seed, batch_size, log, progress, stop)
    findings = run.examine(pictures, out / "work.jsonl")
    held = [] if run.stopped or not clean else run.examine(sources.find(clean), out / "clean.jsonl")
    result = Audit(findings, held, budget, failed=run.failed, stopped=run.stopped, read=read)
    if result.stopped:
        return result
    if not findings:
        raise ValueError("there is no readable picture to audit")
    if clean and not held:
        raise ValueError(_no_clean(clean))
    auditor.compare([*findings, *held], findings)
    if held:
        result.thresholds = auditor.judge(findings, held, budget)
    findings.sort(key=lambda f: (f.p, -f.statistics["drop"], f.uri))
    return result


def _no_clean(clean: Sequence[str | os.PathLike[str]]) -> str:
    return f"there is no readable picture in --clean: {', '.join(map(str, clean))}"


class _Run:
    def __init__(
        self,
        auditor: Auditor,
        seed: int | None,
        batch_size: int,
        log: Path,
        progress: Callable[[int], None],
        stop: Callable[[], bool],
    ):
        self.auditor, self.seed, self.batch_size = auditor, seed, batch_size
        self.log, self.progress, self.stop = log, progress, stop
        self.failed, self.stopped, self.count = 0, False, 0

    def examine(self, pictures: Iterable[Source | Unreadable], work: Path) -> list[Finding]:
        """Findings of all pictures; those in ``work`` are not computed again."""
        settings = {**self.auditor.settings, "seed": "secret" if self.seed is None else self.seed}
        done = _load(work, settings)
        found: dict[str, Finding] = {}
        for batch in chunks(pictures, self.batch_size):
            fresh: list[tuple[str, str, torch.Tensor]] = []
            for entry in batch:
                loaded = self._read(entry)
                if loaded is None:
                    continue
                data, digest = loaded
                if (key := f"{digest} {entry.uri}") in done:
                    found[key] = done[key]
                    continue
                image = self._decode(entry.uri, data)
                if image is not None:
                    fresh.append((key, entry.uri, image))
            if fresh:
                keys, uris, images = zip(*fresh, strict=True)
                seeds = None if self.seed is None else [image_seed(self.seed, k) for k in keys]
                made = self.auditor.examine(torch.stack(images), uris, seeds=seeds)
                _append(work, [_pack(k, f) for k, f in zip(keys, made, strict=True)])
                found.update(zip(keys, made, strict=True))
            self.count += len(batch)
            self.progress(self.count)
            if self.stop():
                self.stopped = True
                break
        return list(found.values())

    def _read(self, entry: Source | Unreadable) -> tuple[bytes, str] | None:
        if isinstance(entry, Unreadable):
            self._fail(entry.uri, entry.reason)
            return None
        try:
            data = entry.read()
        except OSError as error:
            self._fail(entry.uri, f"the file cannot be read: {error.strerror or error}")
            return None
        return data, hashlib.sha256(data).hexdigest()

    def _decode(self, uri: str, data: bytes) -> torch.Tensor | None:
        try:
            return shrink(decode(data), self.auditor.image_size)
        except ImageError as error:
            self._fail(uri, error.reason)
            return None

    def _fail(self, uri: str, reason: str) -> None:
        self.failed += 1
        ingest.append(self.log, {"uri": uri, "reason": reason})


def _of_collection(collection: Collection) -> Iterator[Source]:
    for rows in collection.store.rows():
        for row in rows:
            yield Source(row.uri, partial(collection.read, row.uri), row.meta)


def _pack(key: str, finding: Finding) -> dict[str, Any]:
    """Arrays as base64 of float32, with their shapes."""
    data: dict[str, Any] = {**finding.record(), "key": key}
    for name in ARRAYS:
        array = np.ascontiguousarray(getattr(finding, name), np.float32)
        data[name] = [list(array.shape), base64.b64encode(array.tobytes()).decode()]
    return data


def _unpack(data: dict[str, Any]) -> tuple[str, Finding]:
    key = data.pop("key")
    for name in ARRAYS:
        shape, text = data[name]
        data[name] = np.frombuffer(base64.b64decode(text), np.float32).reshape(shape)
    return key, Finding(**{**data, "window": tuple(data["window"])})


def _load(work: Path, settings: dict[str, Any]) -> dict[str, Finding]:
    """Earlier findings by key. A last line that was cut off by a kill or a full disk is dropped."""
    if not work.exists():
        files.write_atomic(work, (json.dumps(settings) + "\n").encode())
        return {}
    lines = work.read_bytes().split(b"\n")
    try:
        stored = json.loads(lines[0])
    except ValueError:
        stored = None
    if stored != json.loads(json.dumps(settings)):
        raise ValueError(
            f"{work} is of an audit with other settings or models: choose another --out"
        )
    found = {}
    for line in lines[1:]:
        try:
            key, finding = _unpack(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        found[key] = finding
    return found


def _append(work: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with open(work, "ab", buffering=0) as handle:
            text = "\n".join(json.dumps(row) for row in rows)
            handle.write(f"\n{text}\n".encode())  # begins a line, whatever a kill left before
    except OSError as error:
        raise files.explained(error, work) from error
