"""Packs: many photos decoded once into one uint8 array, so that training never waits for JPEG.

A pack is a folder with ``images.npy`` (N, S, S, 3) uint8 and ``index.json`` (a row per photo:
relative path, label, data set, split). Short side resized to S, centre crop.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pair.data.splits import Photo
from pair.images import load_image, resize_crop

IMAGES, INDEX = "images.npy", "index.json"


def _decode(job: tuple[Path, int]) -> np.ndarray:
    path, size = job
    torch.set_num_threads(1)
    try:
        image = resize_crop(load_image(path)[None], size)[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot decode {path}: {error}") from error
    return image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def write_pack(
    photos: list[Photo],
    root: Path,
    out: Path,
    size: int = 128,
    workers: int | None = None,
    progress: Callable[[Iterable], Iterable] = lambda x: x,
) -> None:
    """Decode ``photos`` into the pack ``out``; paths in the index are relative to ``root``."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / (IMAGES + ".partial")
    shape = (len(photos), size, size, 3)
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        jobs = [(p.path, size) for p in photos]
        for i, image in enumerate(progress(pool.map(_decode, jobs, chunksize=32))):
            array[i] = image
    array.flush()
    # Until the new images are in place there is no pack, rather than one with wrong labels.
    (out / IMAGES).unlink(missing_ok=True)
    rows = [[os.path.relpath(p.path, root), p.label, p.dataset, p.split] for p in photos]
    (out / INDEX).write_text(json.dumps({"size": size, "rows": rows}), "utf-8")
    os.replace(partial, out / IMAGES)


class Collection(ABC):
    """Photos with a row of facts each, from which a training takes batches by row number."""

    paths: list[str]
    labels: list[str]  # several names are joined by ";"
    datasets: list[str]
    splits: list[str]
    captions: Sequence[tuple[str, ...]] = ()  # a pack has none

    def __len__(self) -> int:
        return len(self.paths)

    @property
    @abstractmethod
    def side(self) -> int:
        """Height and width of the photos."""

    @abstractmethod
    def raw(self, rows: Tensor) -> Tensor:
        """(B, S, S, 3) uint8."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 that changes when the photos or the facts about them do."""

    def decode_at(self, side: int) -> None:  # noqa: B027
        """Photos that are decoded while they are needed get this side; a pack keeps its own."""

    def prefetch(self, rows: Tensor) -> None:  # noqa: B027  (nothing to do is a fine answer)
        """A hint that ``raw(rows)`` follows soon."""

    def close(self) -> None:  # noqa: B027
        """Let go of whatever reads the photos."""

    def where(self, keep: Callable[[str, str, str], bool]) -> Tensor:
        """Row numbers whose (label, data set, split) pass ``keep``."""
        rows = zip(self.labels, self.datasets, self.splits, strict=True)
        return torch.tensor([i for i, r in enumerate(rows) if keep(*r)], dtype=torch.long)

    def batch(self, rows: Tensor, size: int) -> Tensor:
        """Centre crops (B, 3, size, size), float in [0, 1]."""
        images = self.raw(rows).permute(0, 3, 1, 2).float().div(255)
        margin = images.shape[-1] - size
        if margin < 0:
            return torch.nn.functional.interpolate(images, (size, size), mode="bilinear")
        at = margin // 2
        return images[..., at : at + size, at : at + size].contiguous()


@dataclass
class Pack(Collection):
    """An opened pack (or a part of one). ``batch(rows)`` gives float images in [0, 1]."""

    images: np.ndarray
    paths: list[str]
    labels: list[str]
    datasets: list[str]
    splits: list[str]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Pack:
        folder = Path(folder)
        if not (folder / IMAGES).is_file():
            raise ValueError(f"{folder} holds no finished pack: run 'pair data pack' first")
        try:
            images = np.load(folder / IMAGES, mmap_mode="r")
            rows = json.loads((folder / INDEX).read_text("utf-8"))["rows"]
            paths, labels, datasets, splits = (list(c) for c in zip(*rows, strict=True))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the pack {folder} is damaged, make it again: {error}") from error
        if len(images) != len(rows):
            raise ValueError(
                f"the pack {folder} is damaged, make it again: "
                f"{len(images)} images, {len(rows)} rows in the index"
            )
        return cls(images, paths, labels, datasets, splits)

    @property
    def side(self) -> int:
        return self.images.shape[1]

    def raw(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.images[rows.numpy()])

    def fingerprint(self) -> str:
        facts = (self.images.shape, self.paths, self.labels, self.datasets, self.splits)
        digest = hashlib.sha256(repr(facts).encode())
        for row in {0, len(self) // 2, len(self) - 1} if len(self) else ():
            digest.update(self.images[row].tobytes())
        return digest.hexdigest()
