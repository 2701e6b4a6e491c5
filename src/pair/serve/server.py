"""uvicorn, with what it lacks for strangers: a time limit for headers, and a quiet stop."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import socket
import struct
import sys
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pair.serve.app import Service
from pair.serve.logs import LOGGER
from pair.serve.problems import Problem

HEADER_BYTES = 16 * 1024
HEADER_SECONDS = 10.0
KEEP_ALIVE = 15
HEARING = 1.0  # seconds that the stop leaves to requests which are on their way
HANDSHAKE = 0.1  # and to connections that are being set up


class Protocol(H11Protocol):
    """HTTP/1.1 where a request's head must arrive within ``HEADER_SECONDS``."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEADER_SECONDS, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        idle = self.conn.their_state is h11.IDLE
        if not idle:
            self._cancel()
        elif self._timer is None and self.conn.trailing_data[0]:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.conn.trailing_data[0]:
            text = f"the request did not arrive within {HEADER_SECONDS:g} seconds"
            self._refuse(Problem(408, "slow", text))
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if len(self.conn.trailing_data[0]) >= HEADER_BYTES:
            text = f"the request's head is larger than {HEADER_BYTES} bytes"
            self._refuse(Problem(431, "headers", text))
        else:
            self._refuse(Problem(400, "http", "this is not HTTP/1.1"))

    def _refuse(self, problem: Problem) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = {**problem.headers, "connection": "close"}
            headers["content-length"] = str(len(problem.body))
            for event in (
                h11.Response(status_code=problem.status, headers=list(headers.items())),
                h11.Data(data=problem.body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        LOGGER.info("refused", extra={"fields": {"status": problem.status, "code": problem.code}})
        self.transport.close()


class Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT: ``grace`` seconds not ready but working, then finishes what was
    accepted. A second SIGINT ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float = 0.0):
        super().__init__(config)
        self.service, self.grace = service, grace
        self._exit_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._exit_at is not None and sig == signal.SIGINT:
            self.force_exit = self.should_exit = True
            return
        self.service.leaving = True
        self._exit_at = time.monotonic() + self.grace

    async def on_tick(self, counter: int) -> bool:
        if self._exit_at is not None and time.monotonic() >= self._exit_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening, then hears out who is connected already.

        uvicorn would close idle connections at once. A request that is just arriving on one, or on
        a connection that the system has accepted and nobody here has looked at, would break off
        without an answer. So nobody new is let in, the last connections are taken, and all have
        ``HEARING`` seconds to say something; what they ask is answered with ``Connection: close``.
        """
        self.service.leaving = True
        if _close_the_door(sockets or []):
            await asyncio.sleep(HANDSHAKE)
        last = _waiting(sockets or [])
        for listening in self.servers:
            listening.close()
        for bound in sockets or []:
            bound.close()
        loop = asyncio.get_running_loop()
        for connection in last:
            await loop.connect_accepted_socket(self._protocol, connection)
        until = time.monotonic() + HEARING
        while not self.force_exit and time.monotonic() < until:
            await asyncio.sleep(0.05)
            if not self.server_state.connections:
                break
        await super().shutdown(sockets)

    def _protocol(self) -> Protocol:
        return Protocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def _close_the_door(sockets: list[socket.socket]) -> bool:
    """Lets nobody begin a connection while those in the making are finished; False where it cannot.

    Who connects after the last ``accept`` and before ``close`` would be reset. On Linux a socket
    filter drops the packets that open connections (SYN without ACK); the client sends its own again
    after a second, and finds the port closed: an honest refusal.
    """
    if not sys.platform.startswith("linux"):
        return False
    steps = (
        (0x30, 0, 0, 13),  # the flags of the TCP header
        (0x54, 0, 0, 0x12),  # SYN and ACK of them
        (0x15, 0, 1, 0x02),  # only SYN?
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # let pass
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(code))
    try:
        for bound in sockets:
            bound.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_ATTACH_FILTER", 26), program)
    except OSError:
        return False
    return True


def _waiting(sockets: list[socket.socket]) -> list[socket.socket]:
    """Connections that nobody has accepted yet; closing a listening socket would reset them."""
    found = []
    for listening in sockets:
        listening.setblocking(False)
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                break
            connection.setblocking(False)
            found.append(connection)
    return found


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ``port`` 0 takes a free one. Raises ``OSError`` with one sentence."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from error
    return found


def server(service: Service, grace: float = 0.0, app: Any = None) -> Server:
    """A server for ``service.app`` (or ``app`` around it); run it with ``run(sockets=[...])``."""
    config = uvicorn.Config(
        app or service.app,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(service.limits.timeout) + 5,
        backlog=1024,
    )
    return Server(config, service, grace)
