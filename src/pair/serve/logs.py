"""Log lines as JSON, one object a line, without anything that a client sent as content."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

LOGGER = logging.getLogger("pair.serve")


class JsonLines(logging.Formatter):
    """Time (UTC), level, message, and the fields given as ``extra={"fields": {...}}``.

    Of an exception the type and the places are kept, not the message: Pillow and pydantic quote
    what they were given.
    """

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{clock}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = type(record.exc_info[1]).__name__
            places = traceback.extract_tb(record.exc_info[2])
            line["at"] = [f"{place.name} in {place.filename}:{place.lineno}" for place in places]
        return json.dumps(line, ensure_ascii=True, default=str)


class Stderr(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is at the time; the one of now may be closed by then."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def set_up(level: str = "info") -> None:
    """Everything to stderr as JSON lines; uvicorn's own access lines are dropped for ours."""
    if level.upper() not in logging.getLevelNamesMapping():
        raise ValueError(f"unknown log level {level!r}: use debug, info, warning or error")
    handler = Stderr()
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers, root.level = [handler], logging.WARNING
    LOGGER.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.getLogger("uvicorn.error").setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True
