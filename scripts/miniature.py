"""Small data sets in the genuine layouts of the large ones, drawn from random numbers.

    python scripts/miniature.py OUT [--only coco2014 ...]

Every file has the name, place and format of the published one, so the same code reads both. A
photo shows the colour of its class (or of the words in its caption), which a few steps can learn.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 40),
    "white": (240, 240, 240),
}
THINGS = ("jacket", "dress", "motorcycle", "policeman", "cow")
WIDTH, HEIGHT = 72, 60


def photo(colour: tuple[int, int, int], number: int) -> bytes:
    """A JPEG of ``colour`` with blocks that belong to this photo alone."""
    draw = np.random.default_rng(number)
    blocks = draw.integers(0, 256, (HEIGHT // 12, WIDTH // 12, 3)).repeat(12, 0).repeat(12, 1)
    pixels = (0.7 * np.array(colour) + 0.3 * blocks).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=92)
    return out.getvalue()


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def described(number: int) -> tuple[bytes, list[str]]:
    """A photo and its five captions."""
    name = list(COLOURS)[number % len(COLOURS)]
    thing = THINGS[number // len(COLOURS) % len(THINGS)]
    captions = [
        f"A {name} {thing} in the street .",
        f"Someone with a {name} {thing} .",
        f"The {thing} is {name} .",
        f"A photo of a {name} {thing} .",
        f"There is a {thing} which is {name} .",
    ]
    return photo(COLOURS[name], number), captions


# --- COCO -------------------------------------------------------------------------------------

CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 3, "name": "car", "supercategory": "vehicle"},
    {"id": 21, "name": "cow", "supercategory": "animal"},
    {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
]


def coco2014(root: Path, train: int = 24, val: int = 36) -> None:
    karpathy = []
    sentence = 0
    for side, count, first in (("train", train, 9), ("val", val, 42)):
        images, captions, instances = [], [], []
        for i in range(count):
            key = first + 7 * i
            name = f"COCO_{side}2014_{key:012d}.jpg"
            data, said = described(i)
            write(root / f"{side}2014" / name, data)
            images.append({"id": key, "file_name": name, "height": HEIGHT, "width": WIDTH})
            captions += [
                {"image_id": key, "id": sentence + k, "caption": text}
                for k, text in enumerate(said)
            ]
            # Every sixth photo has no label at all, some have two.
            labels = [] if i % 6 == 5 else [CATEGORIES[i % 4]["id"]]
            labels += [CATEGORIES[(i + 1) % 4]["id"]] if i % 3 == 0 else []
            instances += [
                {"image_id": key, "id": sentence + k, "category_id": c, "bbox": [1, 1, 9, 9],
                 "area": 81, "iscrowd": 0, "segmentation": [[1, 1, 10, 1, 10, 10]]}
                for k, c in enumerate(labels)
            ]  # fmt: skip
            split = "train" if side == "train" else ("restval", "val", "test")[i % 3]
            karpathy.append({
                "filepath": f"{side}2014", "filename": name, "cocoid": key, "imgid": len(karpathy),
                "split": split, "sentids": list(range(sentence, sentence + 5)),
                "sentences": [
                    {"raw": text, "tokens": text.lower().split(), "imgid": len(karpathy),
                     "sentid": sentence + k}
                    for k, text in enumerate(said)
                ],
            })  # fmt: skip
            sentence += 5
        info = {"info": {"year": 2014}, "licenses": [], "images": images}
        notes = root / "annotations"
        write(notes / f"captions_{side}2014.json", json.dumps({**info, "annotations": captions}))
        content = {**info, "annotations": instances, "categories": CATEGORIES}
        write(notes / f"instances_{side}2014.json", json.dumps(content))
    write(root / "dataset_coco.json", json.dumps({"images": karpathy, "dataset": "coco"}))


# --- Flickr30K --------------------------------------------------------------------------------


def _flickr(count: int) -> list[tuple[str, bytes, list[str]]]:
    return [(f"{1000092795 + 31 * i}.jpg", *described(i)) for i in range(count)]


def flickr30k(root: Path, count: int = 20) -> None:
    """The token file, and the Karpathy file with fewer photos."""
    lines, images = [], []
    for i, (name, data, said) in enumerate(_flickr(count)):
        write(root / "flickr30k-images" / name, data)
        lines += [f"{name}#{k}\t{text}\n" for k, text in enumerate(said)]
        if i < count - 2:
            split = ("train", "train", "val", "test")[i % 4]
            sentences = [{"raw": t, "tokens": t.split(), "imgid": i} for t in said]
            images.append({"filename": name, "imgid": i, "split": split, "sentences": sentences})
    write(root / "results_20130124.token", "".join(lines))
    write(root / "dataset_flickr30k.json", json.dumps({"images": images, "dataset": "flickr30k"}))


def flickr30k_kaggle(root: Path, count: int = 20) -> None:
    """Nested folders, results.csv with "| " and its one broken row."""
    lines = ["image_name| comment_number| comment\n"]
    for i, (name, data, said) in enumerate(_flickr(count)):
        write(root / "flickr30k_images" / "flickr30k_images" / name, data)
        for k, text in enumerate(said):
            between = "   " if (i, k) == (3, 4) else "| "
            lines.append(f"{name}| {k}{between}{text}\n")
    write(root / "flickr30k_images" / "results.csv", "".join(lines))


def flickr30k_hub(root: Path, count: int = 20) -> None:
    """flickr_annotations_30k.csv of the repository nlphuji/flickr30k, photos unpacked."""
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow(["raw", "sentids", "split", "filename", "img_id"])
    for i, (name, data, said) in enumerate(_flickr(count)):
        write(root / "flickr30k-images" / name, data)
        out.writerow([json.dumps(said), json.dumps(list(range(5))), "train", name, i])
    write(root / "flickr_annotations_30k.csv", text.getvalue())


# --- classes ----------------------------------------------------------------------------------


def _colour(number: int) -> tuple[int, int, int]:
    draw = np.random.default_rng(10_000 + number).integers(0, 256, 3)
    return int(draw[0]), int(draw[1]), int(draw[2])


def imagenet100(root: Path, train: int = 3, val: int = 1) -> None:
    """train/<wnid>/, and val/ flat as it comes, with LOC_val_solution.csv."""
    from pair.data.sets.imagenet100 import CLASSES

    rows = ["ImageId,PredictionString\n"]
    for k, wnid in enumerate(CLASSES):
        for i in range(train):
            data = photo(_colour(k), 100 * k + i)
            write(root / "train" / wnid / f"{wnid}_{100 + i}.JPEG", data)
        for i in range(val):
            name = f"ILSVRC2012_val_{1 + k * val + i:08d}"
            write(root / "val" / f"{name}.JPEG", photo(_colour(k), 50_000 + 100 * k + i))
            rows.append(f"{name},{wnid} 1 1 50 50 \n")
    # A class that is not among the hundred is left out.
    write(root / "val" / "ILSVRC2012_val_00050000.JPEG", photo((0, 0, 0), 1))
    rows.append("ILSVRC2012_val_00050000,n01440764 1 1 50 50 \n")
    write(root / "LOC_val_solution.csv", "".join(rows))


def caltech101(root: Path) -> None:
    classes = {"accordion": 62, "bonsai": 61, "Leopards": 18, "Faces": 2, "BACKGROUND_Google": 70}
    for k, (name, count) in enumerate(classes.items()):
        for i in range(1, count + 1):
            data = photo(_colour(k), 1000 * k + i)
            write(root / "101_ObjectCategories" / name / f"image_{i:04d}.jpg", data)


def imagenette(root: Path) -> None:
    from pair.data.splits import IMAGENETTE

    for k, wnid in enumerate(IMAGENETTE):
        for side, count in (("train", 4), ("val", 2)):
            for i in range(count):
                data = photo(_colour(k), 1000 * k + i + 500 * (side == "val"))
                write(root / "imagenette2-320" / side / wnid / f"{wnid}_{i}.JPEG", data)


# --- your own ---------------------------------------------------------------------------------


def folder(root: Path) -> None:
    rows = ["image,caption\n"]
    for i in range(24):
        data, said = described(i)
        write(root / "photos" / f"{i:03d}.jpg", data)
        rows += [f'photos/{i:03d}.jpg,"{text}"\n' for text in said[:2]]
    write(root / "captions.csv", "".join(rows))


def classes(root: Path) -> None:
    for k, name in enumerate(COLOURS):
        for i in range(6):
            write(root / name / f"{i}.jpg", photo(COLOURS[name], 100 * k + i))


def webdataset(root: Path) -> None:
    for side, shards, count in (("train", 2, 8), ("val", 1, 6)):
        for shard in range(shards):
            path = root / f"{side}-{shard:06d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as tar:
                for i in range(count):
                    number = 100 * shard + i
                    data, said = described(number)
                    facts = json.dumps({"caption": said[0], "key": f"{number:09d}"})
                    for kind, content in (("jpg", data), ("txt", said[0].encode()),
                                          ("json", facts.encode()), ("cls", b"3")):  # fmt: skip
                        member = tarfile.TarInfo(f"{number:09d}.{kind}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


def huggingface(root: Path) -> None:
    """A folder of save_to_disk; needs the library datasets."""
    import datasets

    datasets.disable_progress_bars()
    kinds = datasets.ClassLabel(names=list(COLOURS))
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": kinds}
    )
    splits = {}
    for side, count in (("train", 12), ("validation", 6)):
        rows = []
        for i in range(count):
            data, said = described(i)
            picture = {"bytes": data, "path": None}
            rows.append({"image": picture, "text": said[0], "label": i % len(COLOURS)})
        splits[side] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(root)


ALL: dict[str, tuple[str, Callable[[Path], None]]] = {
    "coco2014": ("coco2014", coco2014),
    "flickr30k": ("flickr30k", flickr30k),
    "flickr30k-kaggle": ("flickr30k", flickr30k_kaggle),
    "flickr30k-hub": ("flickr30k", flickr30k_hub),
    "imagenet100": ("imagenet100", imagenet100),
    "caltech101": ("caltech101", caltech101),
    "imagenette": ("imagenette", imagenette),
    "folder": ("folder", folder),
    "classes": ("folder", classes),
    "webdataset": ("webdataset", webdataset),
    "huggingface": ("huggingface", huggingface),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(ALL), help="some of them")
    args = parser.parse_args()
    for name in args.only or ALL:
        kind, make = ALL[name]
        try:
            make(args.out / name)
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
            continue
        print(f"{name}: pair data prepare {kind} --root {args.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
