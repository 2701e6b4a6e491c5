"""A corpus of malformed and malicious pictures and requests, made here, with the right answers."""

# ruff: noqa: E501 (tables of cases are read by line)

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from PIL import Image

from pair.images import to_pil

OK, BAD, KIND, CONTENT, LARGE = 200, 400, 415, 422, 413
EITHER = (200, 422)  # damage that a decoder may or may not notice
TRAVERSALS = (
    "../../../../tmp/escaped.png", "..\\..\\escaped.png", "/tmp/escaped.png", "C:\\escaped.png",
    "file:///tmp/escaped.png", "http://127.0.0.1:1/escaped.png", "~/escaped.png", "a\x00.png",
    "|touch escaped", "$(touch escaped)", "%2e%2e%2fescaped.png", "x" * 2000, "a\u202egnp.exe",
    "CON", ".", "", "'; DROP TABLE images; --",
)  # fmt: skip


class Picture(NamedTuple):
    """A body for /purify and the statuses that are right."""

    name: str
    data: bytes
    right: tuple[int, ...]


class Call(NamedTuple):
    """Arguments of httpx' ``request``."""

    name: str
    method: str
    path: str
    options: dict
    right: tuple[int, ...]


class Raw(NamedTuple):
    """Bytes on the socket."""

    name: str
    data: bytes
    right: tuple[int, ...]


def saved(format: str, mode: str = "RGB", size: tuple[int, int] = (48, 40), **options) -> bytes:
    noise = torch.rand(3, size[1], size[0], generator=torch.Generator().manual_seed(1))
    buffer = io.BytesIO()
    to_pil(noise).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


WHOLE = {
    "jpeg": lambda: saved("JPEG"),
    "progressive": lambda: saved("JPEG", progressive=True),
    "png": lambda: saved("PNG"),
    "gif": lambda: saved("GIF"),
    "tiff": lambda: saved("TIFF"),
    "tiff-deflate": lambda: saved("TIFF", compression="tiff_deflate"),
    "webp": lambda: saved("WEBP"),
    "webp-lossless": lambda: saved("WEBP", lossless=True),
    "bmp": lambda: saved("BMP"),
}


def chunk(name: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png_of(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


def gif_of(frames: int, width: int = 2, height: int = 2) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    one = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"
    return head + one * frames + b"\x3b"


def tiff_of(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    table = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", following)


def truncated() -> Iterator[Picture]:
    for name, make in WHOLE.items():
        data = make()
        for share in (0.12, 0.3, 0.5, 0.7, 0.85):
            yield Picture(f"{name} cut at {share}", data[: int(share * len(data))], (CONTENT,))
        yield Picture(f"{name} cut after its signature", data[:12], (CONTENT,))


def mutated() -> Iterator[Picture]:
    generator = torch.Generator().manual_seed(7)
    for name, make in WHOLE.items():
        for turn in range(5):
            data = bytearray(make())
            for place in torch.randint(
                14, len(data), (1 + 4 * turn,), generator=generator
            ).tolist():
                data[place] ^= 1 << (place % 8)
            yield Picture(f"{name} with {1 + 4 * turn} bits turned", bytes(data), EITHER)


def bombs() -> Iterator[Picture]:
    small = zlib.compress(bytes(3 * 4 * 4 + 4))
    for side in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (4_000_001, 1), (1, 4_000_001), (0, 5)):
        yield Picture(f"png of {side}", png_of(*side, chunk(b"IDAT", small)), (CONTENT,))
    huge = zlib.compress(bytes(200_000_000), 9)
    yield Picture("png that inflates to 200 MB", png_of(4, 4, chunk(b"IDAT", huge)), EITHER)
    text = chunk(b"zTXt", b"a\0\0" + huge)
    yield Picture("png with a text of 200 MB", png_of(4, 4, text, chunk(b"IDAT", small)), EITHER)
    profile = chunk(b"iCCP", b"a\0\0" + huge)
    yield Picture(
        "png with a profile of 200 MB", png_of(4, 4, profile, chunk(b"IDAT", small)), EITHER
    )
    many = chunk(b"tEXt", b"a\0b") * 20_000
    yield Picture("png with 20,000 texts", png_of(4, 4, many, chunk(b"IDAT", small)), EITHER)
    frames = chunk(b"acTL", struct.pack(">II", 10**9, 0))
    yield Picture("png of 10^9 frames", png_of(4, 4, frames, chunk(b"IDAT", small)), (CONTENT,))
    yield Picture("gif of 65535 squared", gif_of(1, 65535, 65535), (CONTENT,))
    yield Picture("gif of 100,000 frames", gif_of(100_000), (CONTENT,))
    yield Picture("gif of 17 frames", gif_of(17), (CONTENT,))
    yield Picture("gif without a picture", gif_of(0), (CONTENT,))
    bmp = bytearray(saved("BMP"))
    for width, height in ((2**31 - 1, 1), (30_000, 30_000), (-5, 5), (0, 0), (5, -(2**31))):
        bmp[18:26] = struct.pack("<ii", width, height)
        yield Picture(f"bmp of {width} x {height}", bytes(bmp), (CONTENT,))
    jpeg = bytearray(saved("JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    yield Picture("jpeg of 65500 squared", bytes(jpeg), (CONTENT,))
    jpeg[at : at + 4] = struct.pack(">HH", 0, 0)
    yield Picture("jpeg of nothing", bytes(jpeg), (CONTENT,))
    shape = [(256, 4, 1, 10**6), (257, 4, 1, 10**6), (258, 3, 1, 8), (262, 3, 1, 1)]
    yield Picture("tiff of 10^12 pixels", tiff_of(shape), (CONTENT,))
    tiny = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (262, 3, 1, 1)]
    yield Picture("tiff in a circle", tiff_of(tiny, 8), (CONTENT,))
    yield Picture("tiff without data", tiff_of(tiny), (CONTENT,))
    strips = [*tiny, (273, 4, 2**31 - 1, 8), (279, 4, 2**31 - 1, 8)]
    yield Picture("tiff with 2^31 strips", tiff_of(strips), (CONTENT,))
    outside = [*tiny, (273, 4, 1, 2**32 - 1), (279, 4, 1, 16)]
    yield Picture("tiff with data outside", tiff_of(outside), (CONTENT,))
    big = saved("WEBP", size=(3000, 3000), lossless=True)[:60]
    yield Picture("webp of 9 megapixels, cut", big, (CONTENT,))
    anim = b"".join(b"ANMF" + struct.pack("<I", 16) + bytes(16) for _ in range(99))
    riff = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02" + bytes(9) + anim
    yield Picture("webp of 99 frames", b"RIFF" + struct.pack("<I", len(riff)) + riff, (CONTENT,))


def wrong_kinds() -> Iterator[Picture]:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", bytes(1_000_000))
    yield from (
        Picture(name, data, (KIND,))
        for name, data in {
            "nothing": b"",
            "one byte": b"\xff",
            "zeros": bytes(1000),
            "html": b"<html><script>alert(1)</script></html>",
            "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            "xml bomb": b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><x>&b;</x>',
            "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run quit\n",
            "pdf": b"%PDF-1.7\n1 0 obj\n",
            "photoshop": b"8BPS\0\1" + bytes(50),
            "icon": b"\0\0\1\0\1\0" + bytes(30),
            "heic": b"\0\0\0\x18ftypheic" + bytes(40),
            "avif": b"\0\0\0\x18ftypavif" + bytes(40),
            "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
            "ppm": b"P6 4 4 255 " + bytes(48),
            "xbm": b"#define x_width 8\n#define x_height 8\nstatic char x_bits[] = {0};",
            "pcx": b"\x0a\x05\x01\x08" + bytes(200),
            "tga": bytes(2) + b"\2" + bytes(100),
            "icns": b"icns" + bytes(100),
            "dds": b"DDS " + bytes(150),
            "fli": bytes(4) + b"\x11\xaf" + bytes(200),
            "zip": packed.getvalue(),
            "gzip bomb": gzip.compress(bytes(10_000_000)),
            "executable": b"\x7fELF" + bytes(200),
            "pickle": b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93.",
            "script": b"#!/bin/sh\nrm -rf /\n",
            "an address": b"http://169.254.169.254/latest/meta-data/",
            "a path": b"/etc/passwd",
            "riff sound": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
            "mp4": b"\0\0\0\x20ftypisom" + bytes(40),
            "html before a jpeg": b"<html>" + saved("JPEG"),
        }.items()
    )


def polyglots() -> Iterator[Picture]:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../escaped", b"x")
    script = b"<?php system($_GET[0]); ?><script>alert(1)</script>"
    for name, make in WHOLE.items():
        yield Picture(f"{name} with a zip behind it", make() + packed.getvalue(), (OK,))
        yield Picture(f"{name} with a script behind it", make() + script, (OK,))
    yield Picture("gif as a script", gif_of(1)[:-1] + b"\x21\xfe\x0b/*alert(1)*\0;", EITHER)
    yield Picture("bitmap by name only", b"BM" + script, (CONTENT,))
    yield Picture("gif by name only", b"GIF89a=1;" + script, (CONTENT,))
    yield Picture("two jpegs", saved("JPEG") + saved("JPEG"), (OK,))
    comment = saved("JPEG", comment=script)
    yield Picture("jpeg with a script as comment", comment, (OK,))


def unusual() -> Iterator[Picture]:
    exif = Image.Exif()
    exif[0x0112] = 99
    for name, data in {
        "cmyk": saved("JPEG", "CMYK"),
        "grey": saved("PNG", "L"),
        "one bit": saved("PNG", "1"),
        "palette": saved("PNG", "P"),
        "transparent": saved("PNG", "RGBA"),
        "sixteen bits": saved("PNG", "I;16"),
        "one pixel": saved("PNG", size=(1, 1)),
        "a line": saved("PNG", size=(20_000, 1)),
        "a column": saved("PNG", size=(1, 20_000)),
        "impossible orientation": saved("JPEG", exif=exif),
        "broken exif": saved("JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20)),
        "long exif": saved("JPEG", exif=b"Exif\0\0" + b"\xff" * 60_000),
    }.items():
        yield Picture(name, data, (OK,))


def pictures() -> list[Picture]:
    parts = (truncated, mutated, bombs, wrong_kinds, polyglots, unusual)
    return [picture for part in parts for picture in part()]


def form(name: str = "image", filename: str = "x", data: bytes | None = None) -> dict:
    data = saved("PNG") if data is None else data
    head = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"'
    body = b"--B\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n--B--\r\n"
    return {"content": body, "headers": {"content-type": "multipart/form-data; boundary=B"}}


def forms() -> Iterator[Call]:
    good = form()
    for name in TRAVERSALS:
        yield Call(f"file name {name[:20]!r}", "POST", "/purify", form(filename=name), (200, 400))
    odd = {
        "no boundary": ({**good, "headers": {"content-type": "multipart/form-data"}}, BAD),
        "another boundary": (
            {**good, "headers": {"content-type": "multipart/form-data; boundary=C"}}, BAD),
        "a boundary of 10 KB": (
            {**good, "headers": {"content-type": f"multipart/form-data; boundary={'B' * 9999}"}}, BAD),
        "an empty form": ({**good, "content": b"--B--\r\n"}, (BAD, CONTENT)),
        "no body": ({**good, "content": b""}, BAD),
        "cut off": ({**good, "content": good["content"][:-9]}, BAD),
        "cut in its head": ({**good, "content": good["content"][:30]}, BAD),
        "another field": (form("file"), CONTENT),
        "a field with an address": (form("url", data=b"http://127.0.0.1/"), CONTENT),
        "a field with a path": (form("path", data=b"/etc/passwd"), CONTENT),
        "an empty picture": (form(data=b""), KIND),
        "text as picture": (form(data=b"hello"), KIND),
        "a form in a form": (form(data=good["content"]), KIND),
        "garbage": ({**good, "content": bytes(range(256)) * 20}, BAD),
        "a name that is not UTF-8": (
            {**good, "content": good["content"].replace(b'"image"', b'"\xff\xfe"')}, CONTENT),
        "no name": ({**good, "content": good["content"].replace(b'name="image"; ', b"")}, CONTENT),
        "a head of 1 MB": (
            {**good, "content": good["content"].replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 10**6 + b"\r\n\r\n", 1)},
            BAD),
        "10,000 heads": (
            {**good, "content": good["content"].replace(b"\r\n\r\n", b"\r\nX: y" * 10_000 + b"\r\n\r\n", 1)},
            BAD),
    }  # fmt: skip
    for name, (options, right) in odd.items():
        answers = right if isinstance(right, tuple) else (right,)
        yield Call(f"form: {name}", "POST", "/purify", options, answers)
    part = good["content"].removesuffix(b"--B--\r\n")
    for count, right in ((4, OK), (5, LARGE), (1000, LARGE)):
        options = {**good, "content": part * count + b"--B--\r\n"}
        yield Call(f"form: {count} pictures", "POST", "/purify", options, (right,))
    options = {**good, "content": part * 2 + b"--B--\r\n"}
    yield Call("search by two pictures", "POST", "/search/image", options, (LARGE,))


def texts() -> Iterator[Call]:
    """JSON for /search/text."""
    kind = {"content-type": "application/json"}
    deep = b"[" * 30_000 + b"]" * 30_000
    bodies = {
        "nothing": (b"", BAD),
        "not json": (b"query=laptop", BAD),
        "cut off": (b'{"query": "lap', BAD),
        "bad utf-8": (b'{"query": "\xff\xfe"}', BAD),
        "overlong utf-8": (b'{"query": "\xc0\xaf"}', BAD),
        "utf-16": ('{"query": "x"}'.encode("utf-16"), BAD),
        "byte order mark": (b'\xef\xbb\xbf{"query": "x"}', BAD),
        "30,000 brackets": (deep, BAD),
        "nan": (b'{"query": "x", "k": NaN}', BAD),
        "infinity": (b'{"query": "x", "k": -Infinity}', BAD),
        "zeros behind": (b'{"query": "x"}' + bytes(10), BAD),
        "two objects": (b'{"query": "x"}{"query": "y"}', BAD),
        "100 KB": (json.dumps({"query": "x" * 100_000}).encode(), LARGE),
        "3 MB of spaces": (b" " * 3_000_000, LARGE),
        "5 MB of spaces": (b" " * 5_000_000, LARGE),
        "a list": (b"[]", CONTENT),
        "null": (b"null", CONTENT),
        "a number": (b"1", CONTENT),
        "a number of 60,000 digits": (b'{"query": "x", "k": ' + b"9" * 60_000 + b"}", CONTENT),
        "1e400": (b'{"query": "x", "k": 1e400}', CONTENT),
        "lone surrogate": (b'{"query": "\\ud800"}', CONTENT),
        "nul": (b'{"query": "a\\u0000b"}', CONTENT),
        "escape codes": (b'{"query": "\\u001b[2J"}', CONTENT),
        "spaces": (b'{"query": "   "}', CONTENT),
        "empty": (b'{"query": ""}', CONTENT),
        "an object as query": (b'{"query": {"$gt": ""}}', CONTENT),
        "a list as query": (b'{"query": ["a", "b"]}', CONTENT),
        "513 characters": (json.dumps({"query": "x" * 513}).encode(), CONTENT),
        "a key twice": (b'{"query": "x", "query": "y"}', OK),
        "right to left": ('{"query": "\u05d0 cat"}'.encode(), OK),
        "unknown words": (b'{"query": "qwxz"}', OK),
        "an emoji": ('{"query": "\U0001f431"}'.encode(), OK),
    }
    for name, (body, right) in bodies.items():
        options = {"content": body, "headers": kind}
        yield Call(f"json: {name}", "POST", "/search/text", options, (right,))
    settings: list[dict] = [
        {"k": 0}, {"k": -1}, {"k": 101}, {"k": 2**63}, {"k": "10"}, {"k": 1.5}, {"k": True},
        {"k": None}, {"k": []}, {"defend": "query"}, {"defend": "all"}, {"defend": 1},
        {"url": "http://127.0.0.1/"}, {"path": "/etc/passwd"}, {"__class__": "x"}, {"where": ""},
        {"where": "1=1"}, {"where": "id = 'x'; drop table images"}, {"where": "id = 'x' --"},
        {"where": "sleep(5) = 1"}, {"where": "uri = (select 1)"}, {"where": "uri ="},
        {"where": "(" * 300}, {"where": "not " * 120 + "uri = 'x'"}, {"where": "x" * 600},
        {"where": "uri = '\x00'"}, {"where": 5},
    ]  # fmt: skip
    for change in settings:
        options = {"json": {"query": "red", **change}}
        yield Call(f"json: {str(change)[:50]}", "POST", "/search/text", options, (CONTENT,))
    quoted = {"json": {"query": "red", "where": "uri = 'it''s' or uri = '../../etc/passwd'"}}
    yield Call("json: a filter with quotes", "POST", "/search/text", quoted, (OK,))
    for kind_ in ("", "text/plain", "application/xml", "application/x-www-form-urlencoded"):
        options = {"content": b'{"query": "x"}', "headers": {"content-type": kind_}}
        yield Call(f"json as {kind_!r}", "POST", "/search/text", options, (KIND,))


def calls() -> list[Call]:
    """Requests that are wrong outside their body."""
    body = {"content": saved("PNG"), "headers": {"content-type": "image/png"}}
    found = [*forms(), *texts()]
    for query, right in {
        "/purify?format=exe": CONTENT,
        "/purify?format=../png": CONTENT,
        "/purify?format=png%00": CONTENT,
        "/purify?format=": CONTENT,
        "/purify?url=http://127.0.0.1:1/&path=/etc/passwd": OK,
        "/embed?what=weights": CONTENT,
        "/embed?purified=maybe": CONTENT,
        "/search/image?k=0": CONTENT,
        "/search/image?k=abc": CONTENT,
        "/search/image?k=101": CONTENT,
        f"/search/image?k={'9' * 5000}": CONTENT,
        "/search/image?defend=all": CONTENT,
        "/search/image?where=1%3D1": CONTENT,
        "/search/image?where=%00": CONTENT,
        "/search/image?where=%ff%fe": CONTENT,
        "/search/image?where=" + "x" * 600: CONTENT,
        "/search/image?what=__class__": CONTENT,
        "/": 405,
        "/nothing": 404,
        "/purify/": 404,
        "//purify": 404,
        "/purify%00": 404,
        "/PURIFY": 404,
        "/.env": 404,
        "/lab": 404,
        "/" + "x" * 8000: 404,
        "/healthz": 405,
        "/metrics": 405,
    }.items():
        found.append(Call(query[:60], "POST", query, body, (right,)))
    for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "X"):
        found.append(Call(f"{method} /purify", method, "/purify", {}, (405,)))
    for kind in (
        "",
        "text/plain",
        "application/json",
        "image",
        "multipart/mixed; boundary=B",
        "\xff",
    ):
        options = {"content": body["content"], "headers": {"content-type": kind.encode("latin-1")}}
        found.append(Call(f"a picture as {kind!r}", "POST", "/purify", options, (KIND,)))
    for coding in ("gzip", "br", "deflate, gzip", "x"):
        headers = {"content-type": "image/png", "content-encoding": coding}
        options = {"content": gzip.compress(body["content"]), "headers": headers}
        found.append(Call(f"a body in {coding}", "POST", "/purify", options, (KIND,)))
    large = {"content": bytes(2**21 + 1), "headers": {"content-type": "image/png"}}
    found.append(Call("a picture over the limit", "POST", "/purify", large, (LARGE,)))
    larger = {"content": bytes(2**22 + 1), "headers": {"content-type": "image/png"}}
    found.append(Call("a body over the limit", "POST", "/purify", larger, (LARGE,)))
    return found


def raws() -> list[Raw]:
    """What no HTTP library would send."""
    host, png = b"Host: x\r\n", saved("PNG")
    post = b"POST /purify HTTP/1.1\r\n" + host + b"Content-Type: image/png\r\n"
    get = b"GET /healthz HTTP/1.1\r\n"
    return [
        Raw(name, data, right if isinstance(right, tuple) else (right,))
        for name, data, right in (
            ("a header of 100 KB", get + host + b"X: " + b"y" * 100_000, 431),
            ("100,000 headers", get + host + b"X: y\r\n" * 100_000, 431),
            ("a path of 100 KB", b"GET /" + b"x" * 100_000, 431),
            ("no host", get + b"\r\n", BAD),
            ("two hosts", get + host + b"Host: y\r\n\r\n", BAD),
            ("nul in a header", get + host + b"X: \0\r\n\r\n", BAD),
            ("a header without colon", get + host + b"nonsense\r\n\r\n", BAD),
            ("space before the colon", get + host + b"X : y\r\n\r\n", BAD),
            ("length of letters", post + b"Content-Length: abc\r\n\r\n", BAD),
            ("negative length", post + b"Content-Length: -5\r\n\r\n", BAD),
            ("two lengths", post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", BAD),
            ("length of 10^30", post + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\n", (BAD, LARGE)),
            ("length of 1 GB", post + b"Content-Length: 1000000000\r\n\r\n", LARGE),
            ("a bad chunk", post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n", BAD),
            ("a huge chunk", post + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n", BAD),
            ("unknown coding", post + b"Transfer-Encoding: gzip\r\n\r\n", (BAD, 501)),
            ("two codings", post + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", (BAD, 501)),
            ("length and chunks", post + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n"
             b"Connection: close\r\n\r\n0\r\n\r\n", (BAD, KIND)),
            ("http/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (505,)),
            ("http/0.9", b"GET /healthz\r\n\r\n", BAD),
            ("http/9", b"GET /healthz HTTP/9.9\r\n" + host + b"\r\n", 505),
            ("tls", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(200), BAD),
            ("binary", bytes(range(128, 256)) * 4 + b"\r\n\r\n", BAD),
            ("no path", b"GET  HTTP/1.1\r\n" + host + b"\r\n", BAD),
            ("path up", b"GET /../../etc/passwd HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n", 404),
            ("path up, escaped", b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n" + host
             + b"Connection: close\r\n\r\n", 404),
            ("path of bad utf-8", b"GET /%ff%fe HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n", 404),
            ("another server's address", b"GET http://127.0.0.1:1/healthz HTTP/1.1\r\n" + host
             + b"Connection: close\r\n\r\n", 404),
            ("connect", b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n",
             (404, 405)),
            ("upgrade", get.replace(b"healthz", b"purify") + host + b"Connection: upgrade, close\r\n"
             b"Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n", 405),
            ("expectation", post + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: "
             + str(len(png)).encode() + b"\r\n\r\n" + png, OK),
        )
    ]  # fmt: skip
