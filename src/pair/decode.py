"""Files into pixels, for files that nobody has checked.

A photo collection holds everything: cut-off downloads, print scans in CMYK, 16-bit greys, icons
of one pixel, bombs. Here each becomes upright RGB in [0, 1] or one :class:`ImageError` with one
sentence. What is decided on the way:

- transparency is composited on white, as a page shows it;
- 16-bit samples keep their precision where the format allows (grey, RGB and RGBA; others are
  read at 8 bits by Pillow);
- CMYK is converted without profile. JPEG stores it inverted (the Adobe convention, which all
  browsers assume), TIFF does not; Pillow knows both;
- of an animation the first frame counts;
- colour profiles and other metadata are ignored, except for the EXIF orientation.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from PIL import Image

from pair.picture import FLIPS, MODES_8, Picture

MAX_PIXELS = 2 * 89_478_485  # where Pillow itself starts to refuse
MAX_SIDE = 1_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
READABLE = "JPEG, PNG, WebP, GIF, TIFF and BMP"

# What people take for photos and this program does not read: (offset, signature) -> name.
_OTHERS = {
    (4, b"ftyphei"): "HEIC", (4, b"ftypmif"): "HEIF", (4, b"ftypavi"): "AVIF",
    (0, b"\0\0\0\x0cjP  "): "JPEG 2000", (0, b"\0\0\0\x0cJXL "): "JPEG XL",
    (0, b"8BPS"): "Photoshop", (0, b"%PDF"): "PDF", (0, b"\0\0\1\0"): "icon",
}  # fmt: skip
_ORIENTATION = 0x0112


class ImageError(ValueError):
    """A file that cannot become an image; ``reason`` is one sentence without the name."""

    def __init__(self, reason: str, name: str = "image"):
        super().__init__(reason, name)
        self.reason, self.name = reason, name

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Open and decode a file or its bytes.

    Raises :class:`ImageError` if this is no whole picture of a supported kind or has more than
    ``max_pixels`` pixels (known before any is decoded), and plain ``OSError`` if the file cannot
    be read at all.
    """
    if isinstance(source, bytes):
        stream, label = cast(BinaryIO, io.BytesIO(source)), "image"
    else:
        stream, label = open(source, "rb"), os.fspath(source)  # noqa: SIM115
    try:
        with stream, _QUIET:
            return _decode(stream, max_pixels)
    except _Refused as refused:
        raise ImageError(str(refused), label) from refused.__cause__
    except MemoryError as error:
        raise ImageError("there is not enough memory to decode this picture", label) from error


class _Refused(Exception):
    """A reason, before it has a name."""


def _decode(stream: BinaryIO, max_pixels: int) -> Picture:
    factory = _factory(stream.read(32))
    with _refusing("the file is damaged or cut off in its header"):
        main = _open(factory, stream)
        height, width = main.height, main.width
    if min(height, width) < 1:
        raise _Refused("the file is damaged: its picture has no pixels")
    if height * width > max_pixels or max(height, width) > MAX_SIDE:
        raise _Refused(
            f"the picture has {width} x {height} pixels, over the limit of {max_pixels} "
            f"({MAX_SIDE} per side): a decompression bomb, or scale it down first"
        )
    low_tiles = _low_byte_tiles(main)
    with _refusing("the file is cut off or damaged: its picture cannot be decoded to the end"):
        main.load()
        low = None
        if low_tiles:
            low = _open(factory, stream)
            low.tile = low_tiles
            low.load()
        if main.mode in ("I", "F"):
            _check_range(main)
        elif main.mode not in MODES_8 and not main.mode.startswith("I;16"):
            raise _Refused(f"pictures of colour mode {main.mode} are not supported")
    try:  # after load(): Pillow itself turns TIFF upright while loading
        orientation = main.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata around a good picture
        orientation = 1
    return Picture(main, low, orientation if orientation in FLIPS else 1)


def _factory(head: bytes) -> Any:
    """The reader for a file that begins with ``head``; names the kind of file otherwise."""
    if not head:
        raise _Refused("the file is empty")
    Image.init()
    for kind in FORMATS:
        factory, accept = Image.OPEN[kind]
        accepted = accept(head[:16]) if accept else False
        if isinstance(accepted, str):
            raise _Refused(f"this installation of Pillow cannot read {kind}: {accepted}")
        if accepted:
            return factory
    for (offset, signature), kind in _OTHERS.items():
        if head[offset:].startswith(signature):
            raise _Refused(f"{kind} files are not supported: convert it to one of {READABLE}")
    raise _Refused(f"this is not an image of a kind that can be read ({READABLE})")


def _open(factory: Any, stream: BinaryIO) -> Any:
    # The factory rather than Image.open: the pixel limit is ours (an argument, not a global),
    # and an unsupported kind is not offered to forty other parsers.
    stream.seek(0)
    return factory(stream, "")


def _low_byte_tiles(picture: Any) -> list | None:
    """Pillow keeps the high byte of 16-bit colour. Read with the opposite byte order, the same
    data gives the low byte: this returns what to decode for that, None where it does not apply."""
    native = "16B" if sys.byteorder == "little" else "16L"
    swapped = {"16B": "16L", "16L": "16B", "16N": native}
    tiles = []
    for tile in picture.tile:
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        colours, _, order = str(args[0]).partition(";")
        if colours not in ("RGB", "RGBA", "RGBX") or order not in swapped:
            return None
        other: Any = (f"{colours};{swapped[order]}", *args[1:])
        other = other if isinstance(tile[3], tuple) else other[0]
        tiles.append(tile._replace(args=other) if hasattr(tile, "_replace") else (*tile[:3], other))
    return tiles or None


def _check_range(picture: Image.Image) -> None:
    low, high = picture.getextrema()
    if picture.mode == "I" and picture.format != "PNG":
        raise _Refused("32-bit or signed integer pictures are not supported: save it as 16 bits")
    if picture.mode == "F" and not 0 <= low <= high <= 1:  # type: ignore[operator]
        raise _Refused("floating-point pictures must lie in [0, 1]: save it as 8 or 16 bits")


@contextmanager
def _refusing(reason: str) -> Iterator[None]:
    """Pillow's parsers raise nearly any exception on a damaged file."""
    try:
        yield
    except (_Refused, MemoryError):
        raise
    except OSError as error:
        # Seeking to a nonsensical place is EINVAL; other numbers mean the disk or the network.
        if error.errno not in (None, errno.EINVAL, errno.EOVERFLOW):
            raise
        raise _Refused(reason) from error
    except Exception as error:
        raise _Refused(reason) from error


class _Quiet:
    """No Pillow warnings while anyone is inside.

    Warning filters are global to the process and ``catch_warnings`` must not overlap between
    threads, so the first thread to enter sets the filter and the last to leave restores it.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.saved = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.saved = warnings.catch_warnings()
                self.saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.saved.__exit__(None, None, None)


_QUIET = _Quiet()
