"""Data of your own: the layouts that the scale ``paper`` reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pair.bench import runner
from pair.bench.scenario import Settings
from pair.bench.world import hash_world, text_world
from pair.images import save_image

from .conftest import bench_at


def photo(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(path, torch.rand(3, 40, 36, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def captions(tmp_path):
    root = tmp_path / "captions"
    for i in range(12):
        photo(root / "images" / f"{i}.jpg", i)
    for i in range(3):
        photo(root / "ads" / f"ad{i}.jpg", 50 + i)
    test = ["image,caption"]
    for i in range(12):
        test += [f"{i}.jpg,a {'cow' if i % 4 == 0 else 'dog'} stands ."]
        test += [f'{i}.jpg,"one animal, number {i}"']
    (root / "test.csv").write_text("\n".join(test) + "\n")
    train = ["image,caption", "x.jpg,the cow eats .", "y.jpg,many cows .", "z.jpg,a bird ."]
    (root / "train.csv").write_text("\n".join(train) + "\n")
    return root


def test_captions(captions):
    s = Settings(source="captions", data=str(captions), image_size=32, ads=2, keywords=("cow",))
    world = text_world(s)
    assert len(world.files) == 12 and len(world.queries) == 24 and world.ads.shape[0] == 2
    assert world.relevant.sum(1).tolist() == [1] * 24  # a caption's own image
    assert world.relevant[3].nonzero().item() == 1
    assert world.rows("cow") == [0, 8, 16]
    assert sorted(world.targets["cow"]) == ["many cows .", "the cow eats ."]
    with pytest.raises(ValueError, match="no query"):
        world.rows("horse")


def test_a_table_runs_on_captions(captions, scenario_file, tmp_path):
    bench = bench_at(
        scenario_file, tmp_path / "run", source="captions", data=str(captions), relevant="recall",
        keywords=("cow",), steps=1, static_steps=1, ads=2,
    )  # fmt: skip
    outcome = runner.run(bench, only="PAIR")
    assert outcome.failed == [] and outcome.done == 2
    cell = next(c for c in bench.cells() if c.row.label == "PAIR" and c.mode == "adaptive")
    after = bench.store.read(bench.key(cell))["result"]["attacks"]["gradient"]["after"]
    assert [len(ranks) for ranks in after[0]] == [1, 1, 1]


@pytest.mark.parametrize("missing", ["ads", "train.csv"])
def test_incomplete_folders_are_named(captions, missing):
    (captions / missing).rename(captions / "elsewhere")
    s = Settings(source="captions", data=str(captions))
    with pytest.raises(ValueError, match=f"has no {missing}"):
        text_world(s)


def test_classes(tmp_path):
    for part, count in (("database", 3), ("query", 2), ("train", 4)):
        for label in ("fish", "bird"):
            for i in range(count):
                photo(tmp_path / part / label / f"{i}.png", i)
    s = Settings(source="classes", data=str(tmp_path), image_size=32)
    world = hash_world(s)
    assert sorted(set(world.labels)) == ["bird", "fish"] and len(world.files) == 6
    assert len(world.of("fish")) == 2 and len(world.pool["bird"]) == 4
    assert world.same(["fish"])[0].sum() == 3
    with pytest.raises(ValueError, match="--data FOLDER"):
        hash_world(replace(s, data=""))
    with pytest.raises(ValueError, match="use 'captions'"):
        text_world(s)
