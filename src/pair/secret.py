"""Random numbers for masks that nobody can predict."""

from __future__ import annotations

import os
import struct

import numpy as np
import torch

_HEAD = "<QiiQ"  # seed, numbers left before the next twist, seeded, position
_WORDS = 624


def secret_generator() -> torch.Generator:
    """A generator on the CPU whose whole state comes from the operating system's entropy.

    ``manual_seed`` keeps 32 bits of its argument: an attacker who sees a purified picture could
    try all of them. Here the 624 words of the Mersenne Twister are drawn afresh.
    """
    generator = torch.Generator()
    state = generator.get_state().numpy().copy()
    words = np.frombuffer(os.urandom(4 * _WORDS), np.uint32)
    head = struct.calcsize(_HEAD)
    state[:head] = np.frombuffer(struct.pack(_HEAD, 0, 1, 1, 0), np.uint8)
    state[head : head + 8 * _WORDS] = words.astype("<u8").view(np.uint8)
    generator.set_state(torch.from_numpy(state))
    return generator


def mask_generator(seed: int | None) -> torch.Generator:
    """On the CPU: seeded, or secret where ``seed`` is None."""
    return secret_generator() if seed is None else torch.Generator().manual_seed(seed)
