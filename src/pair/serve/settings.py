"""What an operator decides: limits, keys, models. One frozen object, checked when it is made."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from pathlib import Path

KEYS_VARIABLE = "PAIR_API_KEYS"
SHORTEST_KEY = 16


@dataclass(frozen=True)
class Limits:
    """Bounds of one request (first block) and of all together (second block).

    ``timeout`` is what a request may take from its first byte to its answer, ``upload`` what the
    client may take to send it, both in seconds. ``queue`` counts pictures that wait for the
    models, ``requests`` those admitted at a time, ``per_key`` those of one key (or of all
    clients together where no keys are set), ``buffered`` the bytes of all bodies in memory.
    """

    body: int = 32 * 2**20
    image: int = 16 * 2**20
    pixels: int = 40_000_000
    frames: int = 16
    batch: int = 16
    text: int = 512
    results: int = 100
    timeout: float = 30.0
    upload: float = 20.0

    queue: int = 128
    requests: int = 96
    per_key: int = 64
    buffered: int = 512 * 2**20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"limit {name!r} must be above 0, got {value}")
        if self.queue < self.batch:
            raise ValueError(
                f"a queue of {self.queue} pictures cannot hold one request of {self.batch}"
            )


@dataclass(frozen=True)
class Keys:
    """API keys as SHA-256 digests by name; the keys themselves are not kept."""

    digests: dict[str, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.digests)

    def owner(self, key: str) -> str | None:
        """The name of a key, in time that depends on neither the key nor its place."""
        given, found = _digest(key), None
        for name, digest in self.digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found

    @classmethod
    def read(cls, path: str | os.PathLike[str] | None = None) -> Keys:
        """Keys of a file (a line each: ``name key``) and of the environment.

        ``PAIR_API_KEYS`` holds ``name:key`` pairs, separated by commas.
        """
        pairs: list[tuple[str, str]] = []
        for part in os.environ.get(KEYS_VARIABLE, "").split(","):
            if part.strip():
                name, _, key = part.strip().partition(":")
                pairs.append((name.strip(), key.strip()))
        where = KEYS_VARIABLE
        if path is not None:
            where, before = os.fspath(path), len(pairs)
            for line in Path(path).read_text("utf-8").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    name, _, key = line.strip().partition(" ")
                    pairs.append((name, key.strip()))
            if len(pairs) == before:
                raise ValueError(f"{where} holds no key: write a line 'name key' for each")
        digests: dict[str, bytes] = {}
        for name, key in pairs:
            if not name or not key:
                raise ValueError(f"{where}: every key needs a name ('name key' or 'name:key')")
            if len(key) < SHORTEST_KEY:
                raise ValueError(f"the key {name!r} is shorter than {SHORTEST_KEY} characters")
            if name in digests:
                raise ValueError(f"two keys are named {name!r}")
            digests[name] = _digest(key)
        return cls(digests)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
