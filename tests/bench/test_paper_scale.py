"""The scale ``paper`` on miniatures: genuine layouts and checkpoint formats, by the same code."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pair.bench import photos, runner, sets, tiny
from pair.bench.grid import Bench
from pair.bench.models import Models
from pair.bench.photos import Photos
from pair.bench.scenario import Row, Settings, at_scale, changes, load, settings
from pair.bench.store import Store
from pair.data.sets import load as load_set
from pair.data.sets import searchable
from pair.hub import kind_of
from pair.images import save_image
from pair.purifier import Purifier
from pair.retrieval.hashing import HashConfig, HashNet
from pair.retrieval.resnet import ResNetConfig

SMALL = {
    "image_size": 32, "static_steps": 1, "steps": 1, "ads": 2, "seeds": 2, "selection": 1,
    "eot": 2, "hash_static": 2, "hash_steps": 2, "member_steps": 1, "uploads": 2, "sources": 2,
    "units": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint of every genuine format that can be made here."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "miniature_weights.py"
    spec = importlib.util.spec_from_file_location("miniature_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("checkpoints")
    for name, make in module.ALL.items():
        try:
            make(root / name)
        except (ImportError, RuntimeError):
            shutil.rmtree(root / name, ignore_errors=True)
    return root


@pytest.fixture(scope="session")
def start(checkpoints) -> Path:
    if not (checkpoints / "vit-mae-old").is_dir():
        pytest.skip("needs the library transformers")
    return checkpoints / "vit-mae-old"


@pytest.fixture(scope="session")
def csq(tmp_path_factory) -> str:
    torch.manual_seed(0)
    net = HashNet(HashConfig(32, 16, ResNetConfig((1, 1, 1, 1), 4), ("a", "b")))
    folder = tmp_path_factory.mktemp("csq") / "net"
    net.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> str:
    return str(tiny.folder("clip-paper", tmp_path_factory.mktemp("clip"), 32))


def bench_of(name: str, root: Path, **given) -> Bench:
    found = at_scale(load(name), "paper")
    return Bench(found, settings(found, "paper", **{**SMALL, **given}), Store(root))


# --- what is searched ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["flickr30k", "coco2014", "coco2014/karpathy"])
def test_captions_of_held_out_photos_are_the_queries(spec, miniatures):
    name, _, protocol = spec.partition("/")
    s = Settings(source="captions", data=f"{spec}:{miniatures / name}", image_size=32, ads=3)
    found = load_set(name, miniatures / name, protocol or None)
    world = sets.text_world(sets.opened(s, "text"), s)
    test = [r for r in found.records if r.split == "test"]
    assert list(world.files) == test and world.queries == [c for r in test for c in r.captions]
    for row, caption in enumerate(world.queries):
        (own,) = world.relevant[row].nonzero()[:, 0].tolist()
        assert caption in test[own].captions
    train = {c for r in found.records if r.split == "train" for c in r.captions}
    used = {c for texts in world.targets.values() for c in texts}
    assert used and used <= train
    shown = {r.id for items in world.concepts.values() for r in items}
    assert shown and not shown & {r.id for r in test}
    assert any(world.members.values()) and world.ads.shape == (3, 3, 32, 32)


def test_advertisements_of_your_own(miniature_script, tmp_path):
    miniature_script.flickr30k(tmp_path)
    picture = torch.full((3, 32, 32), 0.5)
    (tmp_path / "ads").mkdir()
    for i in range(2):
        save_image(tmp_path / "ads" / f"ad{i}.png", picture)
    s = Settings(source="captions", data=f"flickr30k:{tmp_path}", image_size=32, ads=2)
    world = sets.text_world(sets.opened(s, "text"), s)
    torch.testing.assert_close(world.ads, picture.expand(2, 3, 32, 32), atol=0.003, rtol=0)
    with pytest.raises(ValueError, match="holds 2 advertisements, 3 are asked for"):
        sets.text_world(sets.opened(s, "text"), replace(s, ads=3))


def test_labels_of_the_photos_decide(miniatures):
    s = Settings(source="classes", data=f"coco2014:{miniatures / 'coco2014'}", image_size=32)
    found = sets.opened(s, "photo")
    assert found.protocol == "leakfree"
    world = sets.hash_world(found, s)
    queries, database = found.part("query"), found.part("database")
    dense = world.same(world.query_labels)
    shared = [[bool(set(q.labels) & set(r.labels)) for r in database] for q in queries]
    assert torch.equal(dense[0 : len(queries)], torch.tensor(shared))
    assert any(";" in labels for labels in world.labels)
    for pair in world.pairs:
        source, target = (c.strip() for c in pair.split(">"))
        assert source != target and world.of(source) and world.having(target)
        assert all(source in r.labels and r.split == "train" for r in world.pool[source])
    assert sets.hash_world(found, s).pairs == world.pairs  # seeded
    drawn = {sets.hash_world(found, replace(s, seed=n)).pairs for n in range(8)}
    assert len(drawn) > 1


def test_each_search_takes_the_data_that_it_can_use(miniatures):
    both = (f"imagenet100:{miniatures / 'imagenet100'}", f"flickr30k:{miniatures / 'flickr30k'}")
    s = Settings(source="captions", data=both)
    assert sets.opened(s, "text").name == "flickr30k"
    assert sets.opened(s, "photo").name == "imagenet100"
    assert sets.opened(Settings(), "text") is None  # the photos of this package
    with pytest.raises(ValueError, match=r"cannot serve a search by photo: add --data NAME:FOLDER"):
        sets.opened(replace(s, data=both[1:]), "photo")
    with pytest.raises(ValueError, match="cannot serve a text search"):
        sets.opened(replace(s, data=(f"coco2014/leakfree:{miniatures / 'coco2014'}",)), "text")


def test_many_photos_are_decoded_when_they_are_needed(miniatures, monkeypatch):
    records = load_set("imagenet100", miniatures / "imagenet100").part("query")[:7]
    held, framed = Photos(records, 24), Photos(records, 24, framed=True)
    whole, centre = held[:], framed[:]
    assert whole.shape == (7, 3, 24, 24) and not torch.equal(whole, centre)
    larger = photos.decoded(records, 27)  # 8/7 of the side, then the centre
    torch.testing.assert_close(centre, larger[..., 1:25, 1:25])
    monkeypatch.setattr(photos, "HELD", 0)
    lazy = Photos(records, 24)
    assert not lazy.few and len(lazy) == 7
    assert torch.equal(lazy[2], whole[2]) and torch.equal(lazy[1:3], whole[1:3])
    assert torch.equal(lazy[[4, 0]], whole[[4, 0]])
    parts = list(lazy.split(3))
    assert [len(p) for p in parts] == [3, 3, 1] and torch.equal(torch.cat(parts), whole)


# --- models -------------------------------------------------------------------------------------


def test_public_autoencoders_are_generators(checkpoints, start, tmp_path):
    """transformers (both key layouts) and Meta: the same weights give the same folder."""
    s = Settings(tiny=False)
    models = Models(s, tmp_path)
    places = {n: Path(models.where(str(checkpoints / n))) for n in ("vit-mae", "vit-mae-old")}
    file = checkpoints / "meta" / "mae_visualize_vit_base.pth"
    places["meta"] = Path(models.where(str(file)))
    assert len(set(places.values())) == 3
    assert all(kind_of(p) == "generator" for p in places.values())
    new, old = (Purifier.from_pretrained(places[n]) for n in ("vit-mae", "vit-mae-old"))
    images, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 16) > 0.5
    with torch.no_grad():
        assert torch.equal(new(images, mask=mask), old(images, mask=mask))
    assert len(models.sha(str(start))) == 64
    assert models.where("pair-small") == "pair-small"
    named = Models(replace(s, models={"sac-small": "elsewhere"}), tmp_path)
    assert named.where("sac-small") == "elsewhere"


def test_small_models_do_not_stand_in_for_large_ones(tmp_path):
    strict = Models(settings(load("table1"), "paper"), tmp_path)
    with pytest.raises(ValueError, match=r"not this scale: name .*--set models\.sac-small=FOLDER"):
        strict.defense(Row("SAC", "sac"))
    with pytest.raises(ValueError, match=r"'pair-base' is not shipped: .* --generator FOLDER"):
        strict.defense(Row("PAIR", "pair"))
    assert strict.sha("sac-small") == "missing"  # so that allowing it is another cell
    assert Models(settings(load("table1"), "paper", shipped=True), tmp_path).defense(
        Row("SAC", "sac")
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [("steps", "write KEY=VALUE"), ("a.b=3", "write KEY=VALUE"), ("=3", "write KEY=VALUE")],
)
def test_changes_are_written_as_in_a_scenario(given, message):
    with pytest.raises(ValueError, match=message):
        changes([given])
    made = changes(["static_steps=3", "start=qr", "models.sac-small=a/b", "checks=false"])
    assert made == {
        "static_steps": 3, "start": "qr", "models": {"sac-small": "a/b"}, "checks": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match="unknown setting 'speed'"):
        settings(load("table1"), "paper", **changes(["speed=3"]))


# --- tables -------------------------------------------------------------------------------------


def test_table_1_on_flickr30k(miniatures, start, clip, tmp_path):
    data = f"flickr30k:{miniatures / 'flickr30k'}"
    bench = bench_of("table1", tmp_path, data=data, clip=clip, generator=str(start), checks=False)
    for only in ("undefended", "PAIR"):
        assert runner.run(bench, only=only).failed == []
    lines = {(c.row.label, c.mode): bench.store.read(bench.key(c)) for c in bench.cells()}
    ranks = lines["undefended", "clean"]["result"]["ranks"]
    world, search = bench.text, bench.search(Row("undefended", "none"))
    scores = search.text(world.queries) @ search.rows(world.photos, 0)[:, 0].T
    for row, found in enumerate(ranks[0]):  # one relevant photo each, ranked by hand
        own = scores[row, world.relevant[row]]
        assert found == [1 + int((scores[row] >= own).sum()) - 1]
    assert lines["PAIR", "adaptive"]["result"]["details"]["gradient"]["config"]["eot"] == 2
    runner.run(bench, only="SAC")
    assert lines["SAC", "clean"] is None  # not asked for before
    told = bench.store.read(bench.key(next(c for c in bench.cells() if c.row.label == "SAC")))
    assert told["status"] == "failed" and "models.sac-small=FOLDER" in told["message"]


@pytest.mark.parametrize("name", ["imagenet100", "coco2014"])
def test_table_2_on_labelled_photos(name, miniatures, start, csq, tmp_path):
    bench = bench_of(
        "table2", tmp_path, data=f"{name}:{miniatures / name}", csq=csq, generator=str(start)
    )
    for only in ("undefended", "PAIR"):
        assert runner.run(bench, only=only).failed == []
    cell = next(c for c in bench.cells() if c.mode == "clean")
    result = bench.store.read(bench.key(cell))["result"]
    codes = [[int(b) for b in f"{int(h, 16):016b}"] for h in result["gallery"]]
    for query, labels, wanted in zip(
        result["codes"][0], result["query_labels"], result["ap"][0], strict=True
    ):
        own = torch.tensor([int(b) for b in f"{int(query, 16):016b}"])
        distance = (torch.tensor(codes) != own).sum(1).tolist()
        right = [bool(set(labels.split(";")) & set(x.split(";"))) for x in result["labels"]]
        assert wanted == pytest.approx(expected_precision(distance, right), abs=1e-5)


def expected_precision(distance: list[int], right: list[bool]) -> float:
    """Mean precision at the hits, over random orders of the ties (an independent estimate would
    be noisy, so: exact, item by item, by the hypergeometric mean)."""
    total, hits = 0.0, sum(right)
    for d in sorted(set(distance)):
        tied = [r for x, r in zip(distance, right, strict=True) if x == d]
        before = [r for x, r in zip(distance, right, strict=True) if x < d]
        n, r = len(tied), sum(tied)
        for place in range(1, n + 1):  # a hit at this place of the tie, r/n likely
            inside = (place - 1) * (r - 1) / (n - 1) if n > 1 else 0.0
            total += r / n * (sum(before) + inside + 1) / (len(before) + place)
    return total / hits if hits else 0.0


OTHERS = ["caltech101", "folder/classes", "folder", "webdataset", "huggingface"]


@pytest.mark.parametrize("spec", OTHERS)
def test_tables_on_photos_of_your_own(spec, miniatures, csq, clip, tmp_path):
    """Every data set that can be searched, in its genuine layout."""
    name, _, protocol = spec.partition("/")
    root = miniatures / ("classes" if protocol == "classes" else name)
    if not root.is_dir():
        pytest.skip("needs the library datasets")
    text = any(name == found.partition("/")[0] for found in searchable("text")) and not protocol
    given = {"clip": clip} if text else {"csq": csq}
    bench = bench_of("table1" if text else "table2", tmp_path, data=f"{spec}:{root}", **given)
    assert runner.run(bench, only="undefended").failed == []
    result = bench.store.read(bench.key(bench.cells()[0]))["result"]
    assert len(result["ranks" if text else "codes"][0]) > 0


@pytest.mark.integration
def test_table_1_with_clips_of_open_clip(checkpoints, miniatures, start, tmp_path):
    """A folder, and an architecture with a weights file: the same weights, the same ranks."""
    folder = checkpoints / "open-clip"
    if not folder.is_dir():
        pytest.skip("open_clip cannot be imported here")
    data, ranks = f"coco2014:{miniatures / 'coco2014'}", []
    file = folder / "open_clip_model.safetensors"
    for spec in (f"local-dir:{folder}", f"pair-miniature/{file}"):
        bench = bench_of(
            "table1", tmp_path / "run", data=data, clip=f"open_clip:{spec}", generator=str(start),
            checks=False,
        )  # fmt: skip
        assert len(bench.models.sha(bench.settings.clip)) == 64
        if spec.startswith("pair"):
            with pytest.warns(UserWarning, match="does not say how its images were normalised"):
                bench.models.clip()
        assert runner.run(bench, only="PAIR").failed == []
        cell = next(c for c in bench.cells() if c.row.label == "PAIR" and c.mode == "clean")
        ranks.append(len(bench.store.read(bench.key(cell))["result"]["ranks"][0]))
    test = load_set("coco2014", miniatures / "coco2014").part("test")
    assert ranks[0] == ranks[1] == 5 * len(test)


# --- the whole way ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_way(pair, miniatures, checkpoints, start, clip, tmp_path):
    """Every data set: prepare, check, training; then all tables and figures at the scale paper."""
    made = sorted(p.name for p in miniatures.iterdir() if p.is_dir())
    names = {"flickr30k-kaggle": "flickr30k", "flickr30k-hub": "flickr30k", "classes": "folder"}

    def run(*arguments) -> str:
        code, out, err = pair(*map(str, arguments))
        assert code == 0, (arguments, err)
        return out + err

    loop = "[loop]\nsteps = 2\nbatch_size = 4\nwarmup = 0\n[task]\n"
    generator = tmp_path / "generator.toml"
    generator.write_text(f'{loop}init = "{start}"\nlr = 1e-4\naugment = "none"\n')
    for name in made:
        kind = names.get(name, name)
        protocol = "classes" if name == "classes" else ""
        options = ("--protocol", protocol) if protocol else ()
        out = tmp_path / "index"
        run("data", "prepare", kind, "--root", miniatures / name, "--out", out, *options)
        assert "can be decoded" in run("data", "check", kind, "--root", miniatures / name, *options)
        spec = f"{kind}{'/' + protocol if protocol else ''}:{miniatures / name}"
        task = ("train", "generator", "--recipe", generator)
        run(*task, "--data", spec, "--out", tmp_path / "train" / name)
    big = tmp_path / "train" / "both"
    opened = checkpoints / "open-clip"
    critic = f"open_clip:local-dir:{opened}" if opened.is_dir() else clip
    data = [f"coco2014:{miniatures / 'coco2014'}", f"flickr30k:{miniatures / 'flickr30k'}"]
    run(
        "train", "generator", "--recipe", generator, "--data", data[0], "--data", data[1],
        "--out", big, "--set", f"task.discriminator={critic}",
    )  # fmt: skip
    meta = checkpoints / "meta" / "mae_visualize_vit_base.pth"
    assert "CC BY-NC" in run("models", "convert", meta, "--out", tmp_path / "meta")
    recipe = tmp_path / "csq.toml"
    weights = checkpoints / "resnet" / "resnet18-f37072fd.pth"
    recipe.write_text(
        f'{loop}backbone = "resnet18"\nweights = "{weights}"\nimage_size = 32\nbits = 16\n'
        "top_k = 20\n"
    )
    photos_of = f"imagenet100:{miniatures / 'imagenet100'}"
    run(
        "train", "csq-paper", "--recipe", recipe, "--data", photos_of, "--out", tmp_path / "csq"
    )  # fmt: skip
    if opened.is_dir():
        tuned = tmp_path / "clip.toml"
        tuned.write_text(f'{loop}model = "{critic}"\nimage_size = 32\n')
        run("train", "clip-paper", "--recipe", tuned, "--data", data[1], "--out", tmp_path / "clip")
        critic = f"open_clip:local-dir:{tmp_path / 'clip' / 'best'}"
    given = ["--scale", "paper", "--data", data[1], "--data", photos_of, "--clip", critic]
    given += ["--csq", tmp_path / "csq" / "best", "--generator", big / "best"]
    given += ["--keywords", "1", "--steps", "2", "--ads", "3"]
    own = {"pair-small-pixel": start}
    quick_task = "validation = 3\ninner_steps = 2\n"
    detect = f"{quick_task}image_size = 32\nwidth = 4\nbank = 4\ncraft_steps = 2\n"
    detect += f'clip = "{critic}"\ncsq = "{tmp_path / "csq" / "best"}"\n'
    denoise = f'{quick_task}image_size = 32\nwidth = 4\ntarget = "{critic}"\n'
    harden = f'{quick_task}lr = 1e-3\ninit = "{critic}"\n'
    hashing = f'{quick_task}lr = 1e-3\nkind = "csq"\ninit = "{tmp_path / "csq" / "best"}"\n'
    baselines = {  # row's model -> kind, settings, photos
        "sac-small": ("sac", detect, (data[1], photos_of)),
        "patchzero-small": ("patchzero", detect, (data[1], photos_of)),
        "arn-small": ("arn", denoise, (data[0],)),
        "cafd-small": ("cafd", denoise, (data[0],)),
        "clip-small-at": ("at", harden, (data[1],)),
        "csq-small-at": ("at", hashing, (photos_of,)),
        "clip-small-hm": ("hm", f"{harden}classes = 4\nper_class = 1\n", (data[0],)),
    }
    for name, (kind, task, photos_named) in baselines.items():
        named = tmp_path / f"{name}.toml"
        named.write_text(loop + task)
        each = [word for spec in photos_named for word in ("--data", spec)]
        run("train", kind, "--recipe", named, *each, "--out", tmp_path / "train" / name)
        own[name] = tmp_path / "train" / name / "best"
    quick = {k: v for k, v in SMALL.items() if k not in ("steps", "ads", "units")}
    for key, value in {**quick, **{f"models.{k}": v for k, v in own.items()}}.items():
        given += ["--set", f"{key}={value}"]
    out = tmp_path / "bench"
    tables = ["table1", "table2", "table3", "table4", "table5", "alpha", "fig1", "fig2"]
    if importlib.util.find_spec("sklearn"):
        tables.append("fig5")
    run("bench", "run", *tables, *given, "--out", out)
    # The rungs of the ladder, those with a preset's own number of steps cut short.
    text = (Path(tiny.__file__).parents[1] / "assets" / "bench" / "ladder.toml").read_text()
    text = re.sub(r'(preset = "(?:paper|std|strong)") }', r"\1, effort = 1.0 }", text)
    ladder = tmp_path / "ladder.toml"
    ladder.write_text(text)
    run("bench", "run", ladder, *given, "--out", out)
    records = [json.loads(p.read_text()) for p in (out / "cells").iterdir()]
    failed = {(r["facts"]["row"]["defense"], r["message"]) for r in records if "message" in r}
    assert not failed
    assert {r["facts"]["kind"] for r in records} >= {"text", "hash", "noise", "ladder", "panels"}
    rungs = {
        r["facts"]["row"]["attack"].get("preset", r["facts"]["row"]["attack"]["rung"]): r["result"]
        for r in records
        if r["facts"]["kind"] == "ladder"
    }
    assert rungs.keys() == {"paper", "std", "strong", "uploads", "known", "unbounded", "estimator",
                            "floor"}  # fmt: skip
    assert [rungs[n]["eot"] for n in ("paper", "std", "strong")] == [7, 20, 50]
    for name in ("paper", "std", "strong"):  # a curve: before, on the way, at the end
        assert [p["steps"] for p in rungs[name]["points"]] == [0, 1, 2]
    run("bench", "report", *tables, ladder, *given, "--results", out, "--no-figures")
    report = out / "report"
    table = json.loads((report / "table1.json").read_text())
    cells = {row[0]: row[1:] for row in table["rows"]}
    assert cells.keys() == {"undefended", "PatchZero", "SAC", "MAEDefense", "LGS", "AT", "PAIR",
                            "PAIR, certified"}  # fmt: skip
    assert all("failed" not in v[0] for v in cells.values())
    assert {p.stem for p in report.glob("table*.jsonl")} == {f"table{i}" for i in range(1, 6)}
    assert "flickr30k" in (report / "table1.md").read_text()
