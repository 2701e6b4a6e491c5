"""Micro-batches: work that arrives one by one, computed together by one thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

Compute = Callable[[Hashable, list[Any]], Sequence[Any]]
Watch = Callable[[Hashable, int, float, float], None]  # kind, size, longest wait, seconds


class Full(Exception):
    """No place left in the queue."""


class Closed(Exception):
    """The batcher takes no new work."""


class _Item(NamedTuple):
    kind: Hashable
    payload: Any
    future: Future
    since: float


class Batcher:
    """``submit(kind, payload) -> Future``; items of one kind are computed together.

    ``compute(kind, payloads)`` returns one result per payload; it runs in one thread, so its
    models need no locks. At most ``capacity`` items wait; the next is refused (:class:`Full`).
    The oldest item decides what is computed next, with up to ``size`` items of its kind. A batch
    that is not full waits at most ``wait`` seconds for company. Cancelled futures are dropped
    before they are computed.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        size: int = 16,
        capacity: int = 256,
        wait: float = 0.004,
        watch: Watch | None = None,
    ):
        self.compute, self.size, self.capacity, self.wait = compute, size, capacity, wait
        self.watch = watch
        self.pace = 0.0  # seconds per item, a moving average
        self._queue: deque[_Item] = deque()
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="pair-compute", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, kind: Hashable, payloads: Sequence[Any]) -> list[Future]:
        """All of ``payloads`` or, if they do not all fit, none."""
        with self._change:
            if self._closing:
                raise Closed
            if len(self._queue) + len(payloads) > self.capacity:
                raise Full
            now = time.monotonic()
            items = [_Item(kind, payload, Future(), now) for payload in payloads]
            self._queue.extend(items)
            self._change.notify()
        return [item.future for item in items]

    def close(self, timeout: float | None = None) -> bool:
        """Take no new work, finish what was accepted; whether that was done within ``timeout``."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while batch := self._next():
            batch = [item for item in batch if item.future.set_running_or_notify_cancel()]
            if batch:
                self._finish(batch)

    def _next(self) -> list[_Item]:
        """The next batch; empty at the end."""
        with self._change:
            while not self._queue:
                if self._closing:
                    return []
                self._change.wait()
            first = self._queue[0]
            until = first.since + self.wait
            while not self._closing:
                left = until - time.monotonic()
                mates = sum(item.kind == first.kind for item in self._queue)
                if left <= 0 or mates >= self.size:
                    break
                self._change.wait(left)
            batch: list[_Item] = []
            others: deque[_Item] = deque()
            for item in self._queue:
                mine = item.kind == first.kind and len(batch) < self.size
                (batch if mine else others).append(item)
            self._queue = others
            return batch

    def _finish(self, batch: list[_Item]) -> None:
        start = time.monotonic()
        kind = batch[0].kind
        try:
            results = self.compute(kind, [item.payload for item in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} items")
        except BaseException as error:
            for item in batch:
                item.future.set_exception(error)
        else:
            for item, result in zip(batch, results, strict=True):
                item.future.set_result(result)
        seconds = time.monotonic() - start
        self.pace += 0.2 * (seconds / len(batch) - self.pace)
        if self.watch is not None:
            self.watch(kind, len(batch), start - batch[0].since, seconds)
