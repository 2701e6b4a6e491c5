"""Splits: disjoint, deterministic, faces and background never labelled."""

import shutil
from collections import Counter

from pair.data import splits
from pair.data.splits import BACKGROUND, FACES, caltech101, class_name, flickr8k, imagenette


def by_split(photos):
    out = {}
    for photo in photos:
        out.setdefault(photo.split, set()).add(photo.path)
    return out


def test_every_photo_has_exactly_one_split(photo_root):
    for name, read in splits.DATASETS.items():
        photos = list(read(photo_root / name))
        files = {p for p in (photo_root / name).rglob("*") if p.is_file()}
        assert Counter(p.path for p in photos) == Counter(files)  # all, none twice
        assert {p.dataset for p in photos} == {name}
        groups = list(by_split(photos).values())
        assert sum(len(g) for g in groups) == len(set().union(*groups))


def test_splits_do_not_depend_on_order_place_or_run(photo_root, tmp_path):
    first = list(caltech101(photo_root / "caltech101"))
    assert first == list(caltech101(photo_root / "caltech101"))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in reversed(sorted((photo_root / "caltech101").rglob("*.jpg"))):
        target = moved / path.relative_to(photo_root / "caltech101")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"")
    again = list(caltech101(moved))
    assert [(p.path.relative_to(moved), p.split) for p in again] == [
        (p.path.relative_to(photo_root / "caltech101"), p.split) for p in first
    ]


def test_a_photo_keeps_its_split_across_versions(tmp_path):
    """The draw is part of the data: the shipped models were trained by it."""
    (tmp_path / "anchor").mkdir()
    for i in range(20):
        (tmp_path / "anchor" / f"image_{i:04d}.jpg").write_bytes(b"")
    train = [int(p.path.stem[-4:]) for p in caltech101(tmp_path) if p.split == "train"]
    assert train == [17, 9, 4, 12]


def test_caltech_counts(photo_root):
    photos = list(caltech101(photo_root / "caltech101"))
    counts = Counter((p.path.parent.name, p.split) for p in photos)
    assert counts == {
        ("anchor", "gallery"): 16,  # 20 photos: no queries
        ("anchor", "train"): 4,
        ("bonsai", "gallery"): 16,  # 62 photos: queries too
        ("bonsai", "query"): 8,
        ("bonsai", "train"): 38,
        ("Faces", "train"): 3,
        ("Faces_easy", "train"): 2,
        (BACKGROUND, "ads"): 68,
        (BACKGROUND, "train"): 2,
    }


def test_faces_and_background_are_never_labelled(photo_root):
    for photo in caltech101(photo_root / "caltech101"):
        folder = photo.path.parent.name
        assert (photo.label == "") == (folder == BACKGROUND or folder in FACES)
        if photo.label == "":
            assert photo.split not in ("gallery", "query")


def test_imagenette_keeps_its_own_split(photo_root):
    photos = list(imagenette(photo_root / "imagenette"))
    assert all(p.path.parent.parent.name == p.split for p in photos)
    assert Counter(p.split for p in photos) == {"train": 40, "val": 30}
    assert {p.label for p in photos} == {n.lower() for n in splits.IMAGENETTE.values()}


def test_flickr_is_unlabelled_and_holds_out_a_hundred(photo_root):
    photos = list(flickr8k(photo_root / "flickr8k"))
    assert {p.label for p in photos} == {""}
    assert Counter(p.split for p in photos) == {"val": 100, "train": 2}


def test_class_names():
    assert class_name("grand_piano") == "grand piano"
    assert class_name("Leopards") == "leopard"


def test_only_photos_are_listed(photo_root, tmp_path):
    folder = tmp_path / "anchor"
    folder.mkdir()
    for name in ("a.jpg", "b.PNG", "c.webp", "notes.txt", ".DS_Store", "d.mat"):
        (folder / name).write_bytes(b"")
    (tmp_path / "README.md").write_text("not a class")
    assert {p.path.name for p in caltech101(tmp_path)} == {"a.jpg", "b.PNG", "c.webp"}


def test_embedding_deletes_nothing_but_what_it_wrote(photo_root, tmp_path, pair):
    given = tmp_path / "data" / "caltech101"
    shutil.copytree(photo_root / "caltech101", given)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    embed = ("data", "embed", "--caltech101", given, "--out")
    before = sorted(tmp_path.rglob("*"))
    for place, said in (
        (out, "is not empty and has no splits.json"),
        (out / "mine", "is no folder"),
        (given, "holds the photos of Caltech-101 themselves"),
        (given.parent, "holds the photos of Caltech-101 themselves"),
    ):
        code, _, err = pair(*embed, place)
        assert code == 2 and said in err
    assert sorted(tmp_path.rglob("*")) == before
    (out / "mine").unlink()
    assert pair(*embed, out)[0] == 0
    (out / "bonsai" / "image_0000.jpg").unlink(missing_ok=True)
    assert pair(*embed, out)[0] == 0  # its own folder is written anew
    assert (out / "splits.json").is_file() and sorted(tmp_path.iterdir()) == [given.parent, out]
