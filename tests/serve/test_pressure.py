"""Overload, slow clients, time limits, and stopping in the middle of work."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from service_tiny import png, serving

from pair.serve import gate as gate_module
from pair.serve import server as server_module
from pair.serve.app import Service
from pair.serve.client import Client, ServiceError
from pair.serve.engine import Engine
from pair.serve.settings import Limits

HEADERS = {"content-type": "image/png"}


class Held(Engine):
    """An engine whose computing waits for ``go``; what is then computed is real."""

    def __init__(self, models):
        super().__init__(models)
        self.go = threading.Event()

    def compute(self, work, payloads):
        assert self.go.wait(30)
        return super().compute(work, payloads)


def post(url: str, path: str = "/embed", **options) -> httpx.Response:
    return httpx.post(url + path, content=png(), headers=HEADERS, timeout=40, **options)


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("limits", "status", "code"),
    [
        ({"per_key": 4}, 429, "busy"),
        ({"requests": 4}, 503, "full"),
        ({"queue": 3, "batch": 3}, 503, "full"),
    ],
)
def test_overload_is_refused_with_a_time_to_return(models, limits, status, code):
    engine = Held(models)
    service = Service(engine, limits=Limits(**limits), batch=1, threads=2)
    with serving(service) as (url, _), ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(post, url) for _ in range(12)]
        until(lambda: sum(a.done() for a in answers) == 8)
        refused = [a.result() for a in answers if a.done()]
        assert {a.status_code for a in refused} == {status}
        assert {a.json()["error"]["code"] for a in refused} == {code}
        assert all(1 <= int(a.headers["retry-after"]) <= 60 for a in refused)
        if "queue" in limits:
            assert httpx.get(f"{url}/readyz").status_code == 503
        assert httpx.get(f"{url}/healthz").status_code == 200
        engine.go.set()
        accepted = [a.result() for a in answers if a.result().status_code == 200]
        assert len(accepted) == 4 and len({a.text for a in accepted}) >= 1
        assert post(url).status_code == 200, "and goes on as before"
    assert service.gate.working.total() == 0 and service.gate.buffered == 0


def test_client_returns_after_the_pause_it_was_told(models):
    engine, pauses = Held(models), []
    service = Service(engine, limits=Limits(per_key=1), threads=2)
    with serving(service) as (url, _), ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url)
        until(lambda: service.gate.working.total() == 1)

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                engine.go.set()
                first.result(20)

        with Client(url, sleep=sleep) as client:
            assert client.embed([png()]).shape == (1, 16)
        assert len(pauses) == 2 and all(0.5 <= p <= 90 for p in pauses)
        until(lambda: service.gate.working.total() == 0)  # an answer comes before its end
        engine.go.clear()
        second = pool.submit(post, url)
        until(lambda: service.gate.working.total() == 1)
        with Client(url, retries=1, sleep=lambda s: None) as client, pytest.raises(ServiceError):
            client.embed([png()])
        engine.go.set()
        assert second.result().status_code == 200


def test_late_work_is_dropped(models):
    engine = Held(models)
    service = Service(engine, limits=Limits(timeout=0.4), batch=1, threads=2)
    with serving(service) as (url, _), ThreadPoolExecutor(4) as pool:
        start = time.monotonic()
        answers = [a.result() for a in [pool.submit(post, url) for _ in range(4)]]
        assert {a.status_code for a in answers} == {504} and time.monotonic() - start < 10
        assert answers[0].json()["error"]["code"] == "timeout"
        until(lambda: service.gate.working.total() == 0)
        engine.go.set()
        until(lambda: len(service.batcher) == 0)
        text = httpx.get(f"{url}/metrics").text
    done = re.search(r'pair_pictures_total{work="embedding-purified"} (\S+)', text)
    assert done is None or float(done[1]) <= 1, "what nobody waits for is not computed"


def raw(url: str, data: bytes, pause: float = 0.0, rest: bytes = b"") -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(data)
        time.sleep(pause)
        if rest:
            connection.sendall(rest)
        answer = b""
        while part := connection.recv(65536):
            answer += part
            if b"\r\n\r\n" in answer and b"close" not in answer.lower():
                break
    return answer


def test_slow_bodies_and_slow_heads_end(models, monkeypatch):
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(gate_module, "LINGER", 0.2)
    service = Service(Engine(models), limits=Limits(upload=0.3), threads=2)
    head = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99\r\n"
    with serving(service) as (url, _):
        assert raw(url, head + b"\r\nabc").startswith(b"HTTP/1.1 408")
        assert raw(url, head).startswith(b"HTTP/1.1 408")
        assert raw(url, b"GET ").startswith(b"HTTP/1.1 408")
        assert raw(url, b"") == b""
        # A second request on a connection that is kept open has the same limit.
        first = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        assert b" 408" in raw_all(url, first, b"GET /hea")
        assert post(url).status_code == 200
    assert service.gate.working.total() == 0 and service.gate.buffered == 0


def raw_all(url: str, first: bytes, second: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(first)
        answer = connection.recv(65536)
        connection.sendall(second)
        while part := connection.recv(65536):
            answer += part
    return answer


def test_bytes_are_limited_while_they_arrive(models):
    limits = Limits(body=100_000, image=50_000, buffered=120_000)
    service = Service(Engine(models), limits=limits, threads=2)

    def endless():
        for _ in range(10_000):
            yield b"x" * 10_000

    with serving(service) as (url, _):
        # Without a length only counting helps; 100 MB are never read.
        answer = httpx.post(url + "/embed", content=endless(), headers=HEADERS, timeout=20)
        assert answer.status_code == 413
        declared = httpx.post(url + "/embed", content=b"x" * 3_000_000, headers=HEADERS)
        assert (declared.status_code, declared.json()["error"]["code"]) == (413, "bytes")
        assert httpx.post(url + "/embed", content=b"x" * 60_000, headers=HEADERS).status_code == 413
        other = httpx.post(url + "/healthz", content=b"x" * 3_000_000)
        assert other.status_code == 413
        assert post(url).status_code == 200
        received = re.search(r"\npair_received_bytes_total (\S+)", httpx.get(f"{url}/metrics").text)
        assert float(received[1]) < 1_000_000
    assert service.gate.buffered == 0


def test_all_bodies_together_are_limited(models):
    service = Service(Engine(models), limits=Limits(buffered=150_000), threads=2)
    head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 200000"
    with serving(service) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as one:
            one.sendall(f"{head}\r\n\r\n".encode() + b"x" * 100_000)
            until(lambda: service.gate.buffered >= 100_000)
            answer = httpx.post(url + "/embed", content=b"x" * 100_000, headers=HEADERS)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "memory")
        until(lambda: service.gate.buffered == 0)
        assert post(url).status_code == 200


@pytest.mark.parametrize(("times", "fine"), [(1, True), (2, False)])
def test_client_repeats_what_a_closing_connection_swallowed(times, fine):
    """A server may close an idle connection at the moment in which it is used again."""
    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"hits":[]}'
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            for number in range(times + fine):
                connection, _ = listening.accept()
                with connection:
                    if number < times:
                        connection.recv(10)  # the rest is unread: the client gets a reset
                        continue
                    connection.recv(65536)
                    connection.sendall(answer)

        done = pool.submit(serve)
        with Client(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=20) as client:
            if fine:
                assert client.search_text("x") == []
            else:
                with pytest.raises(ConnectionError):
                    client.search_text("x")
        done.result(20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_work_finishes_what_was_accepted(models, tmp_path, number):
    models.purifier.save_pretrained(tmp_path / "purifier")
    models.encoder.save_pretrained(tmp_path / "encoder")
    command = [sys.executable, "-m", "pair", "serve", "--port", "0", "--hasher", ""]
    command += ["--purifier", str(tmp_path / "purifier"), "--encoder", str(tmp_path / "encoder")]
    command += ["--wait-ms", "1500", "--batch", "64"]  # so that work is waiting when it is told
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        line = process.stderr.readline()
        while "serving on" not in line:
            assert line, "it ended early"
            line = process.stderr.readline()
        url = line.split()[-1]
        with Client(url) as client:
            assert client.embed([png()]).shape == (1, 16)
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(post, url) for _ in range(6)]
            until(lambda: "pair_requests_active 6.0" in httpx.get(f"{url}/metrics").text)
            process.send_signal(number)
            assert [a.result().status_code for a in answers] == [200] * 6
        rest = process.stderr.read()
        assert process.wait(30) == 0
    finally:
        process.kill()
    lines = [json.loads(text) for text in rest.splitlines()]
    assert sum(x.get("route") == "/embed" and x["status"] == 200 for x in lines) >= 6
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/healthz")


def test_grace_says_not_ready_and_works_on(models):
    service = Service(Engine(models), threads=2)
    with serving(service) as (url, running):
        running.grace = 1.0
        running.handle_exit(signal.SIGTERM, None)
        assert httpx.get(f"{url}/readyz").json()["error"]["message"] == "stopping"
        assert post(url).status_code == 200
        until(lambda: running.should_exit)


def test_who_is_connected_when_it_stops_gets_an_answer(models):
    service = Service(Engine(models), threads=2)
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(service) as (url, running):
        host, port = url.removeprefix("http://").split(":")
        with (
            socket.create_connection((host, int(port)), 20) as kept,
            socket.create_connection((host, int(port)), 20) as silent,
            socket.create_connection((host, int(port)), 20) as half,
        ):
            kept.sendall(request)
            assert b"200 OK" in kept.recv(65536)
            half.sendall(request[:9])
            running.handle_exit(signal.SIGTERM, None)
            until(lambda: not running.servers[0].is_serving())
            for connection, rest in ((kept, request), (half, request[9:])):
                connection.sendall(rest)
                answer = b""
                while part := connection.recv(65536):
                    answer += part
                assert b"200 OK" in answer and b"connection: close" in answer.lower()
            assert silent.recv(1) == b"", "who says nothing is not waited for"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a filter of Linux")
def test_nobody_slips_in_between_the_last_accept_and_the_close(models, monkeypatch):
    found = []
    waiting = server_module._waiting

    def late(sockets):
        last = waiting(sockets)
        with socket.socket() as stranger:
            stranger.settimeout(0.2)
            found.append(stranger.connect_ex(sockets[0].getsockname()))
        return last

    monkeypatch.setattr(server_module, "_waiting", late)
    with serving(Service(Engine(models), threads=2)) as (url, _):
        assert httpx.get(f"{url}/healthz").status_code == 200
    assert found == [errno.EAGAIN], "neither taken nor refused yet"


def test_a_stop_under_traffic_breaks_no_connection(models, monkeypatch):
    """Requests on kept connections, new connections, and some that wait to be accepted."""
    # a busy machine lets a client wait for its turn; who has said something is not waited for
    monkeypatch.setattr(server_module, "HEARING", 20.0)
    broken: list[str] = []

    def send(url: str, keep: bool) -> None:
        headers = {} if keep else {"connection": "close"}
        with httpx.Client(base_url=url, timeout=30, headers=headers) as http:
            while True:
                try:
                    assert http.get("/healthz").status_code == 200
                except httpx.ConnectError:
                    return  # it listens no longer
                except httpx.TransportError as error:
                    broken.append(type(error).__name__)

    for _ in range(4):
        service = Service(Engine(models), threads=2)
        with serving(service) as (url, running), ThreadPoolExecutor(12) as pool:
            sent = [pool.submit(send, url, n % 2 == 0) for n in range(12)]
            time.sleep(0.3)
            running.handle_exit(signal.SIGTERM, None)
            for future in sent:
                future.result(30)
    assert not broken


def test_command_refuses_what_cannot_work(tmp_path):
    from typer.testing import CliRunner

    from pair.cli import app

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, words in (
            (["--host", "0.0.0.0"], "without API keys"),
            (["--collection", str(tmp_path / "none")], "none"),
            (["--encoder", "no-such-model"], "no model"),
            (["--keys", str(tmp_path / "missing")], "missing"),
            (["--log-level", "loud"], "log level"),
            (["--queue", "1"], "cannot hold"),
            (["--port", port], f"cannot listen on 127.0.0.1 port {port}"),
        ):
            result = CliRunner().invoke(app, ["serve", *options])
            assert isinstance(result.exception, ValueError | OSError), options
            assert words in str(result.exception), options
