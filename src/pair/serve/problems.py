"""Everything that a request can be refused for, as one exception with one sentence."""

from __future__ import annotations

import json
import math


class Problem(Exception):
    """``status`` (HTTP), a short stable ``code`` for programs, a ``message`` for people."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.retry_after = retry_after

    @property
    def body(self) -> bytes:
        text = {"error": {"code": self.code, "message": self.message}}
        return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace")

    @property
    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        if self.retry_after is not None:
            headers["retry-after"] = str(min(60, max(1, math.ceil(self.retry_after))))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


# What each status means here; the reference page prints this table.
STATUSES = {
    400: "the request itself is broken: JSON, form or text that cannot be parsed",
    401: "no API key, or a wrong one",
    404: "no such address",
    405: "wrong method",
    408: "the body did not arrive in time",
    413: "more bytes or pictures than allowed",
    415: "not a picture of a readable kind, or a wrong Content-Type",
    422: "a picture that cannot be used (damaged, cut off, too many pixels or frames), or a "
    "parameter out of range",
    429: "too many requests of this key at a time; come back after Retry-After seconds",
    431: "the head of the request is larger than allowed",
    500: "a fault of the service; the log has it under the request's id",
    503: "the service is full, not ready or stopping; come back after Retry-After seconds",
    504: "no answer within the time limit; the work was dropped",
    505: "another version of HTTP than 1.1",
}
