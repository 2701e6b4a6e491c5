"""What a file claims to be, and how many frames it holds, without decoding anything.

Pillow counts the frames of a GIF or TIFF by walking all of them, at the pace the file's author
chose. These walks read markers only, and stop at the limit.
"""

from __future__ import annotations

import struct

KINDS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"BM": "BMP",
}


def kind(data: bytes) -> str | None:
    """The format that the first bytes announce, one of those that pair.decode reads."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for mark, name in KINDS.items() if data.startswith(mark)), None)


def frames(data: bytes, limit: int) -> int:
    """Frames of a picture file, counted no further than ``limit + 1``; damage counts as an end."""
    walk = {"GIF": _gif, "TIFF": _tiff, "PNG": _png, "WEBP": _webp}.get(kind(data) or "")
    if walk is None:
        return 1
    try:
        return max(1, walk(data, limit + 1))
    except (IndexError, struct.error):
        return 1  # whether that much of it is a picture is for the decoder to say


def _gif(data: bytes, stop: int) -> int:
    def table(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    at, count = 13 + table(data[10]), 0
    while at < len(data) and count < stop:
        if data[at] == 0x2C:  # image descriptor
            count += 1
            at += 10 + table(data[at + 9]) + 1
        elif data[at] == 0x21:  # extension
            at += 2
        elif data[at] == 0x3B:
            break
        else:
            at += 1
            continue
        while at < len(data) and data[at]:  # sub-blocks
            at += data[at] + 1
        at += 1
    return count


def _tiff(data: bytes, stop: int) -> int:
    order = "<" if data[:2] == b"II" else ">"
    big = data[2] == 43 or data[3] == 43
    pointer, entry, number = ("Q", 20, "Q") if big else ("I", 12, "H")
    (at,) = struct.unpack_from(order + pointer, data, 8 if big else 4)
    count = 0
    while 0 < at < len(data) and count < stop:  # a circle of directories ends at the limit
        try:
            (entries,) = struct.unpack_from(order + number, data, at)
            after = at + struct.calcsize(number) + entry * entries
            (at,) = struct.unpack_from(order + pointer, data, after)
        except struct.error:
            return count + 1
        count += 1
    return count


def _png(data: bytes, stop: int) -> int:
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name = data[at + 4 : at + 8]
        if name == b"acTL":
            return min(stop, struct.unpack_from(">I", data, at + 8)[0])
        if name == b"IDAT":
            break
        at += 12 + length
    return 1


def _webp(data: bytes, stop: int) -> int:
    at, count = 12, 0
    while at + 8 <= len(data) and count < stop:
        (length,) = struct.unpack_from("<I", data, at + 4)
        count += data[at : at + 4] == b"ANMF"
        at += 8 + length + length % 2
    return count
