"""A grid is finished exactly once, whoever works on it and however often it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pair.bench import report, runner
from pair.bench.store import Store

from .conftest import bench_at

ROOT = Path(__file__).resolve().parents[2]


def results(root: Path) -> dict[str, dict]:
    """Every record without times: what two runs must share."""
    found = {}
    for path in sorted((root / "cells").glob("*.json")):
        record = json.loads(path.read_text())
        found[record["key"]] = {k: v for k, v in record.items() if k != "run"}
    return found


def start(scenario_file: Path, root: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pair", "bench", "run", str(scenario_file)]
    command += ["--scale", "smoke", "--out", str(root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def test_everything_is_measured_and_failures_do_not_stop_the_rest(finished):
    outcome = finished.outcome
    cells = {c.title: finished.store.read(finished.key(c)) for c in finished.cells()}
    assert outcome.done == len(cells) and outcome.found == 0
    failed = {t for t, r in cells.items() if r["status"] == "failed"}
    assert failed == {t for t, _ in outcome.failed} == {t for t in cells if t.startswith("absent")}
    assert len(failed) == 2 and len(cells) == 6
    message = cells["absent, clean"]["message"]
    assert "nowhere" in message and "\n" not in message


def test_a_missing_shipped_model_says_how_it_is_trained(tmp_path):
    bench = bench_at("table1", tmp_path)
    object.__setattr__(bench.settings, "tiny", False)
    bench.models.where = lambda name: f"{tmp_path}/{name}"
    with pytest.raises(ValueError, match=r"pair train sac --recipe configs/small/sac\.toml"):
        bench.models.need("sac-small")


def test_a_record_says_all_that_its_numbers_need(finished):
    cell = next(c for c in finished.cells() if c.mode == "adaptive" and c.row.label == "PAIR")
    record = finished.store.read(finished.key(cell))
    facts, result = record["facts"], record["result"]
    assert set(facts["models"]) == {"clip-small", "pair-small"}
    assert all(len(sha) == 64 for sha in facts["models"].values())
    s = finished.settings
    queries = len(finished.text.rows(cell.unit))
    for entry in result["attacks"].values():
        assert [len(entry["inserted"]), len(entry["inserted"][0])] == [s.seeds, queries]
        assert all(len(q) == s.ads for draw in entry["inserted"] for q in draw)
    assert {"gradient", "transfer", "typographic", "collage", "none"} == set(result["attacks"])
    assert result["chosen"] == min(result["selection"], key=result["selection"].get)
    seeds = [set(v) for v in result["seeds"].values()]
    assert sum(map(len, seeds)) == len(set.union(*seeds))
    names = {c["name"] for c in result["checks"]}
    assert names >= {"S4", "S5", "S6", "S8", "S9", "S10", "S11", "S12"}
    for check in result["checks"]:
        if check["name"] in ("S10", "S11", "S12"):
            assert check["passed"], check
    patch = finished.store.patch(result["details"]["gradient"]["patch"])
    values = patch.content * 255
    assert (values - values.round()).abs().max() < 1e-4  # what is scored is what is stored


def test_a_second_run_finds_everything_and_changes_nothing(finished):
    before = {p: p.stat().st_mtime_ns for p in (finished.store.root / "cells").iterdir()}
    outcome = runner.run(bench_again(finished))
    assert outcome.done == 0 and outcome.found == len(before)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert runner.estimate(bench_again(finished)).cells == 0


def bench_again(bench):
    from pair.bench.grid import Bench

    return Bench(bench.scenario, bench.settings, bench.store)


def test_failures_are_tried_again_on_request(finished):
    outcome = runner.run(bench_again(finished), only="absent", retry=True)
    assert outcome.done == 2 and len(outcome.failed) == 2


def test_other_settings_or_models_are_other_cells(finished, scenario_file, tmp_path):
    keys = {finished.key(c) for c in finished.cells()}
    more = bench_at(scenario_file, finished.store.root, steps=5)
    clean = {more.key(c) for c in more.cells() if c.mode == "clean"}
    attacked = {more.key(c) for c in more.cells() if c.mode != "clean"}
    assert clean <= keys, "without attack, steps change nothing"
    assert not attacked & keys
    other = bench_at(scenario_file, tmp_path)
    other.models.sha = lambda name: "0" * 64
    assert not {other.key(c) for c in other.cells()} & keys
    twice = bench_at(scenario_file, finished.store.root, units=2)
    assert keys < {twice.key(c) for c in twice.cells()}, "more keywords keep the first ones"


def test_killed_twice_and_resumed_gives_the_same_results(finished, scenario_file, tmp_path):
    for _ in range(2):
        process = start(scenario_file, tmp_path)
        cells, deadline = tmp_path / "cells", time.time() + 240
        had = len(list(cells.glob("*.json"))) if cells.is_dir() else 0
        while process.poll() is None and time.time() < deadline:
            if cells.is_dir() and len(list(cells.glob("*.json"))) > had:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 1 <= len(list(cells.glob("*.json"))) < 6, "killed in the middle"
    outcome = runner.run(bench_at(scenario_file, tmp_path))
    assert outcome.found >= 1
    assert results(tmp_path) == results(finished.store.root)


def test_two_processes_share_a_grid(finished, scenario_file, tmp_path):
    both = [start(scenario_file, tmp_path) for _ in range(2)]
    assert [p.wait(timeout=400) for p in both] == [0, 0]
    assert results(tmp_path) == results(finished.store.root)


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from pair.bench.store import Store\n"
        "with Store(Path(sys.argv[1])).lock('x') as mine:\n"
        "    print(mine, flush=True); time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert holder.stdout.readline().strip() == b"True"
    store = Store(tmp_path)
    with store.lock("x") as mine:
        assert not mine
    with store.lock("y") as mine:
        assert mine
    holder.kill()
    holder.wait()
    with store.lock("x") as mine:
        assert mine


def test_a_broken_record_is_named(tmp_path):
    store = Store(tmp_path)
    store.write("a", {"status": "done"})
    store.path("a").write_text("{")
    with pytest.raises(ValueError, match="delete it"):
        store.read("a")


@pytest.mark.parametrize("name", ["table2", "table5"])
def test_other_kinds_run(tmp_path, name):
    bench = bench_at(name, tmp_path, steps=1, static_steps=1, hash_static=2, hash_steps=2)
    outcome = runner.run(bench, only="PAIR")
    assert outcome.done >= 2 and outcome.failed == []
    lines = report.stamped(bench, "smoke")
    checks = {c["name"] for x in lines for c in x["result"].get("checks", [])}
    assert {"S8", "S11"} <= checks
    notes = report.table_of(bench.scenario, lines).notes
    assert any("proved for the attacked queries" in n for n in notes) == (name == "table2")


def test_rungs_of_the_ladder(tmp_path):
    bench = bench_at("ladder", tmp_path, steps=2)
    for only in ("Adam 0.05, 1 mask per step", "uploads", "identity"):
        assert runner.run(bench, only=only).failed == []
    lines = [bench.store.read(bench.key(c)) for c in bench.cells()]
    done = [x["result"] for x in lines if x is not None and x["facts"]["mode"] == "adaptive"]
    assert {r["rung"] for r in done} == {"curve", "uploads", "estimator"}
    curve = next(r for r in done if r["rung"] == "curve" and len(r["points"]) > 2)
    assert [p["steps"] for p in curve["points"]] == sorted(p["steps"] for p in curve["points"])
    assert curve["points"][0]["gradients"] == 0
    uploads = next(r for r in done if r["rung"] == "uploads")["curve"]
    assert list(uploads.values()) == sorted(uploads.values())
    assert max(map(int, uploads)) <= bench.settings.uploads  # as many as were drawn, no more


def test_masks_per_step_are_those_of_the_row(tmp_path):
    bench = bench_at("ladder", tmp_path, steps=8)
    assert runner.run(bench, only="Adam 0.05, 7 masks").failed == []
    lines = [bench.store.read(bench.key(c)) for c in bench.cells()]
    (found,) = (x["result"] for x in lines if x is not None and x["facts"]["mode"] == "adaptive")
    last = found["points"][-1]
    assert found["eot"] == 7 and found["details"]["config"]["eot"] == 7
    assert last["gradients"] == last["steps"] * bench.settings.ads * 7
