"""Purify files and folders: resumable, one bad file never stops the rest.

Decoding runs ahead in threads, the purifier computes, threads write; at most a few batches of
small images are in memory, and one full-size picture per decoding thread.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event

import torch

from pair import files
from pair.guard.pipeline import Item, ahead, batches, compute, load, make_folder, write
from pair.guard.plan import FAILURES, FORMATS, Plan, find_done, make_plan, settle_record
from pair.images import MAX_PIXELS
from pair.purifier import Purifier

_WORKERS = 2  # decoding threads
_WRITERS = 4  # a file that must be safe on the disk is mostly waited for


@dataclass
class Summary:
    """Counts of a run: ``found = purified + skipped + failed`` when it ran to its end."""

    found: int = 0
    purified: int = 0
    skipped: int = 0  # done in an earlier run
    failed: int = 0  # listed in ``failures``
    ignored: int = 0  # not named like an image
    stopped: bool = False
    failures: Path | None = None
    # Where the wall time went. Decoding and writing run beside the purifier: what counts here is
    # how long it waited for them.
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("decode", "purify", "write"), 0.0), compare=False
    )

    @property
    def finished(self) -> int:
        return self.purified + self.skipped + self.failed


def purify_folder(
    paths: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    purifier: Purifier,
    *,
    seed: int | None = None,
    format: str = "keep",
    batch_size: int = 16,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[Summary], None] = lambda summary: None,
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Purify ``paths`` (files, folders with all below) into ``out``; see :mod:`pair.guard.plan`
    for names, and for what counts as done when the same call is repeated.

    Without ``seed`` every image gets a secret mask from the operating system's entropy. With it,
    an image's mask depends on the seed and its name below the root alone, and images keep their
    places in the batches: a run that was stopped and resumed writes the same bytes as one that
    was not (same files, settings and machine). Each image has a mask of its own in all presets.

    Files that cannot be read are listed in ``out/failures.jsonl`` ({"path", "reason"} per line),
    which describes the latest run. ``progress`` is called after each batch; after ``stop()``
    returns True the images in work are finished and the call returns.

    Raises ``ValueError`` on settings or paths that make no sense, ``OSError`` if ``out`` cannot
    be written or the disk is full; what is in ``out`` by then is complete.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: the results need a folder")
    plan = make_plan(paths, out, format)
    settings = {
        "model": fingerprint(purifier),
        "purifier": purifier.extra_repr(),
        "restore size": purifier.restore_size,
        "output format": format,
        "seed": "secret" if seed is None else seed,
    }
    make_folder(out)
    refusal = f"another 'pair purify' is writing to {out}: let it finish"
    with files.sole_writer(out, refusal):
        find_done(plan, settle_record(plan, settings, overwrite, time.time_ns()))
        found = len(plan.jobs) + len(plan.unreadable)
        summary = Summary(found, skipped=len(plan.done), ignored=plan.ignored)
        _remove_partials(plan)
        progress(summary)
        _run(plan, purifier, seed, batch_size, max_pixels, summary, progress, stop)
    return summary


def fingerprint(purifier: Purifier) -> str:
    """SHA-256 over the names, shapes and values of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(purifier.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _run(
    plan: Plan,
    purifier: Purifier,
    seed: int | None,
    batch_size: int,
    max_pixels: int,
    summary: Summary,
    progress: Callable[[Summary], None],
    stop: Callable[[], bool],
) -> None:
    report = plan.out / FAILURES
    report.unlink(missing_ok=True)

    def fail(path: str, reason: str) -> None:
        files.append_line(report, {"path": path, "reason": reason})
        summary.failed, summary.failures = summary.failed + 1, report

    for error in plan.unreadable:
        fail(error.filename, f"the folder cannot be read: {error.strerror}")
    writing: deque[list[Future[list[Item]]]] = deque()  # batches, each in as many parts as writers

    def account(ahead: int) -> None:
        while len(writing) > ahead:
            for item in (i for part in writing.popleft() for i in part.result()):
                if item.reason:
                    fail(item.job.source, item.reason)
                else:
                    summary.purified += 1
            progress(summary)

    def spent(stage: str, since: float) -> float:
        now = time.perf_counter()
        summary.seconds[stage] += now - since
        return now

    closing = Event()
    writers = 1 if purifier.restore_size else _WRITERS  # full-size pictures one at a time
    with ThreadPoolExecutor(_WORKERS) as readers, ThreadPoolExecutor(writers) as writer:
        decoding = partial(load, purifier.image_size, max_pixels, closing)
        try:
            clock = time.perf_counter()
            for count, items in ahead(readers, _WORKERS, decoding, batches(plan, batch_size)):
                clock = spent("decode", clock)
                if stop():
                    break
                images = compute(purifier, count, items, seed)
                clock = spent("purify", clock)
                parts = [items[k::writers] for k in range(writers)]
                save = partial(write, images=images, restore=purifier.restore_size)
                writing.append([writer.submit(save, part) for part in parts if part])
                account(1)
                clock = spent("write", clock)
            account(0)
            spent("write", clock)
        finally:
            closing.set()
            readers.shutdown(wait=False, cancel_futures=True)
    summary.stopped = summary.finished < summary.found


def _remove_partials(plan: Plan) -> None:
    for folder in {plan.out, *(Path(job.target).parent for job in plan.jobs)}:
        for stale in folder.glob(files.PARTIAL):
            stale.unlink(missing_ok=True)
