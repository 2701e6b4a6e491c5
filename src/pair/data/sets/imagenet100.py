"""ImageNet-100: the 100 ILSVRC-2012 classes of HashNet, CSQ and AdvHash, for hashing.

Layout: ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``; or val as it comes, flat, beside one of
the files that say what is on its photos. Labels are WordNet ids, so classes are in the order in
which the published networks have them.
"""

from __future__ import annotations

import csv
from pathlib import Path

from pair.data.sets import lists
from pair.data.sets.base import Dataset, Record, Source, files_of, need, seeded_split, verify

TITLE = "ImageNet-100"
ORIGIN = "register at https://image-net.org and unpack ILSVRC2012_img_{}.tar (Kaggle's copy works)"
TRAIN_PER_CLASS = 130
CLASSES = """
    n01514668 n01537544 n01560419 n01629819 n01632458 n01664065 n01685808 n01687978 n01698640
    n01729322 n01774750 n01797886 n01819313 n01828970 n01944390 n01986214 n02017213 n02018207
    n02077923 n02088466 n02093256 n02094114 n02096177 n02096294 n02097209 n02098105 n02102177
    n02105162 n02106550 n02111129 n02111277 n02113023 n02128385 n02256656 n02281787 n02346627
    n02391049 n02408429 n02415577 n02454379 n02488291 n02526121 n02655020 n02834397 n02840245
    n02841315 n02865351 n02871525 n02895154 n02939185 n02948072 n02965783 n02992211 n03018349
    n03045698 n03047690 n03196217 n03223299 n03272562 n03291819 n03345487 n03445924 n03483316
    n03584829 n03680355 n03690938 n03733131 n03743016 n03803284 n03814639 n03838899 n03857828
    n03891332 n03895866 n03899768 n03902125 n03944341 n04026417 n04153751 n04201297 n04238763
    n04254120 n04344873 n04350905 n04366367 n04404412 n04417672 n04435653 n04486054 n04548362
    n04560804 n04579432 n04596742 n07583066 n07584110 n07753113 n07754684 n07836838 n12057211
    n13044778
""".split()  # noqa: SIM905
MAPS = (
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)


def _side(root: Path, side: str) -> Path:
    places = [side, f"ILSVRC/Data/CLS-LOC/{side}", f"ILSVRC2012_img_{side}"]
    return need(root, places, TITLE, ORIGIN.format(side))


def _by_class(folder: Path, side: str) -> list[tuple[str, Path]]:
    """(wnid, file) of the 100 classes; every class must be there and hold photos."""
    out = []
    for wnid in CLASSES:
        names = sorted(files_of(folder / wnid)) if (folder / wnid).is_dir() else []
        if not names:
            raise ValueError(
                f"{TITLE}: {folder / wnid} holds no photos, but {wnid} is one of the 100 classes: "
                + ORIGIN.format(side)
            )
        out += [(wnid, folder / wnid / name) for name in names]
    return out


def _validation(root: Path) -> list[tuple[str, Path]]:
    folder = _side(root, "val")
    if any((folder / wnid).is_dir() for wnid in CLASSES):
        return _by_class(folder, "val")
    names = sorted(files_of(folder))
    truth = _truth(root, names)
    wanted = set(CLASSES)
    out = [(truth[Path(n).stem], folder / n) for n in names if truth[Path(n).stem] in wanted]
    if lost := wanted - {wnid for wnid, _ in out}:
        raise ValueError(f"{TITLE}: no photo in {folder} is of class {min(lost)}")
    return out


def _truth(root: Path, names: list[str]) -> dict[str, str]:
    """Stem of a flat validation photo -> wnid, from whichever file there is."""
    places = [p for m in MAPS for p in (m, f"data/{m}", f"ILSVRC2012_devkit_t12/data/{m}")]
    path = need(
        root, places, TITLE,
        "the photos in val/ are not sorted into folders, and one of these files must say what "
        "they show (the first is on Kaggle, the last in ILSVRC2012_devkit_t12.tar.gz)",
    )  # fmt: skip
    lines = path.read_text("utf-8").splitlines()
    if path.name == MAPS[0]:
        truth = {
            row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(lines)
        }
    else:
        numbers = _synsets(path.with_name("meta.mat")) if path.name == MAPS[2] else None
        labels = [numbers[int(line)] if numbers else line.strip() for line in lines if line.strip()]
        truth = {f"ILSVRC2012_val_{i:08d}": wnid for i, wnid in enumerate(labels, 1)}
    if lost := [n for n in names if Path(n).stem not in truth]:
        raise ValueError(f"{path} does not say what is on {lost[0]}")
    return truth


def _synsets(path: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid, from the development kit's meta.mat."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs scipy (pip install scipy), or take LOC_val_solution.csv"
        ) from error
    if not path.is_file():
        raise ValueError(f"{TITLE} lacks {path}: it is in ILSVRC2012_devkit_t12.tar.gz")
    synsets = loadmat(path, squeeze_me=True)["synsets"]
    return {int(n): str(w) for n, w in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}


def read(root: Path, protocol: str, seed: int) -> Dataset:
    train = _by_class(_side(root, "train"), "train")
    queries = _validation(root)
    splits: dict[str, str] = {}
    for wnid in CLASSES:
        own = [path.stem for label, path in train if label == wnid]
        # 130 of about 1,285 photos of each class train; all of them are searched.
        sizes = {"gallery": len(own) - TRAIN_PER_CLASS, "train": TRAIN_PER_CLASS}
        if sizes["gallery"] < 1:
            sizes = {"gallery": 9, "train": 1}
        splits |= seeded_split(own, sizes, seed, f"imagenet100/{wnid}")
    records = [Record(p.stem, p, (), (w,), splits[p.stem]) for w, p in train]
    records += [Record(p.stem, p, (), (w,), "query") for w, p in queries]
    if given := lists.find(root):
        records = lists.apply(given, records, TITLE)
    views: dict[str, tuple[str, ...]] = {"database": ("gallery", "train")}
    return verify(Dataset("imagenet100", protocol, root, seed, tuple(records), views))


SOURCE = Source(
    "imagenet100",
    TITLE,
    "ImageNet's terms: research and teaching only",
    {"hashnet": "130 photos a class train (seeded), all of train/ is searched, val/ queries"},
    read,
    lists=True,
    search={"photo": ("hashnet",)},
    published={
        "hashnet": {"photos": 133_503, "train": 13_000, "query": 5_000, "database": 128_503}
    },
)
