"""Scenarios as typed data: what a table measures, at which size, next to which printed numbers.

A scenario is a TOML file (``assets/bench/table1.toml`` ... or one of your own): its rows, the
columns of its table with the paper's values, and its settings per scale. ``scales.toml`` holds
what the scales have in common. Settings win in the order scale < scenario < command line.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

SCALES = ("smoke", "small", "paper")
NAMES = (
    *("table1", "table2", "table3", "table4", "table5"),
    *("alpha", "ladder", "fig1", "fig2", "fig5"),
)
KINDS = ("text", "hash", "noise", "ladder", "panels", "map", "none")


@dataclass(frozen=True)
class Settings:
    """Sizes, models and budgets of a run. Every field may be set by a scale, a scenario or the
    user; a result depends on nothing else but its row, the models and the version."""

    # pictures and models
    source: str = "embedded"  # or yours, in ``data``: "captions" for texts, "classes" for photos
    data: tuple[str, ...] = ()  # NAME:FOLDER of a data set (see pair.data.sets), or one folder
    workers: int = 0  # processes that decode photos
    tiny: bool = False  # random models made on the fly: for tests of the machinery only
    shipped: bool = True  # whether this package's weights may stand in for those of a defense
    models: dict[str, str] = field(default_factory=dict)  # name in a row -> folder that replaces it
    clip: str = "clip-small"  # "open_clip:<architecture>/<weights>" for public models
    csq: str = "csq-small"
    generator: str = "pair-small"
    image_size: int = 112
    device: str = "cpu"
    classes: int = 0  # of the gallery; 0 = all
    per_class: int = 16
    ads: int = 10
    keywords: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()  # "source > target"
    units: int = 0  # use only the first so many keywords or pairs; 0 = all
    sources: int = 10  # photos that an AdvHash patch is optimised on
    # evaluation
    k: int = 10
    relevant: str = "precision"  # "precision" (P@K over a class) or "recall" (own image in top K)
    top: int = 1000  # mAP@top of the hash search
    seeds: int = 5  # purifications per picture
    uploads: int = 50  # draws of the best-of-n curve
    selection: int = 2  # draws that choose among attacks
    checks: bool = True
    # attacks
    size: float = 0.35  # of the side
    hash_size: float = 0.22
    hash_place: str = "centre"
    static_steps: int = 300  # against the undefended search, in the paper's own settings
    steps: int = 100  # against a defense
    random_steps: int = 0  # against a random one, whose gradients are noise; 0 = steps
    random_ads: int = 0  # and so many advertisements per step, drawn anew; 0 = all
    eot: int = 1
    lr: float = 0.05
    schedule: str = "cosine"
    distortion: float = 0.0
    start: str = "grey"
    hash_static: int = 200
    hash_steps: int = 100
    hash_step: float = 4 / 255
    hash_optimiser: str = "adam"  # of the adaptive attack; "sign" is AdvHash's own
    member_steps: int = 30  # against the views of the certified mode
    views: int = 9
    epsilon: float = 4 / 255
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.data, str):  # one will do
            object.__setattr__(self, "data", (self.data,) if self.data else ())
        for name in ("k", "ads", "seeds", "selection", "steps", "eot", "image_size", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.relevant not in ("precision", "recall"):
            raise ValueError(f"relevant must be 'precision' or 'recall', got {self.relevant!r}")
        for pair in self.pairs:
            if len(pair.split(">")) != 2:
                raise ValueError(f"a pair of classes is written 'source > target', got {pair!r}")


@dataclass(frozen=True)
class Row:
    """One line of a table, or one of several systems in it (rows with the same label).

    ``defense`` is a name of ``pair.defenses``, "certified", or "package.module:factory";
    ``options`` go to its factory. ``attack`` changes the patch or the settings of the attack.
    ``paper`` maps a printed column such as "flickr30k.adaptive.irrelevant" to its value.
    ``patches`` is a folder of submitted patches, one per keyword, that join the attacks;
    ``scales`` limits a row to some scales; ``at`` adds to ``attack`` at a scale.
    """

    label: str
    defense: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    attack: dict[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ()
    system: str = ""
    paper: dict[str, Any] = field(default_factory=dict)
    patches: str = ""
    scales: tuple[str, ...] = ()
    at: dict[str, dict[str, Any]] = field(default_factory=dict)

    def printed(self, dataset: str, column: str) -> float | None:
        """The paper's value in a column, if it has one."""
        return self.paper.get(dataset, {}).get(column)


@dataclass(frozen=True)
class Column:
    """``key``: [system.]mode.figure, or "clean"."""

    key: str
    title: str


@dataclass(frozen=True)
class Scenario:
    name: str
    title: str
    kind: str
    rows: tuple[Row, ...] = ()
    columns: tuple[Column, ...] = ()
    modes: tuple[str, ...] = ("nonadaptive", "adaptive")
    datasets: tuple[str, ...] = ()  # of the paper, in the order of printing
    citation: str = ""
    differences: str = ""
    needs: tuple[str, ...] = ()
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)


def folder() -> Path:
    return Path(str(resources.files("pair"))) / "assets" / "bench"


def load(name: str) -> Scenario:
    """A scenario by name, or from a TOML file of your own."""
    path = Path(name) if name.endswith(".toml") else folder() / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise ValueError(f"no file {name}")
        raise ValueError(
            f"no scenario {name!r}: use one of {', '.join(NAMES)}, or a path that ends in .toml"
        )
    data = _read(path)
    columns = data.pop("columns", [])
    if not all(isinstance(c, list) and len(c) == 2 for c in columns):
        raise ValueError(f'{path.name}: a column is written ["key", "title"]')
    printed = [key for key, _ in columns]
    rows = tuple(_row(r, printed, f"{path.name}: row {i + 1}") for i, r in
                 enumerate(data.pop("rows", [])))  # fmt: skip
    scales = {name: data.pop(name) for name in SCALES if name in data}
    made = _typed(Scenario, {"name": path.stem, **data}, path.name, rows=rows, scales=scales,
                  columns=tuple(Column(*c) for c in columns))  # fmt: skip
    if made.kind not in KINDS:
        raise ValueError(f"{path.name}: kind must be one of {', '.join(KINDS)}, got {made.kind!r}")
    for scale in scales:
        settings(made, scale)
    return made


def at_scale(scenario: Scenario, scale: str) -> Scenario:
    """The scenario with the rows that exist at a scale, as they are attacked there."""
    rows = [r for r in scenario.rows if not r.scales or scale in r.scales]
    made = (replace(r, attack={**r.attack, **r.at.get(scale, {})}, at={}) for r in rows)
    return replace(scenario, rows=tuple(made))


def settings(scenario: Scenario, scale: str, **changes: Any) -> Settings:
    """The settings of a scenario at a scale, with the user's changes (None changes nothing)."""
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: use one of {', '.join(SCALES)}")
    common = _read(folder() / "scales.toml")[scale]
    given = {k: v for k, v in changes.items() if v is not None}
    table = {**common, **scenario.scales.get(scale, {}), **given}
    return _typed(Settings, table, f"{scenario.name}, scale {scale}")


def changes(given: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` (the value as in TOML, or a bare word) -> changes for :func:`settings`.

    ``models.NAME=FOLDER`` adds to the table ``models``.
    """
    out: dict[str, Any] = {}
    for change in given:
        name, equals, text = change.partition("=")
        table, dot, key = name.strip().partition(".")
        if not equals or not table or (dot and not (table == "models" and key)):
            raise ValueError(f"--set {change}: write KEY=VALUE or models.NAME=FOLDER")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        if dot:
            out.setdefault(table, {})[key] = value
        else:
            out[table] = value
    return out


def changed(base: Settings, table: dict[str, Any], where: str) -> Settings:
    """``base`` with the settings that a row's ``attack`` names (shapes are read elsewhere)."""
    known = {f.name for f in fields(Settings)}
    values = {k: v for k, v in table.items() if k in known}
    return _typed(Settings, {**asdict(base), **values}, where) if values else base


def units(settings: Settings, known: tuple[str, ...]) -> tuple[str, ...]:
    """The keywords or pairs that are attacked."""
    if settings.units > len(known):
        raise ValueError(f"this scale names {len(known)} keywords or pairs: {settings.units} asked")
    return known[: settings.units] if settings.units else known


def _row(data: dict[str, Any], columns: list[str], where: str) -> Row:
    """TOML gives the paper's values as lists in the order of the columns."""
    paper = {}
    for name, values in data.pop("paper", {}).items():
        keys = data.get("printed", columns)
        if len(values) != len(keys):
            raise ValueError(f"{where}: {len(values)} printed values for {len(keys)} columns")
        paper[name] = {k: float(v) for k, v in zip(keys, values, strict=True)}
    data.pop("printed", None)
    return _typed(Row, data, where, paper=paper)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def _typed(cls: Any, data: dict[str, Any], where: str, **rest: Any) -> Any:
    """A dataclass from a table; unknown names and wrong types are refused by name."""
    hints = get_type_hints(cls)
    values = {}
    for key, given in data.items():
        if key not in hints:
            known = ", ".join(f.name for f in fields(cls))
            raise ValueError(f"{where}: unknown setting {key!r}; known: {known}")
        hint = hints[key]
        plain = get_args(hint)[0] if isinstance(hint, UnionType) else get_origin(hint) or hint
        value = given
        if plain is tuple and isinstance(given, list | tuple):
            value = tuple(given)
        if key == "data" and isinstance(given, str):
            value = (given,) if given else ()
        if plain is float and isinstance(given, int) and not isinstance(given, bool):
            value = float(given)
        if plain in (int, float, str, bool, tuple, dict) and type(value) is not plain:
            raise ValueError(f"{where}: {key} must be {plain.__name__}, got {given!r}")
        values[key] = value
    try:
        return cls(**values, **rest)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
