"""From the records of a grid to tables: means with intervals, the paper's values, what failed.

Everything here works on *lines*: records of cells with the label, system, mode and unit of their
place in the table. A published result file holds such lines, so a table can be made again from it
without any model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pair.attacks import sanity
from pair.attacks.sanity import TITLES, Check
from pair.bench.grid import Bench
from pair.bench.scenario import Scenario
from pair.files import write_atomic
from pair.retrieval.statistics import summarise

Line = dict[str, Any]
RESAMPLES = 1000
_MODES = {"adaptive": "adaptive", "nonadaptive": "non-adaptive"}


@dataclass
class Value:
    """A mean with its interval, in percent; ``grey`` names the checks that failed.

    ``single``: one cluster only, so there is no interval to show.
    """

    mean: float | None = None
    low: float = 0.0
    high: float = 0.0
    single: bool = False
    printed: list[float | None] = field(default_factory=list)  # the paper's, by data set
    grey: list[str] = field(default_factory=list)
    message: str = ""  # why there is no value
    text: str = ""  # shown instead of a number

    def __str__(self) -> str:
        return self.shown(interval=not self.single)

    def shown(self, interval: bool) -> str:
        if self.text:
            return self.text
        if self.mean is None:
            return "failed" if self.message else "–"
        ends = f" [{self.low:.1f}, {self.high:.1f}]" if interval else ""
        return f"{self.mean:.1f}{ends}{' †' if self.grey else ''}"

    @property
    def paper(self) -> str:
        known = ["–" if v is None else f"{v:.2f}" for v in self.printed]
        return " / ".join(known) if any(v is not None for v in self.printed) else "–"


@dataclass
class Table:
    """``rows``: label and one value per column. ``with_paper``: columns that the paper has too."""

    name: str
    title: str
    columns: list[str]
    rows: list[tuple[str, list[Value]]]
    with_paper: list[bool]
    notes: list[str]
    facts: dict[str, Any]


# --- lines ------------------------------------------------------------------------------------


def lines_of(bench: Bench) -> list[Line]:
    """The finished cells of a grid, in the order of the table."""
    found = []
    for row in bench.scenario.rows:  # rows of equal settings share a cell; each has its line
        for cell in bench.of_row(row):
            record = bench.store.read(bench.key(cell))
            if record is not None:
                place = {"label": row.label, "system": row.system, "mode": cell.mode,
                         "unit": cell.unit}  # fmt: skip
                found.append({**place, **record})
    return found


def publish(path: Path, lines: Iterable[Line]) -> None:
    text = "".join(json.dumps(x, separators=(",", ":"), ensure_ascii=False) + "\n" for x in lines)
    write_atomic(path, text.encode())


def published(path: Path) -> list[Line]:
    if not path.is_file():
        raise ValueError(f"there is no result file {path}: run the scenario and report it first")
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a result file: {error}") from error


# --- figures of one line ----------------------------------------------------------------------


def figures(line: Line, kind: str, k: int, relevant: str) -> dict[str, list[float]]:
    """Per query, averaged over the purifications: "clean", or "irrelevant", "relevant" and more."""
    result = line["result"]
    if line["mode"] == "clean":
        if "ap" in result:
            return {"clean": _mean(result["ap"])}
        return {"clean": _mean([[_found(r, k, relevant) for r in d] for d in result["ranks"]])}
    attack, none = result["attacks"][result["chosen"]], result["attacks"]["none"]
    if kind == "hash":
        return {
            "irrelevant": _mean(attack["irrelevant"]),
            "relevant": _mean(attack["relevant"]),
            "relevant_before": _mean(none["relevant"]),
            "irrelevant_before": _mean(none["irrelevant"]),
        }
    if kind == "noise":  # one picture at a time: each is a case of its own
        shown = _inside(attack, k)
        return {
            "irrelevant": _mean([[_average(q) for q in d] for d in shown]),
            "relevant": _alone(attack["after"], k, relevant),
            "relevant_before": _alone(none["after"], k, relevant),
            "irrelevant_before": _mean([[_average(q) for q in d] for d in _inside(none, k)]),
        }
    shown = _inside(attack, k)
    return {
        "irrelevant": _mean([[float(any(q)) for q in d] for d in shown]),
        "share": _mean([[_average(q) for q in d] for d in shown]),
        "relevant": _mean([[_found(r, k, relevant) for r in d] for d in attack["after"]]),
        "relevant_before": _mean([[_found(r, k, relevant) for r in d] for d in none["after"]]),
        "irrelevant_before": _mean([[float(any(q)) for q in d] for d in _inside(none, k)]),
    }


def _inside(attack: dict[str, Any], k: int) -> list[list[list[bool]]]:
    return [[[r <= k for r in q] for q in d] for d in attack["inserted"]]


def _found(ranks: Sequence[int], k: int, how: str) -> float:
    inside = sum(r <= k for r in ranks)
    return float(inside > 0) if how == "recall" else inside / k


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean(draws: Sequence[Sequence[float]]) -> list[float]:
    return [_average(values) for values in zip(*draws, strict=True)]


def _alone(after: list, k: int, how: str) -> list[float]:
    return _mean([[_average([_found(r, k, how) for r in q]) for q in d] for d in after])


# --- tables -----------------------------------------------------------------------------------


def interval(values: list[float], groups: list[Any]) -> tuple[float, float, float, bool]:
    """Mean over groups with its 95 % cluster-bootstrap interval, in percent."""
    return *_interval(tuple(values), tuple(groups)), len(set(groups)) == 1


@lru_cache(maxsize=4096)  # a report shows the same value on several pages
def _interval(values: tuple[float, ...], groups: tuple[Any, ...]) -> tuple[float, float, float]:
    clipped = torch.tensor(values, dtype=torch.float64).clamp(0, 1)
    found = summarise(clipped, groups, resamples=RESAMPLES, seed=0).macro
    return 100 * found.mean, 100 * found.low, 100 * found.high


def table(scenario: Scenario, lines: list[Line], facts: dict[str, Any]) -> Table:
    """The table of a scenario of kind text, hash or noise."""
    k, how = int(facts.get("k", 10)), str(facts.get("relevant", "precision"))
    labels = list(dict.fromkeys(row.label for row in scenario.rows))
    checks = _checks(lines)
    keys = [c.key for c in scenario.columns]
    modes = [m for m in _MODES if scenario.kind == "text" and f"{m}.irrelevant" in keys]
    rows, failures = [], []
    for label in labels:
        values = []
        own = [x for x in lines if x["label"] == label]
        for column in scenario.columns:
            value = _value(own, column.key, scenario.kind, k, how)
            value.printed = [
                next((v for r in scenario.rows if r.label == label
                      and (v := r.printed(d, column.key)) is not None), None)
                for d in scenario.datasets
            ]  # fmt: skip
            if value.message:
                failures.append(f"{label}: {value.message}.")
            if column.key.endswith("irrelevant") and "adaptive" in column.key.split("."):
                value.grey = checks.get(label, [])
            values.append(value)
        shares = [_value(own, f"{m}.share", scenario.kind, k, how) for m in modes]
        before = [_before(own, scenario.kind, k, how, f) for f in ("relevant", "irrelevant")]
        values += [*shares, *before, _latency(own)]
        rows.append((label, values))
    printed = [
        any(r[1][i].paper != "–" for r in rows) for i in range(len(scenario.columns))
    ]  # fmt: skip
    columns = [c.title for c in scenario.columns]
    columns += [f"{_MODES[m]}: share of the pictures in the top {k}" for m in modes]
    columns += ["relevant, same queries, no patch", "irrelevant, no patch", "ms"]
    printed += [False] * (len(columns) - len(printed))
    return Table(
        scenario.name, scenario.title, columns, rows, printed,
        _notes(scenario, lines, facts, failures, checks), facts,
    )  # fmt: skip


def _value(own: list[Line], key: str, kind: str, k: int, how: str) -> Value:
    *place, figure = key.split(".")
    mode = place[-1] if place else "clean"
    system = place[0] if len(place) > 1 else None
    lines = [x for x in own if x["mode"] == mode and (system is None or x["system"] == system)]
    failed = [x for x in lines if x["status"] == "failed"]
    if failed:
        return Value(message=failed[0]["message"])
    if not lines:
        return Value()
    values: list[float] = []
    groups: list[Any] = []
    for line in lines:
        found = figures(line, kind, k, how)[figure]
        values += found
        groups += _groups(line, len(found))
    return Value(*interval(values, groups))


def _groups(line: Line, count: int) -> list[Any]:
    """Clusters of a line's queries: the keyword or pair, or (clean) the class of each query."""
    if line["mode"] != "clean":
        return [line["unit"]] * count
    result = line["result"]
    return list(result.get("groups") or result["query_labels"])


def _before(own: list[Line], kind: str, k: int, how: str, figure: str) -> Value:
    lines = [x for x in own if x["mode"] != "clean" and x["status"] == "done"]
    units: dict[str, list[float]] = {}
    for line in lines:
        units.setdefault(line["unit"], figures(line, kind, k, how)[f"{figure}_before"])
    if not units:
        return Value()
    values = [v for found in units.values() for v in found]
    return Value(*interval(values, [u for u, found in units.items() for _ in found]))


def _latency(own: list[Line]) -> Value:
    times = [x["run"]["ms_per_image"] for x in own if "ms_per_image" in x.get("run", {})]
    return Value(text=f"{times[0]:.1f}") if times else Value()


def _checks(lines: list[Line]) -> dict[str, list[str]]:
    """label -> names of the checks that failed for some unit."""
    failed: dict[str, set[str]] = {}
    for line in lines:
        for check in line.get("result", {}).get("checks", []):
            if check["passed"] is False:
                failed.setdefault(line["label"], set()).add(check["name"])
    return {label: sorted(names, key=lambda n: int(n[1:])) for label, names in failed.items()}


def measured(lines: list[Line]) -> list[str]:
    """Names of the checks that were measured somewhere in these lines."""
    found = {
        c["name"]
        for line in lines
        for c in line.get("result", {}).get("checks", [])
        if c["passed"] is not None
    }
    return [name for name in TITLES if name in found]


def _notes(scenario, lines, facts, failures, checks) -> list[str]:
    notes = [f"Paper: {scenario.citation}."] if scenario.citation else []
    if scenario.differences:
        notes.append(scenario.differences)
    units = list(dict.fromkeys(x["unit"] for x in lines if x["unit"]))
    setting = (
        f"Scale {facts['scale']}: {', '.join(units)}; {facts['seeds']} purifications per picture "
        "where the defense is random; percent, with 95 % cluster bootstrap intervals over keywords "
        "(pairs, classes): few clusters, read them as ranges."
    )
    if "data" in facts:
        setting += f" Measured on {facts['data']}."
    if facts.get("tiny"):
        setting += " Random models: the numbers mean nothing."
    notes.append(setting)
    if len(lines) < int(facts.get("cells", 0)):
        notes.append(f"Unfinished: {len(lines)} of {facts['cells']} cells are measured.")
    if checks:
        details = "; ".join(f"{label}: {', '.join(names)}" for label, names in checks.items())
        notes.append(f"† grey, a sanity check failed for some keyword ({details}).")
    notes += [_proof(label, lines) for label in dict.fromkeys(x["label"] for x in lines
              if x.get("result", {}).get("proved"))]  # fmt: skip
    if names := measured(lines):
        missing = [n for n in TITLES if n not in names]
        notes.append(
            f"Measured here: {', '.join(names)}."
            + (f" Not measured here: {', '.join(missing)}." if missing else "")
        )
    notes += list(dict.fromkeys(failures))
    return notes


def _proof(label: str, lines: list[Line]) -> str:
    """What was proved about the queries of a row: from clean pictures, not by an attack."""
    own = [x["result"]["proved"] for x in lines
           if x["label"] == label and "proved" in x.get("result", {})]  # fmt: skip
    most, least = (
        100 * _average([_average(p[name]) for p in own]) for name in ("irrelevant", "relevant")
    )
    vacuous = " That is no bound: it proves nothing." if most > 99.95 else ""
    return (
        f"{label}: proved for the attacked queries, from their clean pictures and for every patch "
        f"of that size at any place: irrelevant at most {most:.1f}, relevant at least {least:.1f}."
        f"{vacuous}"
    )


# --- the ladder -------------------------------------------------------------------------------


def ladder(scenario: Scenario, lines: list[Line], facts: dict[str, Any]) -> Table:
    """One row per rung and number of steps."""
    k = int(facts.get("k", 10))
    rows: list[tuple[str, list[Value]]] = []
    labels = list(dict.fromkeys(row.label for row in scenario.rows))
    failures = []
    for label in labels:
        own = [x for x in lines if x["label"] == label and x["mode"] == "adaptive"]
        failed = [x for x in own if x["status"] == "failed"]
        if failed:
            failures.append(f"{label}: {failed[0]['message']}.")
            own = []
        if own:
            rows += _rung_rows(label, own, k)
    columns = ["steps", "masks per step", "gradients", f"share of pictures in top {k}",
               f"any in top {k}"]  # fmt: skip
    notes = _notes(scenario, lines, facts, failures, {})
    notes += [_told(check) for check in ladder_checks(lines, k)]
    return Table(scenario.name, scenario.title, columns, rows, [False] * len(columns), notes, facts)


def ladder_checks(lines: list[Line], k: int) -> list[Check]:
    """S1, S2 and S8 as the rungs found them; S3 and S7 from comparing rungs."""
    done = [x for x in lines if x["status"] == "done" and x["mode"] == "adaptive"]
    found = [
        Check(c["name"], c["value"], c["threshold"], c["passed"], f"{x['label']}, {x['unit']}")
        for x in done
        for c in x["result"].get("checks", [])
    ]
    curves = [x for x in done if x["result"].get("rung") == "curve"]
    for label in dict.fromkeys(x["label"] for x in curves):
        levels = [_by_picture(x["result"]["points"], k) for x in curves if x["label"] == label]
        joined = [[v for level in levels for v in level[i]] for i in range(len(levels[0]))]
        check = sanity.s3_monotone(joined)
        found.append(Check("S3", check.value, check.threshold, check.passed, label))
    substitutes = {x["label"]: x for x in done if x["result"].get("rung") == "estimator"}
    for other in substitutes.values():
        point = other["result"]["points"][-1]
        same = [x for x in curves if x["unit"] == other["unit"]
                and x["facts"]["row"]["attack"] == {"rung": "curve"}]  # fmt: skip
        if same:
            full = _average(_by_picture(same[0]["result"]["points"][-1:], k)[0])
            own = {other["label"]: _average(_by_picture([point], k)[0])}
            check = sanity.s7_full_gradient(full, own, 0.02)
            found.append(Check("S7", check.value, check.threshold, check.passed, check.note))
    return sorted(found, key=lambda c: int(c.name[1:]))


def _by_picture(points: list[dict[str, Any]], k: int) -> list[list[float]]:
    """Share of draws and queries in which each inserted picture is in the top K, per point."""
    return [
        (torch.tensor(p["inserted"], dtype=torch.float64) <= k).double().mean((0, 1)).tolist()
        for p in points
    ]


def _told(check: Check) -> str:
    word = {True: "holds", False: "fails", None: "was not measured"}[check.passed]
    numbers = ""
    if check.value is not None and check.threshold is not None:
        numbers = f": {check.value:.3g} against {check.threshold:.3g}"
    return f"{check.name}, {TITLES[check.name]}, {word}{numbers} ({check.note})."


def _rung_rows(label: str, own: list[Line], k: int) -> list[tuple[str, list[Value]]]:
    first = own[0]["result"]
    if "families" in first:
        names = first["families"]
        return [
            (f"{name}, no gradient", [_text("–"), _text("–"), _text("0"), *_shares(
                [(x["unit"], x["result"]["families"][name]["inserted"]) for x in own], k)])
            for name in names
        ]  # fmt: skip
    if "curve" in first:
        return [
            (f"best of {n} uploads of one picture", [
                _text("–"), _text(str(first["eot"])), _text("–"),
                Value(*interval([x["result"]["curve"][n] for x in own],
                                [x["unit"] for x in own])), Value()])
            for n in first["curve"]
        ]  # fmt: skip
    rows = []
    for i, point in enumerate(first["points"]):
        found = [(x["unit"], x["result"]["points"][i]["inserted"]) for x in own]
        head = [str(point["steps"]), str(first["eot"]), f"{point['gradients']:,}"]
        rows.append((label, [*map(_text, head), *_shares(found, k)]))
    return rows


def _text(text: str) -> Value:
    return Value(text=text)


def _shares(found: list[tuple[str, list]], k: int) -> list[Value]:
    share: list[float] = []
    some: list[float] = []
    groups: list[str] = []
    for unit, ranks in found:
        inside = (torch.tensor(ranks, dtype=torch.float64) <= k).double()  # (draws, Q, A)
        share += inside.mean((0, 2)).tolist()
        some += inside.amax(2).mean(0).tolist()
        groups += [unit] * inside.shape[1]
    return [Value(*interval(share, groups)), Value(*interval(some, groups))]
