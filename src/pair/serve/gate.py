"""What every request passes before and after the application: identity, keys, limits, records.

An ASGI layer, so that limits hold while a body arrives, before anything has parsed it. A refusal
is answered here; the application is then told that the client has left.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from pair.serve.logs import LOGGER
from pair.serve.metrics import Metrics
from pair.serve.problems import Problem
from pair.serve.settings import Keys, Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

WORK = ("/purify", "/embed", "/search/text", "/search/image", "/audit")
OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")
LINGER = 2.0  # seconds that a refused body may go on arriving, so that the client reads why
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclass
class Visit:
    """One request and what became of it; the log line is made of this."""

    id: str
    method: str
    path: str
    start: float
    key: str | None = None
    received: int = 0
    pictures: int = 0
    status: int = 0
    code: str = ""


class Gate:
    """Wraps ``app``; ``visits`` counts what is being worked on, by key and in all."""

    def __init__(self, app: App, limits: Limits, keys: Keys, metrics: Metrics):
        self.app, self.limits, self.keys, self.metrics = app, limits, keys, metrics
        self.working: Counter[str] = Counter()
        self.buffered = 0
        self.pace: Callable[[], float] = lambda: 1.0  # seconds until a place may be free
        self.leaving: Callable[[], bool] = lambda: False  # then every connection ends
        metrics.gauge("pair_requests_active", "Admitted, not answered.", self.working.total)
        metrics.gauge("pair_buffered_bytes", "Bodies in memory.", lambda: float(self.buffered))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else secrets.token_hex(8)
        visit = Visit(name, scope["method"], scope["path"], time.monotonic())
        scope["pair.visit"] = visit
        answer = _Answer(send, visit, self.leaving)
        work, admitted = visit.path in WORK, False
        body: _Body | None = None
        try:
            if scope["http_version"] not in ("1.0", "1.1"):
                raise Problem(505, "http", "this service speaks HTTP/1.1")
            self._authorise(visit, headers)
            body = _Body(self, visit, receive, answer, headers, counted=work)
            if work:
                self._admit(visit)
                admitted = True
                async with asyncio.timeout(self.limits.timeout):
                    await self.app(scope, body.receive, answer.send)
            else:
                await self.app(scope, body.receive, answer.send)
        except Problem as problem:
            await answer.refuse(problem, self._rest(body, headers, receive))
        except TimeoutError:
            text = f"no answer within {self.limits.timeout:g} seconds: the work was dropped"
            late = Problem(504, "timeout", text, 1)
            await answer.refuse(late, self._rest(body, headers, receive))
        except Exception:
            LOGGER.exception("fault", extra={"fields": {"id": visit.id}})
            text = f"a fault of the service; its log has more under {visit.id}"
            fault = Problem(500, "fault", text)
            await answer.refuse(fault, self._rest(body, headers, receive))
        finally:
            if admitted:
                self.working[visit.key or ""] -= 1
            if body is not None:
                body.release()
            self._record(visit, scope)

    @staticmethod
    def _rest(body: _Body | None, headers: dict[str, str], receive: Receive) -> Receive | None:
        """Where the rest of the body comes from, if the client may still be sending it."""
        return None if "expect" in headers or (body is not None and body.complete) else receive

    def _authorise(self, visit: Visit, headers: dict[str, str]) -> None:
        if not self.keys or visit.path in OPEN or not self._protected(visit.path):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        visit.key = self.keys.owner(given) if given else None
        if visit.key is None:
            text = "send a valid API key: 'Authorization: Bearer <key>'"
            raise Problem(401, "key", text)

    def _protected(self, path: str) -> bool:
        return path in WORK or path == "/metrics"  # the page under /lab asks by itself

    def _admit(self, visit: Visit) -> None:
        wait = self.pace()
        if self.working[visit.key or ""] >= self.limits.per_key:
            text = f"{self.limits.per_key} requests of yours are being worked on: wait for them"
            raise Problem(429, "busy", text, wait)
        if self.working.total() >= self.limits.requests:
            raise Problem(503, "full", "the service is full: try again later", wait)
        self.working[visit.key or ""] += 1

    def _record(self, visit: Visit, scope: MutableMapping[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", None)
        if visit.path in (*WORK, *OPEN, "/metrics"):
            route = visit.path
        elif route is None or visit.path.startswith("/lab"):
            route = "/lab" if visit.path.startswith("/lab") else "other"
        seconds = time.monotonic() - visit.start
        self.metrics.requests.labels(route, visit.status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        self.metrics.received.inc(visit.received)
        if visit.code:
            self.metrics.refused.labels(visit.code).inc()
        fields = {
            "id": visit.id,
            "method": visit.method if visit.method.isalpha() else "other",
            "route": route,
            "status": visit.status,
            "ms": round(1000 * seconds, 1),
            "bytes": visit.received,
            "pictures": visit.pictures,
            "key": visit.key,
            "code": visit.code,
        }
        LOGGER.info("request", extra={"fields": {k: v for k, v in fields.items() if v}})


class _Body:
    """The body of a request as it arrives, within its limits."""

    def __init__(
        self,
        gate: Gate,
        visit: Visit,
        receive: Receive,
        answer: _Answer,
        headers: dict[str, str],
        counted: bool,
    ):
        self.gate, self.visit, self.inner, self.answer = gate, visit, receive, answer
        self.limits, self.counted, self.complete = gate.limits, counted, False
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limits.body:
            raise self._too_large()

    def _too_large(self) -> Problem:
        text = f"the body is larger than the {self.limits.body} bytes allowed"
        return Problem(413, "bytes", text)

    async def receive(self) -> Message:
        if self.complete:
            return await self.inner()
        left = self.visit.start + self.limits.upload - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self.inner()
        except TimeoutError:
            text = f"the body did not arrive within {self.limits.upload:g} seconds"
            return await self._stop(Problem(408, "slow", text))
        size = len(message.get("body", b""))
        self.visit.received += size
        if self.counted:
            self.gate.buffered += size
        if self.visit.received > self.limits.body:
            return await self._stop(self._too_large())
        if self.gate.buffered > self.limits.buffered:
            text = "the service has no memory left for this body: try again later"
            return await self._stop(Problem(503, "memory", text, self.gate.pace()))
        self.complete = not message.get("more_body", False)
        return message

    async def _stop(self, problem: Problem) -> Message:
        await self.answer.refuse(problem, self.inner)
        return {"type": "http.disconnect"}

    def release(self) -> None:
        if self.counted:
            self.gate.buffered -= self.visit.received


class _Answer:
    """The way back: adds headers, notes the status, and refuses at most once."""

    def __init__(self, send: Send, visit: Visit, leaving: Callable[[], bool]):
        self.inner, self.visit, self.leaving = send, visit, leaving
        self.started = self.refused = False

    async def send(self, message: Message) -> None:
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self.started = True
            self.visit.status = message["status"]
            given = {name.lower() for name, _ in message.get("headers", [])}
            extra = [(k, v) for k, v in _HEADERS if k not in given]
            extra.append((b"x-request-id", self.visit.id.encode()))
            if self.leaving() and b"connection" not in given:
                extra.append((b"connection", b"close"))  # the next request goes elsewhere
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await self.inner(message)

    async def refuse(self, problem: Problem, rest: Receive | None) -> None:
        if self.started or self.refused:
            return
        headers = {**problem.headers, "connection": "close"}
        headers["content-length"] = str(len(problem.body))
        pairs = [(k.encode(), v.encode()) for k, v in headers.items()]
        self.visit.code = problem.code
        await self.send({"type": "http.response.start", "status": problem.status, "headers": pairs})
        self.refused = True
        more = {"type": "http.response.body", "body": problem.body, "more_body": True}
        await self.inner(more)
        # Closing while the client still sends would destroy the answer on its way (TCP reset).
        try:
            async with asyncio.timeout(LINGER):
                while rest is not None:
                    message = await rest()
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        break
        except TimeoutError:
            pass
        await self.inner({"type": "http.response.body", "body": b"", "more_body": False})


def _headers(scope: MutableMapping[str, Any]) -> dict[str, str]:
    return {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
