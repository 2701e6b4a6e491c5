"""Results on disk: one JSON file per finished cell, patches as PNG, locks that die with a process.

A cell's file appears whole or not at all, and its name is the hash of everything that its numbers
depend on; a run that was killed therefore continues where it was, and several processes may work
on one folder. The part of a record called ``run`` (times, machine) is not part of the result.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pair.attacks.patch import Patch
from pair.files import write_atomic

LENGTH = 20  # hexadecimal digits of a key


def key_of(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


class Store:
    def __init__(self, root: Path):
        self.root = root

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    # --- cells -------------------------------------------------------------------------------

    def path(self, key: str) -> Path:
        return self.root / "cells" / f"{key}.json"

    def read(self, key: str) -> dict[str, Any] | None:
        """The record of a finished (or failed) cell, None if there is none."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a result: {error}; delete it") from error

    def write(self, key: str, record: dict[str, Any]) -> None:
        self.folder("cells")
        line = json.dumps({"key": key, **record}, separators=(",", ":"), ensure_ascii=False)
        write_atomic(self.path(key), (line + "\n").encode())

    # --- locks -------------------------------------------------------------------------------

    @contextmanager
    def lock(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Hold ``name`` while working on it; yields False where another process holds it.

        The operating system releases the lock when its process ends, however it ends: there is
        no stale lock to clear up.
        """
        path = self.folder("locks") / name
        try:
            import fcntl
        except ImportError:  # no such lock on this system: one process at a time
            yield True
            return
        with open(path, "a") as handle:
            flags = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
            try:
                fcntl.flock(handle, flags)
            except BlockingIOError:
                yield False
                return
            yield True

    # --- patches and intermediate tensors ----------------------------------------------------

    def patch(self, key: str) -> Patch | None:
        path = self.root / "patches" / f"{key}.png"
        return Patch.load(path) if path.with_suffix(".json").is_file() else None

    def keep_patch(self, key: str, patch: Patch) -> Patch:
        """Save a patch and return it as its file holds it: rounded to 8 bits."""
        return Patch.load(patch.save(self.folder("patches") / key))

    def tensor(self, key: str) -> Tensor | None:
        path = self.root / "cache" / f"{key}.pt"
        return torch.load(path, weights_only=True) if path.is_file() else None

    def keep_tensor(self, key: str, value: Tensor) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        write_atomic(self.folder("cache") / f"{key}.pt", buffer.getvalue(), durable=False)
