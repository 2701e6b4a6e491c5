"""benchmarks/adaptive.py from start to table, with tiny models and short runs."""

import json
import sys
from pathlib import Path

import attack_models
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import adaptive

from pair.purifier import Purifier
from pair.retrieval.clip import ClipConfig, SmallClip
from pair.retrieval.resnet import ResNetConfig


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    backbone = ResNetConfig(layers=(1, 1, 1, 1), width=8)
    words = ("<pad>", "<unknown>", "laptop", "umbrella", "photo")
    config = ClipConfig(image_size=32, dim=8, backbone=backbone, text_width=16, text_heads=2,
                        text_depth=1, vocabulary=words)  # fmt: skip
    clip, purifier = SmallClip(config).eval(), attack_models.purifier()
    purifier.straight_through = False
    files, full = adaptive.embedded.gallery()[::24], adaptive.Keyword.plan

    def short(self):
        rows = full(self)
        few = {n: steps if max(steps) <= 4 else (1, 2) for n, (_, _, _, steps) in rows.items()}
        return {n: (which, f, config, few[n]) for n, (which, f, config, _) in rows.items()}

    monkeypatch.setattr(adaptive, "SIZE", 32)
    monkeypatch.setattr(adaptive, "STEPS", (1, 2, 4))
    monkeypatch.setattr(SmallClip, "from_pretrained", lambda name: clip)
    monkeypatch.setattr(Purifier, "from_pretrained", lambda name: purifier)
    monkeypatch.setattr(adaptive.embedded, "gallery", lambda: files)
    monkeypatch.setattr(adaptive.Keyword, "plan", short)
    return monkeypatch


def call(patch, *words) -> int:
    patch.setattr(sys, "argv", ["adaptive", *map(str, words)])
    return adaptive.main()


@pytest.mark.slow
def test_runs_checks_resumes_and_merges(small, tmp_path, capsys):
    folder = tmp_path / "adaptive"
    keywords = ("laptop", "umbrella", "--folder", folder, "--budget", 8)
    assert call(small, *keywords, "--minutes", 0) == 0
    assert not folder.exists() or not list(folder.glob("*.json"))  # nothing fits into no time
    assert call(small, *keywords) == 0
    data = json.loads((folder / "laptop.json").read_text())
    assert data["checks"][0]["name"] == "S1"
    assert {c["name"] for c in data["checks"]} == {f"S{i}" for i in range(1, 13)}
    measured = {c["name"] for c in data["checks"] if c["passed"] is not None}
    assert measured >= {"S1", "S4", "S5", "S6", "S7", "S8", "S9", "S10", "S11", "S12"}
    assert {"transfer", "typographic", "collage", "random search"} <= set(data["compared"])
    at = {n: data["runs"][f"PAIR, Adam, EOT-{n}"]["points"][-1] for n in (1, 7)}
    assert at[1]["gradients"] == at[1]["steps"] * adaptive.CARRIERS
    assert at[7]["gradients"] == at[7]["steps"] * adaptive.CARRIERS * 7
    capsys.readouterr()
    before = (folder / "umbrella.json").read_bytes()
    assert call(small, *keywords) == 0  # everything is there already
    assert (folder / "umbrella.json").read_bytes() == before and capsys.readouterr().out == ""
    assert call(small, *keywords[:-1], 9) == 2
    assert "begun with other settings" in capsys.readouterr().err
    assert call(small, "--merge", "--folder", folder, "--out", tmp_path / "all.json") == 0
    table = json.loads((tmp_path / "all.json").read_text())
    assert {r[0] for r in table["rows"]} >= {"known mask, Adam", "PAIR, Adam, EOT-50"}
    assert table["tables"]["checks"]["rows"][10][2] == "2 of 2"  # S11


def test_unknown_keywords_are_refused(small, capsys):
    assert call(small, "zebra") == 2
    assert "keywords must be some of" in capsys.readouterr().err
