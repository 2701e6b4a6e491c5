"""COCO 2014: captions for text search, instances for hashing.

Layout as published: ``train2014/``, ``val2014/`` (or below ``images/``), ``annotations/``; for the
Karpathy splits also ``dataset_coco.json``.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from pair.data.sets import lists
from pair.data.sets.base import (
    Dataset,
    Record,
    Source,
    all_present,
    need,
    read_json,
    seeded_split,
    verify,
)

TITLE = "COCO 2014"
PHOTOS = "it is in {}2014.zip from https://cocodataset.org/#download"
NOTES = "it is in annotations_trainval2014.zip from https://cocodataset.org/#download"
KARPATHY = (
    "it is in caption_datasets.zip from "
    "https://cs.stanford.edu/people/karpathy/deepimagesent/ (Kaggle has copies)"
)
HELD_OUT = {"rest": 30_504, "val": 5_000, "test": 5_000}
HASHING = {"gallery": 107_218, "query": 5_000, "train": 10_000}


def _folder(root: Path, side: str) -> Path:
    places = [f"{side}2014", f"images/{side}2014"]
    return need(root, places, TITLE, PHOTOS.format(side))


def _annotations(root: Path, kind: str, side: str) -> dict[str, Any]:
    name = f"{kind}_{side}2014.json"
    path = need(root, [f"annotations/{name}", name], TITLE, NOTES)
    content = read_json(path)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{path} has no 'images' and 'annotations': it is no COCO file")
    return content


def _side(root: Path, kind: str, side: str) -> tuple[dict[int, str], dict[int, list[Any]], Any]:
    """File names and annotations by image id, and the categories, of one half of the data."""
    content = _annotations(root, kind, side)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    if len(names) < len(content["images"]):
        raise ValueError(f"{kind}_{side}2014.json lists an image id twice")
    found: dict[int, list[Any]] = defaultdict(list)
    for entry in content["annotations"]:
        if entry["image_id"] not in names:
            raise ValueError(
                f"{kind}_{side}2014.json annotates image {entry['image_id']}, which it does not "
                "list: fetch the file again"
            )
        found[entry["image_id"]].append(entry)
    all_present(names.values(), _folder(root, side), TITLE, PHOTOS.format(side))
    return names, found, content.get("categories", [])


def _captioned(root: Path, seed: int) -> list[Record]:
    """train2014 trains; 5,000 seeded photos of val2014 test, 5,000 validate."""
    out = []
    for side in ("train", "val"):
        names, found, _ = _side(root, "captions", side)
        folder = _folder(root, side)
        bare = [n for i, n in names.items() if not found[i]]
        if bare:
            raise ValueError(f"{TITLE}: {bare[0]} has no caption")
        stems = {i: Path(n).stem for i, n in names.items()}
        splits = {}
        if side == "val":
            splits = seeded_split(stems.values(), HELD_OUT, seed, "coco2014")
        for i, name in names.items():
            said = tuple(" ".join(e["caption"].split()) for e in found[i])
            split = splits.get(stems[i], "train")
            out.append(Record(stems[i], folder / name, said, (), split))
    return out


def _karpathy(root: Path, folds: bool) -> list[Record]:
    places = ["dataset_coco.json", "annotations/dataset_coco.json", "karpathy/dataset_coco.json"]
    path = need(root, places, TITLE, KARPATHY)
    out, wanted, tests = [], defaultdict(list), 0
    for image in karpathy_images(path):
        side = image["filepath"].removesuffix("2014")
        wanted[side].append(image["filename"])
        split = image["split"]
        if folds and split == "test":
            split, tests = f"test-{tests // 1000}", tests + 1
        said = tuple(" ".join(s["raw"].split()) for s in image["sentences"])
        place = _folder(root, side) / image["filename"]
        out.append(Record(Path(image["filename"]).stem, place, said, (), split))
    for side, names in wanted.items():
        all_present(names, _folder(root, side), TITLE, PHOTOS.format(side))
    return out


def karpathy_images(path: Path) -> list[dict[str, Any]]:
    """The entries of a Karpathy file, checked for what is used of them."""
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not images or not {"filename", "split", "sentences"} <= images[0].keys():
        raise ValueError(f"{path} has no images with filename, split and sentences")
    return images


def _labelled(root: Path, seed: int) -> list[Record]:
    """All photos with at least one of the 80 labels; queries and training photos drawn."""
    out = []
    for side in ("train", "val"):
        names, found, categories = _side(root, "instances", side)
        title = {c["id"]: c["name"] for c in categories}
        folder = _folder(root, side)
        for i, name in names.items():
            unknown = {e["category_id"] for e in found[i]} - title.keys()
            if unknown:
                raise ValueError(f"{TITLE}: {name} has the unknown category {unknown.pop()}")
            labels = tuple(sorted({title[e["category_id"]] for e in found[i]}))
            if labels:
                out.append(Record(Path(name).stem, folder / name, (), labels))
    splits = seeded_split([r.id for r in out], HASHING, seed, "coco2014/hashing")
    return [Record(r.id, r.path, (), r.labels, splits[r.id]) for r in out]


def read(root: Path, protocol: str, seed: int) -> Dataset:
    views: dict[str, tuple[str, ...]] = {}
    notes: tuple[str, ...] = ()
    if protocol in ("leakfree", "hashnet"):
        records = _labelled(root, seed)
        if given := lists.find(root):
            records = lists.apply(given, records, TITLE)
        if protocol == "leakfree":
            views = {"database": ("gallery", "train")}
        else:
            views = {"database": ("gallery", "query")}
            notes = ("HashNet's database holds the queries themselves: every query finds itself",)
    elif protocol == "paper":
        records = _captioned(root, seed)
    else:
        records = _karpathy(root, protocol == "karpathy1k")
        if protocol == "karpathy1k":
            folds = sorted({r.split for r in records if r.split.startswith("test-")})
            views = {"test": tuple(folds)}
    return verify(Dataset("coco2014", protocol, root, seed, tuple(records), views, notes))


SOURCE = Source(
    "coco2014",
    TITLE,
    "annotations CC BY 4.0, photos under the terms of Flickr",
    {
        "paper": "train2014 trains; 5,000 photos of val2014 test, 5,000 validate (seeded)",
        "karpathy": "dataset_coco.json: train, restval, val, 5,000 test photos",
        "karpathy1k": "the same, the test photos in five folds of 1,000",
        "leakfree": "80 labels: 5,000 queries, database without them, 10,000 of it train (seeded)",
        "hashnet": "80 labels: HashNet's rule, database with the queries and without training",
    },
    read,
    lists=True,
    search={"text": ("paper", "karpathy"), "photo": ("leakfree", "hashnet")},
    published={
        "paper": {"photos": 123_287, "train": 82_783, "val": 5_000, "test": 5_000},
        "karpathy": {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000},
        "karpathy1k": {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000},
        "leakfree": {"photos": 122_218, "train": 10_000, "query": 5_000, "database": 117_218},
        "hashnet": {"photos": 122_218, "train": 10_000, "query": 5_000, "database": 112_218},
    },
)
