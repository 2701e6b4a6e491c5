"""The table of benchmarks/adaptive.py, made from files written by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from adaptive_report import merge

from pair.attacks import sanity


def point(steps, share):
    return {"steps": steps, "gradients": 2 * steps, "share": share, "any": [1.0] * len(share)}


def keyword(name, known, shares, model="a"):
    runs = {
        "undefended, Adam": {"points": [point(0, [0.0]), point(50, [0.9])]},
        "PAIR, Adam, EOT-1": {"points": [point(0, [0.0] * 2), *(point(s, v) for s, v in shares)]},
    }
    for i, share in enumerate(known):
        runs[f"known mask {i}, Adam"] = {"points": [point(0, [0.0]), point(50, [share])]}
    checks = [sanity.Check("S4", 0.001, 0.01, name == "x"), sanity.s11_seeds({"optimise": [1]})]
    facts = {"keyword": name, "models": {"m": model}, "carriers per update": 2, "masks": []}
    return {"facts": facts, "runs": runs, "checks": sanity.records(checks)}


def test_means_over_keywords_and_checks_over_all(tmp_path):
    x = keyword("x", [0.8, 0.9, 0.9, 0.7], [(50, [0.1, 0.3]), (100, [0.5, 0.5])])
    y = keyword("y", [0.9, 0.9, 0.9, 0.85], [(50, [0.4, 0.4]), (100, [0.7, 0.9])])
    for data in (x, y):
        (tmp_path / f"{data['facts']['keyword']}.json").write_text(json.dumps(data))
    unfinished = {**keyword("z", [], []), "checks": None}
    (tmp_path / "z.json").write_text(json.dumps(unfinished))
    out = tmp_path / "out" / "all.json"
    out.parent.mkdir()
    merge(tmp_path, out)
    table = json.loads(out.read_text())
    cells = {(r[0], r[1]): r for r in table["rows"]}
    assert [r[0] for r in table["rows"]] == [
        "undefended, Adam", "known mask, Adam", "PAIR, Adam, EOT-1", "PAIR, Adam, EOT-1"
    ]  # fmt: skip
    assert cells["PAIR, Adam, EOT-1", "50"][2:4] == ["100", "30.0 [20.0, 40.0]"]
    assert cells["PAIR, Adam, EOT-1", "100"][3].startswith("65.0 [")
    assert cells["known mask, Adam", "50"][3].startswith("85.6 [")  # pooled: mean of eight
    assert "x, y;" in table["note"] and "z" not in table["note"].split(";")[0]
    checks = {row[0]: row for row in table["tables"]["checks"]["rows"]}
    assert checks["S2"][2:] == ["1 of 1", "0.9"]  # median of the masks, against 0.9 - 0.1
    assert checks["S3"][2] == "1 of 1" and checks["S4"][2] == "1 of 2"
    assert checks["S1"][2] == "0 of 2"  # not measured is not passed


def test_keywords_with_a_part_of_the_runs_are_in_those_rows_only(tmp_path):
    x = keyword("x", [0.8] * 4, [(50, [0.1])])
    y = {**keyword("y", [0.9, 0.9, 0.95, 1.0], []), "checks": None, "only": ["known", "undefended"]}
    del y["runs"]["PAIR, Adam, EOT-1"]
    y["runs"]["undefended, Adam"]["points"][-1]["share"] = [0.7]
    for data in (x, y):
        (tmp_path / f"{data['facts']['keyword']}.json").write_text(json.dumps(data))
    merge(tmp_path, tmp_path / "all.json")
    table = json.loads((tmp_path / "all.json").read_text())
    cells = {(r[0], r[1]): r[3] for r in table["rows"]}
    assert cells["PAIR, Adam, EOT-1", "50"].startswith("10.0 [")
    assert cells["undefended, Adam", "50"].startswith("80.0 [")
    rows = "“undefended, Adam” and “known mask, Adam”"
    assert f"Keywords x; also y in the rows {rows}; 10 advert" in table["note"]
    checks = {row[0]: row for row in table["tables"]["checks"]["rows"]}
    assert checks["S2"][2:] == ["1 of 1", "0.85"] and "0.700" in table["tables"]["checks"]["note"]
    assert checks["S4"][2] == "1 of 1"


def test_unfinished_attacks_and_missing_checks_are_named(tmp_path):
    falling = [1 - k / 100 for k in range(101)]
    flat = [1 - min(k, 50) / 50 for k in range(101)]
    for name, losses in (("x", falling), ("y", flat)):
        data = keyword(name, [0.8], [(50, [0.1]), (100, [0.5])])
        data["runs"]["PAIR, Adam, EOT-1"]["losses"] = losses
        data["runs"]["undefended, Adam"]["losses"] = flat
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    merge(tmp_path, tmp_path / "all.json")
    table = json.loads((tmp_path / "all.json").read_text())
    assert table["columns"][-1] == "still improving"
    cells = {(r[0], r[1]): r[-1] for r in table["rows"]}
    assert cells["PAIR, Adam, EOT-1", "100"] == "1 of 2"  # the last row of a curve tells
    assert cells["PAIR, Adam, EOT-1", "50"] == ""
    assert cells["undefended, Adam", "50"] == "0 of 2"
    assert cells["known mask, Adam", "50"] == "–"  # no losses kept
    checks = {row[0]: row for row in table["tables"]["checks"]["rows"]}
    assert checks["S2"][2:] == ["0 of 1", "not measured: 2 masks, needs 8"]
    assert checks["S1"][2:] == ["0 of 2", "not measured"]


def test_other_models_are_not_mixed(tmp_path):
    for name, model in (("x", "a"), ("y", "b")):
        data = keyword(name, [0.5], [(50, [0.1])], model)
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="different models"):
        merge(tmp_path, tmp_path / "all.json")
