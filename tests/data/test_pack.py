"""Packs: photos decoded once, opened without copying, damaged ones refused."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from pair.data import splits
from pair.data.pack import IMAGES, INDEX, Pack, write_pack
from pair.images import load_image, resize_crop


def test_rows_are_the_photos(pack, photo_root):
    photos = [p for name, read in splits.DATASETS.items() for p in read(photo_root / name)]
    assert len(pack) == len(photos) == len(pack.images)
    assert pack.side == 32
    for i in (0, 57, len(photos) - 1):
        photo = photos[i]
        assert photo_root / pack.paths[i] == photo.path
        assert (pack.labels[i], pack.datasets[i], pack.splits[i]) == (
            photo.label,
            photo.dataset,
            photo.split,
        )
        wanted = resize_crop(load_image(photo.path)[None], 32)
        got = pack.batch(torch.tensor([i]), 32)
        assert float((got - wanted).abs().max()) <= 0.5 / 255 + 1e-6  # rounded, not truncated


def test_where_selects_rows(pack):
    rows = pack.where(lambda label, data, split: data == "imagenette" and split == "val")
    assert len(rows) == 30
    assert rows.dtype == torch.long
    assert {pack.splits[i] for i in rows.tolist()} == {"val"}
    nothing = pack.where(lambda label, data, split: False)
    assert nothing.shape == (0,) and nothing.dtype == torch.long


def test_batches_are_centre_crops_in_range(pack):
    rows = torch.tensor([3, 0, 3])
    raw = pack.raw(rows)
    assert raw.shape == (3, 32, 32, 3) and raw.dtype == torch.uint8
    crop = pack.batch(rows, 16)
    assert crop.shape == (3, 3, 16, 16)
    assert torch.equal(crop, raw.permute(0, 3, 1, 2)[..., 8:24, 8:24].float() / 255)
    assert torch.equal(crop[0], crop[2])
    assert pack.batch(rows, 48).shape == (3, 3, 48, 48)
    raw.zero_()  # a copy: the pack on disk cannot be written to by accident
    assert bool((pack.raw(rows) != 0).any())


def few(photo_root, count):
    return list(islice(splits.imagenette(photo_root / "imagenette"), count))


def test_an_interrupted_pack_is_no_pack(photo_root, tmp_path, monkeypatch):
    write_pack(few(photo_root, 3), photo_root, tmp_path, 8, workers=1)
    assert len(Pack.open(tmp_path)) == 3

    def stop(photos):
        for i, image in enumerate(photos):
            if i == 1:
                raise KeyboardInterrupt
            yield image

    with pytest.raises(KeyboardInterrupt):
        write_pack(few(photo_root, 5), photo_root, tmp_path, 8, workers=1, progress=stop)
    assert len(Pack.open(tmp_path)) == 3  # the old one still stands
    import pair.data.pack as module

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):  # after the index, before the images
        write_pack(few(photo_root, 5), photo_root, tmp_path, 8, workers=1)
    with pytest.raises(ValueError, match="holds no finished pack: run 'pair data pack'"):
        Pack.open(tmp_path)
    monkeypatch.undo()
    write_pack(few(photo_root, 5), photo_root, tmp_path, 8, workers=1)
    assert len(Pack.open(tmp_path)) == 5


def test_a_broken_photo_is_named(photo_root, tmp_path):
    photos = few(photo_root, 2)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photos[0].path.read_bytes()[:200])
    photos.append(splits.Photo(broken, "", "imagenette", "train"))
    with pytest.raises(ValueError, match=r"cannot decode .*broken\.jpg"):
        write_pack(photos, photo_root, tmp_path / "pack", 8, workers=1)


def test_damaged_packs_are_refused_in_one_sentence(photo_root, tmp_path):
    with pytest.raises(ValueError, match="holds no finished pack"):
        Pack.open(tmp_path / "nowhere")
    write_pack(few(photo_root, 3), photo_root, tmp_path, 8, workers=1)
    index = json.loads((tmp_path / INDEX).read_text())
    for text in ("", "{}", '{"rows": []}', '{"rows": [1, 2, 3]}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(ValueError, match="is damaged, make it again"):
            Pack.open(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({**index, "rows": index["rows"][:2]}))
    with pytest.raises(ValueError, match="3 images, 2 rows in the index"):
        Pack.open(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match="is damaged"):
        Pack.open(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / IMAGES).write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="is damaged"):
        Pack.open(tmp_path)
    np.save(tmp_path / IMAGES, np.zeros((3, 8, 8, 3), np.uint8))
    assert len(Pack.open(tmp_path)) == 3
