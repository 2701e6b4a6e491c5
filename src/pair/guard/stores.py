"""Where the rows of a collection live: one small interface, LanceDB and Milvus behind it.

A store knows vectors, filters and ids, nothing of images or models. ``URI#name`` picks a
collection beside others; without it the name is ``images``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pair.guard.filters import Filter

NAME = "images"
VECTORS = ("vector", "vector_raw")
CODES = ("code", "code_raw")
FIXED = (
    "id", "uri", "sha256", "width", "height", "added", "model", "purifier", "seed", "meta",
)  # fmt: skip


@dataclass
class Row:
    """One picture as it is stored.

    ``id``: the first 32 digits of ``sha256``, the hash of the file's bytes. ``seed``: "secret", or
    the seed that the mask was derived from. ``model`` and ``purifier``: fingerprints. Vectors are
    float32 of unit length, codes uint8 with 8 bits each.
    """

    id: str
    uri: str
    sha256: str
    width: int = 0
    height: int = 0
    added: int = 0  # microseconds since 1970, UTC
    model: str = ""
    purifier: str = ""
    seed: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    vector: np.ndarray | None = None
    vector_raw: np.ndarray | None = None
    code: np.ndarray | None = None
    code_raw: np.ndarray | None = None


@dataclass(frozen=True)
class Layout:
    """Which columns a collection has; ``fields`` are declared metadata with their types."""

    dim: int | None = None
    bits: int | None = None
    purified: bool = True
    fields: dict[str, str] = field(default_factory=dict)

    def columns(self) -> dict[str, tuple[str, int]]:
        """column -> ("float", D) or ("bits", bits)."""
        found: dict[str, tuple[str, int]] = {}
        for raw in (False, True):
            if not raw and not self.purified:
                continue
            tail = "_raw" if raw else ""
            if self.dim:
                found["vector" + tail] = ("float", self.dim)
            if self.bits:
                found["code" + tail] = ("bits", self.bits)
        return found


class Store(Protocol):
    """What a collection asks of a database. All calls raise ``OSError`` or ``ValueError`` with one
    sentence; ``insert`` returns when the rows are committed."""

    uri: str
    record: dict[str, Any]  # what Collection.create wrote

    def insert(self, rows: Sequence[Row]) -> int:
        """Add the rows whose id is not there yet, all or none; returns how many that were."""
        ...

    def existing(self, ids: Sequence[str]) -> set[str]: ...

    def delete(self, where: Filter | None = None, **columns: Sequence[str]) -> int:
        """Remove what fits ``where``, or has one of the values: ``delete(id=[...])``."""
        ...

    def count(self, where: Filter | None = None) -> int: ...

    def nearest(
        self,
        column: str,
        query: np.ndarray,
        k: int,
        where: Filter | None = None,
        *,
        exact: bool = False,
    ) -> list[tuple[Row, float]]:
        """The k best rows (without vectors) and scores: cosine, or share of equal bits * 2 - 1."""
        ...

    def rows(
        self,
        columns: Sequence[str] = (),
        where: Filter | None = None,
        *,
        ids: Sequence[str] | None = None,
        batch: int = 1024,
    ) -> Iterator[list[Row]]:
        """All rows in batches, with the vector ``columns`` asked for."""
        ...

    def sample(self, column: str, count: int) -> np.ndarray:
        """Up to ``count`` stored vectors (n, D)."""
        ...

    def optimise(self, approximate_from: int) -> None:
        """Merge small pieces; build or extend approximate indexes from that many rows on."""
        ...

    def stats(self) -> dict[str, Any]:
        """``bytes`` on disk (None if unknown) and ``indexes`` column -> facts."""
        ...


def split(uri: str) -> tuple[str, str]:
    """``place#name`` -> (place, name)."""
    place, mark, name = uri.rpartition("#")
    if not mark:
        place, name = uri, NAME
    if not place or not name.replace("_", "a").isalnum() or not name.isascii():
        raise ValueError(
            f"{uri!r} is no collection: write a folder, s3://bucket/prefix, http://host:19530 or "
            "file.db, with #name (letters, digits, _) to choose one of several"
        )
    return place, name


def is_milvus(place: str) -> bool:
    return place.startswith(("http://", "https://", "unix:", "tcp://")) or place.endswith(".db")


def open_store(uri: str) -> Store:
    place, name = split(uri)
    if is_milvus(place):
        from pair.guard.milvus import MilvusStore

        return MilvusStore.open(place, name)
    from pair.guard.lance import LanceStore

    return LanceStore.open(place, name)


def create_store(uri: str, layout: Layout, record: dict[str, Any]) -> Store:
    """Raises ``ValueError`` if there is such a collection already."""
    place, name = split(uri)
    if is_milvus(place):
        from pair.guard.milvus import MilvusStore

        return MilvusStore.create(place, name, layout, record)
    from pair.guard.lance import LanceStore

    return LanceStore.create(place, name, layout, record)


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    part: list[Any] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
