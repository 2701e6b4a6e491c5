"""The photos inside the package: a subset of Caltech-101 (CC BY 4.0).

No photo here was used in any training, except those of ``pool()``, which an attacker may use to
optimise a patch. ``gallery()`` is what is searched, ``queries()`` are photos to search with, and
``ads()`` are background photos that play the advertisements an attacker wants to promote.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from functools import cache
from importlib import resources
from pathlib import Path

from pair.data.splits import Photo, caltech101
from pair.files import explained

MANIFEST = "splits.json"
POOL_CLASSES, POOL = 10, 40
SOURCE = {
    "name": "Caltech 101",
    "authors": "Fei-Fei Li, Marco Andreeto, Marc'Aurelio Ranzato, Pietro Perona",
    "publisher": "CaltechDATA",
    "doi": "10.22002/D1.20086",
    "licence": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
    "changes": "A subset of the photos, each resized to a short side of 144 pixels.",
}


def root() -> Path:
    """Folder of the embedded photos."""
    return Path(str(resources.files("pair"))) / "assets" / "photos"


@cache
def _manifest() -> dict[str, dict[str, str]]:
    path = root() / MANIFEST
    if not path.is_file():
        raise ValueError(f"the embedded photos are missing ({path}): reinstall the package")
    return json.loads(path.read_text())["splits"]


def _split(name: str, labels: list[str] | None) -> list[tuple[Path, str]]:
    rows = [(root() / path, label) for path, label in _manifest()[name].items()]
    return rows if labels is None else [r for r in rows if r[1] in set(labels)]


def labels() -> list[str]:
    """Class names of the gallery, sorted."""
    return sorted(set(_manifest()["gallery"].values()))


def gallery(only: list[str] | None = None) -> list[tuple[Path, str]]:
    """(file, class name) of the searchable photos, 16 per class; ``only`` picks classes."""
    return _split("gallery", only)


def queries(only: list[str] | None = None) -> list[tuple[Path, str]]:
    """(file, class name) of the query photos, 8 per class."""
    return _split("query", only)


def pool(only: list[str] | None = None) -> list[tuple[Path, str]]:
    """(file, class name) of photos that an attacker may optimise on: 40 each of 10 classes."""
    return _split("pool", only)


def ads() -> list[tuple[Path, str]]:
    """(file, '') of 68 background photos, the advertisements."""
    return _split("ads", None)


def build(source: Path, out: Path) -> dict[str, int]:
    """Choose the photos from Caltech-101 in ``source`` and write the folder ``out`` anew.

    Classes with at least 60 photos: gallery and queries of :mod:`pair.data.splits`, plus a pool
    from the training photos of the largest classes. Faces are left out. A folder that is there is
    replaced only if it is empty or was written by this function.
    """
    out = Path(os.path.abspath(out))
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} holds the photos of Caltech-101 themselves: name another folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} is there and is no folder: name another")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ValueError(
            f"{out} is not empty and has no {MANIFEST}: it is not what this command writes, "
            "name another folder"
        )
    photos = list(caltech101(source))
    chosen: dict[str, list[Photo]] = {"query": [p for p in photos if p.split == "query"]}
    names = {p.label for p in chosen["query"]}
    chosen["gallery"] = [p for p in photos if p.split == "gallery" and p.label in names]
    train = {n: [p for p in photos if p.split == "train" and p.label == n] for n in names}
    largest = sorted(names, key=lambda n: (-len(train[n]), n))[:POOL_CLASSES]
    chosen["pool"] = [p for n in sorted(largest) for p in train[n][:POOL]]
    chosen["ads"] = [p for p in photos if p.split == "ads"]
    if not all(chosen.values()):
        raise ValueError(f"{source} does not look like Caltech-101: <class>/image_0001.jpg")
    fresh = out.with_name(f".{out.name}.writing-{secrets.token_hex(6)}")
    try:
        manifest = _write(chosen, fresh)
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(fresh, out)
    except OSError as error:
        raise explained(error, out) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return {split: len(rows) for split, rows in manifest.items()}


def _write(chosen: dict[str, list[Photo]], fresh: Path) -> dict[str, dict[str, str]]:
    manifest: dict[str, dict[str, str]] = {}
    for split, members in chosen.items():
        manifest[split] = {}
        for photo in members:
            name = f"{photo.path.parent.name.lower()}/{photo.path.name}"
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(photo.path, fresh / name)
            manifest[split][name] = photo.label
    text = json.dumps({"source": SOURCE, "splits": manifest}, indent=1)
    (fresh / MANIFEST).write_text(text + "\n")
    lines = [f"{key}: {value}" for key, value in SOURCE.items()]
    (fresh / "ATTRIBUTION").write_text("\n".join(lines) + "\n")
    return manifest
