"""benchmarks/audit.py from start to table, with tiny models, and its attacker who keeps quiet."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from collections_tiny import draw, save_models

from pair.attacks import TTHConfig, tth
from pair.guard import conformal
from pair.guard.models import Models

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import audit

STEPS = ("--steps", 2, 2, 2, 2, 2)


@pytest.fixture
def small(monkeypatch, tmp_path):
    names = save_models(tmp_path / "models")
    models = Models.load(names["encoder"], None, names["purifier"])
    photos = [(draw(tmp_path / "photos" / f"{i:02}.png", i), "red") for i in range(24)]
    monkeypatch.setattr(audit, "SIZE", 32)
    monkeypatch.setattr(Models, "load", lambda *names, **options: models)
    for name, part in (("gallery", photos[:16]), ("queries", photos[16:20]), ("ads", photos[20:])):
        monkeypatch.setattr(audit.embedded, name, lambda part=part: part)
    monkeypatch.setattr(audit.embedded, "labels", lambda: ["red", "green", "blue"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def call(patch, *words) -> int:
    fixed = ("--gallery", 8, "--clean", 10, "--ads", 3, "--draws", 2, "--out", "audit.json")
    patch.setattr(sys, "argv", ["audit", *map(str, (*fixed, *words))])
    return audit.main()


def test_runs_continues_and_refuses_other_settings(small, tmp_path, capsys):
    assert call(small, "--keywords", "red", *STEPS) == 0
    first = json.loads((tmp_path / "audit.json").read_text())
    assert [r["attack"] for r in first["records"]] == list(audit.KINDS)
    assert call(small, "--keywords", "red,blue", *STEPS) == 0
    both = json.loads((tmp_path / "audit.json").read_text())
    assert both["records"][:6] == first["records"], "the first keyword is not computed again"
    assert [row[0] for row in both["rows"]] == list(audit.KINDS)
    for record in both["records"]:
        assert record["auroc"].keys() == {*audit.STATISTICS, "focus", "combined"}
        for name, found in record["share"].items():
            assert 0 <= record["unnoticed share"][name] <= found <= record["any"][name] <= 1
    columns = both["tables"]["evaded"]["columns"]
    assert all(len(row) == len(columns) for row in both["tables"]["evaded"]["rows"])
    with pytest.raises(SystemExit, match="other settings"):
        call(small, "--keywords", "red", "--steps", 3, 2, 2, 2, 2)
    with pytest.raises(SystemExit, match="no photos of zebra"):
        call(small, "--keywords", "zebra", *STEPS)


def test_the_quiet_attacker_stays_below_the_thresholds(small, tmp_path):
    """Its statistics are those of the audit, and optimising brings them down."""
    args = Namespace(draws=2, gallery=8, clean=10, ads=3, work=tmp_path / "work")
    bench = audit.Bench(args)
    encoder, purifier = bench.models.encoder, bench.models.purifier.differentiable()
    target = torch.from_numpy(bench.models.text(["red"]))[0]
    seen = audit.Seen(encoder, purifier, bench.ads)
    quiet = audit.Quiet(bench, target, purified=False)
    with torch.no_grad():
        outputs = seen(bench.ads, generator=torch.Generator().manual_seed(0))
        plain = torch.stack([torch.from_numpy(f.plain) for f in bench.auditor.examine(
            bench.ads, ["a", "b", "c"], seeds=[1, 2, 3])])  # fmt: skip
    assert torch.allclose(outputs[:, :16], plain, atol=1e-5)
    assert outputs[:, -1].tolist() == [0, 1, 2]
    # A bar that the unpatched picture exceeds costs, and is paid down.
    quiet.bars = {"drop": -1.0, "shift": 2.0, "spread": 2.0}
    drop = (plain @ bench.auditor.queries.T - quiet.floor).amax(1)
    cost = 1 - plain @ target + audit.PENALTY * (drop + 1)
    assert torch.allclose(quiet(outputs), cost, atol=1e-4)
    config = TTHConfig(
        steps=20, lr=0.05, distortion=0.0, schedule="constant", retry=False, carriers=2
    )
    result = tth(seen, bench.ads, quiet, config=config)
    assert result.losses[-1] < result.losses[0]


def test_auroc_counts_ties_half():
    assert audit.auroc([1, 2], [0, 1]) == (0.5 + 1 + 1 + 1) / 4
    assert audit.auroc([3, 4], [1, 2]) == 1 and audit.auroc([1], [1]) == 0.5
    assert conformal.threshold([1.0] * 10, 0.01) == float("inf")
