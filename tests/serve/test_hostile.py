"""The whole hostile corpus against the real service: the right status each, and nothing else."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import hostile
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service_tiny import png, serving

from pair.serve.app import Service
from pair.serve.engine import Engine
from pair.serve.problems import STATUSES, Problem
from pair.serve.settings import Limits

LIMITS = Limits(body=2**22, image=2**21, pixels=4_000_000, frames=16, batch=4, timeout=60)


@pytest.fixture(scope="module")
def service(models, collection):
    return Service(Engine(models, collection), limits=LIMITS, threads=2)


@pytest.fixture(scope="module")
def target(service):
    with serving(service) as (url, _):
        yield url


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left(service, target, tmp_path_factory):
    """No file, no thread, no counter, no memory stays behind."""
    here = tmp_path_factory.mktemp("here")
    before = os.getcwd()
    os.chdir(here)
    httpx.post(f"{target}/purify", content=png(), headers={"content-type": "image/png"})
    threads, memory = threading.active_count(), resident()
    yield
    answer = httpx.post(f"{target}/purify", content=png(), headers={"content-type": "image/png"})
    assert answer.status_code == 200, "it works as before"
    end = time.monotonic() + 10
    while service.gate.working.total() or service.gate.buffered:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert threading.active_count() <= threads + 4
    assert resident() - memory < 400 * 2**20
    os.chdir(before)
    assert list(here.iterdir()) == [] and not Path("/tmp/escaped.png").exists()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def told(answer: httpx.Response) -> None:
    """Refusals are JSON of one short sentence without traces of the inside."""
    if answer.status_code != 200 and answer.request.method != "HEAD":
        error = answer.json()["error"]
        assert error["code"] and 5 < len(error["message"]) < 300, error
        for trace in ("Traceback", "site-packages", "/src/", "0x", "PIL."):
            assert trace not in answer.text
    assert answer.status_code == 200 or answer.status_code in STATUSES


def test_the_corpus_is_large():
    count = len(hostile.pictures()) + len(hostile.calls()) + len(hostile.raws())
    assert count >= 200


def test_pictures(target):
    wrong = []
    with httpx.Client(timeout=60) as client:
        for case in hostile.pictures():
            answer = client.post(
                f"{target}/purify", content=case.data, headers={"content-type": "image/png"}
            )
            told(answer)
            if answer.status_code not in case.right:
                wrong.append((case.name, answer.status_code, answer.text[:200], case.right))
    assert not wrong


def test_calls(target):
    wrong = []
    with httpx.Client(timeout=60) as client:
        for case in hostile.calls():
            answer = client.request(case.method, target + case.path, **case.options)
            told(answer)
            if answer.status_code not in case.right:
                wrong.append((case.name, answer.status_code, answer.text[:200], case.right))
    assert not wrong


def test_raw_bytes(target):
    host, port = target.removeprefix("http://").split(":")
    wrong = []
    for case in hostile.raws():
        with socket.create_connection((host, int(port)), 20) as connection:
            answer = b""
            try:
                connection.sendall(case.data)
                while part := connection.recv(65536):
                    answer += part
            except ConnectionError:
                pass  # it hung up while we were still sending
        final = answer.rpartition(b"HTTP/1.1 ")[2]
        if not final[:3].isdigit() or int(final[:3]) not in case.right:
            wrong.append((case.name, answer[:200], case.right))
    assert not wrong


START = sorted(make() for make in hostile.WHOLE.values())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    start=st.sampled_from(START),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=40)), max_size=4),
    keep=st.floats(0, 1),
)
def test_damaged_files_are_decoded_or_refused(service, start, cuts, keep):
    """The fuzz target: any splice of a real file is a picture or a Problem, nothing else."""
    data = start
    for place, piece in cuts:
        at = int(place * len(data))
        data = data[:at] + piece + data[at + len(piece) :]
    data = data[: max(4, int(keep * len(data)))] if keep < 0.5 else data
    try:
        picture = service.engine.picture(data, LIMITS)
        view = service.engine.view(picture, "purify")
    except Problem as problem:
        assert problem.status in (415, 422)
    else:
        assert view.shape == (3, 32, 32) and 0 <= float(view.min()) <= float(view.max()) <= 1
