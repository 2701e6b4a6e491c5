"""The stages of a folder run: cut into batches, decode ahead, compute, write."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from pair import files
from pair.guard.plan import Job, Plan, named_like_image
from pair.images import ImageError, decode, save_image, shrink
from pair.purifier import Purifier
from pair.secret import mask_generator

# After these no other file can be written either: stop instead of failing one by one.
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


@dataclass
class Item:
    """A job at its place in a batch, with its picture or the reason why there is none."""

    slot: int
    job: Job
    image: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    mtime_ns: int = 0
    reason: str = ""


def image_seed(seed: int, name: str) -> int:
    """The seed of one image's mask, from ``seed`` and its name."""
    text = f"{seed}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1


def batches(plan: Plan, size: int) -> Iterator[tuple[int, list[Item]]]:
    """(images in the batch, the items of it that are to do).

    Batches are cut from all jobs, done ones included, and places left free are computed as grey:
    an image's place and its batch's shape, on which the last bits of floating-point results can
    depend, are the same in a resumed run.
    """
    for start in range(0, len(plan.jobs), size):
        jobs = plan.jobs[start : start + size]
        items = [Item(slot, job) for slot, job in enumerate(jobs) if job.name not in plan.done]
        if items:
            yield len(jobs), items


def ahead(
    pool: Executor,
    depth: int,
    load: Callable[[list[Item]], list[Item]],
    batches: Iterable[tuple[int, list[Item]]],
) -> Iterator[tuple[int, list[Item]]]:
    """Load up to ``depth`` batches ahead of the one that is handed out, in order."""
    waiting: deque[tuple[int, Future[list[Item]]]] = deque()
    for count, items in batches:
        waiting.append((count, pool.submit(load, items)))
        if len(waiting) > depth:
            size, loaded = waiting.popleft()
            yield size, loaded.result()
    for size, loaded in waiting:
        yield size, loaded.result()


def load(side: int, max_pixels: int, closing: Event, items: list[Item]) -> list[Item]:
    """Decode ``items`` to (3, side, side); ``closing`` ends it early, when nobody waits for it."""
    for item in items:
        if closing.is_set():
            break
        try:
            item.mtime_ns = _check_file(item.job.source)
            picture = decode(item.job.source, max_pixels=max_pixels)
            item.image, item.size = shrink(picture, side), picture.size
        except ImageError as error:
            item.reason = error.reason
        except OSError as error:
            item.reason = f"the file cannot be read: {error.strerror or error}"
        except (RuntimeError, MemoryError):  # torch's and Python's words for it
            item.reason = "there is not enough memory to scale this picture"
    return items


def _check_file(path: str) -> int:
    """The file's time; refuses pipes and the like, which could be read for ever."""
    if not named_like_image(path):
        raise ImageError("the name has no image suffix such as .jpg or .png: rename the file", path)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("this is not a regular file", path)
    return status.st_mtime_ns


@torch.inference_mode()
def compute(purifier: Purifier, count: int, items: list[Item], seed: int | None) -> Tensor:
    """(count, 3, S, S) on the CPU; the places without an image hold nothing of interest."""
    side, device = purifier.image_size, next(purifier.parameters()).device
    images = torch.full((count, 3, side, side), 0.5)
    mask = purifier.draw_mask(1, torch.Generator().manual_seed(0)).repeat(count, 1)
    for item in items:
        if item.image is not None:
            images[item.slot] = item.image
            own = None if seed is None else image_seed(seed, item.job.name)
            mask[item.slot] = purifier.draw_mask(1, mask_generator(own))[0]
    return purifier(images.to(device), mask=mask).float().cpu()


def write(items: list[Item], images: Tensor, restore: bool) -> list[Item]:
    """Save what was computed; failures that concern one file only become its reason."""
    for item in items:
        if item.image is None:
            continue
        item.image = None
        target = Path(item.job.target)
        try:
            make_folder(target.parent)
            # Not before the input's time: cameras with a wrong clock date files in the future.
            mtime_ns = max(time.time_ns(), item.mtime_ns)
            size = item.size if restore else None
            save_image(target, images[item.slot], size=size, mtime_ns=mtime_ns)
        except ValueError as error:
            item.reason = str(error)
        except OSError as error:
            if error.errno in _FATAL:
                raise
            item.reason = str(error)
    return items


def make_folder(path: Path) -> None:
    """``mkdir -p`` with errors of one sentence."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.explained(error, path) from error
