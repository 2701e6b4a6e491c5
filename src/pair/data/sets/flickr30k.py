"""Flickr30K: 31,783 photos with five captions each, in the four layouts in which it is found."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from pair.data.sets.base import Dataset, Record, Source, all_present, need, seeded_split, verify
from pair.data.sets.coco2014 import karpathy_images

TITLE = "Flickr30K"
PHOTOS = ["flickr30k-images", "flickr30k_images/flickr30k_images", "flickr30k_images", "Images"]
ORIGIN = (
    "ask for Flickr30K at https://shannon.cs.illinois.edu/DenotationGraph/ or take Kaggle's "
    "hsankesara/flickr-image-dataset or Hugging Face's nlphuji/flickr30k"
)
KARPATHY = (
    "it is in caption_datasets.zip from https://cs.stanford.edu/people/karpathy/deepimagesent/"
)
TOKENS, KAGGLE, HUB = "results_20130124.token", "results.csv", "flickr_annotations_30k.csv"
SIZES = {"train": 21_783, "val": 5_000, "test": 5_000}


def _tokens(path: Path) -> dict[str, list[str]]:
    """``<id>.jpg#<n><tab><caption>``."""
    out: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        match = re.fullmatch(r"(\S+)#(\d+)\t(.+)", line)
        if not match:
            raise ValueError(f"{path}, line {number}: expected <photo>#<number><tab><caption>")
        out.setdefault(match[1], []).append(match[3].strip())
    return out


def _kaggle(path: Path) -> dict[str, list[str]]:
    """``image_name| comment_number| comment``; one published row lacks its second separator."""
    out: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if number == 1 and line.startswith("image_name"):
            continue
        match = re.fullmatch(r"([^|]+)\|\s*(\d+)\s*\|?\s+(.+)", line)
        if not match:
            raise ValueError(f"{path}, line {number}: expected image_name| comment_number| comment")
        out.setdefault(match[1].strip(), []).append(match[3].strip())
    return out


def _hub(path: Path) -> dict[str, list[str]]:
    """The csv of the Hugging Face repository: ``raw`` is a JSON list of captions."""
    with open(path, newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        if not {"raw", "filename"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} has no columns raw and filename")
        try:
            return {row["filename"]: list(json.loads(row["raw"])) for row in reader}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: a row has no JSON list of captions: {error}") from error


READERS = {TOKENS: _tokens, KAGGLE: _kaggle, HUB: _hub}


def _captions(root: Path) -> dict[str, list[str]]:
    places = [
        *READERS, f"flickr30k/{TOKENS}", f"flickr30k_images/{KAGGLE}",
        f"flickr30k_images/flickr30k_images/{KAGGLE}",
    ]  # fmt: skip
    path = need(root, places, TITLE, ORIGIN)
    return READERS[path.name](path)


def read(root: Path, protocol: str, seed: int) -> Dataset:
    if (root / "flickr30k-images.zip").is_file() and not any((root / p).is_dir() for p in PHOTOS):
        raise ValueError(f"{TITLE}: unpack {root / 'flickr30k-images.zip'} where it is")
    folder = need(root, PHOTOS, TITLE, ORIGIN)
    if protocol == "paper":
        said = _captions(root)
        # By stem, so that the split does not depend on the layout that was found.
        splits = seeded_split([Path(n).stem for n in said], SIZES, seed, "flickr30k")
        found = {n: (said[n], splits[Path(n).stem]) for n in said}
    else:
        places = ["dataset_flickr30k.json", "karpathy/dataset_flickr30k.json"]
        path = need(root, places, TITLE, KARPATHY)
        found = {
            image["filename"]: ([s["raw"] for s in image["sentences"]], image["split"])
            for image in karpathy_images(path)
        }
    all_present(found, folder, TITLE, ORIGIN)
    records = [
        Record(Path(name).stem, folder / name, tuple(" ".join(c.split()) for c in text), (), split)
        for name, (text, split) in sorted(found.items())
    ]
    return verify(Dataset("flickr30k", protocol, root, seed, tuple(records)))


SOURCE = Source(
    "flickr30k",
    TITLE,
    "research use, on request; photos under the terms of Flickr",
    {
        "paper": "21,783 photos train, 5,000 validate, 5,000 test (seeded; the paper's is unknown)",
        "karpathy": "dataset_flickr30k.json: 29,000 / 1,014 / 1,000",
    },
    read,
    {
        "paper": {"photos": 31_783, "captions": 158_915, **SIZES},
        "karpathy": {"photos": 31_014, "train": 29_000, "val": 1_014, "test": 1_000},
    },
    search={"text": ("paper", "karpathy")},
)
