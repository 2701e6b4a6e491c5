"""Texts that commands search for or attack with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer


def check(texts: Sequence[str], encoder: Any, name: str, what: str = "the query") -> None:
    """Refuse empty texts, and tell on stderr which words the encoder was never taught.

    Only encoders with a vocabulary of words can tell: all others know every word in some way.
    """
    if not all(text.strip() for text in texts):
        raise ValueError(f"{what} is empty")
    unknown = encoder.unknown(texts) if hasattr(encoder, "unknown") else []
    if unknown:
        typer.echo(f"{name} does not know: {', '.join(unknown)}", err=True)
