"""AT and HM: the images stay as they are, the retrieval target is trained to stand attacks."""

from __future__ import annotations

import os
from typing import Any

from pair.defenses.base import Defense
from pair.retrieval.clip import SmallClip
from pair.retrieval.hashing import HashNet
from pair.retrieval.openclip import OpenClip


class Hardened(Defense):
    """Identity on images; ``harden(encoder)`` gives the adversarially trained target.

    ``clip`` and ``csq`` name the model folders that replace a text-image and a hashing target
    (made by ``pair train at`` or ``pair train hm``); for a target of open_clip, a folder that
    open_clip reads, or ``open_clip:...``. An attacker faces the new target itself, so
    adaptive and non-adaptive attacks coincide, as in the AT rows of PAIR's tables.
    """

    def __init__(self, clip: str | os.PathLike[str], csq: str | os.PathLike[str]):
        super().__init__()
        self.clip, self.csq = clip, csq

    def extra_repr(self) -> str:
        return f"clip={os.fspath(self.clip)!r}, csq={os.fspath(self.csq)!r}"

    def defend(self, images, generator, join):
        return images

    def harden(self, encoder: Any) -> SmallClip | HashNet | OpenClip:
        hardened: SmallClip | HashNet | OpenClip
        if isinstance(encoder, OpenClip):
            name = os.fspath(self.clip)
            known = name.startswith("open_clip:")
            spec = name.removeprefix("open_clip:") if known else f"local-dir:{name}"
            hardened = OpenClip.from_spec(spec)
        elif isinstance(encoder, SmallClip):
            hardened = SmallClip.from_pretrained(self.clip)
        elif isinstance(encoder, HashNet):
            hardened = HashNet.from_pretrained(self.csq)
        else:
            raise ValueError(
                f"there is no hardened {type(encoder).__name__}: adversarial training replaces "
                "the target, so train one with 'pair train at' and use it in place of the raw one"
            )
        if hardened.dim != encoder.dim:
            raise ValueError(
                f"the hardened target has {hardened.dim} dimensions, the raw one {encoder.dim}"
            )
        return hardened.to(next(encoder.parameters()).device)


def adversarial_training(clip: str = "clip-small-at", csq: str = "csq-small-at") -> Hardened:
    """AT (Madry et al. 2018): PGD fine-tuning, l_inf."""
    return Hardened(clip, csq)


def hardness_manipulation(clip: str = "clip-small-hm", csq: str = "csq-small-hm") -> Hardened:
    """HM (Zhou and Patel 2022): hardness-manipulated triplets."""
    return Hardened(clip, csq)
