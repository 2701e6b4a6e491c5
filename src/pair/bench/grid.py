"""The grid of a scenario: its cells, what each depends on, and what they share."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pair import __version__
from pair.bench import sets
from pair.bench.masked import hash_search
from pair.bench.models import CERTIFIED, Models
from pair.bench.scenario import Row, Scenario, Settings, changed, units
from pair.bench.search import HashSearch, Search, search
from pair.bench.store import Store, key_of
from pair.bench.world import HashWorld, TextWorld, hash_world, text_world

CODE = 2  # raised whenever a change of the benchmark or the attacks changes what is measured
# Where the work is done, and which cells there are, does not change a cell's numbers.
NEUTRAL = ("device", "data", "keywords", "pairs", "units", "classes")
# Of these, what they lead to is part of a cell: photos and the SHA-256 of models.
PLACES = ("tiny", "shipped", "models", "workers")
# A search without attack does not depend on how an attack would be made.
CLEAN = ("source", "image_size", "per_class", "seeds", "seed")
PURPOSES = {"optimise": 1, "select": 2, "evaluate": 3, "gallery": 4, "uploads": 5}


@dataclass(frozen=True)
class Cell:
    """One unit of work: a row, a mode and what is attacked ("" where nothing is)."""

    row: Row
    mode: str
    unit: str = ""

    @property
    def title(self) -> str:
        parts = [self.row.label, self.row.system, self.mode, self.unit]
        return ", ".join(p for p in parts if p)


def seed_of(purpose: str, base: int, unit: str = "", draw: int = 0) -> int:
    """Seeds of different purposes never meet; those of one unit follow one another."""
    spread = zlib.crc32(unit.encode()) % 9_000
    return PURPOSES[purpose] * 100_000_000 + base * 10_000_000 % 100_000_000 + spread * 1_000 + draw


@dataclass
class Bench:
    """A scenario with its settings, and everything that its cells share, loaded when needed."""

    scenario: Scenario
    settings: Settings
    store: Store
    progress: Callable[[int, int, float], None] | None = None
    _searches: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def models(self) -> Models:
        return Models(self.settings, self.store.root)

    @cached_property
    def text(self) -> TextWorld:
        found = sets.opened(self.settings, "text")
        return text_world(self.settings) if found is None else sets.text_world(found, self.settings)

    @cached_property
    def hash(self) -> HashWorld:
        found = sets.opened(self.settings, "photo")
        return hash_world(self.settings) if found is None else sets.hash_world(found, self.settings)

    def hashing(self, row: Row) -> bool:
        return self.scenario.kind == "hash" or row.attack.get("panel") == "hash"

    def units(self, hashing: bool) -> tuple[str, ...]:
        """The keywords or pairs that are attacked."""
        s = self.settings
        if hashing:
            return units(s, s.pairs or self.hash.pairs)
        return units(s, s.keywords or tuple(k for k, rows in self.text.members.items() if rows))

    def settings_of(self, row: Row) -> Settings:
        return changed(self.settings, row.attack, f"{self.scenario.name}, row {row.label}")

    def search(self, row: Row) -> Search:
        return self._kept("text", row, lambda: search(self.models, row))

    def hash_search(self, row: Row) -> HashSearch:
        return self._kept("hash", row, lambda: hash_search(self.models, row))

    def _kept(self, kind: str, row: Row, make: Callable[[], Any]) -> Any:
        name = key_of({"kind": kind, "row": identity(row)})
        if name not in self._searches:
            self._searches = {name: make()}  # one defense at a time is enough memory
        return self._searches[name]

    # --- cells and their keys ----------------------------------------------------------------

    def cells(self) -> list[Cell]:
        """Every cell, the clean ones first, then keyword by keyword; equal ones once."""
        found = [cell for row in self.scenario.rows for cell in self.of_row(row)]
        order = {"": 0, **{u: i for i, u in enumerate(dict.fromkeys(c.unit for c in found), 1)}}
        kept: dict[str, Cell] = {}
        for cell in sorted(found, key=lambda c: order[c.unit]):
            kept.setdefault(self.key(cell), cell)
        return list(kept.values())

    def of_row(self, row: Row) -> list[Cell]:
        """The cells of one row."""
        if self.scenario.kind in ("panels", "map"):
            return [Cell(row, "panel", self.units(self.hashing(row))[0])]
        attacked = self.units(self.scenario.kind == "hash")
        modes = row.modes or self.scenario.modes
        return [Cell(row, "clean"), *(Cell(row, mode, unit) for unit in attacked for mode in modes)]

    def key(self, cell: Cell) -> str:
        return key_of(self.facts(cell))

    def facts(self, cell: Cell) -> dict[str, Any]:
        """What the numbers of a cell depend on; also the head of its record."""
        kind, settings = self.scenario.kind, asdict(self.settings_of(cell.row))
        hashing, row = self.hashing(cell.row), identity(cell.row)
        if cell.mode == "clean":
            kind = "hash" if hashing else "text"
            size = "hash_size" if hashing else "size"
            kept = (*CLEAN, size, "views") if cell.row.defense == CERTIFIED else CLEAN
            settings = {k: v for k, v in settings.items() if k in kept}
        else:
            settings = {k: v for k, v in settings.items() if k not in NEUTRAL}
            row |= {"attack": cell.row.attack}
            if cell.row.patches:
                row["patches"] = _digest(Path(cell.row.patches))
        settings = {k: v for k, v in settings.items() if k not in PLACES}
        return {
            "code": CODE,
            "version": __version__,
            "kind": kind,
            "row": row,
            "mode": cell.mode,
            "unit": cell.unit,
            "settings": settings,
            "models": self.models.facts(cell.row, hashing),
            "data": (self.hash if hashing else self.text).digest,
        }

    def gallery(self, row: Row, draw: int) -> Tensor:
        """Rows of the clean photos behind the row's defense, draw number ``draw``; kept on disk."""
        s = self.settings_of(row)
        facts = self.facts(Cell(row, "clean"))
        facts["settings"] = {k: v for k, v in facts["settings"].items() if k in ("size", "views")}
        key = key_of({**facts, "draw": draw, "seed": s.seed, "what": "gallery"})
        kept = self.store.tensor(key)
        if kept is None:
            kept = self.search(row).rows(self.text.photos, seed_of("gallery", s.seed, draw=draw))
            self.store.keep_tensor(key, kept)
        return kept

    def codes(self, row: Row) -> Tensor:
        """Codes (N, K) of the clean gallery by the network of a row; kept on disk."""
        hardened = row.defense in ("at", "hm")
        models = self.models.facts(row if hardened else Row("", "none"), True)
        key = key_of({"what": "codes", "code": CODE, "version": __version__, "models": models,
                      "data": self.hash.digest, "side": self.settings.image_size})  # fmt: skip
        kept = self.store.tensor(key)
        if kept is None:
            kept = self.hash_search(row).gallery(self.hash.photos).to(torch.int8)
            self.store.keep_tensor(key, kept)
        return kept.float()

    def draws(self, row: Row) -> range:
        """Purifications that are measured: one is all there is without randomness."""
        searched = self.hash_search(row) if self.hashing(row) else self.search(row)
        return range(self.settings.seeds if searched.random else 1)


def identity(row: Row) -> dict[str, Any]:
    return {"defense": row.defense, "options": row.options}


def _digest(folder: Path) -> str:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".json"))
    if not files:
        raise ValueError(f"{folder} holds no patches")
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]
