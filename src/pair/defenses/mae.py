"""MAEDefense (Chen et al. 2023): blend the image with its partial in-painting."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from pair.defenses.base import Defense
from pair.generator import MaskedAutoencoder
from pair.images import resize
from pair.masks import ExactCount, FixedPattern, MaskRule
from pair.purifier import Purifier

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


class MaeDefense(Defense):
    """x' = w * x + (1 - w) * x_hat, x_hat = visible originals and generated hidden tokens.

    ``mask="random"`` hides a random ``ratio`` of the tokens (as PAIR's authors ran it),
    ``mask="grid"`` a regular checkerboard (the original's uniform mask). The text of the
    original could not be obtained: ``weight`` is unknown and is to be chosen on clean data
    (:func:`choose_weight`); 0.3 is a middle value. No training.
    """

    def __init__(
        self,
        generator: MaskedAutoencoder,
        weight: float = 0.3,
        mask: str = "random",
        ratio: float = 0.5,
        encoder: str = "drop",
    ):
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight of the original must lie in [0, 1], got {weight}")
        if mask not in ("random", "grid"):
            raise ValueError(f"mask must be 'random' or 'grid', got {mask!r}")
        rule: MaskRule = ExactCount(ratio) if mask == "random" else FixedPattern("checkerboard")
        self.purifier = Purifier(
            generator, rule, passes=1, encoder=encoder, output="paste", straight_through=True
        )
        self.weight, self.random = weight, self.purifier.random

    def defend(self, images, generator, join):
        rebuilt = self.purifier(images.clamp(0, 1), generator=generator)
        rebuilt = resize(rebuilt, tuple(images.shape[-2:]))
        return self.weight * images + (1 - self.weight) * rebuilt

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str] = "pair-small-pixel", **options
    ) -> MaeDefense:
        p = Purifier.from_pretrained(name)
        return cls(p.autoencoder, **{"encoder": p.encoder, **options})


def choose_weight(
    make: Callable[[float], Defense],
    score: Callable[[Defense], float],
    floor: float,
    weights: Sequence[float] = WEIGHTS,
) -> tuple[float, dict[float, float]]:
    """The smallest weight of the original whose clean score reaches ``floor``, and all scores.

    ``score`` measures a defense on *clean* validation photos (higher is better), so the sweep
    never sees an attack. Setting ``floor`` to another defense's clean score compares both at
    equal clean quality. The best-scoring weight is returned where none reaches the floor.
    """
    scores = {w: score(make(w)) for w in sorted(weights)}
    enough = [w for w, s in scores.items() if s >= floor]
    return (enough[0] if enough else max(scores, key=lambda w: scores[w])), scores
