"""Collections: what goes in comes out, once; searches agree with a loop over the pictures."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from collections_tiny import draw, save_models
from PIL import Image

from pair import cli
from pair.guard import ingest, sources
from pair.guard.collection import Collection
from pair.guard.lance import _plain_errors
from pair.guard.models import Models
from pair.guard.pipeline import image_seed
from pair.guard.stores import Row, split
from pair.images import load_image
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.hashing import HashNet

pytest.importorskip("lancedb")


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def models(names) -> Models:
    return Models.load(**names)


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    return [draw(tmp_path / "photos" / f"{i:02d}.png", i) for i in range(12)]


@pytest.fixture
def collection(tmp_path, models, photos) -> Collection:
    made = Collection.create(str(tmp_path / "c"), models, seed=5)
    report = made.add(tmp_path / "photos", batch_size=5, commit_rows=4)
    assert (report.seen, report.added, report.present, report.failed) == (12, 12, 0, 0)
    return made


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def purified(names, path: Path) -> torch.Tensor:
    """One picture through the purifier as it is called everywhere else, with the seed's mask."""
    purifier = Purifier.from_pretrained(names["purifier"])
    seed = image_seed(5, hashlib.sha256(path.read_bytes()).hexdigest())
    image = load_image(path, size=32)[None]
    with torch.no_grad():
        return purifier(image, generator=torch.Generator().manual_seed(seed))


def test_features_of_several_draws_are_averaged(tmp_path, names, photos):
    models = Models.load(**names, draws=3)
    made = Collection.create(str(tmp_path / "c"), models, seed=5)
    made.add(photos[0], photos[1])
    clip, csq = (
        SmallClip.from_pretrained(names["encoder"]),
        HashNet.from_pretrained(names["hasher"]),
    )
    purifier = Purifier.from_pretrained(names["purifier"])
    rows = {r.uri: r for part in made.store.rows(("vector", "vector_raw", "code")) for r in part}
    for path in photos[:2]:
        seed = image_seed(5, hashlib.sha256(path.read_bytes()).hexdigest())
        source = torch.Generator().manual_seed(seed)
        image = load_image(path, size=32)[None]
        with torch.no_grad():
            draws = [purifier(image, generator=source) for _ in range(3)]
            vector = unit(torch.stack([clip.encode_image(x) for x in draws]).mean(0))[0]
            code = torch.stack([csq.encode_image(x) for x in draws]).mean(0)[0] > 0
            raw = unit(clip.encode_image(image))[0]
        row = rows[str(path)]
        np.testing.assert_allclose(row.vector, vector, atol=1e-5)
        np.testing.assert_allclose(row.vector_raw, raw, atol=1e-5)
        np.testing.assert_array_equal(row.code, np.packbits(code.numpy()))
    # The collection remembers how many, and refuses models with another number.
    again = Collection.open(made.uri)
    assert again.models.draws == 3
    hits = again.search_image(photos[0], 2, defend="both")
    assert {hit.uri for hit in hits} == set(map(str, photos[:2]))
    with pytest.raises(ValueError, match="made with another purifier"):
        Collection.open(made.uri, Models.load(**names))
    with pytest.raises(ValueError, match="purifications, 1 or more of a purifier"):
        Models.load(names["encoder"], None, None, draws=2)


def test_stored_rows_equal_a_loop_over_the_pictures(collection, photos, names):
    clip, csq = (
        SmallClip.from_pretrained(names["encoder"]),
        HashNet.from_pretrained(names["hasher"]),
    )
    columns = ("vector", "vector_raw", "code", "code_raw")
    rows = {r.uri: r for part in collection.store.rows(columns) for r in part}
    assert sorted(rows) == sorted(map(str, photos))
    for path in photos:
        row, whole = rows[str(path)], load_image(path)[None]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert (row.sha256, row.id, row.width, row.height) == (digest, digest[:32], 40, 30)
        raw = unit(clip.encode_image(whole))[0]
        assert np.allclose(row.vector_raw, raw, atol=1e-5)
        assert np.allclose(row.vector, unit(clip.encode_image(purified(names, path)))[0], atol=1e-5)
        outputs = csq.encode_image(whole)[0]
        sure = outputs.abs() > 1e-4
        bits = torch.from_numpy(np.unpackbits(row.code_raw)).bool()
        assert torch.equal(bits[sure], outputs[sure] > 0) and len(bits) == 16
        assert row.seed == "5" and row.model and row.purifier


def test_search_is_the_ranking_by_cosine(collection, photos, names):
    clip = SmallClip.from_pretrained(names["encoder"])
    text = unit(clip.encode_text(["a red photo"]))[0]
    gallery = torch.cat([unit(clip.encode_image(purified(names, p))) for p in photos])
    scores = gallery @ text
    hits = collection.search_text("a red photo", k=5)
    wanted = scores.argsort(descending=True)[:5].tolist()
    assert [h.uri for h in hits] == [str(photos[i]) for i in wanted]
    assert [h.rank for h in hits] == [1, 2, 3, 4, 5]
    assert np.allclose([h.score for h in hits], scores[wanted], atol=1e-5)
    raw = torch.cat([unit(clip.encode_image(load_image(p)[None])) for p in photos]) @ text
    undefended = collection.search_text("a red photo", k=12, defend="none")
    assert np.allclose([h.score for h in undefended], sorted(raw.tolist(), reverse=True), atol=1e-5)


def test_search_by_picture_and_code(collection, photos, names):
    assert collection.search_image(photos[3], 1, defend="none")[0].uri == str(photos[3])
    assert collection.search_image(photos[3].read_bytes(), 1, defend="none")[0].score == (
        pytest.approx(1, abs=1e-5)
    )
    csq = HashNet.from_pretrained(names["hasher"])
    codes = torch.cat([csq.codes(load_image(p)[None]) for p in photos])
    hits = collection.search_image(load_image(photos[3]), 12, defend="none", using="code")
    expected = sorted(((codes @ codes[3]) / 16).tolist(), reverse=True)
    assert np.allclose([h.score for h in hits], expected, atol=1e-6)
    again = [collection.search_image(photos[0], 3, seed=9) for _ in range(2)]
    assert again[0] == again[1]
    fresh = {collection.search_image(photos[0], 1, defend="query")[0].score for _ in range(8)}
    assert len(fresh) > 1  # a secret mask for every query


def test_defend_says_which_side_is_purified(collection, photos):
    row = next(r for p in collection.store.rows(("vector", "vector_raw")) for r in p)
    path = row.uri
    scores = {
        mode: {h.uri: h.score for h in collection.search_image(path, 12, defend=mode, seed=1)}[path]
        for mode in ("gallery", "query", "both", "none")
    }
    raw = collection.embed(path, purified=False)["vector"]
    clean = collection.embed(path, purified=True, seeds=[1])["vector"]
    expected = {
        "gallery": raw @ row.vector, "query": clean @ row.vector_raw,
        "both": clean @ row.vector, "none": raw @ row.vector_raw,
    }  # fmt: skip
    assert scores == pytest.approx(expected, abs=1e-5)


def test_same_content_is_one_row(collection, tmp_path, photos):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "copy.png").write_bytes(photos[0].read_bytes())
    draw(tmp_path / "more" / "new.png", 99)
    (tmp_path / "more" / "new too.png").write_bytes((tmp_path / "more" / "new.png").read_bytes())
    report = collection.add(tmp_path / "more", tmp_path / "photos")
    assert (report.seen, report.added, report.repeated) == (15, 1, 1)
    assert report.present == 13 and len(collection) == 13
    ids = [r.id for part in collection.store.rows() for r in part]
    assert len(ids) == len(set(ids)) == 13


def test_broken_files_are_listed_and_stop_nothing(collection, tmp_path):
    folder = tmp_path / "mixed"
    good = draw(folder / "good.png", 50)
    (folder / "cut.png").write_bytes(good.read_bytes()[:60])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    report = collection.add(folder)
    assert (report.seen, report.added, report.failed) == (5, 1, 4)
    lines = [json.loads(line) for line in report.failures.read_text().splitlines()]
    assert {Path(line["uri"]).name for line in lines} == {
        "cut.png", "empty.jpg", "text.png", "link.png"
    }  # fmt: skip
    assert all("\n" not in line["reason"] and line["reason"] for line in lines)
    again = collection.add(folder)
    assert (again.present, again.failed, again.added) == (1, 4, 0)


def test_stop_and_go_on(tmp_path, models, photos):
    made = Collection.create(str(tmp_path / "c"), models, seed=5)
    calls = []

    def stop() -> bool:
        calls.append(1)
        return len(calls) == 2

    first = made.add(tmp_path / "photos", batch_size=3, commit_rows=100, stop=stop)
    assert first.stopped and first.added == len(made) == 6
    second = made.add(tmp_path / "photos", batch_size=3)
    assert (second.present, second.added, second.stopped) == (6, 6, False)


def test_parts_are_disjoint_and_complete(tmp_path, models, photos):
    made = Collection.create(str(tmp_path / "c"), models)
    added = [made.add(tmp_path / "photos", part=(i, 3)).added for i in (1, 2, 3)]
    assert added == [4, 4, 4] and len(made) == 12
    with pytest.raises(ValueError, match="part 4 of 3"):
        made.add(tmp_path / "photos", part=(4, 3))


def test_committed_is_told_of_stored_rows_only(tmp_path, models, photos):
    made = Collection.create(str(tmp_path / "c"), models)
    told: list[str] = []

    def committed(rows) -> None:
        other = Collection.open(made.uri, models)
        ids = {r.id for r in rows}
        assert other.store.existing(sorted(ids)) == ids
        told.extend(ids)

    made.add(tmp_path / "photos", batch_size=4, commit_rows=4, committed=committed)
    assert len(told) == len(set(told)) == 12


def test_other_models_are_refused(collection, names, tmp_path):
    other = save_models(tmp_path / "others", seed=1)
    for role in names:
        mixed = Models.load(**{**names, role: other[role]})
        with pytest.raises(ValueError, match=f"another {role} .fingerprint"):
            Collection.open(collection.uri, mixed)
    with pytest.raises(ValueError, match="another purifier"):
        Collection.open(collection.uri, Models.load(**{**names, "purifier": None}))
    settings = Models.load(**names)
    settings.purifier.output = "paste"  # same weights, another purifier
    with pytest.raises(ValueError, match="another purifier"):
        Collection.open(collection.uri, settings)


def test_weights_that_changed_behind_a_name_are_noticed(tmp_path, photos):
    names = save_models(tmp_path / "m")
    made = Collection.create(str(tmp_path / "c"), Models.load(**names))
    save_models(tmp_path / "m", seed=3)
    opened = Collection.open(made.uri)
    assert len(opened) == 0 and opened.info().rows == 0  # facts need no models
    with pytest.raises(ValueError, match="another encoder"):
        opened.search_text("a red photo")
    with pytest.raises(ValueError, match="another encoder"):
        opened.add(tmp_path / "photos")


def test_remove(collection, photos):
    rows = [r for part in collection.store.rows() for r in part]
    assert collection.remove(ids=[rows[0].id, "unknown"]) == 1
    assert collection.remove(uris=[rows[1].uri]) == 1
    assert collection.remove(where=f"uri = '{rows[2].uri}'") == 1
    assert len(collection) == 9
    with pytest.raises(ValueError, match="what to remove"):
        collection.remove()
    # What was removed can come back.
    assert collection.add(rows[0].uri).added == 1


def test_collections_without_purifier_or_text(tmp_path, names, photos):
    plain = Collection.create(str(tmp_path / "p"), Models.load(**{**names, "purifier": None}))
    plain.add(tmp_path / "photos")
    assert plain.search_image(photos[2], 1)[0].uri == str(photos[2])
    with pytest.raises(ValueError, match="no purifier"):
        plain.search_text("red", defend="gallery")
    codes = Collection.create(str(tmp_path / "h"), Models.load(None, names["hasher"], None))
    codes.add(tmp_path / "photos")
    assert codes.search_image(photos[2], 1)[0].score == 1
    with pytest.raises(ValueError, match="no embeddings"):
        codes.search_text("red")
    with pytest.raises(ValueError, match="an encoder, a hash network"):
        Models.load(None, None, names["purifier"])


def test_several_collections_in_one_place_and_bad_uris(tmp_path, models):
    place = str(tmp_path / "c")
    one, two = Collection.create(place, models), Collection.create(f"{place}#two", models)
    one.add_rows([])
    assert {one.uri, two.uri} == {f"{place}#images", f"{place}#two"}
    with pytest.raises(ValueError, match="already"):
        Collection.create(place, models)
    with pytest.raises(ValueError, match=r"no collection .*#three"):
        Collection.open(f"{place}#three")
    with pytest.raises(ValueError, match="no collection"):
        Collection.open(str(tmp_path / "nowhere"))
    assert split("s3://b/p#x_1") == ("s3://b/p", "x_1") and split("a") == ("a", "images")
    for bad in ("", "#x", "a#", "a#b/c", "a#b c"):
        with pytest.raises(ValueError, match="is no collection"):
            split(bad)


def test_root_keeps_uris_short_and_movable(tmp_path, models, photos):
    made = Collection.create(str(tmp_path / "c"), models, root=tmp_path)
    made.add(tmp_path / "photos")
    hit = made.search_image(photos[0], 1, defend="none")[0]
    assert hit.uri == "photos/00.png" and made.read(hit.uri) == photos[0].read_bytes()
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    (tmp_path / "moved").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "moved" / "photos")
    moved = Collection.open(made.uri, root=tmp_path / "moved")
    assert Image.open(io.BytesIO(moved.read(hit.uri))).size == (40, 30)
    with pytest.raises(OSError):
        made.read(hit.uri)


# -- sources ---------------------------------------------------------------------------------


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_shards_with_metadata_and_filters(tmp_path, models, photos):
    pictures = [p.read_bytes() for p in photos]
    for number in range(2):
        members: dict[str, bytes] = {}
        for i in range(3):
            index = 3 * number + i
            members[f"d/{index}.png"] = pictures[index]
            members[f"d/{index}.json"] = json.dumps({"year": 2000 + index, "x": [1]}).encode()
            members[f"d/{index}.cls"] = str(index % 2).encode()
        write_shard(tmp_path / f"s-{number:03d}.tar", members)
    made = Collection.create(str(tmp_path / "c"), models, fields={"year": "int", "class": "str"})
    assert made.add(str(tmp_path / "s-{000..001}.tar")).added == 6
    hits = made.search_text("red", where="year >= 2002 and class = '0'", defend="none")
    assert sorted(h.metadata["year"] for h in hits) == [2002, 2004]
    assert all(h.metadata["x"] == [1] for h in hits)
    hit = next(h for h in hits if h.metadata["year"] == 2004)
    assert made.read(hit.uri) == pictures[4]
    with pytest.raises(OSError):
        made.read(hit.uri + "x")


def test_damaged_shards_and_metadata_are_listed(tmp_path, models, photos):
    data = photos[0].read_bytes()
    whole = write_shard(
        tmp_path / "a.tar", {"1.png": data, "1.json": b"{", "2.png": photos[1].read_bytes()}
    )
    cut = tmp_path / "b.tar"
    cut.write_bytes(whole.read_bytes()[:600])
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
    made = Collection.create(str(tmp_path / "c"), models, fields={"year": "int"})
    report = made.add(*(tmp_path / f"{n}.tar" for n in "abc"))
    assert (report.added, report.failed) == (2, 3)
    (tmp_path / "l.jsonl").write_text(
        json.dumps({"path": str(photos[3]), "year": "soon"}) + "\nnonsense\n"
        + json.dumps({"path": "photos/04.png", "year": "7"}) + "\n"
    )  # fmt: skip
    report = made.add(tmp_path / "l.jsonl")
    assert (report.added, report.failed) == (1, 2)
    row = next(r for part in made.store.rows(where=made._where("year = 7")) for r in part)
    assert row.uri == str(photos[4]) and row.meta == {"year": 7}


def test_lists(tmp_path, photos):
    (tmp_path / "a.txt").write_text("photos/00.png\n\nphotos/01.png\n")
    (tmp_path / "b.csv").write_text('path,label\nphotos/02.png,"x, y"\nphotos/03.png,\n')
    found = list(sources.find([tmp_path / "a.txt", tmp_path / "b.csv"]))
    assert [Path(s.uri).name for s in found] == ["00.png", "01.png", "02.png", "03.png"]
    assert [s.meta for s in found] == [{}, {}, {"label": "x, y"}, {}]
    assert found[2].read() == photos[2].read_bytes()
    with pytest.raises(ValueError, match="no such file"):
        list(sources.find([tmp_path / "none"]))


def test_braces():
    assert sources.expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert sources.expand("{1..2}/{0..1}x") == ["1/0x", "1/1x", "2/0x", "2/1x"]
    assert sources.expand("plain") == ["plain"]


def test_settle():
    fields = {"n": "int", "f": "float", "b": "bool", "s": "str"}
    got = ingest.settle({"n": "3", "f": 1, "b": "True", "s": 5, "z": None}, fields)
    assert got == ({"n": 3, "f": 1.0, "b": True, "s": "5", "z": None}, "")
    assert "of type int" in ingest.settle({"n": "x"}, fields)[1]
    assert "of type bool" in ingest.settle({"b": "maybe"}, fields)[1]


# -- two writers, an index, the command ------------------------------------------------------


def synthetic(start: int, count: int, dim: int = 16) -> list[Row]:
    rows = []
    for i in range(start, start + count):
        rng = np.random.default_rng(i)
        v = rng.standard_normal((2, dim)).astype(np.float32)
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        digest = hashlib.sha256(str(i).encode()).hexdigest()
        codes = rng.integers(0, 256, (2, 2), dtype=np.uint8)
        rows.append(Row(digest[:32], f"{i}.jpg", digest, vector=v[0], vector_raw=v[1],
                        code=codes[0], code_raw=codes[1]))  # fmt: skip
    return rows


def test_two_writers_of_the_same_rows(tmp_path, models):
    """Handles of their own, at the same moment; processes are killed in test_kill.py."""
    made = Collection.create(str(tmp_path / "c"), models)
    gate = threading.Barrier(2)

    def write(start: int) -> int:
        store = Collection.open(made.uri).store
        added = 0
        for i in range(start, start + 60, 20):
            rows = synthetic(i, 20)
            gate.wait(60)
            added += store.insert(rows)
        return added

    with ThreadPoolExecutor(2) as pool:
        added = list(pool.map(write, (0, 20)))
    ids = [r.id for part in made.store.rows() for r in part]
    assert len(ids) == sum(added) == 80 and set(ids) == {r.id for r in synthetic(0, 80)}


def test_approximate_index_and_its_recall(tmp_path, models):
    made = Collection.create(str(tmp_path / "c"), models, approximate_from=1000)
    made.add_rows(synthetic(0, 900))
    assert made.info().indexes == {}
    made.add_rows(synthetic(900, 1100))
    info = made.info(recall=20)
    assert info.rows == 2000 and info.bytes > 2000 * 2 * 16 * 4
    assert set(info.recall) == {"vector", "vector_raw", "code", "code_raw"} and info.sampled == 20
    assert min(info.recall.values()) > 0.8
    # Rows that came after the index are found all the same.
    late = synthetic(5000, 1)
    made.add_rows(late, index=False)
    found = made._search("vector", late[0].vector, 1, None, exact=False)
    assert found[0].uri == "5000.jpg" and found[0].score == pytest.approx(1, abs=1e-5)
    # The recall that is reported is the one that a loop in numpy finds.
    matrix = np.stack([r.vector for r in synthetic(0, 2000) + late])
    shares = []
    for query in made.store.sample("vector", 20):
        best = set(np.argsort(-(matrix @ query), kind="stable")[:10])
        near = {int(r.uri.split(".")[0]) for r, _ in made.store.nearest("vector", query, 10)}
        shares.append(len({2000 if n == 5000 else n for n in near} & best) / 10)
    assert made.info(recall=20).recall["vector"] == pytest.approx(np.mean(shares), abs=0.02)


@pytest.mark.parametrize(
    ("dim", "kind", "least"),
    [
        (16, "IvfSq", 0.9),  # a bit per number found 0.75 to 0.9 of these
        (20, "IvfSq", 0.9),
        (68, "IvfSq", 0.9),  # RaBitQ wants multiples of 8
        (64, "IvfRq", 0.6),  # random vectors have no neighbourhoods: the hardest case for it
    ],
)
def test_index_by_length_of_the_vectors(tmp_path, dim, kind, least):
    class Numbers:
        fingerprint, image_size = "synthetic", 1

    Numbers.dim = dim
    made = Collection.create(str(tmp_path / "c"), Models(encoder=Numbers()), approximate_from=500)
    made.add_rows(synthetic(0, 1000, dim=dim))
    info = made.info(recall=20)
    found = info.indexes["vector_raw"]
    assert (found["rows"], found["type"]) == (1000, kind) and info.recall["vector_raw"] > least


def test_memory_for_indexes_is_bounded_by_a_number(tmp_path, models, monkeypatch):
    monkeypatch.setenv("PAIR_INDEX_CACHE_MB", "lots")
    with pytest.raises(ValueError, match="PAIR_INDEX_CACHE_MB is 'lots'"):
        Collection.create(str(tmp_path / "c"), models)
    monkeypatch.setenv("PAIR_INDEX_CACHE_MB", "0")  # nothing is kept: slower, the same answers
    made = Collection.create(str(tmp_path / "c"), models, approximate_from=500)
    rows = synthetic(0, 600)
    made.add_rows(rows)
    assert made.store.nearest("vector", rows[7].vector, 1)[0][0].uri == "7.jpg"


def run(*arguments: str, monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["pair", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


def test_errors_of_the_library_name_no_place_in_its_source():
    with pytest.raises(OSError, match="no credentials") as caught, _plain_errors("s3://b", "open"):
        raise RuntimeError("no credentials, /build/registry/object_store.rs:12:3")
    assert str(caught.value) == "cannot open the collection in s3://b: no credentials"


def test_commands(tmp_path, names, photos, monkeypatch, capsys):
    uri, folder = str(tmp_path / "c"), str(tmp_path / "photos")

    def pair(*arguments: str) -> tuple[int, str, str]:
        return run(*arguments, monkeypatch=monkeypatch, capsys=capsys)

    options = [x for role, name in names.items() for x in (f"--{role}", name)]
    assert pair("index", "create", uri, *options, "--field", "year:int")[0] == 0
    code, _, err = pair("index", "create", uri, *options)
    assert code == 2 and "already" in err and "Traceback" not in err
    code, out, _ = pair("index", "add", uri, folder, "--json", "--commit-rows", "5")
    lines = [json.loads(line) for line in out.splitlines()]
    told = [row["uri"] for line in lines[:-1] for row in line["committed"]]
    assert code == 0 and sorted(told) == sorted(map(str, photos)) and lines[-1]["added"] == 12
    assert "12 there already" in pair("index", "add", uri, folder)[1]
    (tmp_path / "photos" / "bad.png").write_text("no")
    code, out, _ = pair("index", "add", uri, folder)
    assert code == 1 and "1 failed" in out
    code, out, _ = pair("search", uri, "a red photo", "--k", "3", "--json")
    hits = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [h["rank"] for h in hits] == [1, 2, 3]
    sheet = tmp_path / "sheet.png"
    code, out, _ = pair("search", uri, "--image", str(photos[0]), "--sheet", str(sheet))
    assert code == 0 and "rank" in out and "…" not in out and Image.open(sheet).width > 500
    code, out, _ = pair("index", "info", uri, "--json")
    facts = json.loads(out)
    assert facts["rows"] == 12 and facts["fields"] == {"year": "int"}
    assert "exact (approximate from" in pair("index", "info", uri)[1]
    code, out, _ = pair("index", "optimise", uri)
    assert code == 0 and "; rows: 12, " in out
    assert out.endswith("; search: exact (approximate from 50,000 rows on)\n")
    assert pair("index", "remove", uri, "--path", str(photos[0]))[1] == "1 removed\n"
    (tmp_path / "no pictures").mkdir()
    for wrong in (
        ["search", uri],
        ["search", uri, "x", "--image", "y"],
        ["search", uri, "x", "--where", "name = 3"],
        ["search", uri, "x", "--defend", "all"],
        ["search", uri, "x", "--using", "code"],
        ["search", uri, "x", "--sheet", "s.gif"],
        ["search", uri, "--image", str(tmp_path / "photos" / "bad.png")],
        ["search", uri, "--image", str(tmp_path / "none.png")],
        ["search", str(tmp_path / "none"), "x"],
        ["index", "add", uri, folder, "--part", "3"],
        ["index", "add", uri, str(tmp_path / "nowhere")],
        ["index", "add", uri, str(tmp_path / "no pictures")],
        ["index", "remove", uri],
        ["index", "create", str(tmp_path / "d"), *options, "--field", "id:str"],
        ["index", "create", str(tmp_path / "d"), *options, "--field", "a:date"],
    ):
        code, _, err = pair(*wrong)
        assert code == 2 and "Traceback" not in err and err.startswith("pair: "), wrong
