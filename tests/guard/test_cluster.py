"""The Ray engine: the same rows as the local one, and going on where it was."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
from collections_tiny import draw, save_models

from pair.guard import cluster
from pair.guard.collection import Collection
from pair.guard.models import Models


def test_units_cover_everything_once(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.tar").write_bytes(b"")
    (tmp_path / "f").mkdir()
    made = cluster.units([tmp_path / "{0..2}.tar", tmp_path / "f"], 2)
    assert [(u["paths"], u["number"], u["of"]) for u in made] == [
        *(([str(tmp_path / f"{i}.tar")], 1, 1) for i in range(3)),
        ([str(tmp_path / "f")], 1, 2),
        ([str(tmp_path / "f")], 2, 2),
    ]
    with pytest.raises(ValueError, match="no such file"):
        cluster.units([tmp_path / "none"], 2)


@pytest.mark.slow
def test_the_same_rows_as_the_local_engine(tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("lancedb")
    names = save_models(tmp_path / "models")
    models = Models.load(**names)
    for i in range(12):
        draw(tmp_path / "p" / f"{i:02d}.png", i)
    (tmp_path / "p" / "bad.png").write_text("no")
    made = {}
    try:
        for engine in ("local", "ray"):
            made[engine] = Collection.create(str(tmp_path / engine), models, seed=4)
            add = made[engine].add if engine == "local" else None
            told: list[str] = []
            options = {"committed": lambda rows, told=told: told.extend(r.id for r in rows)}
            if add is not None:
                report = add(tmp_path / "p", **options)
            else:
                report = cluster.add_with_ray(made[engine], [tmp_path / "p"], workers=2, **options)
            assert (report.seen, report.added, report.failed) == (13, 12, 1), engine
            assert len(told) == len(set(told)) == 12 and "bad.png" in report.failures.read_text()
        again = cluster.add_with_ray(made["ray"], [tmp_path / "p"], workers=2)
        assert (again.added, again.present) == (0, 12)
    finally:
        ray.shutdown()
    rows = {
        engine: {r.id: r for part in c.store.rows(("vector", "vector_raw")) for r in part}
        for engine, c in made.items()
    }
    assert rows["local"].keys() == rows["ray"].keys()
    for key, row in rows["local"].items():
        assert np.allclose(row.vector, rows["ray"][key].vector, atol=1e-5)
        assert np.allclose(row.vector_raw, rows["ray"][key].vector_raw, atol=1e-5)
        assert row.uri == rows["ray"][key].uri


@pytest.mark.slow
def test_failures_of_ray_are_one_sentence(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("lancedb")
    names = save_models(tmp_path / "models")
    draw(tmp_path / "p" / "0.png", 0)
    made = Collection.create(str(tmp_path / "c"), Models.load(**names))
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody is there
        begin = time.monotonic()
        with pytest.raises(OSError, match="Ray could not start: nobody answers") as told:
            cluster.add_with_ray(made, [tmp_path / "p"], workers=1)
        assert "\n" not in str(told.value) and time.monotonic() - begin < 60
    shutil.rmtree(tmp_path / "models" / "encoder")  # workers cannot load it any more
    try:
        with pytest.raises((OSError, ValueError), match="Ray could not finish: ") as told:
            cluster.add_with_ray(made, [tmp_path / "p"], workers=1)
        assert "encoder" in str(told.value) and "\n" not in str(told.value)
    finally:
        ray.shutdown()
    assert len(made) == 0
