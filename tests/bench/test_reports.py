"""Tables against numbers made by hand, and published files against themselves."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pair.bench import markup, report, tables
from pair.bench.scenario import load
from pair.cli import app
from pair.commands import bench

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "bench"


def line(label: str, mode: str, unit: str, result: dict | None, **more) -> dict:
    status = "done" if result is not None else "failed"
    body = {"result": result} if result is not None else {"message": "no such model"}
    place = {"scale": "smoke", "tiny": False, "k": 2, "relevant": "precision", "seeds": 2}
    return {"label": label, "system": "", "mode": mode, "unit": unit, "status": status,
            "table": place, "run": {}, **body, **more}  # fmt: skip


def attacked(inserted, after, checks=()):
    none = {"inserted": [[[9, 9]]] * 2, "after": [[[1, 2]]] * 2}
    chosen = {"inserted": inserted, "after": after}
    return {
        "chosen": "gradient",
        "attacks": {"gradient": chosen, "none": none},
        "checks": [{"name": n, "passed": p, "value": 1, "threshold": 0} for n, p in checks],
    }


LINES = [
    line("PAIR", "clean", "", {"ranks": [[[1, 2], [1, 5]], [[1, 2], [3, 5]]], "groups": [0, 1]},
         run={"ms_per_image": 12.34}),
    # two draws, one query, two inserted pictures
    line("PAIR", "adaptive", "a", attacked([[[1, 7]], [[3, 7]]], [[[2, 3]], [[1, 2]]])),
    line("PAIR", "adaptive", "b", attacked([[[1, 2]], [[1, 2]]], [[[3, 4]], [[3, 4]]],
                                           [("S8", False), ("S11", True)])),
    line("undefended", "adaptive", "a", None),
]  # fmt: skip


def test_figures_of_a_line_by_hand():
    clean = tables.figures(LINES[0], "text", 2, "precision")["clean"]
    assert clean == [1.0, 0.25]  # (2+2)/4, (1+0)/4
    found = tables.figures(LINES[1], "text", 2, "precision")
    assert found["irrelevant"] == [0.5] and found["share"] == [0.25]
    assert found["relevant"] == [0.75] and found["relevant_before"] == [1.0]
    assert tables.figures(LINES[1], "text", 2, "recall")["relevant"] == [1.0]


def rung(label, kind, ranks, attack=None):
    points = [{"steps": i, "gradients": 10 * i, "inserted": r} for i, r in enumerate(ranks)]
    row = {"attack": attack or {"rung": kind}}
    result = {"rung": kind, "eot": 1, "points": points, "checks": []}
    return line(label, "adaptive", "a", result, facts={"row": row})


def test_the_ladder_compares_its_rungs():
    """Two draws, one query, two pictures: shares rise 0, 50, 75 %, a substitute reaches 100 %."""
    rises = [[[[9, 9]]] * 2, [[[1, 9]]] * 2, [[[1, 9]], [[1, 1]]]]
    lines = [
        rung("full", "curve", rises),
        rung("falls", "curve", [[[[1, 1]]] * 2, [[[9, 9]]] * 2], {"rung": "curve", "eot": 7}),
        rung("bpda", "estimator", [[[[1, 1]]] * 2]),
    ]
    found = {(c.name, c.note): c for c in tables.ladder_checks(lines, 2)}
    assert found["S3", "full"].passed and not found["S3", "falls"].passed
    s7 = found["S7", "strongest other: bpda"]
    assert (s7.value, s7.threshold, s7.passed) == (0.75, 0.98, False)
    made = tables.ladder(load("ladder"), [], lines[0]["table"])
    assert made.rows == []


@pytest.fixture
def table(scenario_file):
    return tables.table(load(str(scenario_file)), LINES, LINES[0]["table"])


def test_a_table_has_means_the_papers_values_and_what_failed(table):
    rows = dict(table.rows)
    assert [round(v.mean, 3) for v in rows["PAIR"][:3]] == [62.5, 75.0, 37.5]
    assert rows["PAIR"][1].grey == ["S8"] and rows["PAIR"][0].grey == []
    assert rows["PAIR"][1].paper == "2.50 / 1.50"
    assert rows["undefended"][1].paper == "94.00 / –"
    assert rows["undefended"][1].mean is None and str(rows["undefended"][1]) == "failed"
    assert rows["PAIR"][-1].text == "12.3"
    # The share of pictures; the same queries with nothing in the top; no patch, none in the top.
    assert [round(v.mean, 3) for v in rows["PAIR"][3:6]] == [62.5, 100.0, 0.0]
    notes = " ".join(table.notes)
    assert "no such model" in notes and "PAIR: S8" in notes and "everything" in notes


def test_the_interval_is_that_of_the_library(table):
    import torch

    from pair.retrieval.statistics import summarise

    value = dict(table.rows)["PAIR"][1]
    given = torch.tensor([0.5, 1.0])
    macro = summarise(given, ["a", "b"], resamples=tables.RESAMPLES, seed=0).macro
    assert (value.low, value.high) == (100 * macro.low, 100 * macro.high)


def test_markdown_latex_and_data_say_the_same(table):
    data = markup.data(table)
    text = markup.markdown(table)
    header = next(x for x in text.splitlines() if x.startswith("|  |"))
    assert header.count("paper") == 3 and data["columns"].count("paper") == 3
    for row in data["rows"]:
        assert f"| {' | '.join(row)} |" in text
    latex = markup.latex(table)
    grey = next(t for r in data["rows"] for t in r if "†" in t)
    assert rf"\textcolor{{gray}}{{{markup.escape(grey)}}}" in latex
    assert latex.count(r"\\") == 1 + len(data["rows"])
    assert not re.search(r"(?<!\\)[&%_#](?=[^ ])", latex.split(r"\begin")[1].split("%")[0])


def test_a_run_is_published_and_rebuilt(finished, tmp_path):
    lines = report.stamped(finished, "smoke")
    assert [x["label"] for x in lines] == ["undefended"] * 2 + ["PAIR"] * 2 + ["absent"] * 2
    scenario = finished.scenario
    section = report.write(tmp_path, scenario, lines, finished.store.root, draw=False)
    stored = json.loads((tmp_path / "own.json").read_text())
    again = report.table_of(scenario, tables.published(tmp_path / "own.jsonl"))
    assert markup.data(again) == stored == markup.data(section.table)
    named = report.patches_of(lines)
    assert named and all((tmp_path / "patches" / f"{key}.png").is_file() for key in named)
    assert "Random models" in stored["note"]


def test_the_page_is_self_contained_and_shows_grey(finished, tmp_path):
    from dataclasses import replace

    lines = report.stamped(finished, "smoke")
    table1 = replace(load("table1"), rows=tuple(r for r in load("table1").rows))
    report.write(tmp_path, table1, lines, finished.store.root, draw=False)
    page = report.page(tmp_path).read_text()
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)
    assert "data:image/png;base64," in page and "data-sort=" in page
    assert 'class="grey"' in page
    board = report.leaderboard(tmp_path)
    order = [float(row[2].split()[0]) for row in board["rows"]]
    assert order == sorted(order) and {row[0] for row in board["rows"]} == {"undefended", "PAIR"}
    # A submission stands beside ours, one on other data is refused.
    (tmp_path / "submissions").mkdir()
    theirs = [{**x, "label": "theirs"} for x in lines if x["label"] == "PAIR"]
    tables.publish(tmp_path / "submissions" / "theirs.jsonl", theirs)
    names = [(r[0], r[-1]) for r in report.leaderboard(tmp_path)["rows"]]
    assert ("theirs", "theirs") in names
    for x in theirs:
        x["facts"] = {**x["facts"], "data": "other"}
    tables.publish(tmp_path / "submissions" / "theirs.jsonl", theirs)
    with pytest.raises(ValueError, match="other data"):
        report.leaderboard(tmp_path)


def test_commands(scenario_file, finished, tmp_path):
    cli = CliRunner()
    shown = cli.invoke(app, ["bench", "list"])
    assert shown.exit_code == 0 and all(n in shown.output for n in ("table1", "ladder", "fig5"))
    base = ["bench", "run", str(scenario_file), "--scale", "smoke"]
    dry = cli.invoke(app, [*base, "--out", str(tmp_path), "--dry-run"])
    assert dry.exit_code == 0 and "gradients" in dry.output + (dry.stderr or "")
    assert not (tmp_path / "cells").exists()
    done = cli.invoke(
        app, ["bench", "report", str(scenario_file), "--scale", "smoke", "--no-figures",
              "--results", str(finished.store.root), "--out", str(tmp_path / "r")]
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r" / "own.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "run", "table9"], "no scenario 'table9'"),
        (["bench", "run", "table1", "--scale", "paper"], "--data FOLDER"),
        (["bench", "run", "table2", "--scale", "paper"], "--data FOLDER"),
        (["bench", "run", "table1", "--keywords", "99"], "names 6 keywords"),
        (["bench", "report", "table1", "--results", "nowhere"], "no finished cell"),
    ],
)
def test_bad_requests_are_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.jsonl")), ids=lambda p: p.stem)
def test_published_tables_agree_with_their_cells(path):
    made = report.table_of(load(path.stem), tables.published(path))
    if made is None:
        return
    stored = json.loads(path.with_suffix(".json").read_text())
    assert markup.data(made) == stored
    assert markup.markdown(made) == path.with_suffix(".md").read_text()
    assert markup.latex(made) == path.with_suffix(".tex").read_text()


def test_a_narrow_screen_gets_the_main_columns():
    columns = [
        "clean", "adaptive: irrelevant", "adaptive: relevant", "non-adaptive: irrelevant",
        "non-adaptive: relevant", "relevant, same queries, no patch", "irrelevant, no patch",
    ]  # fmt: skip
    values = [tables.Value(80.0 + i, 70.1, 99.9, printed=[88.86, 87.72]) for i in range(7)]
    values[1].grey = ["failed"]
    rows = [(label, values) for label in ("undefended", "PAIR, certified")]
    table = tables.Table("table1", "Table 1", columns, rows, [i < 5 for i in range(7)], [], {})

    def shown(width: int) -> str:
        console = Console(width=width, file=io.StringIO())
        assert bench._print(console, table) == (width > 100)
        return console.file.getvalue()

    narrow, wide = shown(80), shown(300)
    lines = narrow.splitlines()
    assert max(map(len, lines)) <= 80 and "[" not in narrow and "paper" not in narrow
    assert "non-adaptive:" in narrow and "irrelevant" in narrow and "…" not in narrow
    (row,) = [line for line in lines if line.startswith("│ PAIR, certified ")]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["PAIR, certified", "80.0", "81.0 †", "82.0", "83.0"]
    assert "84.0 [70.1, 99.9]" in wide and "88.86 / 87.72" in wide


def test_figures_are_drawn(finished, tmp_path):
    pytest.importorskip("matplotlib")
    from pair.bench import figures

    scenario = load("table1")
    lines = report.stamped(finished, "smoke")
    made = figures.drawn(scenario, report.table_of(scenario, lines), lines)
    assert set(made) == {"table1-trade-off"}
    assert made["table1-trade-off"].startswith(b"\x89PNG")


def test_names_in_a_figure_do_not_hide_each_other():
    pytest.importorskip("matplotlib")
    from pair.bench import figures

    plt = figures._library()
    figure, panel = plt.subplots()
    panel.set(xlim=(0, 100), ylim=(0, 100))
    points = {f"a long name {i}": (99.0, 90 + i / 2) for i in range(6)}
    boxes = [text.get_window_extent() for text in figures._labels(panel, points).values()]
    plt.close(figure)
    edge = panel.get_window_extent().x1
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i]) and box.x1 <= edge
