"""Secret numbers, frame counts and micro-batches, each against something independent."""

from __future__ import annotations

import io
import json
import logging
import struct
import threading
import time
from concurrent.futures import wait

import numpy as np
import pytest
import torch
from PIL import Image

from pair import secret
from pair.serve import logs
from pair.serve.batching import Batcher, Closed, Full
from pair.serve.frames import frames, kind


def test_secret_generator_is_the_twister_with_all_words_from_the_system(monkeypatch):
    words = np.random.default_rng(1).integers(0, 2**32, 624, dtype=np.uint32)
    monkeypatch.setattr(secret.os, "urandom", lambda n: words.tobytes()[:n])
    drawn = torch.rand(2000, generator=secret.secret_generator())
    oracle = np.random.RandomState()
    oracle.set_state(("MT19937", words, 624))
    bits = oracle.randint(0, 2**32, 2000, dtype=np.uint32)
    assert np.array_equal(drawn.numpy(), (bits & 0xFFFFFF) / np.float32(2**24))


def test_secret_generators_differ_and_look_uniform():
    draws = torch.stack([torch.rand(500, generator=secret.secret_generator()) for _ in range(40)])
    assert len({row.numpy().tobytes() for row in draws}) == 40
    assert abs(float(draws.mean()) - 0.5) < 0.02 and abs(float(draws.std()) - 0.2887) < 0.02


def animation(format: str, count: int) -> bytes:
    pictures = [Image.new("RGB", (9, 7), (20 * i, 0, 0)) for i in range(count)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, format, save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_frames_are_counted_as_pillow_counts_them(format, count):
    data = animation(format, count)
    with Image.open(io.BytesIO(data)) as picture:
        assert getattr(picture, "n_frames", 1) == count
    assert kind(data) == format and frames(data, 20) == count
    assert frames(data, 3) == min(count, 4)


def test_frame_counts_of_nonsense_end():
    circle = b"II*\0" + struct.pack("<IHI", 8, 0, 8)  # a directory that points at itself
    start = time.monotonic()
    assert frames(circle, 1000) == 1001
    for data in (b"GIF89a", b"II*\0", b"MM\0+", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b""):
        for tail in (b"", b"\xff" * 50, b"\0" * 1000, b"," * 3000):
            assert frames(data + tail, 5) <= 6
    assert time.monotonic() - start < 5


def test_batches_group_by_kind_and_keep_order():
    seen, gate = [], threading.Event()

    def compute(name, items):
        gate.wait(10)
        seen.append((name, list(items)))
        return [f"{name}{item}" for item in items]

    batcher = Batcher(compute, size=3, capacity=50, wait=0)
    first = batcher.submit("a", [0])
    time.sleep(0.1)  # the thread is busy with it now
    futures = first + batcher.submit("b", [1, 2]) + batcher.submit("a", [3, 4, 5, 6])
    futures += batcher.submit("b", [7])
    gate.set()
    results = [f.result(10) for f in futures]
    assert results == ["a0", "b1", "b2", "a3", "a4", "a5", "a6", "b7"]
    assert seen == [("a", [0]), ("b", [1, 2, 7]), ("a", [3, 4, 5]), ("a", [6])]
    assert batcher.close(10)


def test_a_batch_waits_for_company_but_not_long():
    sizes = []
    batcher = Batcher(lambda k, items: sizes.append(len(items)) or items, size=8, wait=0.3)
    start = time.monotonic()
    futures = batcher.submit("x", [1])
    time.sleep(0.05)
    futures += batcher.submit("x", [2])
    wait(futures, 10)
    assert sizes == [2] and time.monotonic() - start >= 0.29
    full = batcher.submit("x", list(range(8)))
    start = time.monotonic()
    wait(full, 10)
    assert time.monotonic() - start < 0.25, "a full batch does not wait"
    batcher.close(10)


def test_the_queue_is_bounded_and_closing_finishes_it():
    gate, done = threading.Event(), []

    def compute(kind, items):
        gate.wait(10)
        done.extend(items)
        return items

    batcher = Batcher(compute, size=2, capacity=4, wait=0)
    running = batcher.submit("x", [0])
    time.sleep(0.1)
    waiting = batcher.submit("x", [1, 2, 3])
    with pytest.raises(Full):
        batcher.submit("x", [4, 5])  # all or nothing
    waiting += batcher.submit("x", [6])
    assert waiting[1].cancel()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    time.sleep(0.05)
    with pytest.raises(Closed):
        batcher.submit("x", [7])
    gate.set()
    closing.join(10)
    assert done == [0, 1, 3, 6] and running[0].result() == 0 and not batcher.alive


def test_a_fault_fails_its_batch_only():
    def compute(kind, items):
        if kind == "bad":
            raise RuntimeError("broken")
        return items[: len(items) - (kind == "short")]

    batcher = Batcher(compute, wait=0)
    for name in ("bad", "short"):
        with pytest.raises(RuntimeError):
            batcher.submit(name, [1])[0].result(10)
    assert batcher.submit("good", [1])[0].result(10) == 1
    batcher.close(10)


@pytest.fixture
def loggers():
    """The loggers that the service sets up, left as they were."""
    named = [logging.getLogger(n) for n in ("", "pair.serve", "uvicorn.error", "uvicorn")]
    access = logging.getLogger("uvicorn.access")
    kept = [(n, n.handlers, n.level, n.propagate) for n in (*named, access)]
    silent = access.disabled
    yield
    for logger, handlers, level, propagate in kept:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    access.disabled = silent


def test_log_lines_go_where_stderr_is_now(loggers, monkeypatch, capsys):
    """Who runs the command inside another program may close the stderr that it had then."""
    then = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", then)
        logs.set_up("info")
        logs.LOGGER.info("before")
        assert json.loads(then.getvalue())["message"] == "before"
        then.close()
    logs.LOGGER.info("after", extra={"fields": {"status": 200}})
    lines = capsys.readouterr().err.splitlines()
    assert [(json.loads(x)["message"], json.loads(x)["status"]) for x in lines] == [("after", 200)]
