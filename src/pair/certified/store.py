"""Views on disk, by the content of the picture they belong to: computed once, kept for ever.

A folder of segments that are written whole and never changed, so several processes may read and
write it, and a killed one leaves nothing half-written. The key is the SHA-256 of the picture's
bytes: a picture that changes is another picture, with views of its own.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pair.certified.index import quantise
from pair.files import write_atomic

FORMAT = 1
SETTINGS = "views.json"
SEGMENT = "views-{}.safetensors"
MANY = 64  # segments; more are merged into one when the store is opened


class ViewStore:
    """int8 views (R, d) of pictures. ``settings`` is what the views depend on.

    Opening a folder that was made with other settings (another generator, encoder, patch, fill)
    raises ``ValueError``: views of different models cannot be compared, and a certificate for one
    family says nothing about another.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], views: int, dim: int):
        self.folder, self.settings, self.shape = Path(folder), settings, (views, dim)
        self._where: dict[str, tuple[int, int]] = {}  # key -> (part, row)
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._seen: set[str] = set()
        self._settle()
        self.refresh()
        if len(self._segments()) > MANY:
            self.merge()

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    @property
    def bytes(self) -> int:
        """Size of all segments on disk."""
        return sum(p.stat().st_size for p in self._segments())

    def get(self, keys: Sequence[str]) -> Tensor:
        """Views (n, R, d) as they were rounded; ``KeyError`` for pictures that have none."""
        rows = [self._where[k] for k in keys]
        views = [self._parts[p][0][r].float() * self._parts[p][1][r] for p, r in rows]
        return torch.stack(views) if views else torch.empty(0, *self.shape)

    def put(self, keys: Sequence[str], views: Tensor) -> None:
        """Keep views (n, R, d) of pictures; those that are known already stay as they are."""
        if views.shape != (len(keys), *self.shape):
            raise ValueError(
                f"views must have shape {(len(keys), *self.shape)}, got {tuple(views.shape)}"
            )
        fresh = [i for i, k in enumerate(keys) if k not in self._where]
        if not fresh:
            return
        codes, scales = quantise(views[fresh].detach().float().cpu())
        names = [keys[i] for i in fresh]
        self._write(names, codes, scales)
        self._keep(names, codes, scales)

    def refresh(self) -> int:
        """Read segments that other processes have added; returns how many pictures are known."""
        for path in self._segments():
            if path.name in self._seen:
                continue
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # merged by another process meanwhile
                continue
            try:
                table = load(data)
                keys = [bytes(row).hex() for row in table["keys"].numpy()]
                codes, scales = table["codes"], table["scales"]
            except (SafetensorError, KeyError) as error:
                raise ValueError(
                    f"{path} is damaged: delete it, its views are made again"
                ) from error
            if codes.shape != (len(keys), *self.shape):
                raise ValueError(f"{path} does not fit {self.folder / SETTINGS}: delete it")
            self._seen.add(path.name)
            self._keep(keys, codes, scales)
        return len(self)

    def merge(self) -> None:
        """Write everything as one segment and remove the many; safe beside other processes."""
        old = self._segments()
        self.refresh()
        if len(old) < 2:
            return
        keys = list(self._where)
        codes = torch.stack([self._parts[p][0][r] for p, r in self._where.values()])
        scales = torch.stack([self._parts[p][1][r] for p, r in self._where.values()])
        self._write(keys, codes, scales)
        for path in old:  # only after the merged one is on disk
            path.unlink(missing_ok=True)

    def _keep(self, keys: Sequence[str], codes: Tensor, scales: Tensor) -> None:
        for row, key in enumerate(keys):
            self._where.setdefault(key, (len(self._parts), row))
        self._parts.append((codes, scales))

    def _write(self, keys: Sequence[str], codes: Tensor, scales: Tensor) -> None:
        table = torch.tensor([list(bytes.fromhex(k)) for k in keys], dtype=torch.uint8)
        name = SEGMENT.format(secrets.token_hex(8))
        data = save({"keys": table, "codes": codes.contiguous(), "scales": scales.contiguous()})
        write_atomic(self.folder / name, data)
        self._seen.add(name)

    def _segments(self) -> list[Path]:
        return sorted(self.folder.glob(SEGMENT.format("*")))

    def _settle(self) -> None:
        """Create the folder with its settings, or check those that are there."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: views need a folder")
        path = self.folder / SETTINGS
        mine = {"format": FORMAT, "views": self.shape[0], "dim": self.shape[1], **self.settings}
        mine = json.loads(json.dumps(mine))
        try:
            found = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, (json.dumps(mine, indent=1) + "\n").encode())
            return
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: delete {self.folder}") from error
        if not isinstance(found, dict) or found != mine:
            found = found if isinstance(found, dict) else {}
            names = sorted(k for k in mine.keys() | found.keys() if mine.get(k) != found.get(k))
            raise ValueError(
                f"{self.folder} holds views of other settings (different: {', '.join(names)}): "
                "use the same settings or another folder"
            )


def content_key(data: bytes) -> str:
    """The key of a picture: SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
