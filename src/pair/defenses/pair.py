"""PAIR, the rows of its ablation (Table 3) and the single pass: settings of one class."""

from __future__ import annotations

import os

from pair.defenses.base import Defense
from pair.generator import MaskedAutoencoder
from pair.masks import ExactCount, FixedPattern, MaskRule, NoMask
from pair.purifier import Purifier

FULL = "pair-small"  # beta = 1: trained with the semantic discriminator
PIXEL = "pair-small-pixel"  # beta = 0: L_p only


class Pair(Defense):
    """A :class:`~pair.purifier.Purifier` as a defense; the output has the size of the input.

    Gradients pass the final clamp straight through, the rest is exact.
    """

    def __init__(
        self,
        generator: MaskedAutoencoder,
        rule: MaskRule | None = None,
        *,
        passes: int = 2,
        encoder: str = "drop",
        output: str = "decoder",
    ):
        super().__init__()
        self.purifier = Purifier(
            generator,
            rule,
            passes=passes,
            encoder=encoder,
            output=output,
            restore_size=True,
            straight_through=True,
        )
        self.random = self.purifier.random

    def defend(self, images, generator, join):
        return self.purifier(images.clamp(0, 1), generator=generator)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] = FULL, **options) -> Pair:
        """The settings stored with the weights; keyword arguments override them."""
        p = Purifier.from_pretrained(name, **options)
        return cls(p.autoencoder, p.rule, passes=p.passes, encoder=p.encoder, output=p.output)


def reconstruction(name: str | os.PathLike[str] = PIXEL) -> Pair:
    """ "w/ reconstruction": one pass, every token visible."""
    return Pair.from_pretrained(name, rule=NoMask(), passes=1)


def fixed_mask(name: str | os.PathLike[str] = PIXEL, pattern: str = "checkerboard") -> Pair:
    """ "w/ fixed mask and reconstruction": one known mask, and its inverse in the second pass."""
    return Pair.from_pretrained(name, rule=FixedPattern(pattern), passes=2)


def random_mask(name: str | os.PathLike[str] = PIXEL) -> Pair:
    """ "w/ random mask and reconstruction": everything but the semantic discriminator."""
    return Pair.from_pretrained(name, passes=2)


def single_pass(name: str | os.PathLike[str] = FULL, ratio: float = 0.5) -> Pair:
    """A trivial control: the decoder's image after one pass under a random mask."""
    return Pair.from_pretrained(name, rule=ExactCount(ratio), passes=1, output="decoder")
