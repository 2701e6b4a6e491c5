"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".pair-*.partial"  # what a killed process may leave behind


def write_atomic(
    path: str | os.PathLike[str], data: bytes, *, mtime_ns: int | None = None, durable: bool = True
) -> None:
    """Write to a temporary name beside ``path``, then rename.

    Whatever happens, ``path`` is the old file (or none) or the new one, complete; with
    ``durable`` also after a power cut. ``mtime_ns`` becomes the time of the file. A failure leaves
    nothing behind and raises ``OSError`` with one sentence and the original ``errno``.
    """
    path = Path(path)
    partial = path.with_name(PARTIAL.replace("*", secrets.token_hex(6)))
    try:
        try:
            with open(partial, "xb") as handle:
                handle.write(data)
                if durable:
                    handle.flush()
                    os.fsync(handle.fileno())
            if mtime_ns is not None:
                os.utime(partial, ns=(mtime_ns, mtime_ns))
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise explained(error, path) from error


def explained(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error as one sentence about ``path`` (``str`` has no "[Errno 28]")."""
    what = f"cannot write {os.fspath(path)}: {error.strerror or error}"
    told = type(error)(what)
    told.errno = error.errno
    return told


@contextmanager
def sole_writer(folder: Path, refusal: str) -> Iterator[None]:
    """Hold an existing ``folder`` for this process; ``ValueError(refusal)`` if another holds it.

    The lock is on the folder itself, so it leaves no file behind and dies with the process. Where
    the system has no such locks (Windows, some network drives) nothing is refused.
    """
    if fcntl is None:  # pragma: no cover
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(refusal) from None
        except OSError:  # a network drive without locks
            pass
        yield
    finally:
        os.close(handle)


def append_line(path: Path, row: dict[str, Any]) -> None:
    """One JSON line at the end of a log in one write: no kill and no other writer can break it."""
    try:
        with open(path, "ab", buffering=0) as handle:
            handle.write((json.dumps(row) + "\n").encode())
    except OSError as error:
        raise explained(error, path) from error
