"""Data sets: every miniature in its genuine layout, by every protocol; splits; index; decoding."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from pair import cli
from pair.data import sets
from pair.data.photos import Photos, batches, broken, read_bytes
from pair.data.sets import lists
from pair.data.sets.base import Dataset, read_index, seeded_split
from pair.data.sets.imagenet100 import CLASSES
from pair.images import load_image, resize_crop

# miniature, data set, protocol, counts
ROWS = [
    ("coco2014", "coco2014", "paper", {"photos": 60, "train": 24, "captions": 300}),
    ("coco2014", "coco2014", "karpathy", {"train": 24, "restval": 12, "val": 12, "test": 12}),
    ("coco2014", "coco2014", "karpathy1k", {"test-0": 12, "test": 12}),
    ("coco2014", "coco2014", "leakfree", {"photos": 50, "classes": 4}),
    ("coco2014", "coco2014", "hashnet", {"photos": 50, "classes": 4}),
    ("flickr30k", "flickr30k", "paper", {"photos": 20, "captions": 100}),
    ("flickr30k", "flickr30k", "karpathy", {"photos": 18, "train": 10, "val": 4, "test": 4}),
    ("flickr30k-kaggle", "flickr30k", "paper", {"photos": 20, "captions": 100}),
    ("flickr30k-hub", "flickr30k", "paper", {"photos": 20, "captions": 100}),
    ("imagenet100", "imagenet100", "hashnet", {"train": 100, "query": 100, "database": 300}),
    ("caltech101", "caltech101", "shipped", {"ads": 68, "gallery": 48, "query": 16}),
    ("imagenette", "imagenette", "own", {"train": 40, "val": 20, "classes": 10}),
    ("folder", "folder", "plain", {"photos": 24, "train": 23, "val": 1, "captions": 48}),
    ("classes", "folder", "classes", {"photos": 30, "query": 5, "gallery": 5, "classes": 5}),
    ("webdataset", "webdataset", "plain", {"train": 16, "val": 6, "captions": 22}),
    ("huggingface", "huggingface", "plain", {"train": 12, "val": 6, "captions": 18, "classes": 5}),
]


def pair(*arguments, capsys) -> tuple[int, str, str]:
    before, cli.sys.argv = cli.sys.argv, ["pair", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        cli.sys.argv = before
    told = capsys.readouterr()
    return stopped.value.code or 0, told.out, told.err


@pytest.mark.parametrize(("folder", "name", "protocol", "counts"), ROWS)
def test_every_miniature_prepares_checks_and_counts(
    folder, name, protocol, counts, miniatures, tmp_path, capsys
):
    root = miniatures / folder
    if not root.is_dir():
        pytest.skip("needs the library datasets")
    found = sets.source(name).read(root, protocol, 0)
    assert found.counts() == {**found.counts(), **counts}
    arguments = (name, "--root", root, "--protocol", protocol)
    code, out, err = pair("data", "prepare", *arguments, "--out", tmp_path, capsys=capsys)
    assert code == 0, err
    index = tmp_path / f"{name}.{protocol}.jsonl"
    assert f"wrote {index}" in out.replace("\n", "") and f"protocol {protocol}:" in out
    again = sets.load(name, index, protocol)
    assert again.records == found.records and again.fingerprint() == found.fingerprint()
    assert again.views == found.views and again.notes == found.notes
    code, out, err = pair("data", "check", *arguments, capsys=capsys)
    assert (code, err) == (0, "") and f"all {len(found)} photos can be decoded" in out
    for record in found.records[:3]:  # the bytes of the right photo, also out of shards
        assert load_image(read_bytes(record)).shape == (3, 60, 72)


def test_every_protocol_is_tested():
    assert {(name, protocol) for _, name, protocol, _ in ROWS} >= {
        (s.name, p) for s in sets.SOURCES.values() for p in s.protocols if s.name != "folder"
    }


def test_captions_and_labels_belong_to_their_photo(miniatures, miniature_script):
    """The colour that a caption names is the one in the photo, in all layouts."""
    colours = {k: torch.tensor(v) / 255 for k, v in miniature_script.COLOURS.items()}
    folders = ["coco2014", "flickr30k", "flickr30k-kaggle", "flickr30k-hub", "folder"]
    for folder in [*folders, "webdataset"]:
        name = folder.partition("-")[0]
        for record in sets.load(name, miniatures / folder).records[:12]:
            mean = load_image(read_bytes(record)).mean((1, 2))
            nearest = min(colours, key=lambda k: float((0.7 * colours[k] + 0.15 - mean).norm()))
            for caption in record.captions:
                assert nearest in caption, (folder, record.id)


def test_the_three_layouts_of_flickr30k_are_one_data_set(miniatures):
    found = [sets.load("flickr30k", miniatures / f"flickr30k{s}") for s in ("", "-kaggle", "-hub")]
    assert len({d.fingerprint() for d in found}) == 1


def test_splits_are_those_of_the_paper_at_full_size():
    ids = [f"{i}" for i in range(31_783)]
    sizes = {"train": 21_783, "val": 5_000, "test": 5_000}
    first, again, other = (seeded_split(ids, sizes, s, "flickr30k") for s in (0, 0, 1))
    assert {k: list(first.values()).count(k) for k in sizes} == sizes
    assert first == again and first != other
    assert seeded_split(reversed(ids), sizes, 0, "flickr30k") == first  # order does not matter
    small = seeded_split(ids[:100], sizes, 0, "flickr30k")
    assert {k: list(small.values()).count(k) for k in sizes} == {"train": 70, "val": 15, "test": 15}


def test_published_counts_add_up():
    """What the tables of the literature say, against each other."""
    p = {s.name: s.published for s in sets.SOURCES.values()}
    assert p["coco2014"]["paper"]["train"] + p["flickr30k"]["paper"]["train"] == 104_566
    leakfree, hashnet = p["coco2014"]["leakfree"], p["coco2014"]["hashnet"]
    assert leakfree["database"] == leakfree["photos"] - leakfree["query"]
    assert hashnet["database"] == hashnet["photos"] - hashnet["train"]
    assert p["imagenet100"]["hashnet"]["train"] == 130 * len(CLASSES) == 13_000


def test_leakfree_and_hashnet_differ_as_they_say(miniatures):
    for protocol, leak in (("leakfree", False), ("hashnet", True)):
        found = sets.load("coco2014", miniatures / "coco2014", protocol)
        query, train, database = (
            {r.id for r in found.part(p)} for p in ("query", "train", "database")
        )
        assert (query <= database) is leak and (train <= database) is not leak
        assert not query & train and bool(found.notes) is leak


def test_list_files_round_trip_and_decide(miniatures, miniature_script, tmp_path):
    """Our lists, put where a user puts HashNet's, give back the same parts."""
    miniature_script.coco2014(tmp_path)
    first = sets.load("coco2014", tmp_path, "leakfree")
    lists.write(first, tmp_path / "lists")
    line = (tmp_path / "lists" / "test.txt").read_text().splitlines()[0].split()
    assert len(line) == 1 + 4 and line[0].startswith(("train2014/", "val2014/"))
    again = sets.load("coco2014", tmp_path, "leakfree", seed=5)  # the seed no longer matters
    for part in ("train", "query", "database"):
        assert {r.id for r in again.part(part)} == {r.id for r in first.part(part)}


def test_the_hundred_classes():
    assert len(set(CLASSES)) == 100 and list(CLASSES) == sorted(CLASSES)
    assert CLASSES[0] == "n01514668" and CLASSES[42] == "n02655020" and CLASSES[99] == "n13044778"


def test_imagenet_validation_by_folders_and_by_the_other_lists(miniature_script, tmp_path):
    miniature_script.imagenet100(tmp_path, train=2)
    wanted = sets.load("imagenet100", tmp_path).fingerprint()
    solution = tmp_path / "LOC_val_solution.csv"
    rows = {r["ImageId"]: r["PredictionString"].split()[0]
            for r in csv.DictReader(solution.read_text().splitlines())}  # fmt: skip
    solution.unlink()
    kit = tmp_path / "data"
    kit.mkdir()
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 50_001)]
    labels = [rows.get(n, "n01440764") for n in names]
    (kit / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(labels) + "\n")
    assert sets.load("imagenet100", tmp_path).fingerprint() == wanted
    (kit / "imagenet_2012_validation_synset_labels.txt").unlink()
    scipy = pytest.importorskip("scipy.io")
    numbers = {wnid: i for i, wnid in enumerate(sorted(set(labels)), 1)}
    synsets = torch.zeros(0).numpy()
    import numpy as np

    synsets = np.array(
        [(i, w) for w, i in numbers.items()], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")]
    )
    scipy.savemat(kit / "meta.mat", {"synsets": synsets})
    truth = "\n".join(str(numbers[w]) for w in labels) + "\n"
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    assert sets.load("imagenet100", tmp_path).fingerprint() == wanted
    for path in sorted((tmp_path / "val").glob("*.JPEG")):
        (tmp_path / "val" / rows[path.stem]).mkdir(exist_ok=True)
        os.replace(path, tmp_path / "val" / rows[path.stem] / path.name)
    assert sets.load("imagenet100", tmp_path).fingerprint() == wanted


# --- decoding ---------------------------------------------------------------------------------


def expected(record, side: int) -> torch.Tensor:
    image = resize_crop(load_image(read_bytes(record))[None], side)[0]
    return image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0)


def test_photos_are_decoded_alike_in_and_out_of_workers(miniatures):
    found = [sets.load("webdataset", miniatures / "webdataset"),
             sets.load("imagenette", miniatures / "imagenette")]  # fmt: skip
    here, there = Photos(found, 24), Photos(found, 24, workers=1)
    rows = torch.tensor([5, 40, 0, 77])
    there.prefetch(rows)
    raw = here.raw(rows)
    assert raw.shape == (4, 24, 24, 3) and raw.dtype == torch.uint8
    for row, image in zip(rows.tolist(), raw, strict=True):
        assert torch.equal(image, expected(here.records[row], 24))
    assert torch.equal(there.raw(rows), raw)
    assert torch.equal(there.raw(rows.flip(0)), raw.flip(0))  # not asked for before
    assert here.fingerprint() == there.fingerprint() != Photos(found[:1], 24).fingerprint()
    whole = torch.cat(list(batches(here.records[:10], 24, batch=4, workers=1)))
    assert torch.equal(whole, here.batch(torch.arange(10), 24))
    there.close()


def test_a_worker_carries_no_data_set(miniatures):
    """What is sent to a worker does not grow with the number of records."""
    import pickle

    one = sets.load("imagenette", miniatures / "imagenette")
    many = Dataset(one.name, one.protocol, one.root, 0, one.records * 50)
    sizes = {len(pickle.dumps(Photos([d], 24)._jobs(torch.arange(8)))) for d in (one, many)}
    assert len(sizes) == 1 and sizes.pop() < 8 * 300


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_workers_die_with_a_parent_that_is_killed(miniatures):
    script = f"""
import os, signal, torch
from pair.data import sets
from pair.data.photos import Photos
if __name__ == "__main__":
    photos = Photos([sets.load("imagenette", {str(miniatures / "imagenette")!r})], 16, workers=1)
    photos.raw(torch.arange(2))
    print(*photos._decoder._pool._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = miniatures / "orphans.py"
    path.write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # The pipe would be held open by an orphan: wait for the process alone.
    with open(miniatures / "orphans.txt", "w+") as out:
        process = subprocess.Popen([sys.executable, path], stdout=out, env=environment)
        assert process.wait(timeout=300) == -signal.SIGKILL
        out.seek(0)
        (worker,) = map(int, out.read().split())
    for _ in range(300):
        if not running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlives its parent")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_broken_photos_are_all_named(tmp_path):
    for i in range(4):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:200])
    told = broken(sets.load("folder", tmp_path).records)
    assert len(told) == 1 and "2.jpg" in told[0] and "\n" not in told[0]


def test_parts_are_named_when_one_is_missing(miniatures):
    found = sets.load("imagenette", miniatures / "imagenette")
    with pytest.raises(ValueError, match="has no part 'test': it has train, val"):
        found.part("test")


def test_an_index_follows_photos_that_have_moved(miniature_script, tmp_path):
    miniature_script.folder(tmp_path / "a")
    sets.prepare("folder", tmp_path / "a")
    os.replace(tmp_path / "a", tmp_path / "b")
    found = sets.load("folder", tmp_path / "b")
    assert found.records[0].path.is_file()
    with pytest.raises(ValueError, match="no index"):
        read_index(Path("nowhere.jsonl"))


def test_captions_as_json_lines(tmp_path):
    for i in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{i}.png")
    rows = [{"file_name": "0.png", "text": "one"}, {"image": "1.png", "captions": ["two", "three"]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = {r.id: r.captions for r in sets.load("folder", tmp_path).records}
    assert found == {"0": ("one",), "1": ("two", "three"), "2": ()}


def test_shards_without_captions_or_split_names(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i in range(30):
            member = tarfile.TarInfo(f"some/where/{i}.seg.png" if i == 7 else f"{i:03d}.png")
            member.size = len(picture.getvalue())
            tar.addfile(member, io.BytesIO(picture.getvalue()))
        member = tarfile.TarInfo("007.json")
        tar.addfile(member, io.BytesIO(b""))
    with pytest.raises(ValueError, match=r"007\.json is not JSON"):
        sets.load("webdataset", tmp_path)
