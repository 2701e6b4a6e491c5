"""The audit against naive loops, its thresholds, its report, and going on after a stop."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from collections_tiny import draw, save_models
from torch import nn

from pair import cli
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.guard import audit_report, audit_run, conformal
from pair.guard.audit import STATISTICS, Auditor, Finding
from pair.guard.collection import Collection
from pair.guard.models import Models
from pair.images import load_image
from pair.purifier import Purifier

SIZE, TOKEN, GRID = 32, 4, 8


class Encoder(nn.Module):
    """A linear encoder; its texts are numbers of stored directions."""

    image_size, dim = SIZE, 12

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * SIZE * SIZE, self.dim, generator=g))
        self.texts = torch.randn(5, self.dim, generator=g)
        self.requires_grad_(False)

    def encode_image(self, images):
        return (images - 0.5).flatten(1) @ self.weight

    def encode_text(self, texts):
        return torch.stack([self.texts[int(t)] for t in texts])


def make_models() -> Models:
    torch.manual_seed(0)
    config = GeneratorConfig(SIZE, TOKEN, 32, 1, 2, 32, 1, 2)
    generator = MaskedAutoencoder(config).eval().requires_grad_(False)
    return Models(encoder=Encoder(), purifier=Purifier(generator).eval())


@pytest.fixture(scope="module")
def auditor() -> Auditor:
    return Auditor(make_models(), list("01234"), draws=3, patch=0.25, views=9, delta=0.1, top=2)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def cosine(a, b) -> float:
    return float(torch.nn.functional.cosine_similarity(torch.as_tensor(a), torch.as_tensor(b), 0))


# -- thresholds ------------------------------------------------------------------------------


def test_threshold_is_the_conformal_quantile():
    clean = [3.0, 1.0, 2.0, 5.0, 4.0, 9.0, 8.0, 7.0, 6.0]  # n = 9
    assert conformal.threshold(clean, 0.1) == 9.0
    assert conformal.threshold(clean, 0.2) == 8.0
    assert conformal.threshold(clean, 0.5) == 5.0
    assert conformal.threshold(clean, 0.05) == float("inf")
    assert conformal.p_value(8.5, clean) == 0.2 and conformal.p_value(0, clean) == 1.0
    assert conformal.combined([0.5, 0.02, 1]) == pytest.approx(0.06)
    assert conformal.combined([0.5, 0.9]) == 1.0
    assert conformal.needed(0.01, 1) == 99 and conformal.needed(0.01, 4) == 399
    for wrong in (0, 1, -0.1):
        with pytest.raises(ValueError, match="budget"):
            conformal.threshold(clean, wrong)


def test_alarm_and_threshold_say_the_same():
    rng = np.random.default_rng(0)
    for n, budget in ((99, 0.01), (40, 0.1), (57, 0.07)):
        clean, fresh = rng.normal(size=n), rng.normal(size=300)
        bar = conformal.threshold(clean, budget)
        for value in fresh:
            assert (conformal.p_value(value, clean) <= budget) == (value > bar)


def test_false_alarms_stay_in_the_budget():
    """Over many hold-outs, also for the worst of four statistics, and with ties."""
    rng = np.random.default_rng(1)
    alarms = {"one": 0, "four": 0, "ties": 0}
    rounds, budget = 4000, 0.1
    for _ in range(rounds):
        values = rng.normal(size=(60, 4))
        values[:, 1] = values[:, 0] + 0.1 * values[:, 1]  # depend on each other
        p = [conformal.p_value(values[0, s], values[1:, s]) for s in range(4)]
        alarms["one"] += p[0] <= budget
        alarms["four"] += conformal.combined(p) <= budget
        coarse = np.round(values[:, 0])
        alarms["ties"] += conformal.p_value(coarse[0], coarse[1:]) <= budget
    slack = 3 * (budget * (1 - budget) / rounds) ** 0.5
    assert all(count / rounds <= budget + slack for count in alarms.values()), alarms
    assert alarms["one"] / rounds >= budget - slack - 1 / 60


# -- statistics ------------------------------------------------------------------------------


def test_statistics_equal_naive_loops(auditor):
    images, models = pictures(3), auditor.models
    encoder, purifier, views = models.encoder, models.purifier, auditor.views
    found = auditor.examine(images, ["a", "b", "c"], seeds=[10, 20, 30])
    for i, f in enumerate(found):
        x = images[i : i + 1]
        plain = encoder.encode_image(x)[0]
        rebuilt = []
        for j in range(3):
            g = torch.Generator().manual_seed([10, 20, 30][i] + j)
            rebuilt.append(encoder.encode_image(purifier(x, generator=g))[0])
        units = [r / r.norm() for r in rebuilt]
        assert f.statistics["shift"] == pytest.approx(1 - cosine(plain, sum(units)), abs=1e-5)
        pairs = [1 - cosine(units[a], units[b]) for a in range(3) for b in range(3) if a < b]
        assert f.statistics["spread"] == pytest.approx(np.mean(pairs), abs=1e-5)
        best = (-9.0, None, None)
        by_view: dict[int, list[float]] = {}
        for q in range(5):
            text = encoder.texts[q]
            for r, visible in enumerate(views.cover.visible):
                view = encoder.encode_image(views.render(x, visible[None]))[0]
                drop = cosine(plain, text) - cosine(view, text)
                by_view.setdefault(q, []).append(drop)
                if drop > best[0]:
                    best = (drop, q, r)
        drop, q, r = best
        assert f.statistics["drop"] == pytest.approx(drop, abs=1e-5) and f.query == str(q)
        assert f.score - f.lowest == pytest.approx(drop, abs=1e-5)
        assert np.allclose(f.window, np.array(views.cover.boxes()[r]) / SIZE)
        positive = [max(0, d) for d in by_view[q]]
        assert f.statistics["focus"] == pytest.approx(max(positive) / sum(positive), abs=1e-4)
        heat = np.zeros((GRID, GRID))
        for y in range(GRID):
            for c in range(GRID):
                hiding = [d for d, v in zip(by_view[q], views.cover.visible, strict=True)
                          if not v[y * GRID + c]]  # fmt: skip
                heat[y, c] = np.mean(hiding)
        assert np.allclose(f.heat, heat, atol=1e-5)


def test_draws_are_secret_unless_seeded(auditor):
    x = pictures(1)
    spreads = {auditor.examine(x, ["a"])[0].statistics["spread"] for _ in range(3)}
    assert len(spreads) == 3
    again = [auditor.examine(x, ["a"], seeds=[1])[0].record() for _ in range(2)]
    assert again[0] == again[1]


def test_hub_and_one_window_equal_naive_loops(auditor):
    images = pictures(6)
    found = auditor.examine(images, [str(i) for i in range(6)], seeds=range(6))
    outside = auditor.examine(pictures(1, seed=9), ["outside"], seeds=[99])
    auditor.compare([*found, *outside], found)
    texts = auditor.models.encoder.texts
    for f in (*found, *outside):
        others = [o for o in found if o is not f]
        hits = {"plain": 0, "clean": 0}
        hangs = False
        for q in range(5):
            for kind in hits:
                mine = cosine(getattr(f, kind), texts[q])
                better = sum(cosine(getattr(o, kind), texts[q]) > mine for o in others)
                hits[kind] += better < 2
                hangs |= kind == "plain" and better < 2 and f.drops[q] > 0.1
        assert f.statistics["hub"] == pytest.approx((hits["plain"] - hits["clean"]) / 5)
        assert f.one_window == hangs


def test_the_window_is_where_the_patch_is(auditor):
    """Grey pictures with one coloured square, and a query that is the square."""
    models = make_models()
    last = models.purifier.autoencoder.decoder_pred  # rebuilds everything as the mean colour
    nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    for top, left in ((0, 0), (20, 4), (12, 24)):
        image = torch.full((1, 3, SIZE, SIZE), 0.5)
        image[..., top : top + 8, left : left + 8] = pictures(1, seed=3)[..., :8, :8]
        models.encoder.texts[0] = models.encoder.encode_image(image)[0]
        made = Auditor(models, ["0"], draws=2, patch=0.25, views=9)
        f = made.examine(image, ["x"])[0]
        x0, y0, x1, y1 = (v * SIZE for v in f.window)
        assert x0 < left + 8 and left < x1 and y0 < top + 8 and top < y1
        y, x = np.unravel_index(f.heat.argmax(), f.heat.shape)
        assert y0 <= y * TOKEN < y1 and x0 <= x * TOKEN < x1


def test_settings_that_make_no_sense(auditor):
    models = make_models()
    with pytest.raises(ValueError, match="encoder and a purifier"):
        Auditor(Models(encoder=models.encoder), ["0"])
    with pytest.raises(ValueError, match="at least one query"):
        Auditor(models, [])
    with pytest.raises(ValueError, match="at least 2 draws"):
        Auditor(models, ["0"], draws=1)


# -- runs and reports ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(9):
        draw(tmp_path / "p" / f"{i}.png", i)
        draw(tmp_path / "clean" / f"{i}.png", 100 + i)
    (tmp_path / "p" / "bad.jpg").write_text("no picture")
    return tmp_path / "p"


def test_run_resume_and_report(auditor, folder, tmp_path):
    out = tmp_path / "out"
    calls: list[int] = []

    def run(**options) -> audit_run.Audit:
        return audit_run.audit(
            [folder], auditor, out, clean=[tmp_path / "clean"], budget=0.5, seed=3,
            batch_size=2, **options,
        )  # fmt: skip

    first = run(progress=calls.append, stop=lambda: len(calls) == 2)
    assert first.stopped and len(first.findings) == 4
    assert not (out / "audit.json").exists()
    with open(out / "work.jsonl", "ab") as handle:
        handle.write(b'{"uri": "cut off')  # what a kill may leave
    examined = []
    before = auditor.examine
    auditor.examine = lambda x, u, **o: examined.extend(u) or before(x, u, **o)
    try:
        done = run()
    finally:
        del auditor.examine
    assert len(examined) == 5 + 9 and len(done.findings) == 9 and done.failed == 1
    whole = audit_run.audit(
        [folder], auditor, tmp_path / "other", clean=[tmp_path / "clean"], budget=0.5, seed=3,
        batch_size=3,
    )  # fmt: skip
    assert [f.uri for f in done.findings] == [f.uri for f in whole.findings]
    for one, two in zip(done.findings, whole.findings, strict=True):
        assert one.statistics == pytest.approx(two.statistics, abs=1e-5) and one.p == two.p
    assert [f.p for f in done.findings] == sorted(f.p for f in done.findings)

    paths = audit_report.write(done, auditor.settings, out, shown=4)
    assert [p.name for p in paths] == ["audit.json", "audit.csv", "audit.html"]
    record = json.loads((out / "audit.json").read_text())
    assert (record["pictures"], record["failed"], record["clean"]) == (9, 1, 9)
    assert record["alarms"] == sum(f["p"] <= 0.5 for f in record["findings"])
    hanging = sum(f["one_window"] for f in record["findings"])
    assert record["one_window"] == done.one_window == hanging >= 1
    assert set(record["thresholds"]) == set(STATISTICS) and "heuristic" in record["note"]
    rows = list(csv.DictReader((out / "audit.csv").open()))
    assert [r["uri"] for r in rows] == [f.uri for f in done.findings]
    assert float(rows[0]["drop"]) == pytest.approx(done.findings[0].statistics["drop"], abs=1e-5)
    page = (out / "audit.html").read_text()
    said = done.said
    assert said.startswith(f"{record['alarms']} alarm") and f", {hanging} hit" in said
    assert f"<h1>{said} in 9 pictures</h1>" in page and f"<title>pair audit: {said}<" in page
    assert ". p/" in page and "</h2>" in page and f". {folder}" not in page
    assert page.count("<li") == 4 and page.count("data:image/jpeg") == 8 and "heuristics" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)  # nothing is loaded from elsewhere

    other = Auditor(auditor.models, list("0123"), draws=3, patch=0.25)
    with pytest.raises(ValueError, match="other settings or models"):
        audit_run.audit([folder], other, out, seed=3)


def test_without_clean_pictures_there_is_no_alarm(auditor, folder, tmp_path):
    result = audit_run.audit([folder], auditor, tmp_path / "o")
    assert not result.thresholds and result.alarms == 0
    drops = [f.statistics["drop"] for f in result.findings]
    assert drops == sorted(drops, reverse=True)
    audit_report.write(result, auditor.settings, tmp_path / "o")
    assert "without alarms" in (tmp_path / "o" / "audit.html").read_text()
    small = audit_run.audit([folder], auditor, tmp_path / "o", clean=[tmp_path / "clean"])
    assert small.powerless == 399 and small.alarms == 0  # 9 clean pictures cannot carry 1 %
    with pytest.raises(ValueError, match="budget"):
        audit_run.audit([folder], auditor, tmp_path / "o", budget=0)
    with pytest.raises(ValueError, match="no readable picture"):
        audit_run.audit([folder / "bad.jpg"], auditor, tmp_path / "o2")


def test_names_are_escaped(auditor, tmp_path):
    name = "=<img src=x onerror=alert(1)>.png"
    draw(tmp_path / "p" / name, 1)
    result = audit_run.audit([tmp_path / "p"], auditor, tmp_path / "o")
    result.findings[0].uri = name
    audit_report.write(result, auditor.settings, tmp_path / "o")
    assert "<img src=x" not in (tmp_path / "o" / "audit.html").read_text()
    assert "\n1,'=" in (tmp_path / "o" / "audit.csv").read_text().replace("\r", "")


def test_heat_map_marks_the_window():
    image = torch.full((3, 100, 100), 0.5)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 3] = 1
    zero = np.zeros(1, np.float32)
    f = Finding("x", {}, "q", 1, 0, (0.5, 0, 1, 0.5), heat, zero, zero, zero)
    drawn = audit_report.draw_heat(image, f)
    red = drawn[0] - drawn[2]
    assert red[5:20, 80:95].mean() > 0.3 and red[60:, :].abs().max() < 0.05
    assert audit_report.heat_png(image, f).startswith(b"\x89PNG")


def test_command_on_files_and_on_a_collection(folder, tmp_path, monkeypatch, capsys):
    names = save_models(tmp_path / "models")
    bank = tmp_path / "bank.txt"
    bank.write_text("a red photo\n\na green photo\n")

    def pair(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pair", "audit", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    options = ["--encoder", names["encoder"], "--purifier", names["purifier"]]
    options += ["--bank", str(bank), "--draws", "2", "--clean", str(tmp_path / "clean")]
    options += ["--delta", "2"]  # of a cosine: no hit can lose more with one window
    code, out, err = pair(str(folder), "--out", str(tmp_path / "o"), *options)
    assert code == 1 and "0 alarms, 0 hits that hang on one window in 9 pictures, 1 could" in out
    tight = str(tmp_path / "tight"), *options, "--delta", "0"
    code, out, _ = pair(str(folder), "--out", *tight)
    assert code == 4 and "0 alarms, 6 hits that hang on one window in 9 pictures, 1 could" in out
    assert "399 are needed" in err
    # The clean picture with the largest drop, audited too, ties with itself: p = 4 * 2 / 10.
    both = [str(folder), str(tmp_path / "clean"), "--out", str(tmp_path / "o2")]
    code, out, _ = pair(*both, "--budget", "0.9", *options)
    alarms = json.loads((tmp_path / "o2" / "audit.json").read_text())["alarms"]
    assert code == 3 and out.startswith(f"{alarms} alarm") and "in 18" in out and alarms >= 1
    (empty := tmp_path / "empty").mkdir()
    never = [str(folder), "--out", str(tmp_path / "e"), *options[:4], "--clean"]
    code, _, err = pair(*never, str(empty))
    assert code == 2 and "no readable picture in --clean" in err and not (tmp_path / "e").exists()
    code, _, err = pair(str(folder), "--out", str(tmp_path / "o"), *options, "--draws", "3")
    assert code == 2 and "other settings" in err and "Traceback" not in err
    assert pair(str(tmp_path / "none"), "--out", str(tmp_path / "n"))[0] == 2

    pytest.importorskip("lancedb")
    made = Collection.create(str(tmp_path / "c"), Models.load(**names), root=tmp_path)
    made.add(folder)
    code, _, err = pair(made.uri, str(folder), "--out", str(tmp_path / "e"), *options)
    assert code == 2 and f"{made.uri} is a collection: audit it alone" in err
    code, _, err = pair(*never, made.uri)
    assert code == 2 and f"--clean: {made.uri} is a collection" in err
    (folder / "3.png").unlink()
    last = "--out", str(tmp_path / "oc"), "--bank", str(bank), "--delta", "2"
    code, out, _ = pair(made.uri, *last)
    said = "0 hits that hang on one window in 8 pictures, no alarms without --clean, 1 could"
    assert code == 1 and said in out
    assert load_image(made.read("p/1.png")).shape == (3, 30, 40)
