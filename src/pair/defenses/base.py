"""What a defense is: images in, images of the same shape out, and an honest word on gradients.

A subclass writes ``defend``; checks, straight-through joins and diagnostics live here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.images import check_images

EOT_SAMPLES = 7  # h_adv of PAIR, section 5.1

# ``join(hard, soft)``: how a step without useful derivative meets its smooth stand-in.
Join = Callable[[Tensor, Callable[[], Tensor]], Tensor]


@dataclass(frozen=True)
class Gradient:
    """The strongest gradient known for a defense. Autograd through the defense delivers it.

    ``exact``: the derivative of ``forward`` itself; decisions that are constant almost
    everywhere (a block above a threshold) count as constants, clamps of the *output* to [0, 1]
    as identity. ``eot``: the same, for one random draw; average ``samples`` draws. ``bpda``:
    ``forward`` keeps the values of its hard steps and passes gradients through their smooth
    stand-ins; ``surrogate(images, generator=None)`` is the defense made of the stand-ins alone. A
    ``bpda`` defense that is also random asks for ``samples`` above 1.
    """

    kind: str
    surrogate: Callable[..., Tensor] | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "bpda", "eot"):
            raise ValueError(f"gradient must be 'exact', 'bpda' or 'eot', got {self.kind!r}")
        if (self.kind == "bpda") != (self.surrogate is not None):
            raise ValueError("a surrogate belongs to 'bpda', and to nothing else")


def straight_through(hard: Tensor, soft: Callable[[], Tensor]) -> Tensor:
    """Exactly the value of ``hard``, with the derivative of ``soft()``."""
    if not torch.is_grad_enabled():
        return hard
    smooth = soft()
    return hard.detach() + (smooth - smooth.detach())


def uniform(*shape: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Uniform numbers, drawn where the generator lives: a CPU seed is the same everywhere."""
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.rand(*shape, generator=generator, device=device).to(like.device)


class Defense(nn.Module):
    """``defense(images, generator=None) -> images``, (B, 3, H, W) in [0, 1] to the same shape.

    ``random``: the result depends on ``generator`` (a ``torch.Generator``; default: torch's
    global one). The result for an image never depends on its neighbours in the batch. Raises
    ``ValueError`` on an empty batch and on anything that is not (B, 3, H, W) floats in [0, 1].
    """

    random: bool = False
    bridged: bool = False  # does ``defend`` call ``join``?

    @final  # type: ignore[misc]  # nn.Module declares it as an attribute
    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        images = check_images(images)
        if not images.numel():
            raise ValueError(f"there is no image in a batch of shape {tuple(images.shape)}")
        return self.defend(images, generator, straight_through)

    def defend(self, images: Tensor, generator: torch.Generator | None, join: Join) -> Tensor:
        """The defense on checked images; hard steps go through ``join``."""
        raise NotImplementedError

    @property
    def gradient(self) -> Gradient:
        samples = EOT_SAMPLES if self.random else 1
        if self.bridged:
            return Gradient("bpda", self._surrogate, samples)
        return Gradient("eot" if self.random else "exact", samples=samples)

    def _surrogate(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.defend(images, generator, lambda _, soft: soft())

    def smooth_at(self, images: Tensor, seed: int = 0) -> Callable[[Tensor], Tensor]:
        """The function whose derivative at ``images`` autograd reports, for draws from ``seed``.

        Equal to the defense at ``images``; elsewhere each hard step follows its stand-in. Lets
        finite differences check a bridged gradient.
        """
        offsets: list[Tensor] = []

        def record(hard: Tensor, soft: Callable[[], Tensor]) -> Tensor:
            offsets.append((hard - soft()).detach())
            return hard

        with torch.no_grad():
            self.defend(images, torch.Generator().manual_seed(seed), record)

        def smooth(x: Tensor) -> Tensor:
            held = iter(offsets)
            generator = torch.Generator().manual_seed(seed)
            return self.defend(x, generator, lambda _, soft: soft() + next(held))

        return smooth

    def detector_loss(self, images: Tensor, patch_mask: Tensor) -> Tensor | None:
        """What an adaptive attacker adds to its objective and minimises: 0 when the detector
        misses the patch. ``patch_mask`` broadcasts to (B, 1, H, W), 1 on the patch. None for
        defenses that do not localise."""
        return None

    def harden(self, encoder: Any) -> Any:
        """The retrieval target to use behind this defense: AT and HM replace it, others do not."""
        return encoder


class NoDefense(Defense):
    """Images as they are."""

    def defend(self, images, generator, join):
        return images


class Compose(Defense):
    """One defense after another."""

    def __init__(self, defenses: Sequence[Defense]):
        super().__init__()
        if not defenses:
            raise ValueError("Compose needs at least one defense: use NoDefense() for none")
        self.stages = nn.ModuleList(defenses)
        self.random = any(d.random for d in defenses)
        self.bridged = any(d.bridged for d in defenses)

    def defend(self, images, generator, join):
        for stage in self.stages:
            images = stage.defend(images, generator, join)  # type: ignore[operator]
        return images

    def detector_loss(self, images: Tensor, patch_mask: Tensor) -> Tensor | None:
        """Sum over the stages, each judged on the images that it receives."""
        losses = []
        for stage in self.stages:
            assert isinstance(stage, Defense)
            losses.append(stage.detector_loss(images, patch_mask))
            images = stage(images)
        known = [loss for loss in losses if loss is not None]
        return torch.stack(known).sum() if known else None

    def harden(self, encoder: Any) -> Any:
        for stage in self.stages:
            encoder = stage.harden(encoder)  # type: ignore[operator]
        return encoder


class Ensemble(Defense):
    """``n`` independent draws of a random defense.

    As a defense it returns the mean *image*. ``views`` returns the draws, and ``encode`` the
    mean feature, which is what PAIR's ensemble means: blurring pixels is not averaging opinions.
    """

    def __init__(self, defense: Defense, n: int):
        super().__init__()
        if n < 1:
            raise ValueError(f"an ensemble needs at least one draw, got n={n}")
        self.defense, self.n = defense, n
        self.random, self.bridged = defense.random, defense.bridged

    def defend(self, images, generator, join):
        draws = [self.defense.defend(images, generator, join) for _ in range(self.n)]
        return torch.stack(draws).mean(0)

    def views(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(n, B, 3, H, W): each draw on its own."""
        return torch.stack([self.defense(images, generator=generator) for _ in range(self.n)])

    def encode(
        self,
        encode_image: Callable[[Tensor], Tensor],
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, dim): features of the draws, averaged."""
        views = self.views(images, generator=generator)
        return encode_image(views.flatten(0, 1)).unflatten(0, (self.n, -1)).mean(0)

    def detector_loss(self, images: Tensor, patch_mask: Tensor) -> Tensor | None:
        return self.defense.detector_loss(images, patch_mask)

    def harden(self, encoder: Any) -> Any:
        return self.defense.harden(encoder)


def evasion_loss(logits: Tensor, patch_mask: Tensor) -> Tensor:
    """Mean over the patch of -log(1 - sigmoid(logit)): 0 when no patch pixel is detected.

    ``logits`` (B, 1, H, W); ``patch_mask`` broadcasts to it. PAIR, section 3.2.
    """
    mask = torch.as_tensor(patch_mask, device=logits.device).to(logits.dtype)
    try:
        mask = mask.expand_as(logits)
    except RuntimeError as error:
        raise ValueError(
            f"patch mask {tuple(patch_mask.shape)} does not broadcast to {tuple(logits.shape)}"
        ) from error
    return (F.softplus(logits) * mask).sum() / mask.sum().clamp(min=1)
