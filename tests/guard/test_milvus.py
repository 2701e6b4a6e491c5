"""The same collection in Milvus (here: Milvus Lite, a file)."""

from __future__ import annotations

import json
import os
import secrets
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from collections_tiny import draw, save_models

from pair.guard import filters
from pair.guard.collection import Collection
from pair.guard.models import Models
from pair.guard.stores import Row

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def server() -> str | None:
    """A place whose Milvus has vectors of bits: a server, or Milvus Lite 2 here."""
    if address := os.environ.get("PAIR_TEST_MILVUS"):
        return f"{address}#pair_{secrets.token_hex(4)}"
    return "m.db" if version("milvus-lite").startswith("2.") else None


@pytest.mark.skipif(server() is None, reason="Milvus Lite 3 has no vectors of bits")
def test_codes_are_vectors_of_bits(tmp_path, names, monkeypatch):
    """Native Hamming: exact, against the bits themselves; again with the server's index."""
    monkeypatch.chdir(tmp_path)
    place = server()
    assert place is not None
    models = Models.load(None, names["hasher"], None)
    made = Collection.create(place, models, approximate_from=256)
    assert made.store.binary and made.record["binary"]  # type: ignore[attr-defined]
    codes = np.random.default_rng(0).integers(0, 256, (300, 2), dtype=np.uint8)
    made.add_rows(
        [Row(f"{i:032x}", f"{i}.jpg", f"{i:064x}", code_raw=code) for i, code in enumerate(codes)]
    )
    stored = {r.uri: r.code_raw for part in made.store.rows(["code_raw"]) for r in part}
    assert all(np.array_equal(stored[f"{i}.jpg"], code) for i, code in enumerate(codes))
    bits = np.unpackbits(codes, axis=1)
    for query in codes[:5]:
        far = np.sort((bits != np.unpackbits(query)).sum(1))[:10]
        for exact in (True, False):
            found = made.store.nearest("code_raw", query, 10, exact=exact)
            assert np.allclose([s for _, s in found], 1 - 2 * far / 16), exact
    assert Collection.open(place, models).record == made.record
    assert made.remove(uris=["3.jpg"]) == 1 and len(made) == 299


@pytest.mark.skipif(version("milvus-lite").startswith("2."), reason="no declared fields there")
def test_the_same_answers_as_lancedb(tmp_path, names):
    pytest.importorskip("lancedb")
    photos = [draw(tmp_path / "p" / f"{i:02d}.png", i) for i in range(8)]
    (tmp_path / "p.jsonl").write_text(
        "".join(
            json.dumps({"path": str(p), "n": i, "odd": bool(i % 2), "name": f'it\'s "{i}"'}) + "\n"
            for i, p in enumerate(photos)
        )
    )
    models = Models.load(**names)
    fields = {"n": "int", "odd": "bool", "name": "str"}
    made = {
        kind: Collection.create(str(tmp_path / uri), models, fields=fields, seed=1)
        for kind, uri in (("milvus", "m.db"), ("lance", "l"))
    }
    for collection in made.values():
        assert collection.add(tmp_path / "p.jsonl", batch_size=3, commit_rows=3).added == 8
        again = collection.add(tmp_path / "p.jsonl", tmp_path / "p")
        assert (again.added, again.present + again.repeated) == (0, 16)
    for options in (
        {"text": "a red photo"},
        {"text": "a red photo", "where": "n >= 3 and not odd = true"},
        {"text": "a red photo", "where": "name = 'it''s \"4\"' or n in (1, 2)", "defend": "none"},
        {"image": photos[2], "defend": "none"},
        {"image": photos[2], "using": "code", "defend": "gallery"},
    ):
        answers = {}
        for kind, collection in made.items():
            call = collection.search_text if "text" in options else collection.search_image
            first = options.get("text") or options.get("image")
            rest = {k: v for k, v in options.items() if k not in ("text", "image")}
            answers[kind] = call(first, 8, **rest)
        one, two = answers["milvus"], answers["lance"]
        assert len(one) == len(two) > 0
        assert np.allclose([h.score for h in one], [h.score for h in two], atol=1e-5), options
        assert {h.id for h in one} == {h.id for h in two}
        assert {h.id: h.metadata for h in one} == {h.id: h.metadata for h in two}
    columns = ("vector", "vector_raw", "code", "code_raw")
    stored = {
        kind: {r.id: r for part in c.store.rows(columns) for r in part} for kind, c in made.items()
    }
    for key, row in stored["milvus"].items():
        other = stored["lance"][key]
        assert (row.uri, row.sha256, row.seed, row.purifier) == (
            other.uri, other.sha256, other.seed, other.purifier
        )  # fmt: skip
        for column in columns:
            assert np.allclose(getattr(row, column), getattr(other, column), atol=1e-6), column
    milvus = made["milvus"]
    info = milvus.info()
    assert (info.rows, info.kind, info.indexes) == (8, "Milvus", {}) and info.bytes > 0
    assert milvus.store.sample("vector", 3).shape == (3, 16)
    assert milvus.remove(where="n < 3") == 3 and milvus.remove(uris=[str(photos[5])]) == 1
    assert len(milvus) == 4
    with pytest.raises(ValueError, match="already"):
        Collection.create(str(tmp_path / "m.db"), models)
    with pytest.raises(ValueError, match="no collection"):
        Collection.open(str(tmp_path / "m.db#other"))
    opened = Collection.open(str(tmp_path / "m.db"))
    assert opened.record["models"] == milvus.record["models"]
    other = save_models(tmp_path / "others", seed=1)
    with pytest.raises(ValueError, match="another encoder"):
        Collection.open(
            str(tmp_path / "m.db"), Models.load(**{**names, "encoder": other["encoder"]})
        )


def test_pages_of_rows_hold_every_row_once(tmp_path, names):
    made = Collection.create(str(tmp_path / "m.db"), Models.load(names["encoder"], None, None))
    vectors = np.eye(16, dtype=np.float32)
    rows = [
        Row(f"{i:032x}", f"{i}.jpg", f"{i:064x}", vector_raw=vectors[i % 16]) for i in range(50)
    ]
    assert made.add_rows(rows, commit_rows=20) == 50 and made.add_rows(rows[10:20]) == 0
    pages = list(made.store.rows(batch=7))
    assert max(map(len, pages)) <= 7 and sorted(r.id for p in pages for r in p) == [
        r.id for r in rows
    ]


@pytest.mark.skipif(not version("milvus-lite").startswith("2."), reason="Milvus Lite 3 has them")
def test_declared_fields_need_more_than_milvus_lite_two(tmp_path, names):
    models = Models.load(names["encoder"], None, None)
    with pytest.raises(ValueError, match="Milvus Lite 2 has no declared fields"):
        Collection.create(str(tmp_path / "m.db"), models, fields={"n": "int"})


def test_places_that_are_not_there(tmp_path, names):
    with pytest.raises(ValueError, match="no collection"):
        Collection.open(str(tmp_path / "none.db"))
    models = Models.load(names["encoder"], None, None)
    with pytest.raises(ValueError, match="no folder"):
        Collection.create(str(tmp_path / "no" / "where.db"), models)
    assert Path(tmp_path / "no").exists() is False


def test_filters_for_milvus():
    fields = {"a": "str", "n": "int"}
    where = filters.parse("a = 'x\"y' and not (n in (1, 2) or n >= 3)", fields)
    assert filters.to_milvus(where) == '((a == "x\\"y") and (not ((n in [1, 2]) or (n >= 3))))'
