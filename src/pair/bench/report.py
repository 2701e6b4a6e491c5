"""From finished cells to a folder that can be read, published and checked.

``<scenario>.jsonl`` holds the cells, ``.json`` the table as ``scripts/readme.py`` renders it,
``.md`` and ``.tex`` the table to read and to print, ``patches/`` every patch that a table shows,
``index.html`` everything in one file, ``leaderboard.*`` the defenses in order.
"""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pair.bench import figures, markup, tables
from pair.bench.grid import Bench
from pair.bench.scenario import NAMES, Row, Scenario, at_scale, load
from pair.bench.tables import Line, Table
from pair.files import write_atomic
from pair.pages import render

SHOWN = 24  # patches on the page


@dataclass
class Section:
    """What the page shows of one scenario."""

    scenario: Scenario
    table: Table | None
    lines: list[Line]
    pictures: dict[str, bytes] = field(default_factory=dict)


def stamped(bench: Bench, scale: str) -> list[Line]:
    """Lines of a grid with the facts that a table needs."""
    place = {"scale": scale, "tiny": bench.settings.tiny, "k": bench.settings.k,
             "relevant": bench.settings.relevant, "seeds": bench.settings.seeds,
             "cells": sum(len(bench.of_row(row)) for row in bench.scenario.rows)}  # fmt: skip
    if bench.settings.source != "embedded":
        hashing = bench.scenario.kind == "hash"
        place["data"] = (bench.hash if hashing else bench.text).name
    return [{**line, "table": place} for line in tables.lines_of(bench)]


def table_of(scenario: Scenario, lines: list[Line]) -> Table | None:
    """The table of a scenario's lines; None for figures."""
    if not lines or scenario.kind in ("panels", "map", "none"):
        return None
    facts = lines[0]["table"]
    make = tables.ladder if scenario.kind == "ladder" else tables.table
    return make(at_scale(scenario, facts["scale"]), lines, facts)


def write(
    out: Path, scenario: Scenario, lines: list[Line], source: Path | None, draw: bool = True
) -> Section:
    """One scenario's files. ``source`` is the folder of the run, with patches and pictures."""
    out.mkdir(parents=True, exist_ok=True)
    tables.publish(out / f"{scenario.name}.jsonl", lines)
    made = table_of(scenario, lines)
    section = Section(scenario, made, lines)
    if made is not None:
        text = json.dumps(markup.data(made), indent=1, ensure_ascii=False) + "\n"
        write_atomic(out / f"{scenario.name}.json", text.encode())
        write_atomic(out / f"{scenario.name}.md", markup.markdown(made).encode())
        write_atomic(out / f"{scenario.name}.tex", markup.latex(made).encode())
    if source is not None:
        _copy(source, out, lines)
    if draw:
        section.pictures = figures.drawn(scenario, made, lines)
    for line in lines:
        name = line.get("result", {}).get("picture")
        if name and (out / "pictures" / name).is_file():
            label = f"{scenario.name}-{line['label']}".replace(" ", "-").replace(",", "")
            section.pictures[label.lower()] = (out / "pictures" / name).read_bytes()
    for name, picture in section.pictures.items():
        write_atomic(out / f"{name}.png", picture)
    return section


def _copy(source: Path, out: Path, lines: list[Line]) -> None:
    """The patches and pictures that lines name."""
    wanted = {("patches", f"{k}{e}") for k in patches_of(lines) for e in (".png", ".json")}
    wanted |= {("pictures", x["result"]["picture"]) for x in lines
               if x.get("result", {}).get("picture")}  # fmt: skip
    for folder, name in sorted(wanted):
        if (source / folder / name).is_file() and source != out:
            (out / folder).mkdir(exist_ok=True)
            shutil.copyfile(source / folder / name, out / folder / name)


def patches_of(lines: list[Line]) -> dict[str, str]:
    """Key of every optimised patch in these lines -> what it is."""
    found: dict[str, str] = {}
    for line in lines:
        details = line.get("result", {}).get("details", {})
        entries = details if "patch" not in details else {"gradient": details}
        for name, notes in entries.items():
            if isinstance(notes, dict) and "patch" in notes:
                what = "published attack" if name == "transfer" else line["label"]
                found.setdefault(notes["patch"], f"{line['unit']}: {what}")
    return found


def rebuilt(out: Path, name: str) -> Section:
    """A section from published files alone."""
    scenario = load(name)
    lines = tables.published(out / f"{name}.jsonl")
    pictures = {p.stem: p.read_bytes() for p in sorted(out.glob(f"{name}-*.png"))}
    return Section(scenario, table_of(scenario, lines), lines, pictures)


def sections(out: Path) -> list[Section]:
    """Every published scenario, in the order of the paper."""
    return [rebuilt(out, name) for name in NAMES if (out / f"{name}.jsonl").is_file()]


def page(out: Path) -> Path:
    """``index.html`` from everything published in ``out``; nothing is loaded from elsewhere."""
    parts = []
    for section in sections(out):
        patches = [
            (caption, _uri((out / "patches" / f"{key}.png").read_bytes()))
            for key, caption in patches_of(section.lines).items()
            if (out / "patches" / f"{key}.png").is_file()
        ]
        cards = {
            json.dumps(x["result"]["threat"], sort_keys=True): x["result"]["threat"]
            for x in section.lines
            if x.get("result", {}).get("threat")
        }
        columns, rows = markup.flat(section.table) if section.table else ([], [])
        parts.append({
            "name": section.scenario.name,
            "title": section.scenario.title,
            "columns": columns,
            "rows": [[{"text": t, "grey": bool(v and v.grey), "why": ", ".join(v.grey) if v else "",
                       "sort": _sort(t)} for t, v in row] for row in rows],
            "notes": section.table.notes if section.table else _notes(section.scenario),
            "pictures": [(n, _uri(p)) for n, p in section.pictures.items()],
            "patches": patches[:SHOWN],
            "cards": list(cards.values()),
        })  # fmt: skip
    path = out / "index.html"
    write_atomic(path, render("bench", parts=parts, board=leaderboard(out)).encode())
    return path


def _notes(scenario: Scenario) -> list[str]:
    return [n for n in (f"Paper: {scenario.citation}.", scenario.differences) if n]


def _sort(text: str) -> str:
    """What a column is sorted by: its first number, or the text."""
    word = text.partition(" ")[0].replace(",", "")
    try:
        return f"{float(word):012.4f}"
    except ValueError:
        return f"~{text}"


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"


# --- leaderboard ------------------------------------------------------------------------------


def leaderboard(out: Path) -> dict[str, Any] | None:
    """Defenses of the text table by the success of the worst adaptive attack.

    Submitted result files, ``submissions/*.jsonl``, stand in the same order; a line counts only
    under the attack of the benchmark, that is with the data of the table it is compared with.
    """
    if not (out / "table1.jsonl").is_file():
        return None
    base = load("table1")
    own = tables.published(out / "table1.jsonl")
    entries = _entries(base, own, "pair")
    data = {x["facts"]["data"] for x in own if "facts" in x}
    for path in sorted((out / "submissions").glob("*.jsonl")):
        lines = tables.published(path)
        if other := {x["facts"]["data"] for x in lines} - data:
            raise ValueError(f"{path} was measured on other data ({min(other)}): run it again")
        entries += _entries(base, lines, path.stem)
    entries.sort(key=lambda e: (e["order"], -e["clean_mean"]))
    columns = ["defense", "clean", "irrelevant, worst attack", "relevant", "ms", "from"]
    keys = ("label", "clean", "irrelevant", "relevant", "ms", "source")
    rows = [[entry[k] for k in keys] for entry in entries]
    note = (
        f"Text search, scale {own[0]['table']['scale']}: sorted by the irrelevant R@10 of the "
        "worst attack per keyword. † a sanity check of the attack failed: the true value may be "
        "higher. Rows that failed to run are left out."
    )
    return {"columns": columns, "rows": rows, "note": note}


def _entries(base: Scenario, lines: list[Line], source: str) -> list[dict[str, Any]]:
    facts = lines[0]["table"]
    labels = dict.fromkeys(x["label"] for x in lines)
    known = {r.label: r for r in base.rows}
    rows = tuple(known.get(label) or Row(label) for label in labels)
    table = tables.table(replace(base, rows=rows), lines, facts)
    keys = [c.key for c in base.columns]
    out = []
    for label, values in table.rows:
        cell = dict(zip(keys, values, strict=False))
        worst = cell["adaptive.irrelevant"]
        if worst.mean is None:
            continue
        out.append({
            "label": label, "clean": str(cell["clean"]), "irrelevant": str(worst),
            "relevant": str(cell["adaptive.relevant"]), "ms": str(values[-1]), "source": source,
            "order": worst.mean, "clean_mean": cell["clean"].mean or 0.0,
        })  # fmt: skip
    return out


def write_leaderboard(out: Path) -> Path | None:
    board = leaderboard(out)
    if board is None:
        return None
    path = out / "leaderboard.json"
    write_atomic(path, (json.dumps(board, indent=1, ensure_ascii=False) + "\n").encode())
    return path
