"""Photos decoded while they are needed, by worker processes: what training reads at full scale.

Workers get a path and a place in it, nothing else, so their memory does not grow with the data
set, and one worker costs the same as the next. The order of photos is decided by who asks.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pair.data.pack import Collection
from pair.data.sets import Dataset, Record
from pair.data.sets.huggingface import read_row
from pair.images import load_image, resize, resize_crop

WAITING = 64  # slices of batches that may lie decoded and unread

Job = tuple[Path, int, int, int, bool]


def read_bytes(record: Record) -> bytes:
    """The encoded picture of a record."""
    return _bytes(record.path, record.offset, record.size)


def _bytes(path: Path, offset: int, size: int) -> bytes:
    if size < 0:
        if path.is_dir() or path.suffix == ".parquet":
            return read_row(path, offset)
        return path.read_bytes()
    with open(path, "rb") as handle:
        handle.seek(offset)
        data = handle.read(size)
    if len(data) < size:
        raise ValueError(f"{path} ends inside the picture at byte {offset:,}: fetch it again")
    return data


def _decode(job: Job) -> np.ndarray:
    """(S, S, 3) uint8: short side resized and centre cropped, or squashed."""
    path, offset, size, side, squash = job
    torch.set_num_threads(1)
    try:
        image = load_image(_bytes(path, offset, size))[None]
        image = (resize(image, side) if squash else resize_crop(image, side))[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot decode {path}: {error}") from error
    return image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def _decode_many(jobs: list[Job]) -> np.ndarray:
    return np.stack([_decode(job) for job in jobs])


def _begin() -> None:
    """What a worker does first: leave Ctrl-C to its parent, and die with it, however that dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Decoder:
    """A pool of decoding processes; with ``workers=0`` this process decodes."""

    def __init__(self, workers: int = 0):
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, jobs: list[Job]) -> list[Future[np.ndarray]]:
        """Decode ``jobs`` in the background, in equal parts."""
        if self._pool is None:
            # Fresh processes: a forked one would carry the parent's memory, page by page.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, _begin)
        part = -(-len(jobs) // self.workers)
        return [
            self._pool.submit(_decode_many, jobs[at : at + part])
            for at in range(0, len(jobs), part)
        ]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _collect(parts: list[Future[np.ndarray]]) -> Tensor:
    try:
        return torch.from_numpy(np.concatenate([p.result() for p in parts]))
    except BrokenExecutor as error:
        raise ValueError(
            "a decoding process died, most likely for lack of memory: use fewer --workers"
        ) from error


class Photos(Collection):
    """Records of one or several data sets, with the reading interface of a pack.

    ``raw(rows)`` gives (B, S, S, 3) uint8. ``prefetch(rows)`` starts decoding in the background
    what a later ``raw`` with the same rows will take.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        side: int,
        workers: int = 0,
        squash: bool = False,
    ):
        self.records = [r for d in datasets for r in d.records]
        self.paths = [r.id for r in self.records]
        self.labels = [";".join(r.labels) for r in self.records]
        self.captions = [r.captions for r in self.records]
        self.datasets = [d.name for d in datasets for _ in d.records]
        self.splits = [r.split for r in self.records]
        self.squash, self._side = squash, side
        self._decoder = Decoder(workers)
        self._waiting: OrderedDict[bytes, list[Future[np.ndarray]]] = OrderedDict()

    @property
    def side(self) -> int:
        return self._side

    def decode_at(self, side: int) -> None:
        self._side = side

    def _jobs(self, rows: Tensor) -> list[Job]:
        chosen = (self.records[i] for i in rows.tolist())
        return [(r.path, r.offset, r.size, self._side, self.squash) for r in chosen]

    def prefetch(self, rows: Tensor) -> None:
        key = rows.numpy().tobytes()
        if self._decoder.workers and key not in self._waiting:
            self._waiting[key] = self._decoder.submit(self._jobs(rows))
            while len(self._waiting) > WAITING:
                for part in self._waiting.popitem(last=False)[1]:
                    part.cancel()

    def raw(self, rows: Tensor) -> Tensor:
        if not self._decoder.workers:
            return torch.from_numpy(_decode_many(self._jobs(rows)))
        self.prefetch(rows)
        return _collect(self._waiting.pop(rows.numpy().tobytes()))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._side} {self.squash}".encode())
        for row in zip(self.datasets, self.paths, self.labels, self.splits, strict=True):
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def close(self) -> None:
        self._decoder.close()


def batches(
    records: Sequence[Record],
    size: int,
    batch: int = 64,
    workers: int = 0,
    squash: bool = False,
    progress: Callable[[Iterator[Tensor]], Iterator[Tensor]] = lambda x: x,
) -> Iterator[Tensor]:
    """The records in their order as float batches (B, 3, size, size) in [0, 1].

    Decodes ahead in ``workers`` processes, two batches at most, whatever the number of records.
    """
    parts = [records[at : at + batch] for at in range(0, len(records), batch)]

    def decoded() -> Iterator[Tensor]:
        decoder = Decoder(workers)
        try:
            ahead: list[list[Future[np.ndarray]]] = []
            for i, part in enumerate(parts):
                if not workers:
                    yield torch.from_numpy(_decode_many(jobs(part)))
                    continue
                while len(ahead) < 3 and i + len(ahead) < len(parts):
                    ahead.append(decoder.submit(jobs(parts[i + len(ahead)])))
                yield _collect(ahead.pop(0))
        finally:
            decoder.close()

    def jobs(part: Sequence[Record]) -> list[Job]:
        return [(r.path, r.offset, r.size, size, squash) for r in part]

    for raw in progress(decoded()):
        yield raw.permute(0, 3, 1, 2).float().div_(255)


def _verdict(job: Job) -> str:
    try:
        _decode(job)
    except ValueError as error:
        return str(error)
    return ""


def broken(
    records: Sequence[Record],
    workers: int = 0,
    progress: Callable[[Iterable[str]], Iterable[str]] = lambda x: x,
) -> list[str]:
    """One sentence for every photo that cannot be decoded."""
    jobs = ((r.path, r.offset, r.size, 8, False) for r in records)
    if not workers:
        return [told for told in progress(map(_verdict, jobs)) if told]
    with multiprocessing.get_context("spawn").Pool(workers, _begin) as pool:
        return [told for told in progress(pool.imap(_verdict, jobs, chunksize=64)) if told]
