"""Collections in Milvus: a server or cluster, or a file of Milvus Lite.

``id`` is the primary key and rows go in by upsert, so the same row twice is one row. The record of
a collection is the description of its schema, or a row beside it where none is kept. Codes are
native binary vectors, compared by Hamming distance; Milvus Lite 3 refuses that type ("BinaryVector
which MilvusLite does not support"), there they are stored as floats of +-1, whose inner product
ranks the same. Milvus Lite 2 has them, but no columns that may be empty, so no declared fields. A
token is read from the environment variable ``PAIR_MILVUS_TOKEN``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pair.guard.filters import Filter, to_milvus
from pair.guard.stores import FIXED, Layout, Row, chunks

TEXT = 65_535  # bytes in a text
TOKEN = "PAIR_MILVUS_TOKEN"
EVERYTHING = 'id != ""'
RECORD = "__record"
_TYPES = {"str": "VARCHAR", "int": "INT64", "float": "DOUBLE", "bool": "BOOL"}


def _library() -> Any:
    try:
        import pymilvus
    except ImportError as error:
        raise ValueError(
            "collections in Milvus need pymilvus: pip install 'pair-retrieval[milvus]'"
        ) from error
    return pymilvus


@contextmanager
def _plain_errors(place: str, doing: str) -> Iterator[None]:
    try:
        yield
    except _library().MilvusException as error:
        text = " ".join(str(getattr(error, "message", "") or error).split())[:200]
        raise OSError(f"cannot {doing} the collection in {place}: {text}") from error


def _connect(place: str) -> Any:
    library = _library()
    local = "://" not in place and not place.startswith("unix:")
    if local:
        try:
            import milvus_lite  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{place} needs Milvus Lite: pip install milvus-lite, or use a server's address"
            ) from error
        # Milvus Lite 3 logs a stack trace for each call of the client that it does not need.
        logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
        place = os.path.abspath(place)
        if not Path(place).parent.is_dir():
            raise ValueError(f"there is no folder {Path(place).parent}")
    with _plain_errors(place, "reach"):
        return library.MilvusClient(place, token=os.environ.get(TOKEN, ""), timeout=30)


def _lite(place: str) -> int:
    """The version of Milvus Lite behind ``place``; 0 for a server."""
    if "://" in place or place.startswith("unix:"):
        return 0
    from importlib.metadata import version

    return int(version("milvus-lite").partition(".")[0])


class MilvusStore:
    def __init__(self, client: Any, place: str, name: str, record: dict[str, Any]):
        self.client, self.place, self.name, self.record = client, place, name, record
        self.uri = f"{place}#{name}"
        self.layout = Layout(**record["layout"])
        self.binary: bool = record["binary"]

    @classmethod
    def create(cls, place: str, name: str, layout: Layout, record: dict[str, Any]) -> MilvusStore:
        client = _connect(place)
        library, lite = _library(), _lite(place)
        if lite == 2 and layout.fields:
            raise ValueError(
                f"{place}: Milvus Lite 2 has no declared fields: use Milvus Lite 3 or a server"
            )
        with _plain_errors(place, "create"):
            if client.has_collection(name):
                raise ValueError(f"there is a collection {place}#{name} already")
            record = {**record, "binary": lite < 3}
            try:
                _create(client, name, layout, record)
            except library.MilvusException:
                if client.has_collection(name):  # a failed index leaves a collection behind
                    client.drop_collection(name)
                raise
            if client.describe_collection(name)["description"] != json.dumps(record):
                _keep_record(client, name, record)
            client.load_collection(name)
        return cls(client, place, name, record)

    @classmethod
    def open(cls, place: str, name: str) -> MilvusStore:
        missing = f"there is no collection {place}#{name}: make one with 'pair index create'"
        if "://" not in place and not Path(place).exists():
            raise ValueError(missing)
        client = _connect(place)
        with _plain_errors(place, "open"):
            if not client.has_collection(name):
                raise ValueError(missing)
            text = client.describe_collection(name)["description"]
            if not text and client.has_collection(name + RECORD):
                client.load_collection(name + RECORD)
                found = client.query(name + RECORD, filter=EVERYTHING, output_fields=["record"])
                text = found[0]["record"] if found else ""
            client.load_collection(name)
        try:
            return cls(client, place, name, json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{place}#{name} is a collection of another program, not of pair"
            ) from error

    def insert(self, rows: Sequence[Row]) -> int:
        there = self.existing([row.id for row in rows])
        fresh = [row for row in rows if row.id not in there]
        with _plain_errors(self.place, "write to"):
            for part in chunks(fresh, 1000):
                self.client.upsert(self.name, [self._entity(row) for row in part])
        return len(fresh)

    def existing(self, ids: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for part in chunks(ids, 500):
            found.update(e["id"] for e in self._query(_in("id", part), ["id"]))
        return found

    def delete(self, where: Filter | None = None, **columns: Sequence[str]) -> int:
        conditions = [] if where is None else [to_milvus(where)]
        for column, values in columns.items():
            conditions += [_in(column, part) for part in chunks(values, 500)]
        removed = 0
        with _plain_errors(self.place, "write to"):
            for condition in conditions:
                count = self._count(condition)
                self.client.delete(self.name, filter=condition)
                removed += count
        return removed

    def count(self, where: Filter | None = None) -> int:
        with _plain_errors(self.place, "read"):
            return self._count(EVERYTHING if where is None else to_milvus(where))

    def nearest(
        self,
        column: str,
        query: np.ndarray,
        k: int,
        where: Filter | None = None,
        *,
        exact: bool = False,
    ) -> list[tuple[Row, float]]:
        kind, size = self.layout.columns()[column]
        data: Any = np.asarray(query, np.float32).tolist()
        if kind == "bits":
            data = bytes(query) if self.binary else _signs(query)
        # Milvus searches without its index when every cluster and candidate is to be looked at.
        params = {"nprobe": 65_536, "ef": 32_768} if exact and self._indexed(column) else {}
        with _plain_errors(self.place, "search"):
            found = self.client.search(
                self.name, data=[data], anns_field=column, limit=k,
                filter="" if where is None else to_milvus(where),
                output_fields=list(FIXED), search_params={"params": params},
                consistency_level="Strong",
            )[0]  # fmt: skip
        if kind == "bits":
            scale = [1 - 2 * h["distance"] / size if self.binary else h["distance"] / size
                     for h in found]  # fmt: skip
        else:
            scale = [h["distance"] for h in found]
        return [(_row(h["entity"]), s) for h, s in zip(found, scale, strict=True)]

    def rows(
        self,
        columns: Sequence[str] = (),
        where: Filter | None = None,
        *,
        ids: Sequence[str] | None = None,
        batch: int = 1024,
    ) -> Iterator[list[Row]]:
        wanted = [*FIXED, *columns]
        if ids is not None:
            for part in chunks(ids, min(batch, 500)):
                yield [self._full(e, columns) for e in self._query(_in("id", part), wanted)]
            return
        # By id, page after page: no server-side cursor that could run out of time.
        condition, last = "" if where is None else to_milvus(where) + " and ", ""
        while True:
            page = self._ids_after(condition, last, batch)
            if not page:
                return
            yield [self._full(e, columns) for e in self._query(_in("id", page), wanted)]
            last = page[-1]

    def _ids_after(self, condition: str, last: str, batch: int) -> list[str]:
        """The next ids in order. A query comes back in no order, so a prefix is narrowed until
        all that is in it fits."""
        found = self._query(f'{condition}id > "{last}"', ["id"], limit=16_384)
        ids = sorted(e["id"] for e in found)
        if len(ids) < 16_384:
            return ids[:batch]
        high = ids[len(ids) // 2]
        while True:
            found = self._query(f'{condition}id > "{last}" and id <= "{high}"', ["id"], 16_384)
            ids = sorted(e["id"] for e in found)
            if len(ids) < 16_384:
                return ids
            high = ids[len(ids) // 2]

    def sample(self, column: str, count: int) -> np.ndarray:
        found = self._query(EVERYTHING, [column], limit=count)
        kind = self.layout.columns()[column][0]
        return np.stack([self._vector(e[column], kind) for e in found])

    def optimise(self, approximate_from: int) -> None:
        """The server merges by itself; from that many rows on it is asked for a real index."""
        with _plain_errors(self.place, "optimise"):
            self.client.flush(self.name)
            if "://" not in self.place or self._count(EVERYTHING) < approximate_from:
                return
            for column, (kind, _) in self.layout.columns().items():
                if self._indexed(column):
                    continue
                self.client.release_collection(self.name)
                self.client.drop_index(self.name, column)
                self._index(column, kind)
            self.client.load_collection(self.name)

    def stats(self) -> dict[str, Any]:
        indexes = {}
        with _plain_errors(self.place, "read"):
            total = self._count(EVERYTHING)
            for column in self.layout.columns():
                if self._indexed(column):
                    facts = self.client.describe_index(self.name, column)
                    waiting = int(facts.get("pending_index_rows") or 0)
                    indexes[column] = {
                        "type": facts["index_type"], "rows": total - waiting, "waiting": waiting
                    }  # fmt: skip
        size = None
        if "://" not in self.place:
            path = Path(self.place)
            parts = path.rglob("*") if path.is_dir() else [path]
            size = sum(p.stat().st_size for p in parts if p.is_file())
        return {"kind": "Milvus", "bytes": size, "indexes": indexes}

    def _indexed(self, column: str) -> bool:
        facts = self.client.describe_index(self.name, column) or {}
        return str(facts.get("index_type", "FLAT")) not in ("FLAT", "BIN_FLAT", "")

    def _index(self, column: str, kind: str) -> None:
        params = self.client.prepare_index_params()
        if kind == "bits" and self.binary:
            params.add_index(column, index_type="BIN_IVF_FLAT", metric_type="HAMMING",
                             params={"nlist": 1024})  # fmt: skip
        else:
            metric = "IP" if kind == "bits" else "COSINE"
            params.add_index(column, index_type="HNSW", metric_type=metric,
                             params={"M": 16, "efConstruction": 200})  # fmt: skip
        self.client.create_index(self.name, params)

    def _count(self, condition: str) -> int:
        found = self.client.query(
            self.name, filter=condition, output_fields=["count(*)"], consistency_level="Strong"
        )
        return int(found[0]["count(*)"])

    def _query(self, condition: str, columns: Sequence[str], limit: int | None = None) -> list:
        options = {} if limit is None else {"limit": limit}
        with _plain_errors(self.place, "read"):
            found = self.client.query(
                self.name,
                filter=condition,
                output_fields=list(columns),
                consistency_level="Strong",
                **options,
            )
        return list(found)

    def _entity(self, row: Row) -> dict[str, Any]:
        data: dict[str, Any] = {name: getattr(row, name) for name in FIXED}
        data["meta"] = json.dumps(row.meta)
        if len(data["meta"].encode()) > TEXT or len(row.uri.encode()) > TEXT:
            raise ValueError(f"{row.uri[:80]}: Milvus holds at most {TEXT} bytes of metadata")
        for column, (kind, _) in self.layout.columns().items():
            value = getattr(row, column)
            if kind == "float":
                data[column] = np.asarray(value, np.float32).tolist()
            else:
                data[column] = bytes(value) if self.binary else _signs(value)
        data.update({name: row.meta.get(name) for name in self.layout.fields})
        return data

    def _full(self, entity: dict[str, Any], columns: Sequence[str]) -> Row:
        row = _row(entity)
        for column in columns:
            kind = self.layout.columns()[column][0]
            setattr(row, column, self._vector(entity[column], kind))
        return row

    def _vector(self, value: Any, kind: str) -> np.ndarray:
        if kind == "float":
            return np.asarray(value, np.float32)
        if not self.binary:
            return np.packbits(np.asarray(value) > 0)
        data = value[0] if isinstance(value, list) else value
        return np.frombuffer(data, np.uint8).copy()


def _create(client: Any, name: str, layout: Layout, record: dict[str, Any]) -> None:
    library = _library()
    kinds = library.DataType
    schema = client.create_schema(auto_id=False, description=json.dumps(record))
    schema.add_field("id", kinds.VARCHAR, is_primary=True, max_length=32)
    for text in ("uri", "meta"):
        schema.add_field(text, kinds.VARCHAR, max_length=TEXT)
    for text in ("sha256", "model", "purifier", "seed"):
        schema.add_field(text, kinds.VARCHAR, max_length=128)
    for number in ("width", "height", "added"):
        schema.add_field(number, kinds.INT64)
    for field, kind in layout.fields.items():
        options = {"max_length": TEXT} if kind == "str" else {}
        schema.add_field(field, getattr(kinds, _TYPES[kind]), nullable=True, **options)
    params = client.prepare_index_params()
    for column, (kind, size) in layout.columns().items():
        if kind == "float":
            schema.add_field(column, kinds.FLOAT_VECTOR, dim=size)
            params.add_index(column, index_type="FLAT", metric_type="COSINE")
        elif record["binary"]:
            schema.add_field(column, kinds.BINARY_VECTOR, dim=size)
            params.add_index(column, index_type="BIN_FLAT", metric_type="HAMMING")
        else:
            schema.add_field(column, kinds.FLOAT_VECTOR, dim=size)
            params.add_index(column, index_type="FLAT", metric_type="IP")
    client.create_collection(name, schema=schema, index_params=params)


def _keep_record(client: Any, name: str, record: dict[str, Any]) -> None:
    """A collection of one row beside it, where descriptions are not kept (Milvus Lite 3)."""
    kinds = _library().DataType
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", kinds.VARCHAR, is_primary=True, max_length=32)
    schema.add_field("record", kinds.VARCHAR, max_length=TEXT)
    schema.add_field("vector", kinds.FLOAT_VECTOR, dim=2)  # there must be one
    params = client.prepare_index_params()
    params.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_collection(name + RECORD, schema=schema, index_params=params)
    row = {"id": "record", "record": json.dumps(record), "vector": [1.0, 0.0]}
    client.upsert(name + RECORD, [row])


def _row(entity: dict[str, Any]) -> Row:
    values = {name: entity[name] for name in FIXED}
    return Row(**{**values, "meta": json.loads(values["meta"])})


def _signs(code: np.ndarray) -> list[float]:
    """Packed bits -> floats of +-1."""
    return (np.unpackbits(np.asarray(code, np.uint8)) * 2.0 - 1).tolist()


def _in(column: str, values: Sequence[str]) -> str:
    return f"{column} in [{', '.join(json.dumps(str(v)) for v in values)}]"
