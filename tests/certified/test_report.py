"""Run-time certificates: words, numbers, picture and command line."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from pair.certified import (
    CertifiedPurifier,
    Maximum,
    certify,
    evaluate,
    lower_bound,
    metrics,
    tables,
)
from pair.certified.report import picture, stack, summary
from pair.certified.summary import figures, save
from pair.certified.summary import summarise as summary_of
from pair.cli import app, main
from pair.images import to_pil
from pair.purifier import Purifier
from pair.retrieval.clip import ClipConfig, SmallClip, build_vocabulary
from pair.retrieval.resnet import ResNetConfig

from .tiny import SIZE, Encoder, cover, generator


class Corner:
    """Counts red in the top left corner and green everywhere else: evidence of known place."""

    image_size, dim = SIZE, 3

    def encode_image(self, images):
        corner = images[:, 0, :6, :6].mean((1, 2))
        rest = images[:, 1].mean((1, 2))
        return torch.stack([corner, rest, 0.2 * torch.ones_like(rest)], 1)


RED, GREEN = torch.eye(3)[0], torch.eye(3)[1]


def scene():
    """One red spot in the corner of a green image, 96 x 64 px."""
    x = torch.zeros(3, 64, 96)
    x[1] = 0.8
    x[0, :12, 16:28] = 1.0  # the centre crop begins at column 16
    return x


def purifiers(*sides):
    return [CertifiedPurifier(generator(), cover(s, 9), fill="mean") for s in sides]


def test_spread_evidence_is_clear_and_a_spot_is_named():
    models = purifiers(6, 9)
    clear = certify(models, Corner(), scene(), GREEN, delta=0.2)
    assert all(c.clear and c.hit for c in clear)
    assert summary(clear).patch == 9
    assert "no single patch up to 9 px" in summary(clear).sentence()
    spot = certify(models, Corner(), scene(), RED, delta=0.2)
    assert not any(c.clear for c in spot)
    best = summary(spot)
    assert best.patch == 6 and "depends on one window" in best.sentence()
    left, top, right, bottom = best.window
    # In the file's pixels the window holds the spot.
    assert left <= 16 and right >= 28 and top == 0 and bottom >= 12
    assert best.drop == pytest.approx(best.plain - best.lowest) and best.drop > 0.2


def test_the_certificate_is_what_the_definition_says():
    (model,) = purifiers(7)
    encoder, query = Encoder(), F.normalize(torch.randn(16), dim=0)
    x = torch.rand(3, SIZE, SIZE)
    (c,) = certify([model], encoder, x, query, threshold=-1.0)
    views = F.normalize(encoder.encode_image(model.views(x[None])[0]), dim=-1) @ query
    assert c.lowest == pytest.approx(float(views.min()), abs=1e-5)
    assert c.view == int(views.argmin()) and c.clear and c.patch_in_file == 7
    (c,) = certify([model], encoder, x, query, threshold=1.1)
    assert not c.hit and not c.clear and c.sentence().startswith("no hit")
    (c,) = certify([model], encoder, x, query, delta=abs(c.plain) + 0.01)
    assert not c.hit and not c.clear  # one window might carry all of it


def test_a_clear_hit_means_every_patch_can_be_removed():
    """Corollary 2b by brute force: rebuild without any 6 x 6 window, the score stays."""
    (model,) = purifiers(6)
    x = torch.nn.functional.interpolate(scene()[None, :, :, 16:80], SIZE)[0]
    (c,) = certify([model], Corner(), x, GREEN, delta=0.2)
    shown = model.pixels(model.cover.visible)[:, 0]
    views = F.normalize(Corner().encode_image(model.views(x[None])[0]), dim=-1) @ GREEN
    for top in range(SIZE - 5):
        for left in range(SIZE - 5):
            outside = ~shown[:, top : top + 6, left : left + 6].flatten(1).any(1)
            assert float(views[outside].max()) >= c.threshold
    assert c.clear


def test_picture_outlines_the_window():
    (model,) = purifiers(6)
    (c,) = certify([model], Corner(), scene(), RED)
    sheet = picture(scene(), c, model)
    assert (200, 30, 30) in {sheet.getpixel((x, 9)) for x in range(8, 232)}
    assert stack([sheet, sheet]).height == 2 * sheet.height
    named = [picture(scene(), c, model, title=text) for text in ("1. cat.png", "2. cat.png")]
    assert named[0].height == sheet.height + 24 and named[0] != named[1]
    assert named[0].crop((0, 32, 472, 292)).tobytes() == sheet.crop((0, 8, 472, 268)).tobytes()
    assert stack(named, "a cat").height == 2 * named[0].height + 24


def save_models(folder):
    torch.manual_seed(0)
    Purifier(generator()).save_pretrained(folder / "g")
    words = build_vocabulary(["a photo of cats and dogs"])
    config = ClipConfig(SIZE, 16, ResNetConfig((1, 1, 1, 1), 8), 16, 1, 2, vocabulary=tuple(words))
    SmallClip(config).eval().save_pretrained(folder / "c")
    paths = []
    for i in range(24):
        path = folder / f"{i}.png"
        seeded = torch.Generator().manual_seed(i)
        to_pil(torch.rand(3, 40, 48, generator=seeded)).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, save_models(folder)


def test_command_line(models, tmp_path):
    folder, paths = models
    options = ["--generator", str(folder / "g"), "--encoder", str(folder / "c")]
    call = ["certify", *map(str, paths[:2]), "--query", "cats", *options]
    out = tmp_path / "sheet.png"
    result = CliRunner().invoke(app, [*call, "--json", "--picture", str(out)])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["image"] for r in records] == [str(p) for p in paths[:2]]
    assert {"patch", "plain", "lowest", "clear", "certificate", "window"} <= records[0].keys()
    assert len(records[0]["sizes"]) == 4
    assert Image.open(out).size[1] == 2 * 268
    assert "does not know" not in result.output
    jpeg = tmp_path / "sheet.jpg"
    once = ["certify", str(paths[0]), "--query", "cats", *options, "--patch", "0.2"]
    assert CliRunner().invoke(app, [*once, "--picture", str(jpeg)]).exit_code == 0
    assert Image.open(jpeg).format == "JPEG"
    asked = ["certify", str(paths[0]), "--query", "cats qwertz", *options, "--patch", "0.2"]
    assert f"{folder / 'c'} does not know: qwertz\n" in CliRunner().invoke(app, asked).stderr
    with pytest.raises(ValueError, match="the query is empty"):
        CliRunner().invoke(app, [*once, "--query", " "], catch_exceptions=False)
    for name, said in ((tmp_path / "sheet.txt", "must end in .png"), (paths[0], "among the input")):
        with pytest.raises(ValueError, match=said):
            CliRunner().invoke(app, [*once, "--picture", str(name)], catch_exceptions=False)
    table = CliRunner().invoke(app, [*call, "--patch", "0.2"])
    assert table.exit_code == 0 and "certificate" in table.output
    two = CliRunner().invoke(app, [*call, "--patch", "2*2", "--json"])
    record = json.loads(two.stdout.splitlines()[0])
    assert (record["patch"], record["patches"], record["views"]) == (2, 2, 28)  # pairs of 8 windows
    bars = CliRunner().invoke(app, [*call, "--patch", "3x9,9x3", "--json"])
    assert json.loads(bars.stdout.splitlines()[0])["patch"] == 3  # squares that fit inside


def test_bad_input_is_one_sentence(models, monkeypatch, capsys):
    folder, paths = models
    options = ["--generator", str(folder / "g"), "--encoder", str(folder / "c"), "--query", "cat"]
    numbers = (["--threshold", "nan"], ["--delta", "inf"])
    for extra in (["--patch", "0.97"], ["--fill", "grey"], *numbers):
        monkeypatch.setattr("sys.argv", ["pair", "certify", str(paths[0]), *options, *extra])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("pair: ") and error.count("\n") == 1


@pytest.fixture(scope="module")
def records(models, tmp_path_factory):
    folder, paths = models
    out = tmp_path_factory.mktemp("bench") / "r.jsonl"
    gallery = [(p, ("cat", "dog")[i % 2]) for i, p in enumerate(paths[:18])]
    carriers = [(p, "") for p in paths[18:]]
    starts = [(paths[0], "cat")]
    bench = evaluate.Bench(
        gallery, carriers, SmallClip.from_pretrained(folder / "c"), starts=starts
    )
    purifier = Purifier.from_pretrained(folder / "g").eval()
    setting = evaluate.Setting(
        (0.22,), (4, 9), ("window", "mean", "drop"), k=3, resamples=40,
        curve=(0.12,), attacked=2, attack_carriers=2, attack_steps=3,
    )  # fmt: skip
    said = []
    done = evaluate.run(bench, purifier, out, setting, {"run": 1}, said.append)
    again = []
    repeated = evaluate.run(bench, purifier, out, setting, {"run": 1}, again.append)
    assert len(said) == 8 and again == []  # a finished run measures nothing twice
    assert repeated == done
    return bench, done, out, purifier, setting


def test_benchmark_records(records):
    _, done, out, *_ = records
    assert len(out.read_text().splitlines()) == len(done)
    for r in (r for r in done if r["kind"] == "certified"):
        means = {name: interval[0] for name, interval in r["summary"].items()}
        # What is proved lies on the right side of what was measured.
        assert means["CertASR"] >= means["no_attack"] - 1e-12
        assert means["CertASR_any"] >= means["CertASR"]
        assert means["CertR"] <= means["R"] and means["CertAP"] <= means["AP"] + 1e-9
        assert 0 <= r["slack"] < 1e-4
    by_pool = {r["pool"]: r["summary"] for r in done if r["kind"] == "certified" and
               (r["views"], r["fill"]) == (9, "window")}  # fmt: skip
    asr = [by_pool[f"delta {d:g}"]["CertASR"][0] for d in evaluate.DELTAS]
    assert asr == sorted(asr) and asr[-1] == 1.0
    plain = next(r for r in done if r.get("pool") == "undefended")["summary"]
    assert by_pool["delta inf"]["AP"] == pytest.approx(plain["AP"])


def test_an_interrupted_file_is_continued(records, tmp_path):
    bench, done, out, purifier, setting = records
    lines = out.read_text().splitlines(keepends=True)
    cut = tmp_path / "r.jsonl"
    cut.write_text("".join(lines[:-3]) + lines[-3][:100])  # in the middle of the last cell
    assert evaluate.read(cut) == done[:-3]
    said = []
    again = evaluate.run(bench, purifier, cut, setting, {"run": 1}, said.append)
    assert len(said) == 1 and "drop" in said[0] and "4 views" in said[0]
    assert again[-1] == {**done[-1], "environment": again[-1]["environment"]}
    assert all(json.loads(line) for line in cut.read_text().splitlines())


def test_tables(records):
    bench, done, *_ = records
    main_rows = tables.main_table(done).splitlines()
    assert "PAIR" in main_rows[3] and "none" in main_rows[3]
    assert len({row.count("|") for row in main_rows}) == 1
    fills = tables.fill_table(done, bench.keywords).splitlines()
    assert len(fills) == 2 + 4  # two view counts x two other fills
    assert len(tables.cost_table(done).splitlines()) == 2 + 7
    few = evaluate.Setting((0.22, 0.35), (4, 9), ("window", "mean"), fill_views=(9,))
    assert [c for c in few.cells() if c[2] == "mean"] == [(0.22, 9, "mean"), (0.35, 9, "mean")]


def test_attacks_stay_below_their_bounds(records):
    _, done, *_ = records
    attacks = [r for r in done if r["kind"] == "attack"]
    assert [(r["patch"], r["keyword"]) for r in attacks] == [(0.22, "cat"), (0.22, "dog")]
    for r in attacks:
        for pool in r["pools"].values():
            assert pool["violations"] == 0 and pool["closest"] >= 0
            assert max(pool["clean"], pool["collage"], pool["attacked"]) <= pool["certified"]
            assert 0 <= pool["of_the_way"] <= 1
    variants = {(r["look"], r["rule"]): r["summary"] for r in done if r["kind"] == "variant"}
    assert len(variants) == 14
    strict = next(
        r for r in done
        if r.get("pool") == "delta 0" and (r["patch"], r["views"], r["fill"]) == (0.22, 9, "window")
    )  # fmt: skip
    assert variants["upright", "worst view"] == strict["summary"]
    for name in ("worst view", "soft minimum, 40"):
        soft = variants["mirrored", name]
        assert soft["CertASR"][0] >= soft["no_attack"][0]
    costs = [r for r in done if r["kind"] == "cost"]
    assert len(costs) == 1
    for r in costs:
        assert r["bytes_certified"] == r["views"] * (16 + 4) and r["rows"] == 100_000
        assert 3 <= r["certified_per_query"] <= r["items"] == 18


def test_demotion_counts_what_no_patch_can_push_out():
    """Against an attacker who tries every region on every item in turn."""
    seeded = torch.Generator().manual_seed(2)
    patterns = cover().minimal
    scores = torch.rand(4, 15, len(cover()), generator=seeded) * 0.4
    scores[:, :6] += torch.linspace(0, 0.5, 6)[:, None]
    relevant = torch.rand(4, 15, generator=seeded) > 0.4
    pool, k = Maximum(), 5
    clean = pool(scores)
    kept = metrics.cert_kept(lower_bound(pool, scores, patterns), clean, relevant, k)
    for q in range(4):
        top = clean[q].topk(k).indices.tolist()
        hits = [y for y in top if relevant[q, y]]
        staying = 0
        for y in hits:
            ranks = []
            for row in patterns:
                worst = float(torch.where(row, scores[q, y], -1.0).max())
                others = torch.cat([clean[q, :y], clean[q, y + 1 :]])
                ranks.append(1 + int((others >= worst).sum()))
            staying += max(ranks) <= k
        assert float(kept[q]) == pytest.approx(staying / max(1, len(hits)))
    assert 0 < float(kept.mean()) < 1


def test_result_file_and_curves(records, tmp_path):
    bench, done, *_ = records
    found = summary_of(done, bench.keywords)
    tables_ = found["tables"]
    assert {
        "pareto",
        "fills",
        "curve",
        "variants",
        "attack",
        "evidence",
        "demotion",
        "cost",
    } <= set(tables_)
    for table in tables_.values():
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    pareto = {tuple(row[:3]): row for row in tables_["pareto"]["rows"]}
    r = next(
        r for r in done
        if r.get("pool") == "delta 0.2"
        and (r["patch"], r["views"], r["fill"]) == (0.22, 9, "window")
    )  # fmt: skip
    row = pareto["0.22", f"9 ({100 * r['hidden']:.0f} %)", "0.2"]
    assert row[4] == pytest.approx(100 * r["summary"]["P"][0])
    assert row[8].startswith(f"{100 * r['summary']['CertASR'][0]:.1f} [")
    assert [row[0] for row in tables_["curve"]["rows"]] == ["0.12", "0.22"] * 2
    assert all(row[-1] == "0" for row in tables_["attack"]["rows"] if row[1] != "undefended")
    save(tmp_path / "c.json", found)
    assert json.loads((tmp_path / "c.json").read_text()) == found
    pytest.importorskip("matplotlib")
    for path in figures(done, tmp_path):
        with Image.open(path) as picture:
            assert picture.size == (924, 396)
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_patched_queries_are_recorded_once(records, tmp_path):
    bench, _, _, purifier, setting = records
    out, photos = tmp_path / "r.jsonl", bench.gallery[:2]
    targets = [("clip", bench.encoder, False), ("signs", bench.encoder, True)]
    rows = evaluate.run_queries(bench, purifier, photos, targets, out, setting)
    assert rows == evaluate.run_queries(bench, purifier, photos, targets, out, setting)
    assert len(rows) == len(out.read_text().splitlines()) == 4
    for r in rows:
        assert r["means"]["cert_ap"] <= r["means"]["ap"] <= 1
        assert r["means"]["radius"] <= r["means"]["live"]
    assert len(tables.query_table(rows).splitlines()) == 2 + 4
