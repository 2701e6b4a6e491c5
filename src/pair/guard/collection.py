"""Collections of pictures that are purified on the way in, searched, and audited.

    models = Models.load("clip-small", purifier="pair-small")
    collection = Collection.create("photos.lance", models, fields={"label": "str"})
    report = collection.add("holiday/", "more.csv")
    for hit in collection.search_text("a red car", k=5, where="label != 'scan'"):
        print(hit.rank, hit.score, hit.uri)

Everything that is written stays: a row is there when ``add`` reports it, whatever happens next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from pair.guard import filters, ingest, stores
from pair.guard.ingest import AddReport
from pair.guard.models import ROLES, Models
from pair.guard.stores import CODES, FIXED, VECTORS, Layout, Row, Store
from pair.images import decode

APPROXIMATE = 50_000  # rows from which on an approximate index is built
DEFENSES = ("gallery", "query", "both", "none")


@dataclass(frozen=True)
class Hit:
    """One result. ``score``: cosine with the query, or for codes 2 x the share of equal bits - 1.

    ``metadata`` is what the source said about the picture; ``rank`` starts with 1.
    """

    id: str
    uri: str
    score: float
    rank: int
    width: int = 0
    height: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Info:
    """What ``info`` says. ``recall``: per column with an approximate index, the share of the
    exact top 10 that its search finds, over ``sampled`` stored vectors as queries."""

    uri: str
    kind: str
    rows: int
    bytes: int | None
    dim: int | None
    bits: int | None
    models: dict[str, dict[str, str]]
    seed: str
    fields: dict[str, str]
    root: str
    created: int
    indexes: dict[str, dict[str, Any]]
    approximate_from: int
    recall: dict[str, float] = field(default_factory=dict)
    sampled: int = 0

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Collection:
    """Rows in a store and the models that made them. Searching is safe from several threads;
    adding is safe from several processes."""

    def __init__(
        self,
        store: Store,
        models: Models | None = None,
        *,
        root: str | None = None,
        device: str = "cpu",
    ):
        self.store, self.record, self.device = store, store.record, device
        self.uri = store.uri
        self.layout = Layout(**self.record["layout"])
        self.root = self.record["root"] if root is None else os.path.abspath(root)
        self._models = models
        if models is not None:
            self._check(models)

    @classmethod
    def create(
        cls,
        uri: str,
        models: Models,
        *,
        fields: Mapping[str, str] | None = None,
        seed: int | None = None,
        root: str | os.PathLike[str] | None = None,
        approximate_from: int = APPROXIMATE,
    ) -> Collection:
        """A new, empty collection.

        ``uri``: a folder or ``s3://bucket/prefix`` (LanceDB), ``http://host:19530`` or ``file.db``
        (Milvus), each with ``#name`` for one of several. ``fields``: metadata that filters may
        use, name -> "str", "int", "float" or "bool". ``seed``: masks derived from it and the
        content, for experiments; by default every picture gets a secret one. ``root``: uris of
        files below this folder are stored relative to it.

        Raises ``ValueError`` if there is one already.
        """
        declared = dict(fields or {})
        for name, kind in declared.items():
            if kind not in filters.TYPES:
                raise ValueError(f"field {name} has type {kind!r}: use str, int, float or bool")
            if not name.isidentifier() or name in (*FIXED, *VECTORS, *CODES) or name[0] == "_":
                raise ValueError(f"a field cannot be called {name!r}")
        layout = Layout(models.dim, models.bits, models.purifier is not None, declared)
        record = {
            "format": 1,
            "layout": asdict(layout),
            "models": models.describe(),
            "seed": "secret" if seed is None else str(seed),
            "root": "" if root is None else os.path.abspath(root),
            "created": int(time.time() * 1e6),
            "approximate_from": approximate_from,
        }
        return cls(stores.create_store(uri, layout, record), models)

    @classmethod
    def open(
        cls,
        uri: str,
        models: Models | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        device: str = "cpu",
    ) -> Collection:
        """``models``: default, those that the collection names, loaded when first needed.

        Raises ``ValueError`` if there is none, or if the models are not those that made it.
        """
        folder = None if root is None else os.fspath(root)
        return cls(stores.open_store(uri), models, root=folder, device=device)

    @property
    def models(self) -> Models:
        if self._models is None:
            named = self.record["models"]
            if unnamed := [role for role, m in named.items() if not m["name"]]:
                raise ValueError(f"the {unnamed[0]} of {self.uri} has no name: pass models=")
            names = {role: named[role]["name"] if role in named else None for role in ROLES}
            draws = int(named.get("purifier", {}).get("draws", 1))
            models = Models.load(**names, draws=draws, device=self.device)
            self._check(models)
            self._models = models
        return self._models

    def _check(self, models: Models) -> None:
        found = models.describe()
        for role in ROLES:
            wanted = self.record["models"].get(role, {}).get("fingerprint", "none")
            given = found.get(role, {}).get("fingerprint", "none")
            if wanted != given:
                raise ValueError(
                    f"{self.uri} was made with another {role} (fingerprint {wanted}, this one is "
                    f"{given}): use that one, or create a new collection"
                )

    def __len__(self) -> int:
        return self.store.count()

    def add(
        self,
        *paths: str | os.PathLike[str],
        failures: str | os.PathLike[str] | None = None,
        part: tuple[int, int] = (1, 1),
        batch_size: int = 32,
        commit_rows: int = 256,
        index: bool = True,
        committed: Callable[[list[Row]], None] = lambda rows: None,
        progress: Callable[[AddReport], None] = lambda report: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> AddReport:
        """Add pictures of files, folders, lists (.txt, .csv, .jsonl) and WebDataset shards (.tar).

        Same content twice is one row; what is there already is skipped, so the same call goes on
        where another one was stopped, also beside another process. ``committed`` is told of rows
        that are safely stored. ``part=(1, 4)`` takes the first quarter of the sources, for four
        machines. Pictures that cannot be read are appended to the file ``failures``.
        """
        return ingest.add(
            self, list(paths), failures=failures, part=part, batch_size=batch_size,
            commit_rows=commit_rows, index=index, committed=committed, progress=progress,
            stop=stop,
        )  # fmt: skip

    def add_rows(self, rows: Iterable[Row], *, commit_rows: int = 1024, index: bool = True) -> int:
        """Add rows whose vectors you have; returns how many were new. For imports and tests."""
        added = 0
        for part in stores.chunks(rows, commit_rows):
            added += self.store.insert(list({row.id: row for row in part}.values()))
        if index:
            self.optimise()
        return added

    def remove(
        self,
        *,
        ids: Sequence[str] = (),
        uris: Sequence[str] = (),
        where: str | None = None,
    ) -> int:
        """Remove rows by id, by uri, or by a filter; returns how many there were."""
        if not ids and not uris and where is None:
            raise ValueError("say what to remove: ids, uris or a filter")
        removed = self.store.delete(self._where(where)) if where is not None else 0
        if ids:
            removed += self.store.delete(id=list(ids))
        if uris:
            removed += self.store.delete(uri=list(uris))
        return removed

    def optimise(self) -> None:
        """Merge small pieces; from ``approximate_from`` rows on, build or extend the index."""
        self.store.optimise(self.record["approximate_from"])

    def info(self, *, recall: int = 50) -> Info:
        """Facts; ``recall``: stored vectors to search with, exactly and approximately (0: none)."""
        stats = self.store.stats()
        found = {
            column: self._recall(column, recall)
            for column in self.layout.columns()
            if column in stats["indexes"] and recall
        }
        return Info(
            uri=self.uri,
            kind=stats["kind"],
            rows=len(self),
            bytes=stats["bytes"],
            dim=self.layout.dim,
            bits=self.layout.bits,
            models=self.record["models"],
            seed=self.record["seed"],
            fields=self.layout.fields,
            root=self.root,
            created=self.record["created"],
            indexes=stats["indexes"],
            approximate_from=self.record["approximate_from"],
            recall=found,
            sampled=recall if found else 0,
        )

    def _recall(self, column: str, count: int, k: int = 10) -> float:
        shares = []
        for query in self.store.sample(column, count):
            exact = self.store.nearest(column, query, k, exact=True)
            near = self.store.nearest(column, query, k)
            if not exact:
                continue
            # By score, so that equal distances count as equally good.
            last = exact[-1][1] - 1e-6
            shares.append(sum(score >= last for _, score in near[: len(exact)]) / len(exact))
        return float(np.mean(shares)) if shares else 1.0

    def search_text(
        self,
        text: str,
        k: int = 10,
        *,
        defend: str | None = None,
        where: str | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """The pictures nearest to a text. ``defend``: see :meth:`search_image`; texts are never
        purified, so "query" is the same as "none" here."""
        if not text.strip():
            raise ValueError("the query is empty")
        column = self._column("embedding", defend)
        return self._search(column, self.models.text([text])[0], k, where, exact)

    def search_image(
        self,
        image: Tensor | str | os.PathLike[str] | bytes,
        k: int = 10,
        *,
        defend: str | None = None,
        where: str | None = None,
        exact: bool = False,
        using: str | None = None,
        seed: int | None = None,
    ) -> list[Hit]:
        """The pictures nearest to one: (3, H, W) in [0, 1], a file, or the bytes of one.

        ``defend``: "gallery" compares with the purified pictures, "query" purifies the query,
        "both", or "none"; default "both" where the collection has a purifier. ``using``:
        "embedding" or "code"; default the embedding, if there is one. ``seed`` makes the query's
        mask repeatable; by default it is secret and fresh. ``exact`` goes round the approximate
        index, where there is one.
        """
        using = using or ("embedding" if self.layout.dim else "code")
        column = self._column(using, defend)
        purified = self.purifies(defend, "query")
        seeds = None if seed is None else [seed]
        query = self.embed(image, purified=purified, seeds=seeds)[column.partition("_")[0]]
        return self._search(column, query, k, where, exact)

    def search_row(
        self,
        row: np.ndarray,
        k: int = 10,
        *,
        using: str = "embedding",
        defend: str | None = None,
        where: str | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """The pictures nearest to a row that is computed already: a unit vector or a packed code.

        ``defend`` says which side of the gallery it is compared with, see :meth:`search_image`.
        """
        return self._search(self._column(using, defend), row, k, where, exact)

    def embed(
        self,
        image: Tensor | str | os.PathLike[str] | bytes,
        *,
        purified: bool,
        seeds: list[int] | None = None,
    ) -> dict[str, np.ndarray]:
        """{"vector": (D,), "code": (bits / 8,)} of one picture, as far as the models go."""
        models = self.models
        views = models.views_of(image) if isinstance(image, Tensor) else models.views(decode(image))
        features = models.features(
            [v[None] for v in views], raw=not purified, purified=purified, seeds=seeds
        )
        tail = "" if purified else "_raw"
        found = {name: getattr(features, name + tail) for name in ("vector", "code")}
        return {name: value[0] for name, value in found.items() if value is not None}

    def purifies(self, defend: str | None, side: str) -> bool:
        """Is this side, "gallery" or "query", purified under ``defend``?"""
        defend = defend or ("both" if self.layout.purified else "none")
        if defend not in DEFENSES:
            raise ValueError(f"defend is {defend!r}: use one of {', '.join(DEFENSES)}")
        wanted = defend in (side, "both")
        if defend != "none" and not self.layout.purified:
            raise ValueError(f"{self.uri} has no purifier: search with defend='none'")
        return wanted

    def _column(self, using: str, defend: str | None) -> str:
        if using not in ("embedding", "code"):
            raise ValueError(f"cannot search using {using!r}: use 'embedding' or 'code'")
        name = "vector" if using == "embedding" else "code"
        column = name if self.purifies(defend, "gallery") else f"{name}_raw"
        if column not in self.layout.columns():
            raise ValueError(f"{self.uri} has no {using}s: its models are {self._roles()}")
        return column

    def _roles(self) -> str:
        return " and ".join(self.record["models"])

    def _search(
        self, column: str, query: np.ndarray, k: int, where: str | None, exact: bool
    ) -> list[Hit]:
        if not 1 <= k <= 10_000:
            raise ValueError(f"k must lie between 1 and 10000, got {k}")
        found = self.store.nearest(column, query, k, self._where(where), exact=exact)
        found = sorted(found, key=lambda f: (-f[1], f[0].id))
        return [
            Hit(row.id, row.uri, score, rank, row.width, row.height, row.meta)
            for rank, (row, score) in enumerate(found, 1)
        ]

    def _where(self, where: str | None) -> filters.Filter | None:
        return None if where is None else filters.parse(where, self.searchable())

    def searchable(self) -> dict[str, str]:
        """Fields that a filter may use."""
        return {**self.layout.fields, "uri": "str", "id": "str", "width": "int", "height": "int"}

    def read(self, uri: str) -> bytes:
        """The bytes of a stored picture, wherever its source was."""
        return ingest.read(uri, self.root)
