"""Every defense that the paper compares, and trivial controls, behind one interface.

``make("jpeg", quality=50)`` builds by name. Adding a defense: its file, its row in
``tests/defenses/test_contract.py``, and one line here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pair.defenses.base import Compose, Defense, Ensemble, Gradient, NoDefense
from pair.defenses.controls import Blur, Halve, MeanBlock
from pair.defenses.denoise import Arn, Cafd
from pair.defenses.hardened import adversarial_training, hardness_manipulation
from pair.defenses.jpeg import Jpeg
from pair.defenses.lgs import LGS
from pair.defenses.mae import MaeDefense
from pair.defenses.pair import Pair, fixed_mask, random_mask, reconstruction, single_pass
from pair.defenses.patchzero import PatchZero
from pair.defenses.sac import Sac

__all__ = ["DEFENSES", "Compose", "Defense", "Ensemble", "Gradient", "NoDefense", "make"]

DEFENSES: dict[str, Callable[..., Defense]] = {
    "none": NoDefense,
    "halve": Halve,
    "blur": Blur,
    "mean-block": MeanBlock,
    "single-pass": single_pass,
    "jpeg": Jpeg,
    "lgs": LGS,
    "maedefense": MaeDefense.from_pretrained,
    "sac": Sac.from_pretrained,
    "patchzero": PatchZero.from_pretrained,
    "at": adversarial_training,
    "hm": hardness_manipulation,
    "arn": Arn.from_pretrained,
    "cafd": Cafd.from_pretrained,
    "pair": Pair.from_pretrained,
    "pair-reconstruction": reconstruction,
    "pair-fixed-mask": fixed_mask,
    "pair-random-mask": random_mask,
}


def make(name: str, /, **options: Any) -> Defense:
    """A registered defense, frozen, in evaluation mode. Options are those of its factory; for
    trained ones ``name`` is the folder, shipped model or hub repository of their weights."""
    if name not in DEFENSES:
        raise ValueError(f"unknown defense {name!r}: use one of {', '.join(DEFENSES)}")
    factory = DEFENSES[name]
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(factory).parameters) or "none"
        raise ValueError(f"defense {name!r}: {error}; its options: {known}") from error
    return factory(**options).eval().requires_grad_(False)
