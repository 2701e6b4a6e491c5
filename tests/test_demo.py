"""The demonstration on a few photos, a few steps: structure, figures, report."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from pair import demo
from pair.attacks import AdvHashConfig, TTHConfig
from pair.data import embedded
from pair.pages import render

CLASSES = ["laptop", "sunflower", "chandelier", "leopard"]


@pytest.fixture
def few(monkeypatch):
    """Four classes, three photos each; one keyword and one pair of classes."""

    def thin(split, per):
        rows = [r for name in CLASSES for r in split([name])[:per]]
        return lambda only=None: [r for r in rows if only is None or r[1] in only]

    for name, per in (("gallery", 3), ("queries", 2), ("pool", 10)):
        monkeypatch.setattr(demo.embedded, name, thin(getattr(embedded, name), per))
    monkeypatch.setattr(demo.embedded, "labels", lambda: sorted(CLASSES))
    monkeypatch.setattr(demo, "KEYWORDS", ("laptop",))
    monkeypatch.setattr(demo, "SOURCES", ("chandelier",))
    monkeypatch.setattr(demo, "TARGET", "sunflower")
    monkeypatch.setattr(demo, "VIEWS", 4)
    monkeypatch.setattr(demo, "ADS", 2)


def short_run(seed=3):
    return demo.run(
        seed,
        tth_config=TTHConfig(steps=2),
        advhash_config=AdvHashConfig(budget=2, epochs=1),
    )


def test_outcome_has_every_system_and_is_reproducible(few):
    first, second = short_run(), short_run()
    text, images = first.parts
    rows = {row.name: row for row in text.rows}
    assert {"R@10, all queries", "mAP, all queries"} <= rows.keys()
    for row in text.rows:
        for value in (row.clean, row.attacked, row.clean_pair, row.attacked_certified):
            assert value is None or 0 <= value <= 100
    # The certificate covers every patch, so also this one: measured share <= proved share.
    proved = next(row for row in text.rows if row.name.startswith("proved"))
    measured = rows["share of the 10 advertisements in top 10"]
    assert measured.attacked_certified <= proved.attacked_certified + 1e-4
    assert set(text.cases[0].panel.results) == {"undefended", "PAIR", "certified"}
    assert set(images.cases[0].panel.results) == {"undefended", "PAIR"}
    assert [row for part in first.parts for row in part.rows] == [
        row for part in second.parts for row in part.rows
    ]
    assert torch.equal(text.cases[0].patch, second.parts[0].cases[0].patch)


def test_report_is_self_contained(few):
    outcome = short_run()
    page = render("demo", parts=outcome.parts, facts=outcome.facts)
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page refers to another file"
    assert page.count("<img") == page.count(" alt=")
    assert "“there is a laptop in this image”" in page
    picture = demo.figure(outcome)
    assert picture.width > 112 and picture.height > 112


def test_command_writes_all_files(few, tmp_path, monkeypatch):
    from pair.cli import app

    short = short_run()
    monkeypatch.setattr(demo, "run", lambda *a, **k: short)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d")])
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "d").iterdir()} == {
        "report.html",
        "figure.png",
        "results.json",
    }
    results = json.loads((tmp_path / "d" / "results.json").read_text())
    assert results["facts"]["seed"] == "3"
    assert len(results["parts"]) == 2
