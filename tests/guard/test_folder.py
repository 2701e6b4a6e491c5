"""Folders in, folders out: names, resuming, broken files, kills."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pair import cli
from pair.commands.purify import _bar, _shares
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.guard import pipeline
from pair.guard.folder import Summary, fingerprint, purify_folder
from pair.guard.pipeline import image_seed
from pair.guard.plan import output_name
from pair.images import load_image, resize, save_image
from pair.purifier import Purifier

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = GeneratorConfig(
        image_size=32, patch_size=8, width=32, depth=1, heads=2,
        decoder_width=32, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    Purifier(MaskedAutoencoder(config)).save_pretrained(folder)
    return folder


@pytest.fixture
def purifier(model) -> Purifier:
    return Purifier.from_pretrained(model)


def encode(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options) -> bytes:
    array = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(array).convert(mode).save(out, kind, **options)
    return out.getvalue()


def photos(folder: Path, names: list[str]) -> Path:
    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".gif": "GIF",
             ".tif": "TIFF", ".bmp": "BMP"}  # fmt: skip
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(kinds[path.suffix.lower()]))
    return folder


def bomb() -> bytes:
    def chunk(data: bytes) -> bytes:
        return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))

    header = chunk(b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT" + zlib.compress(bytes(99)))


def broken_files() -> dict[str, bytes]:
    """20 files, all kinds."""
    kinds = {
        "empty.jpg": b"",
        "words.png": b"no picture",
        "noise.webp": RNG.bytes(999),
        "bomb.png": bomb(),
        "head.jpg": encode("JPEG")[:30],
        "cut.jpg": encode("JPEG")[:-200],
        "cut.png": encode("PNG")[:-200],
        "cut.webp": encode("WEBP")[:-200],
        "cut.gif": encode("GIF")[:-200],
        "cut.tif": encode("TIFF", compression="tiff_lzw")[:-200],
        "cut.bmp": encode("BMP")[:-200],
        "cmyk.jpg": encode("JPEG", "CMYK")[:-300],
        "phone.heic": b"\0\0\0\x18ftypheic" + bytes(60),
        "new.avif": b"\0\0\0\x18ftypavif" + bytes(60),
        "int.tif": encode("TIFF", "I"),
        "page.jpg": b"<!doctype html><html>",
        "one.jpg": b"\xff",
        "paper.png": b"%PDF-1.7" + bytes(60),
        "void.bmp": b"BM",
        "wide.bmp": b"BM" + struct.pack("<IIIIii", 0, 0, 54, 40, 2_000_000, 1) + bytes(30),
    }
    assert len(kinds) == 20
    return kinds


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def results(folder: Path) -> dict[str, bytes]:
    """The purified files; nothing half-written may lie among them."""
    files = {n: (folder / n).read_bytes() for n in tree(folder)}
    assert not [n for n in files if "partial" in n]
    return {n: b for n, b in files.items() if n not in ("purify.json", "failures.jsonl")}


def times(folder: Path) -> dict[str, int]:
    return {n: (folder / n).stat().st_mtime_ns for n in results(folder)}


def failures(folder: Path) -> dict[str, str]:
    lines = (folder / "failures.jsonl").read_text().splitlines()
    return {Path(row["path"]).name: row["reason"] for row in map(json.loads, lines)}


def command(monkeypatch, *args: object) -> int:
    """Exit code of ``pair purify ...`` in this process."""
    monkeypatch.setattr(sys, "argv", ["pair", "purify", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code  # type: ignore[return-value]


# --- names ------------------------------------------------------------------------------------


def test_the_tree_is_kept(tmp_path, purifier):
    source = photos(tmp_path / "in", ["a.jpg", "b/c.PNG", "b/d/e.webp", "b/f.jpeg"])
    (source / "notes.txt").write_text("not an image")
    seen: list[Summary] = []
    out = tmp_path / "new" / "out"
    summary = purify_folder(
        [source], out, purifier, batch_size=2, progress=lambda s: seen.append(replace(s))
    )
    assert tree(out) == ["a.jpg", "b/c.PNG", "b/d/e.webp", "b/f.jpeg", "purify.json"]
    assert (summary.found, summary.purified, summary.ignored, summary.failed) == (4, 4, 1, 0)
    assert not summary.stopped
    assert [s.finished for s in seen] == [0, 2, 4]
    assert {tuple(load_image(out / n).shape) for n in results(out)} == {(3, 32, 32)}
    for name in results(out):  # the promised format, not only its name
        with Image.open(out / name) as picture:
            assert picture.format in output_name(name).upper().replace("JPG", "JPEG")


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("keep", ["a.jpg", "a.png", "b.gif.png", "b.tif.png", "c.webp"]),
        ("png", ["a.jpg.png", "a.png", "b.gif.png", "b.tif.png", "c.webp.png"]),
        ("jpg", ["a.jpg", "a.png.jpg", "b.gif.jpg", "b.tif.jpg", "c.webp.jpg"]),
        ("webp", ["a.jpg.webp", "a.png.webp", "b.gif.webp", "b.tif.webp", "c.webp"]),
    ],
)
def test_inputs_never_share_an_output(tmp_path, purifier, format, expected):
    source = photos(tmp_path / "in", ["a.png", "a.jpg", "b.gif", "b.tif", "c.webp"])
    purify_folder([source], tmp_path / "out", purifier, format=format)
    assert sorted(results(tmp_path / "out")) == expected


_SUFFIXES = st.sampled_from([".jpg", ".JPG", ".png", ".gif", ".webp", ".tif"])
_names = st.lists(_SUFFIXES | st.just("a"), max_size=3).flatmap(
    lambda parts: _SUFFIXES.map(lambda suffix: "".join(["x", *parts, suffix]))
)


@given(st.sampled_from(["keep", "png", "jpg", "webp"]), st.sets(_names, max_size=30))
def test_output_names_are_one_to_one(format, names):
    outputs = {output_name(n, format) for n in names}
    assert len(outputs) == len(names)
    suffixes = {"keep": (".jpg", ".png", ".webp")}.get(format, (f".{format}",))
    assert all(n.lower().endswith(suffixes) for n in outputs)


def test_several_paths_share_their_common_folder(tmp_path, purifier):
    photos(tmp_path, ["in/a/x.png", "in/b/x.png", "in/y.png", "in/z.png"])
    paths = [tmp_path / "in" / p for p in ("a", "b", "y.png", "a/x.png")]
    summary = purify_folder(paths, tmp_path / "out", purifier)
    assert summary.found == 3
    assert sorted(results(tmp_path / "out")) == ["a/x.png", "b/x.png", "y.png"]


def test_out_inside_the_input_is_not_input(tmp_path, purifier):
    source = photos(tmp_path / "in", ["a.png", "b/c.png"])
    for skipped in (0, 2):
        summary = purify_folder([source], source / "clean", purifier)
        assert (summary.found, summary.skipped) == (2, skipped)
    assert sorted(results(source / "clean")) == ["a.png", "b/c.png"]


def test_outputs_never_land_among_the_inputs(tmp_path, purifier):
    source = photos(tmp_path / "in", ["a.png", "in/b.png"])
    before = results(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(source)
    for paths, out in [
        ([source], source), ([source], tmp_path), ([link], source), ([source], link),
        ([source / "a.png"], source), ([source / "in"], source / "in"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="would land among the inputs"):
            purify_folder(paths, out, purifier, overwrite=True)
    link.unlink()
    assert results(tmp_path) == before
    summary = purify_folder([source / "in"], tmp_path, purifier)  # beside the input: fine
    assert (summary.purified, (tmp_path / "b.png").is_file()) == (1, True)


# --- what is computed --------------------------------------------------------------------------


def test_outputs_are_what_the_purifier_computes(tmp_path, purifier):
    source = photos(tmp_path / "in", ["a.png", "b/c.jpg", "d.webp"])
    purify_folder([source], tmp_path / "out", purifier, seed=7, batch_size=2, format="png")
    for name in ("a.png", "b/c.jpg", "d.webp"):
        x = resize(load_image(source / name)[None], 32)
        generator = torch.Generator().manual_seed(image_seed(7, name))
        with torch.no_grad():
            expected = purifier(x, generator=generator)[0]
        got = load_image(tmp_path / "out" / output_name(name, "png"))
        assert (got - expected).abs().max() < 0.5 / 255 + 1e-5


def test_restore_size_gives_the_upright_size(tmp_path, model):
    purifier = Purifier.from_pretrained(model, restore_size=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encode("JPEG", size=(50, 20), exif=exif))
    (tmp_path / "in" / "b.png").write_bytes(encode("PNG", size=(1, 1)))
    purify_folder([tmp_path / "in"], tmp_path / "out", purifier)
    assert tuple(load_image(tmp_path / "out" / "a.jpg").shape) == (3, 50, 20)
    assert tuple(load_image(tmp_path / "out" / "b.png").shape) == (3, 1, 1)


def test_masks_are_secret_by_default_and_repeatable_with_a_seed(tmp_path, model):
    source = photos(tmp_path / "in", ["a.png", "b.png"])
    shutil.copy(source / "a.png", source / "b.png")  # same picture, other name
    for preset in (None, "paper", "released"):
        purifier = Purifier.from_pretrained(model, **({"preset": preset} if preset else {}))
        outs = []
        for i, seed in enumerate([None, None, 5, 5, 6]):
            purify_folder([source], tmp_path / f"{preset}{i}", purifier, seed=seed)
            outs.append(results(tmp_path / f"{preset}{i}"))
            assert outs[-1]["a.png"] != outs[-1]["b.png"]
        assert outs[0] != outs[1]
        assert outs[2] == outs[3] != outs[4]


def test_fingerprint_sees_every_weight(purifier):
    before = fingerprint(purifier)
    assert before == fingerprint(purifier)
    with torch.no_grad():
        list(purifier.parameters())[-1].view(-1)[-1] += 1e-6
    assert fingerprint(purifier) != before


# --- again and again ---------------------------------------------------------------------------


def test_the_progress_line_fits_80_columns(monkeypatch):
    import rich.console

    out, console = io.StringIO(), rich.console.Console
    options = {"file": out, "force_terminal": True, "width": 80, "color_system": None}
    monkeypatch.setattr(rich.console, "Console", lambda **_: console(**options))
    with _bar() as show:
        show(Summary(1200, purified=1200))
    last = [line for line in re.split(r"[\r\n]+", out.getvalue()) if "1200" in line][-1]
    assert "1200/1200 0:00:00 left, " in last and "images/s" in last


def test_a_second_run_does_only_what_is_missing(tmp_path, purifier):
    source, out = photos(tmp_path / "in", [f"{i}.png" for i in range(9)]), tmp_path / "out"
    future = time.time() + 1e6
    os.utime(source / "8.png", (future, future))  # a camera with a wrong clock
    purify_folder([source], out, purifier, seed=1, batch_size=4)
    before, old = results(out), times(out)
    summary = purify_folder([source], out, purifier, seed=1, batch_size=4)
    assert (summary.skipped, summary.purified, times(out)) == (9, 0, old)

    (out / "2.png").unlink()
    (out / "6.png").unlink()
    soon = time.time() + 5
    os.utime(source / "4.png", (soon, soon))  # changed after it was purified
    summary = purify_folder([source], out, purifier, seed=1, batch_size=4)
    assert (summary.skipped, summary.purified) == (6, 3)
    assert results(out) == before
    assert {n for n, t in times(out).items() if t != old[n]} == {"2.png", "4.png", "6.png"}

    photos(source, ["new/x.png"])
    summary = purify_folder([source], out, purifier, seed=1, batch_size=4)
    assert (summary.skipped, summary.purified) == (9, 1)


def test_other_settings_are_refused(tmp_path, purifier, model):
    source, out = photos(tmp_path / "in", ["a.png", "b.gif"]), tmp_path / "out"
    purify_folder([source], out, purifier, seed=1)
    before = results(out)
    paper = Purifier.from_pretrained(model, preset="paper")
    large = Purifier.from_pretrained(model, restore_size=True)
    for use, options, named in [
        (purifier, {"seed": 2}, "another seed:"),
        (purifier, {}, "another seed:"),
        (purifier, {"seed": 1, "format": "jpg"}, "another output format:"),
        (paper, {"seed": 1}, "another purifier:"),
        (large, {}, "another restore size and seed:"),
    ]:
        with pytest.raises(ValueError, match=named):
            purify_folder([source], out, use, **options)
    other = photos(tmp_path / "other", ["a.png"])
    with pytest.raises(ValueError, match="another input:"):  # would pass for done
        purify_folder([other], out, purifier, seed=1)
    assert results(out) == before
    moved = tmp_path / "moved"
    moved.mkdir()
    source.rename(moved / "in")
    out.rename(moved / "out")
    assert purify_folder([moved / "in"], moved / "out", purifier, seed=1).skipped == 2


def test_foreign_files_are_not_taken_for_results(tmp_path, purifier):
    source, out = photos(tmp_path / "in", ["a.png"]), photos(tmp_path / "out", ["a.png", "z.png"])
    before = results(out)
    with pytest.raises(ValueError, match="not from 'pair purify'"):
        purify_folder([source], out, purifier)
    assert tree(out) == ["a.png", "z.png"]
    purify_folder([source], out, purifier, overwrite=True)
    assert results(out)["a.png"] != before["a.png"]
    assert results(out)["z.png"] == before["z.png"]


def test_overwrite_does_everything_again_and_resumes(tmp_path, purifier):
    source, out = photos(tmp_path / "in", [f"{i}.png" for i in range(6)]), tmp_path / "out"
    purify_folder([source], out, purifier, seed=1)
    state = Summary()

    def watch(summary: Summary) -> None:
        state.purified = summary.purified

    summary = purify_folder(
        [source], out, purifier, seed=2, overwrite=True, batch_size=1,
        progress=watch, stop=lambda: state.purified >= 2,
    )  # fmt: skip
    assert summary.stopped and 2 <= summary.purified < 6
    rest = purify_folder([source], out, purifier, seed=2, batch_size=1)
    assert rest.skipped == summary.purified  # what the first seed made does not count
    purify_folder([source], tmp_path / "fresh", purifier, seed=2, batch_size=1)
    assert results(out) == results(tmp_path / "fresh")
    assert purify_folder([source], out, purifier, seed=2, overwrite=True).purified == 6


def test_a_damaged_record_is_reported(tmp_path, purifier):
    source, out = photos(tmp_path / "in", ["a.png"]), tmp_path / "out"
    purify_folder([source], out, purifier)
    for text in ("{", "[]", '{"input": "../in"}'):
        (out / "purify.json").write_text(text)
        with pytest.raises(ValueError, match=r"purify\.json is damaged"):
            purify_folder([source], out, purifier)
    assert purify_folder([source], out, purifier, overwrite=True).purified == 1


# --- what fails --------------------------------------------------------------------------------


def test_broken_files_are_listed_and_the_rest_goes_on(tmp_path, purifier):
    source, out = photos(tmp_path / "in", [f"{i}.jpg" for i in range(5)]), tmp_path / "out"
    for name, data in broken_files().items():
        (source / name).write_bytes(data)
    (source / "gone.jpg").symlink_to(source / "nowhere.jpg")
    os.mkfifo(source / "pipe.jpg")
    (source / "folder.jpg").mkdir()  # a folder, whatever it is called
    (source / "readme.md").write_text("")
    for _ in range(2):  # they are tried again, and listed once
        summary = purify_folder([source], out, purifier, batch_size=4)
        assert (summary.found, summary.failed, summary.ignored) == (27, 22, 1)
        listed = failures(out)
        assert listed.keys() == {*broken_files(), "gone.jpg", "pipe.jpg"}
        assert len((out / "failures.jsonl").read_text().splitlines()) == 22
    assert listed["empty.jpg"] == "the file is empty"
    assert listed["bomb.png"].startswith("the picture has 60000 x 60000 pixels")
    assert listed["pipe.jpg"] == "this is not a regular file"
    assert listed["gone.jpg"] == "the file cannot be read: No such file or directory"
    assert all("\n" not in r and "Errno" not in r and str(source) not in r for r in listed.values())
    assert sorted(results(out)) == [f"{i}.jpg" for i in range(5)]
    for name in listed:
        (source / name).unlink()
    assert purify_folder([source], out, purifier).failed == 0
    assert not (out / "failures.jsonl").exists()


def test_one_output_that_cannot_be_written_fails_alone(tmp_path, purifier):
    source = photos(tmp_path / "in", ["a.png", "b/c.png"])
    long = "x" * 251 + ".gif"  # 255 bytes are allowed, ".png" is appended
    photos(source, [long])
    out = tmp_path / "out"
    out.mkdir()
    (out / "b").write_text("a file where a folder is needed")
    summary = purify_folder([source], out, purifier)
    assert (summary.purified, summary.failed) == (1, 2)
    assert failures(out)["c.png"].endswith("out/b: File exists")
    assert failures(out)[long].endswith("File name too long")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_the_run_and_a_later_one_continues(tmp_path, purifier, monkeypatch, code):
    source, out = photos(tmp_path / "in", [f"{i}.png" for i in range(12)]), tmp_path / "out"
    calls = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("pair.files.os.fsync", fsync)
    with pytest.raises(OSError, match=rf"^cannot write .*/\d\.png: {os.strerror(code)}$"):
        purify_folder([source], out, purifier, seed=1, batch_size=2)
    monkeypatch.undo()
    kept = times(out)
    assert len(kept) == 5  # the first of six writes was the record
    assert purify_folder([source], out, purifier, seed=1, batch_size=2).skipped == 5
    assert kept.items() <= times(out).items()
    purify_folder([source], tmp_path / "fresh", purifier, seed=1, batch_size=2)
    assert results(out) == results(tmp_path / "fresh")


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder of ours, with root's power over permissions set aside."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    root = os.geteuid() == 0
    try:
        if root:
            os.chown(folder, 65_534, -1)
            os.seteuid(65_534)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o700)
        shutil.rmtree(folder)


def test_permissions(purifier):
    with unprivileged() as folder:
        source = photos(folder / "in", ["a.png", "b/c.png", "d.png"])
        (source / "b").chmod(0)
        (source / "d.png").chmod(0)
        out = folder / "out"
        summary = purify_folder([source], out, purifier)
        assert (summary.found, summary.purified, summary.failed) == (3, 1, 2)
        assert failures(out) == {
            "b": "the folder cannot be read: Permission denied",
            "d.png": "the file cannot be read: Permission denied",
        }
        (folder / "shut").mkdir(mode=0o500)
        for target in (folder / "shut", folder / "shut" / "new"):
            with pytest.raises(OSError, match=r"^cannot write .*: Permission denied$"):
                purify_folder([source / "a.png"], target, purifier)


def test_one_writer_at_a_time(tmp_path, purifier):
    source, out = photos(tmp_path / "in", ["a.png"]), tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another 'pair purify' is writing"):
        purify_folder([source], out, purifier)
    os.close(handle)
    assert purify_folder([source], out, purifier).purified == 1


# --- the command -------------------------------------------------------------------------------


def test_command_exit_codes_and_summary(tmp_path, model, monkeypatch, capsys):
    source, out = photos(tmp_path / "in", ["a.png", "b.jpg"]), tmp_path / "out"
    (source / "c.txt").write_text("")
    base = [source, "--out", out, "--model", model, "--batch-size", 2]
    assert command(monkeypatch, *base) == 0
    assert capsys.readouterr().out == (
        "2 purified, 0 already done, 1 other files ignored, 0 failed\n"
    )
    (source / "bad.jpg").write_bytes(b"")
    assert command(monkeypatch, *base) == 1
    assert capsys.readouterr().out.startswith("0 purified, 2 already done")
    assert command(monkeypatch, source / "c.txt", "--out", tmp_path / "o2", "--model", model) == 1
    assert "no image suffix" in failures(tmp_path / "o2")["c.txt"]
    shutil.copy(source / "a.png", source / "a")  # its output is not that of "a.png"
    assert command(monkeypatch, source, source / "a", *base[1:]) == 1
    assert "no image suffix" in failures(out)["a"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "no such file or folder"),
        (["{in}", "missing.jpg"], "no such file or folder"),
        (["{empty}"], "no image found in"),
        (["{in}", "--model", "no-such-model"], "no model 'no-such-model'"),
        (["{in}", "--preset", "best"], "unknown preset 'best'"),
        (["{in}", "--format", "tiff"], "--format: 'tiff' is none of"),
        (["{in}", "--batch-size", "0"], "--batch-size"),
        (["{in}", "--batch-size", "many"], "--batch-size"),
        (["{in}", "--threads", "0"], "--threads"),
        (["{in}", "--seed", "x"], "--seed"),
        (["{in}", "--device", "abacus"], "--device: cannot compute on 'abacus'"),
        (["{in}", "--out", "{in}/a.png"], "is a file: the results need a folder"),
        (["{in}", "--out", "/dev/null/x"], "cannot write /dev/null/x: Not a directory"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    tmp_path, model, monkeypatch, capsys, args, message
):
    photos(tmp_path / "in", ["a.png"])
    (tmp_path / "empty").mkdir()
    places = {"in": tmp_path / "in", "empty": tmp_path / "empty"}
    args = [a.format(**places) for a in args]
    for name, value in (("--out", tmp_path / "out"), ("--model", model)):
        if name not in args:
            args += [name, str(value)]
    assert command(monkeypatch, *args) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert tree(tmp_path) == ["in/a.png"]


def start(source: Path, out: Path, model: Path, *more: str) -> subprocess.Popen:
    args = ["-m", "pair", "purify", str(source), "--out", str(out), "--model", str(model)]
    return subprocess.Popen(
        [sys.executable, *args, "--seed", "3", "--batch-size", "4", "--threads", "1", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def signal_when(process: subprocess.Popen, out: Path, number: int, wanted: int) -> None:
    """Send a signal as soon as there are ``wanted`` results."""
    while process.poll() is None and sum(1 for _ in out.glob("*/*")) < wanted:
        time.sleep(0.001)
    process.send_signal(number)


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """200 files in 4 folders: 20 broken, 180 good of all formats and modes."""
    source = tmp_path_factory.mktemp("collection")
    odd = [
        ("1.jpg", encode("JPEG", "CMYK")),
        ("2.png", encode("PNG", "LA")),
        ("3.png", encode("PNG", "P")),
        ("4.png", encode("PNG", "RGBA")),
        ("5.gif", encode("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))])),
        ("6.webp", encode("WEBP", size=(1, 1))),
        ("7.tif", encode("TIFF", "1")),
        ("8.bmp", encode("BMP")),
    ]
    good = [f"{i}.{('jpg', 'png', 'webp')[i % 3]}" for i in range(100, 272)]
    for i, (name, data) in enumerate([*odd, *broken_files().items()]):
        (source / str(i % 4)).mkdir(exist_ok=True)
        (source / str(i % 4) / name).write_bytes(data)
    photos(source, [f"{i % 4}/{name}" for i, name in enumerate(good)])
    assert len(tree(source)) == 200
    return source


@pytest.fixture(scope="module")
def undisturbed(collection, model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    process = start(collection, out, model)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert stdout.startswith("180 purified, 0 already done, 20 failed (see "), stdout
    assert stderr == ""
    assert failures(out).keys() == broken_files().keys()
    assert len(results(out)) == 180
    return out


def finish(collection: Path, out: Path, model: Path, undisturbed: Path) -> None:
    """What was interrupted is whole; a second run does the rest and nothing else."""
    early = {n: t for n in tree(out) if "/" in n and "partial" not in n
             for t in [(out / n).stat().st_mtime_ns]}  # fmt: skip
    for name in early:
        load_image(out / name)
    process = start(collection, out, model)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    made, done = 180 - len(early), len(early)
    assert stdout.startswith(f"{made} purified, {done} already done, 20 failed"), stdout
    assert early.items() <= times(out).items()  # nothing done twice
    assert results(out) == results(undisturbed)  # nothing lost, and the same bytes
    assert failures(out) == failures(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_from_outside(collection, undisturbed, model, tmp_path, number):
    for attempt in range(5):  # a machine that sleeps through the whole run gets another chance
        out = tmp_path / str(attempt)
        out.mkdir()
        process = start(collection, out, model)
        signal_when(process, out, number, 20)
        _, stderr = process.communicate(timeout=120)
        if process.returncode != 1:
            break
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + number, stderr
        assert stderr == "pair: stopped; run the same command again to continue\n"
        assert not list(out.rglob("*partial*"))
    assert 20 <= len(list(out.glob("*/*"))) < 180
    finish(collection, out, model, undisturbed)


@pytest.mark.parametrize("writers", [1, 4])
def test_killed_between_writing_and_renaming(collection, undisturbed, model, tmp_path, writers):
    code = (
        "import os, signal, sys\n"
        "import pair.files, pair.guard.folder\n"
        f"pair.guard.folder._WRITERS = {writers}\n"
        "from pair import cli\n"
        "real, calls = os.replace, []\n"
        "def replace(a, b):\n"
        "    calls.append(a)\n"
        "    if len(calls) == 60: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(a, b)\n"
        "os.replace = replace\n"
        "cli.main()\n"
    )
    args = ["purify", collection, "--out", tmp_path, "--model", model, "--seed", "3"]
    args += ["--batch-size", "4", "--threads", "1"]
    run = subprocess.run([sys.executable, "-c", code, *map(str, args)], check=False)
    assert run.returncode == -9
    held = len(list(tmp_path.rglob(".pair-*.partial")))
    done = len(list(tmp_path.glob("*/[!.]*")))
    if writers == 1:
        assert held == 1
        assert done == 58  # one of 59 was the record
    assert 1 <= held <= writers
    # The other writers may have been between writing and renaming too, or already renamed.
    assert 58 - (writers - 1) <= done <= 58
    finish(collection, tmp_path, model, undisturbed)


def test_time_is_accounted_for_where_it_goes(tmp_path, purifier, monkeypatch):
    """By a clock that only moves in the stages: 1 s to load, 10 to compute, 100 to write."""
    source, now = photos(tmp_path / "in", ["a.png"]), [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], time_ns=time.time_ns)
    monkeypatch.setattr("pair.guard.folder.time", clock)
    for name, cost in (("load", 1), ("compute", 10), ("write", 100)):
        real = getattr(pipeline, name)

        def timed(*args, real=real, cost=cost, **options):
            now[0] += cost
            return real(*args, **options)

        monkeypatch.setattr(f"pair.guard.folder.{name}", timed)
    summary = purify_folder([source], tmp_path / "out", purifier)
    assert summary.seconds == {"decode": 1, "purify": 10, "write": 100}
    assert _shares(summary) == "decode 1 %, purify 9 %, write 90 %"


def test_memory_does_not_grow_with_the_collection(tmp_path, purifier, monkeypatch):
    """The pipeline decodes a few batches ahead, not the whole folder."""
    source = photos(tmp_path / "in", [f"{i:02}.png" for i in range(40)])
    loaded, written, ahead = [0], [0], []
    real_save = save_image

    def decode(path, **options):
        from pair.decode import decode as real

        loaded[0] += 1
        ahead.append(loaded[0] - written[0])
        return real(path, **options)

    def save(*args, **options):
        time.sleep(0.02)  # a slow disk
        real_save(*args, **options)
        written[0] += 1

    monkeypatch.setattr("pair.guard.pipeline.decode", decode)
    monkeypatch.setattr("pair.guard.pipeline.save_image", save)
    assert purify_folder([source], tmp_path / "out", purifier, batch_size=2).purified == 40
    assert max(ahead) <= 2 * 6  # three waiting, one computed, two at the writer
