"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

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
