"""Bodies of requests: pictures (raw or in a form) and JSON, never addresses or paths."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from pair.serve.problems import Problem
from pair.serve.settings import Limits

JSON_BYTES = 64 * 1024
FIELD = "image"
M = TypeVar("M", bound=BaseModel)


@dataclass
class Upload:
    """The pictures of a request; ``form`` tells how they came, which decides how results go."""

    pictures: list[bytes]
    form: bool


async def read_pictures(request: Any, limits: Limits) -> Upload:
    """One picture as the body itself, or up to ``limits.batch`` as fields of a form."""
    media, options = _content_type(request)
    if media.startswith("image/") or media == "application/octet-stream":
        return Upload([await _joined(request.stream(), limits.image, "the picture")], False)
    if media != "multipart/form-data":
        text = "send a picture (Content-Type: image/...) or a form (multipart/form-data)"
        raise Problem(415, "content-type", text)
    form = _Form(limits)
    try:
        parser = MultipartParser(
            options.get(b"boundary", b""),
            {
                "on_part_begin": form.part_begin,
                "on_header_field": form.header_field,
                "on_header_value": form.header_value,
                "on_header_end": form.header_end,
                "on_headers_finished": form.headers_finished,
                "on_part_data": form.part_data,
                "on_part_end": form.part_end,
                "on_end": form.end,
            },
        )
        async for chunk in request.stream():
            parser.write(chunk)
        parser.finalize()
    except (FormParserError, UnicodeDecodeError) as error:
        raise Problem(400, "form", "the form cannot be parsed") from error
    if not form.ended:
        raise Problem(400, "form", "the form is cut off: its last boundary is missing")
    if not form.pictures:
        raise Problem(422, "empty", f"the form holds no picture: add fields named {FIELD!r}")
    return Upload([bytes(p) for p in form.pictures], True)


@dataclass
class _Form:
    """Collects the parts of a form in memory, within the limits."""

    limits: Limits
    pictures: list[bytearray] = field(default_factory=list)
    ended: bool = False
    _name: bytes = b""
    _value: bytes = b""
    _headers: dict[bytes, bytes] = field(default_factory=dict)

    def part_begin(self) -> None:
        self._headers = {}

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def headers_finished(self) -> None:
        # The file's name is not looked at: nothing here has a use for it.
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if options.get(b"name") != FIELD.encode():
            text = f"the form has a field other than {FIELD!r}: settings belong into the address"
            raise Problem(422, "field", text)
        if len(self.pictures) >= self.limits.batch:
            text = f"more than {self.limits.batch} pictures in one request"
            raise Problem(413, "batch", text)
        self.pictures.append(bytearray())

    def part_data(self, data: bytes, start: int, end: int) -> None:
        picture = self.pictures[-1]
        if len(picture) + end - start > self.limits.image:
            raise _too_large(f"picture {len(self.pictures)}", self.limits.image)
        picture += data[start:end]

    def part_end(self) -> None:
        pass

    def end(self) -> None:
        self.ended = True


async def read_json(request: Any, model: type[M]) -> M:
    """A JSON object as ``model``; says which field is wrong, and never repeats what was sent."""
    media, _ = _content_type(request)
    if media != "application/json":
        raise Problem(415, "content-type", "send JSON (Content-Type: application/json)")
    body = await _joined(request.stream(), JSON_BYTES, "the JSON")
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_constant, parse_int=_small_int)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "json", "the body is not valid JSON in UTF-8") from error
    return validated(model, data)


def validated(model: type[M], data: Any) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        names = set(model.model_fields)
        known = [str(part) for part in first["loc"] if part in names]
        place = f"{'.'.join(known)}: " if known else ""
        message = first["msg"] if known or not first["loc"] else "there is an unknown setting"
        raise Problem(422, "parameter", f"{place}{message}") from error


def _small_int(text: str) -> int | float:
    return int(text) if len(text) < 20 else math.inf  # a number of a million digits takes minutes


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _content_type(request: Any) -> tuple[str, dict[bytes, bytes]]:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "content-encoding", "compressed bodies are not accepted")
    media, options = parse_options_header(request.headers.get("content-type", ""))
    return media.decode("latin-1").lower(), options


async def _joined(stream: AsyncIterator[bytes], limit: int, what: str) -> bytes:
    parts, size = [], 0
    async for chunk in stream:
        size += len(chunk)
        if size > limit:
            raise _too_large(what, limit)
        parts.append(chunk)
    return b"".join(parts)


def _too_large(what: str, limit: int) -> Problem:
    return Problem(413, "bytes", f"{what} is larger than the {limit} bytes allowed")
