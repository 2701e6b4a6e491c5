"""Decoding, resizing and saving: every kind of file a collection may hold."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pair.images import (
    ImageError,
    check_images,
    from_pil,
    load_batch,
    load_image,
    quantise,
    resize,
    resize_crop,
    save_image,
    to_pil,
)

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encode(array: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def smooth(height: int = 40, width: int = 60) -> np.ndarray:
    """A photo-like picture: low frequencies, so that lossy formats keep it."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    bands = [0.5 + 0.4 * np.sin(3 * x + 2 * y + c) for c in range(3)]
    return (np.stack(bands, -1) * 255).round().astype(np.uint8)


def png(width: int, height: int, depth: int, colour: int, rows: np.ndarray, extra=b"") -> bytes:
    """A PNG written by hand: the only way to 16-bit colour without trusting Pillow."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff16(values: np.ndarray, order: str) -> bytes:
    """An uncompressed 16-bit RGB TIFF by hand, little ("<") or big (">") endian."""
    h, w, _ = values.shape
    data = values.astype(order + "u2").tobytes()
    tags = [(256, 3, 1, w), (257, 3, 1, h), (259, 3, 1, 1), (262, 3, 1, 2), (277, 3, 1, 3),
            (278, 3, 1, h), (279, 4, 1, len(data))]  # fmt: skip
    size = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags += [(258, 3, 3, size), (273, 4, 1, size + 6)]
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    out += struct.pack(order + "H", len(tags))
    for tag, kind, count, value in sorted(tags):
        short = kind == 3 and count == 1
        packed = struct.pack(order + ("HH" if short else "I"), *((value, 0) if short else (value,)))
        out += struct.pack(order + "HHI", tag, kind, count) + packed
    return out + struct.pack(order + "I", 0) + struct.pack(order + "HHH", 16, 16, 16) + data


def as_array(data: bytes) -> np.ndarray:
    """(H, W, 3) in [0, 255]."""
    return (load_image(data) * 255).permute(1, 2, 0).numpy()


# --- what is decoded ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
     ("WEBP", {"lossless": True})],
)  # fmt: skip
def test_lossless_formats_give_the_pixels(kind, options):
    assert np.array_equal(as_array(encode(NOISE, kind, **options)).round(), NOISE)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_give_nearly_the_pixels(kind):
    assert (
        np.abs(as_array(encode(smooth(), kind, quality=95)) - smooth()).max() < 12
    )  # WebP halves colour


def test_grey_one_bit_and_palette():
    grey = NOISE[..., 0]
    assert np.allclose(as_array(encode(grey, "PNG")), grey[..., None].repeat(3, -1), atol=1e-4)
    bits = Image.fromarray(grey > 127)
    for kind in ("PNG", "TIFF", "BMP"):
        assert set(np.unique(as_array(encode(bits, kind)))) == {0.0, 255.0}
    palette = Image.fromarray(smooth()).quantize(16)
    for kind in ("PNG", "GIF", "BMP"):
        expected = np.asarray(palette.convert("RGB"))
        assert np.allclose(as_array(encode(palette, kind)), expected, atol=1e-4), kind


def test_alpha_is_composited_on_white():
    alpha = np.linspace(0, 255, 60).round().astype(np.uint8)[None].repeat(40, 0)[..., None]
    expected = NOISE * (alpha / 255) + 255 * (1 - alpha / 255)
    rgba = np.concatenate([NOISE, alpha], -1)
    for kind, options in [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})]:
        assert np.allclose(as_array(encode(rgba, kind, **options)), expected, atol=0.01), kind
    la = np.concatenate([NOISE[..., :1], alpha], -1)
    grey = NOISE[..., :1] * (alpha / 255) + 255 * (1 - alpha / 255)
    shown = as_array(encode(la, "PNG"))
    assert np.allclose(shown, grey.repeat(3, -1), atol=0.01)


def test_transparent_colours_of_palettes_and_plain_png():
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.putpixel((0, 0), 0)
    for kind in ("GIF", "PNG"):
        shown = as_array(encode(palette, kind, transparency=0))
        assert shown[0, 0].tolist() == [255, 255, 255], kind
        assert np.allclose(shown[0, 1], [200, 10, 20], atol=1e-4), kind
    half = encode(palette, "PNG", transparency=bytes([0, 128]))  # an alpha per palette entry
    weight = 128 / 255
    expected = np.array([200, 10, 20]) * weight + 255 * (1 - weight)
    assert np.allclose(as_array(half)[0, 1], expected, atol=0.01)
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (1, 2, 4))
    shown = as_array(encode(rgb, "PNG", transparency=(1, 2, 3)))
    assert np.allclose(shown, [[[255, 255, 255], [1, 2, 4]]], atol=1e-4)


def test_16_bits_keep_their_precision():
    deep = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    big = deep.astype(">u2")
    files = {
        "grey PNG": (png(7, 5, 16, 0, big[..., :1]), deep[..., :1].repeat(3, -1)),
        "RGB PNG": (png(7, 5, 16, 2, big), deep),
        "little TIFF": (tiff16(deep, "<"), deep),
        "big TIFF": (tiff16(deep, ">"), deep),
        "grey TIFF": (encode(deep[..., 0].copy(), "TIFF"), deep[..., :1].repeat(3, -1)),
    }
    lzw = encode(Image.fromarray(deep[..., 0].copy()), "TIFF", compression="tiff_lzw")
    files["packed grey TIFF"] = (lzw, deep[..., :1].repeat(3, -1))
    for name, (data, expected) in files.items():
        got = load_image(data).permute(1, 2, 0).numpy()
        assert np.abs(got - expected / 65535).max() < 1e-6, name


def test_16_bits_with_transparency():
    deep = RNG.integers(0, 65536, (5, 7, 4), dtype=np.uint16)
    alpha = deep[..., 3:] / 65535
    expected = deep[..., :3] / 65535 * alpha + 1 - alpha
    got = load_image(png(7, 5, 16, 6, deep.astype(">u2"))).permute(1, 2, 0).numpy()
    assert np.abs(got - expected).max() < 1e-6
    key = deep[2, 3, :3].astype(">u2").tobytes()
    trns = struct.pack(">I", 6) + b"tRNS" + key + struct.pack(">I", zlib.crc32(b"tRNS" + key))
    got = load_image(png(7, 5, 16, 2, deep[..., :3].astype(">u2"), trns))
    assert got[:, 2, 3].tolist() == [1, 1, 1]
    assert abs(float(got[0, 0, 0]) - deep[0, 0, 0] / 65535) < 1e-6


def test_cmyk_is_not_inverted():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        assert np.abs(as_array(encode(red, kind))[4, 4] - [255, 0, 0]).max() < 6, kind


def test_only_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (6, 4), c) for c in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        more = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **more)
        assert np.allclose(as_array(data), [255, 0, 0], atol=1), kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_one_pixel(kind):
    x = load_image(encode(np.full((1, 1, 3), 255, np.uint8), kind))
    assert tuple(x.shape) == (3, 1, 1)
    assert torch.allclose(x, torch.ones(3, 1, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = encode(smooth(20, 30), kind, exif=exif, **options.get(kind, {}))
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert expected.shape[:2] == ((30, 20) if orientation >= 5 else (20, 30))
    assert np.allclose(as_array(data), expected, atol=1e-4)
    small = load_image(data, size=(7, 11))
    assert torch.allclose(small, resize(load_image(data)[None], (7, 11))[0], atol=2e-6)


def test_from_pil_matches_load_image():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"):
        picture = Image.fromarray(smooth()).convert("L" if mode == "I;16" else mode)
        picture = picture.convert(mode)
        kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
        if mode != "YCbCr":
            assert torch.equal(from_pil(picture), load_image(encode(picture, kind))), mode
        assert from_pil(picture).shape == (3, 40, 60)


# --- resizing ---------------------------------------------------------------------------------


def triangle_resize(array: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bilinear by its definition, along the first axis: weights fall linearly from
    the centre of an output pixel to zero at one output pixel's distance (never less than one
    input pixel's)."""
    n = len(array)
    scale = n / size
    support = max(scale, 1.0)
    out = []
    for i in range(size):
        centre = (i + 0.5) * scale - 0.5
        weights = np.array([max(0.0, 1 - abs(j - centre) / support) for j in range(n)])
        out.append(np.tensordot(weights / weights.sum(), array, 1))
    return np.stack(out)


@pytest.mark.parametrize("shape", [(40, 60), (40, 1), (1, 60), (1, 1)])
@pytest.mark.parametrize("size", [(11, 17), (40, 23), (90, 130), (1, 1), (3, 200), (17, 1), (1, 9)])
def test_resize_golden(shape, size):
    picture = np.ascontiguousarray(NOISE[: shape[0], : shape[1]])
    x = torch.from_numpy(picture).permute(2, 0, 1).float()[None] / 255
    rows = triangle_resize(picture.astype(np.float64) / 255, size[0])
    expected = triangle_resize(rows.swapaxes(0, 1), size[1]).swapaxes(0, 1)
    got = resize(x, size)[0].permute(1, 2, 0).numpy()
    assert np.abs(got - expected).max() < 1e-5
    pillow = Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR)
    assert np.abs(got * 255 - np.asarray(pillow)).max() < 1.5  # Pillow rounds twice


@pytest.mark.parametrize("shape", [(1, 1), (5, 900), (900, 5), (70, 50), (300, 20)])
@pytest.mark.parametrize("size", [16, (7, 1000), (1000, 7)])
@pytest.mark.parametrize("strip, long", [(1000, 2000), (10**6, 2000), (1000, 0)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_shrinking_while_decoding_is_the_same_resize(monkeypatch, shape, size, strip, long, mode):
    """In strips or whole, by the fast way for ordinary pictures and by the one for the others."""
    monkeypatch.setattr("pair.images.STRIP", strip)
    monkeypatch.setattr("pair.images.LONG", long)
    noise = RNG.integers(0, 256, (*shape, len(mode)), dtype=np.uint8)
    data = encode(noise[..., 0] if mode == "L" else noise, "PNG")
    expected = resize(load_image(data)[None], size)[0]
    assert torch.allclose(load_image(data, size=size), expected, atol=2e-6)


def test_load_batch_crops_the_centre(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    x = load_image(tmp_path / "a.png")[None]
    assert torch.equal(load_batch([tmp_path / "a.png"], 40), x[..., :, 10:50])
    assert resize_crop(x, 20).shape == (1, 3, 20, 20)


# --- saving -----------------------------------------------------------------------------------


def test_save_and_load_again(tmp_path):
    x = quantise(torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)))
    save_image(tmp_path / "a.png", x)
    assert torch.allclose(load_image(tmp_path / "a.png"), x, atol=1e-6)
    photo = from_pil(Image.fromarray(smooth()))
    for name in ("a.jpg", "b.JPEG", "c.webp"):
        save_image(tmp_path / name, photo)
        assert (load_image(tmp_path / name) - photo).abs().max() < 0.04, name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jpg", "a.png", "b.JPEG", "c.webp"]
    assert np.array_equal(np.asarray(to_pil(photo)), smooth())


def test_save_resizes_rounds_and_dates(tmp_path):
    x = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    save_image(tmp_path / "a.png", x, size=(50, 40), mtime_ns=1_500_000_000_000_000_001)
    expected = resize(x[None], (50, 40))[0]
    assert (load_image(tmp_path / "a.png") - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert (tmp_path / "a.png").stat().st_mtime_ns == 1_500_000_000_000_000_001


def test_save_refuses_what_makes_no_sense(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.jpg, \.png or \.webp"):
        save_image(tmp_path / "a.gif", torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        save_image(tmp_path / "a.png", torch.full((3, 4, 4), float("nan")))
    for name, side in (("a.jpg", 65_536), ("a.webp", 16_384)):
        with pytest.raises(ValueError, match=f"cannot hold {side} x 1 pixels"):
            save_image(tmp_path / name, torch.zeros(3, 1, 1), size=(1, side))
    with pytest.raises(OSError, match="No such file or directory") as caught:
        save_image(tmp_path / "missing" / "a.png", torch.zeros(3, 4, 4))
    assert "[Errno" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_leaves_the_old_file(tmp_path):
    """A real failure of write(2): the process may not make files of more than 100 bytes."""
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    code = (
        "import resource, sys, torch\n"
        "from pair.images import save_image\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "try: save_image(sys.argv[1], torch.rand(3, 64, 64))\n"
        "except OSError as error: print(error)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    run = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == f"cannot write {target}: File too large"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert target.read_bytes() == b"old"


# --- what is refused --------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A tiny file that says it is a huge picture."""
    return png(side, side, 8, 2, np.zeros((1, 3), np.uint8))


BROKEN = {
    "empty": (b"", "the file is empty"),
    "text": (b"just some words, no picture at all", "not an image"),
    "random": (RNG.bytes(2000), "not an image"),
    "header only": (encode(NOISE, "PNG")[:12], "damaged or cut off in its header"),
    "truncated JPEG": (encode(NOISE, "JPEG")[:-400], "cut off or damaged"),
    "truncated PNG": (encode(NOISE, "PNG")[:-400], "cut off or damaged"),
    "truncated WebP": (encode(NOISE, "WEBP")[:-400], "damaged or cut off"),
    "truncated GIF": (encode(NOISE, "GIF")[:-400], "cut off or damaged"),
    "truncated TIFF": (encode(NOISE, "TIFF")[:3000], "cut off or damaged|header"),
    "truncated BMP": (encode(NOISE, "BMP")[:-400], "cut off or damaged"),
    "bomb": (bomb(20_000), "20000 x 20000 pixels, over the limit"),
    "bomb under Pillow's own limit": (bomb(13_400), "13400 x 13400 pixels, over the limit"),
    "thread": (png(2_000_000, 1, 8, 0, np.zeros((1, 3), np.uint8)), "over the limit"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC files are not supported"),
    "AVIF": (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(40), "AVIF files are not supported"),
    "PDF": (b"%PDF-1.4\n" + bytes(50), "PDF files are not supported"),
    "int32": (encode(Image.new("I", (4, 4), 70_000), "TIFF"), "32-bit or signed"),
    "float": (encode(Image.new("F", (4, 4), 7.5), "TIFF"), r"lie in \[0, 1\]"),
    "LAB": (encode(Image.new("LAB", (4, 4)), "TIFF"), "colour mode LAB"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_sentence(name, tmp_path, capfd):
    data, message = BROKEN[name]
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (data, path):
            with pytest.raises(ImageError, match=message) as caught:
                load_image(source)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and "Errno" not in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text
    assert capfd.readouterr() == ("", "")


def test_the_pixel_limit_is_an_argument(monkeypatch):
    data = encode(NOISE, "PNG")
    with pytest.raises(ImageError, match="60 x 40 pixels, over the limit of 2399"):
        load_image(data, max_pixels=2399)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit does not interfere
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data, max_pixels=2400).shape == (3, 40, 60)


def test_decoding_in_threads_leaves_the_warning_filters_alone():
    before = list(warnings.filters)
    files = [encode(NOISE, k) for k in ("PNG", "GIF", "TIFF", "JPEG")] * 10
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(load_image, files))) == 40
    assert warnings.filters == before


def test_missing_files_stay_oserrors(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(IsADirectoryError):
        load_image(tmp_path)


def test_check_images_names_the_problem():
    with pytest.raises(ValueError, match="batch dimension"):
        check_images(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="divide by 255"):
        check_images(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert float(check_images(torch.full((1, 3, 2, 2), 1 + 5e-7)).max()) == 1.0


# --- fuzzing ----------------------------------------------------------------------------------

_exif = Image.Exif()
_exif[0x0112] = 6
SEEDS = [
    encode(smooth(12, 16), "JPEG", exif=_exif),
    encode(smooth(12, 16), "JPEG", progressive=True),
    encode(Image.fromarray(smooth(12, 16)).convert("CMYK"), "JPEG"),
    encode(smooth(12, 16), "PNG", exif=_exif),
    png(4, 3, 16, 6, RNG.integers(0, 65536, (3, 4, 4), dtype=np.uint16)),
    encode(Image.fromarray(smooth(12, 16)).quantize(8), "GIF", transparency=1),
    encode(smooth(12, 16), "WEBP"),
    encode(smooth(12, 16), "WEBP", lossless=True),
    encode(smooth(12, 16), "TIFF", compression="tiff_lzw"),
    encode(smooth(12, 16), "TIFF", compression="tiff_adobe_deflate"),
    tiff16(RNG.integers(0, 65536, (3, 4, 3), dtype=np.uint16), ">"),
    encode(smooth(12, 16), "BMP"),
    encode(Image.fromarray(smooth(12, 16)).convert("RGBA"), "PNG"),
]


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    st.sampled_from(SEEDS),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    st.booleans(),
)
def test_fuzz(tmp_path_factory, data, keep, flips, on_disk):
    """Cut off and flipped anywhere: an image in [0, 1] or an ImageError, nothing else."""
    damaged = bytearray(data[: max(1, round(keep * len(data)))] if not flips else data)
    for where, mask in flips:
        damaged[int(where * len(damaged))] ^= mask
    source: bytes | Path = bytes(damaged)
    if on_disk:
        source = tmp_path_factory.getbasetemp() / f"fuzz-{os.getpid()}.jpg"
        source.write_bytes(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            x = load_image(source, max_pixels=100_000)
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            check_images(x[None])
