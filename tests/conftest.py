"""A small real pack: JPEG files in the layouts of the data sets, decoded as by `pair data pack`.

Photos are drawn so that a class can be told from its colours, which a few steps can learn.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from pair import cli
from pair.data import splits
from pair.data.pack import Pack, write_pack
from pair.images import to_pil

SIDE = 32  # of the stored photos


def draw(path: Path, kind: int, number: int) -> None:
    """A 40 x 36 JPEG: a colour of its class, some blocks of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1000 * kind + number)
    base = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(kind))
    blocks = torch.rand(3, 5, 4, generator=generator)
    blocks = blocks.repeat_interleave(8, 1).repeat_interleave(9, 2)
    to_pil(0.7 * base + 0.3 * blocks).save(path, quality=95)


def write_photos(root: Path) -> None:
    """Trees of all three data sets; every split occurs."""
    for kind, wnid in enumerate(splits.IMAGENETTE):
        for split, count in (("train", 4), ("val", 3)):
            for i in range(count):
                draw(root / "imagenette" / split / wnid / f"{wnid}_{i}.JPEG", kind, i)
    counts = {"anchor": 20, "bonsai": 62, "Faces": 3, "Faces_easy": 2, "BACKGROUND_Google": 70}
    for kind, (name, count) in enumerate(counts.items(), 20):
        for i in range(count):
            draw(root / "caltech101" / name / f"image_{i:04d}.jpg", kind, i)
    for i in range(102):
        draw(root / "flickr8k" / "images" / f"{i}.jpg", 40, i)


@pytest.fixture(scope="session")
def photo_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_photos(root)
    return root


@pytest.fixture(scope="session")
def pack_folder(photo_root, tmp_path_factory) -> Path:
    photos = [p for name, read in splits.DATASETS.items() for p in read(photo_root / name)]
    out = tmp_path_factory.mktemp("pack")
    write_pack(photos, photo_root, out, size=SIDE, workers=1)
    return out


@pytest.fixture
def pack(pack_folder) -> Pack:
    return Pack.open(pack_folder)


@pytest.fixture(scope="session")
def miniature_script():
    """The module scripts/miniature.py."""
    path = Path(__file__).resolve().parent.parent / "scripts" / "miniature.py"
    spec = importlib.util.spec_from_file_location("miniature", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def miniatures(miniature_script, tmp_path_factory) -> Path:
    """A folder with a miniature of every data set that can be made here."""
    root = tmp_path_factory.mktemp("miniatures")
    for name, (_, make) in miniature_script.ALL.items():
        with contextlib.suppress(ImportError):  # Hugging Face's needs the library datasets
            make(root / name)
    return root


@pytest.fixture
def pair(capsys, monkeypatch):
    """The command in this process: ``pair("purify", path)`` -> exit code, output, errors."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pair", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        told = capsys.readouterr()
        return stopped.value.code or 0, told.out, told.err

    return run
