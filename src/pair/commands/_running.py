"""What long commands share: stopping in good order, and a line of progress."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType


@contextmanager
def stopping() -> Iterator[tuple[Event, list[int]]]:
    """The first SIGINT or SIGTERM sets the event, a second SIGINT interrupts at once."""
    event, caught = Event(), [signal.SIGINT.value]

    def on_signal(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        caught[0] = number

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event, caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
