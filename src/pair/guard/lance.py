"""Collections in LanceDB: on local disk or object storage, several processes at a time.

A commit is one new manifest that appears whole; a killed writer leaves files that no manifest
names. ``id`` is declared as key, so two writers that insert the same row at the same time are in
conflict: the later one starts its merge again and finds the row there.
"""

from __future__ import annotations

import errno
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pair.guard.filters import Filter, to_sql
from pair.guard.stores import FIXED, Layout, Row, chunks

KEY = b"pair"
KEEP_VERSIONS = timedelta(hours=1)  # readers of an older state have that long to finish
PARTITION = 4096  # rows per partition of an index, about
PROBES, REFINE = 20, 10
LONG = 64
TRIES = 12
CACHE = "PAIR_INDEX_CACHE_MB"
CONFLICT = "onflict"  # in upper or lower case, in LanceDB's messages
_DISK = {
    "No space left": errno.ENOSPC,
    "os error 28": errno.ENOSPC,
    "quota exceeded": errno.EDQUOT,
    "os error 122": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "os error 27": errno.EFBIG,
    "Permission denied": errno.EACCES,
    "os error 13": errno.EACCES,
    "Read-only file system": errno.EROFS,
    "os error 30": errno.EROFS,
    "Not a directory": errno.ENOTDIR,
}
_TYPES = {"str": "string", "int": "int64", "float": "float64", "bool": "bool_"}


def _library() -> tuple[Any, Any]:
    try:
        import lancedb
        import pyarrow
    except ImportError as error:
        raise ValueError("collections need LanceDB: pip install 'pair-retrieval[index]'") from error
    return lancedb, pyarrow


@contextmanager
def _plain_errors(place: str, doing: str) -> Iterator[None]:
    """LanceDB's errors tell the story of its call stack: keep the sentence."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        number = next((n for sign, n in _DISK.items() if sign in text), None)
        # A place in the library's own source (", /...rs:12:3") tells a user nothing.
        reason = os.strerror(number) if number else text.partition(", /")[0][:200]
        if CONFLICT in text and CONFLICT not in reason:
            reason = f"c{CONFLICT} of writers: {reason}"
        told = OSError(f"cannot {doing} the collection in {place}: {reason}")
        told.errno = number
        raise told from error


def _connect(place: str) -> Any:
    lancedb, _ = _library()
    session = lancedb.Session(index_cache_size_bytes=_cache(), metadata_cache_size_bytes=2**28)
    # Always the latest state: other processes write too.
    with _plain_errors(place, "open"):
        return lancedb.connect(place, read_consistency_interval=timedelta(0), session=session)


def _cache() -> int:
    """Bytes of indexes that may stay in memory."""
    given = os.environ.get(CACHE, "1024")
    if not given.isdecimal():
        raise ValueError(f"{CACHE} is {given!r}: it is the number of MB for indexes in memory")
    return int(given) * 2**20


class LanceStore:
    def __init__(self, place: str, name: str, table: Any):
        self.uri, self.place, self.table = f"{place}#{name}", place, table
        text = (table.schema.metadata or {}).get(KEY)
        if text is None:
            raise ValueError(f"{self.uri} is a table of another program, not a collection of pair")
        self.record = json.loads(text)
        layout = self.record["layout"]
        self.layout = Layout(**layout)

    @classmethod
    def create(cls, place: str, name: str, layout: Layout, record: dict[str, Any]) -> LanceStore:
        db = _connect(place)
        schema = _schema(layout).with_metadata({KEY: json.dumps(record).encode()})
        try:
            with _plain_errors(place, "create"):
                table = db.create_table(name, schema=schema)
                table.set_unenforced_primary_key("id")
        except ValueError as error:
            if "already exists" not in str(error):
                raise
            raise ValueError(f"there is a collection {place}#{name} already") from error
        return cls(place, name, table)

    @classmethod
    def open(cls, place: str, name: str) -> LanceStore:
        local = "://" not in place
        missing = f"there is no collection {place}#{name}: make one with 'pair index create'"
        if local and not Path(place).is_dir():
            raise ValueError(missing)
        db = _connect(place)
        try:
            with _plain_errors(place, "open"):
                table = db.open_table(name)
        except ValueError as error:
            if "not found" not in str(error).lower():
                raise
            raise ValueError(missing) from error
        return cls(place, name, table)

    def insert(self, rows: Sequence[Row]) -> int:
        if not rows:
            return 0
        data = _table(rows, self.layout)
        merge = self.table.merge_insert("id").when_not_matched_insert_all()
        return int(self._commit(lambda: merge.execute(data).num_inserted_rows, "write to"))

    def _commit(self, action: Callable[[], Any], doing: str) -> Any:
        """Many writers at a time: a commit may meet another's, and is then tried again."""
        for attempt in range(TRIES):
            try:
                with _plain_errors(self.place, doing):
                    return action()
            except OSError as error:
                if CONFLICT not in str(error) or attempt == TRIES - 1:
                    raise
                time.sleep(random.uniform(0.05, 0.2) * (attempt + 1))
        raise AssertionError

    def existing(self, ids: Sequence[str]) -> set[str]:
        found: set[str] = set()
        with _plain_errors(self.place, "read"):
            for part in chunks(ids, 500):
                query = self.table.search().where(_in("id", part)).select(["id"]).limit(len(part))
                found.update(query.to_arrow()["id"].to_pylist())
        return found

    def delete(self, where: Filter | None = None, **columns: Sequence[str]) -> int:
        conditions = [] if where is None else [to_sql(where)]
        for column, values in columns.items():
            conditions += [_in(column, part) for part in chunks(values, 500)]
        removed = 0
        for condition in conditions:
            done = self._commit(partial(self.table.delete, condition), "write to")
            removed += int(done.num_deleted_rows)
        return removed

    def count(self, where: Filter | None = None) -> int:
        with _plain_errors(self.place, "read"):
            return int(self.table.count_rows(None if where is None else to_sql(where)))

    def nearest(
        self,
        column: str,
        query: np.ndarray,
        k: int,
        where: Filter | None = None,
        *,
        exact: bool = False,
    ) -> list[tuple[Row, float]]:
        bits = self.layout.columns()[column][0] == "bits"
        with _plain_errors(self.place, "search"):
            search = self.table.search(query, vector_column_name=column)
            search = search.distance_type("hamming" if bits else "cosine").limit(k)
            if exact:
                search = search.bypass_vector_index()
            else:
                search = search.nprobes(PROBES)
                search = search if bits else search.refine_factor(REFINE)
            if where is not None:
                search = search.where(to_sql(where), prefilter=True)
            table = search.select([*FIXED, "_distance"]).to_arrow()
        scale = 2 / self.layout.bits if bits and self.layout.bits else 1.0
        scores = [1 - scale * d for d in table["_distance"].to_pylist()]
        return list(zip(_rows(table), scores, strict=True))

    def rows(
        self,
        columns: Sequence[str] = (),
        where: Filter | None = None,
        *,
        ids: Sequence[str] | None = None,
        batch: int = 1024,
    ) -> Iterator[list[Row]]:
        conditions: list[str | None] = [None if where is None else to_sql(where)]
        if ids is not None:
            conditions = [_in("id", part) for part in chunks(ids, 500)]
        with _plain_errors(self.place, "read"):
            for condition in conditions:
                search = self.table.search().select([*FIXED, *columns])
                if condition:
                    search = search.where(condition)
                for part in search.to_batches(batch):
                    if len(part):
                        yield _rows(part, columns)

    def sample(self, column: str, count: int) -> np.ndarray:
        with _plain_errors(self.place, "read"):
            total = self.table.count_rows()
            places = sorted(random.Random(0).sample(range(total), min(count, total)))
            table = self.table.take_offsets(places).select([column]).to_arrow()
        return _matrix(table[column])

    def optimise(self, approximate_from: int) -> None:
        try:
            self._commit(lambda: self._optimise(approximate_from), "optimise")
        except OSError as error:
            if CONFLICT not in str(error):
                raise
            # Others write all the time. Nothing is lost; whoever comes last tidies up.

    def _optimise(self, approximate_from: int) -> None:
        from lancedb import index

        self.table.optimize(cleanup_older_than=KEEP_VERSIONS)
        total = self.table.count_rows()
        indexed = {c for i in self.table.list_indices() for c in i.columns}
        if "id" not in indexed and total >= PARTITION:
            self.table.create_index("id", config=index.BTree())
        if total < max(approximate_from, 256):
            return
        for column, (kind, size) in self.layout.columns().items():
            if column in indexed:
                continue
            cells = max(1, total // PARTITION)
            if kind == "bits":
                config: Any = index.IvfFlat(distance_type="hamming", num_partitions=cells)
            elif size % 8 == 0 and size >= LONG:
                # RaBitQ: a bit per number, nothing to train but the clusters. Its error falls with
                # the length; short vectors keep a byte per number, which costs them little.
                config = index.IvfRq(distance_type="cosine", num_partitions=cells, num_bits=1)
            else:
                config = index.IvfSq(distance_type="cosine", num_partitions=cells)
            self.table.create_index(column, config=config)

    def stats(self) -> dict[str, Any]:
        indexes = {}
        with _plain_errors(self.place, "read"):
            for index in self.table.list_indices():
                facts = self.table.index_stats(index.name)
                for column in index.columns:
                    indexes[column] = {
                        "type": str(index.index_type),
                        "rows": int(facts.num_indexed_rows),
                        "waiting": int(facts.num_unindexed_rows),
                    }
        folder = Path(self.place)
        size = None
        if "://" not in self.place:
            folder = folder / f"{self.table.name}.lance"
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        return {"kind": "LanceDB", "bytes": size, "indexes": indexes}


def _schema(layout: Layout) -> Any:
    _, pa = _library()
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("added", pa.timestamp("us", "UTC")),
        pa.field("model", pa.string()),
        pa.field("purifier", pa.string()),
        pa.field("seed", pa.string()),
        pa.field("meta", pa.string()),
    ]
    for column, (kind, size) in layout.columns().items():
        item = pa.list_(pa.float32(), size) if kind == "float" else pa.list_(pa.uint8(), size // 8)
        fields.append(pa.field(column, item))
    fields += [pa.field(n, getattr(pa, _TYPES[t])()) for n, t in layout.fields.items()]
    return pa.schema(fields)


def _table(rows: Sequence[Row], layout: Layout) -> Any:
    _, pa = _library()
    schema, columns = _schema(layout), layout.columns()
    arrays = []
    for item in schema:
        if item.name in columns:
            kind, size = columns[item.name]
            width = size if kind == "float" else size // 8
            flat = np.concatenate([getattr(row, item.name) for row in rows])
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), width))
        elif item.name in layout.fields:
            arrays.append(pa.array([row.meta.get(item.name) for row in rows], item.type))
        elif item.name == "meta":
            arrays.append(pa.array([json.dumps(row.meta) for row in rows]))
        else:
            arrays.append(pa.array([getattr(row, item.name) for row in rows], item.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _rows(table: Any, columns: Sequence[str] = ()) -> list[Row]:
    plain = {name: table[name].to_pylist() for name in FIXED if name not in ("added", "meta")}
    plain["added"] = table["added"].cast("int64").to_pylist()
    plain["meta"] = [json.loads(text) for text in table["meta"].to_pylist()]
    for name in columns:
        plain[name] = list(_matrix(table[name]))
    names = list(plain)
    return [Row(**dict(zip(names, v, strict=True))) for v in zip(*plain.values(), strict=True)]


def _matrix(column: Any) -> np.ndarray:
    array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)


def _in(column: str, values: Sequence[str]) -> str:
    listed = ", ".join("'" + str(v).replace("'", "''") + "'" for v in values)
    return f"{column} in ({listed})"
