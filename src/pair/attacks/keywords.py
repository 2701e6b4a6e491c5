"""The keyword side of TTH [14]: 24 keywords, its caption rule and the target embedding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# The published list has 24; PAIR says 23, and its released code leaves out "blue".
KEYWORDS = (
    *("jacket", "dress", "floor", "female", "motorcycle", "policeman", "cow", "waiter"),
    *("swimming", "reading", "run", "dancing", "floating", "smiling", "climbing", "feeding"),
    *("blue", "front", "little", "green", "yellow", "pink", "navy", "maroon"),
)
RELEASED_KEYWORDS = tuple(k for k in KEYWORDS if k != "blue")


class TextEncoder(Protocol):
    def encode_text(self, texts: Sequence[str]) -> Tensor: ...


def caption_matches(caption: str, keyword: str) -> bool:
    """TTH's rule, quirks included: does the lower-cased caption hold one of six strings?

    ``" w "``, ``" w."``, ``"w "``, ``" ws "``, ``" ws."``, ``"ws "``. So "evergreen " counts for
    green (no space needed in front), while "green," and a final "green" without a full stop do
    not; the only plural is "+s".
    """
    text = caption.lower()
    singular = (f" {keyword} ", f" {keyword}.", f"{keyword} ")
    plural = (f" {keyword}s ", f" {keyword}s.", f"{keyword}s ")
    return any(part in text for part in (*singular, *plural))


def select_captions(
    captions: Sequence[str], keyword: str, limit: int = 500, seed: int = 2
) -> list[str]:
    """Captions that match; a seeded sample of ``limit`` where there are that many or more."""
    found = [c for c in captions if caption_matches(c, keyword)]
    return random.Random(seed).sample(found, limit) if len(found) >= limit else found


def target_embedding(encoder: TextEncoder, captions: Sequence[str], batch: int = 256) -> Tensor:
    """e_t: arithmetic mean of the raw (not normalised) text features of the captions, (1, D)."""
    if not captions:
        raise ValueError("no caption matches the keyword: a target needs at least one")
    parts = []
    with torch.no_grad():
        for at in range(0, len(captions), batch):
            parts.append(encoder.encode_text(list(captions[at : at + batch])).float())
    return torch.cat(parts).mean(0, keepdim=True)
