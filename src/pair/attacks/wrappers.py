"""Wrappers that turn one "function from images to features" into another.

An attack knows nothing about models and defenses: it calls ``features(images, generator=g)`` and
gets (B, D), or (n, B, D) when n draws are kept apart. :func:`pipeline` builds such a function,
:class:`EOT` averages random draws, :class:`BPDA` replaces a defense's gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from pair.images import resize
from pair.masks import complement

Features = Callable[..., Tensor]


def _takes_generator(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "generator" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def as_features(source: Any) -> Features:
    """An encoder, a retriever, a module or a function as ``features(images, generator=None)``."""
    function = getattr(source, "encode_image", source)
    if not callable(function):
        function = getattr(source, "features", source)  # a retriever, defended or not
    signed = function.forward if isinstance(function, torch.nn.Module) else function
    if _takes_generator(signed):
        return function
    return lambda images, generator=None: function(images)


def pipeline(encoder: Any, *defenses: Any) -> Features:
    """Images through the defenses in order, then the encoder: one function of images."""
    stages = [*(as_features(d) for d in defenses), as_features(encoder)]

    def features(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        for stage in stages:
            images = stage(images, generator=generator)
        return images

    return features


class EOT:
    """Expectation over ``n`` fresh draws (PAIR equations 3-4).

    ``form="mean_embedding"`` averages the features before the loss sees them (the equations);
    ``"mean_loss"`` returns them apart, (n, B, D), so that the loss is averaged.

    All n * B images run as one batch, in slices of at most ``micro_batch``. With ``checkpoint`` a
    slice keeps only its input and is recomputed in the backward pass, so that memory does not
    grow with n. ``held`` images may be kept whole instead (default: ``micro_batch``; the last
    slice, which the backward pass meets first, always is): each that fits into memory saves a
    second forward pass. Draws are taken from ``generator`` exactly as n calls one after the other
    would take them, whatever the slicing.

    ``precision="bf16"`` computes under autocast: faster where the hardware has it, with gradients
    that point in nearly the same direction. Evaluate in full precision.
    """

    def __init__(
        self,
        features: Any,
        n: int,
        form: str = "mean_embedding",
        *,
        micro_batch: int = 64,
        checkpoint: bool = True,
        precision: str = "fp32",
        held: int | None = None,
    ):
        if n < 1 or micro_batch < 1:
            raise ValueError(f"EOT needs n >= 1 and micro_batch >= 1, got {n} and {micro_batch}")
        if form not in ("mean_embedding", "mean_loss"):
            raise ValueError(f"form must be 'mean_embedding' or 'mean_loss', got {form!r}")
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
        self.features = as_features(features)
        self.n, self.form = n, form
        self.micro_batch, self.checkpoint = micro_batch, checkpoint
        self.precision = precision
        self.held = micro_batch if held is None else held

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        batch = len(images)
        rows = torch.arange(self.n * batch, device=images.device) % batch  # draw by draw
        slices = rows.tensor_split(-(-len(rows) // self.micro_batch))  # as equal as can be
        save = self.checkpoint and torch.is_grad_enabled()
        done = accumulate(len(s) for s in slices)
        parts = [
            self._slice(images, s, generator, save and at < len(rows) and first > self.held)
            for s, at in zip(slices, done, strict=True)
            for first in [len(rows) - at + len(s)]  # images from this slice to the last one
        ]
        outputs = torch.cat(parts).view(self.n, batch, -1)  # (n, B, D)
        return outputs.mean(0) if self.form == "mean_embedding" else outputs

    def _features(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.precision == "fp32":
            return self.features(images, generator=generator)
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.features(images, generator=generator).to(images.dtype)

    def _slice(
        self, images: Tensor, index: Tensor, generator: torch.Generator | None, save: bool
    ) -> Tensor:
        if not save:
            return self._features(images[index], generator)
        if generator is None:  # torch's global state: checkpointing replays that itself
            return recompute(lambda x: self._features(x[index], None), images, use_reentrant=False)
        # The recomputation must see the same masks: both runs start from the saved state.
        before, after = generator.get_state(), []

        def run(x: Tensor) -> Tensor:
            replay = torch.Generator(device=generator.device)
            replay.set_state(before)
            out = self._features(x[index], replay)
            after.append(replay.get_state())
            return out

        out = recompute(run, images, use_reentrant=False, preserve_rng_state=False)
        generator.set_state(after[0])
        return out


class Draws(Protocol):
    """The settings of an attack's configuration that EOT needs."""

    @property
    def eot(self) -> int: ...

    @property
    def form(self) -> str: ...

    @property
    def micro_batch(self) -> int: ...

    @property
    def precision(self) -> str: ...

    @property
    def held(self) -> int | None: ...


def expectation(features: Any, config: Draws) -> EOT:
    """The :class:`EOT` that a configuration asks for; with one draw it changes nothing."""
    return EOT(
        features,
        config.eot,
        config.form,
        micro_batch=config.micro_batch,
        precision=config.precision,
        held=config.held,
    )


class BPDA:
    """Forward through ``defense``, backward through ``surrogate`` (Athalye et al. 2018).

    Without a surrogate the backward pass is the identity (with the defense's resize, if it
    changes the size). A surrogate is any differentiable function of images, such as one pass
    with all tokens visible.
    """

    def __init__(self, defense: Any, surrogate: Any = None):
        self.defense = as_features(defense)
        self.surrogate = None if surrogate is None else as_features(surrogate)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            out = self.defense(images, generator=generator)
        if self.surrogate is None:
            path = resize(images, (out.shape[-2], out.shape[-1]))
        else:
            path = self.surrogate(images, generator=generator)
        return out + (path - path.detach())  # adds exactly 0, with the surrogate's gradient


class SecondPassBPDA:
    """For a two-pass purifier: exact first pass, identity through the second (G3)."""

    def __init__(self, purifier: Any):
        if purifier.passes != 2:
            raise ValueError("this purifier has one pass: there is no second pass to replace")
        self.purifier = purifier

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        p = self.purifier
        mask = p.draw_mask(len(images), generator)
        with torch.no_grad():
            out = p(images, mask=mask)
        small = resize(images, p.image_size)
        first = p.autoencoder(small, mask.to(images.device), encoder=p.encoder)
        first = resize(first, (out.shape[-2], out.shape[-1]))
        return out + (first - first.detach())


class OnePassSurrogate:
    """One pass with every token visible: a cheap, deterministic stand-in for a purifier (G4)."""

    def __init__(self, purifier: Any):
        self.purifier = purifier

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        p = self.purifier
        everything = torch.ones(
            len(images), p.autoencoder.grid**2, dtype=torch.bool, device=images.device
        )
        out = p.autoencoder(resize(images, p.image_size), everything, encoder=p.encoder)
        return out + (out.clamp(0, 1) - out).detach()


class FirstPass:
    """Only the first pass of a two-pass purifier (G5: optimise what pass 1 lets through)."""

    def __init__(self, purifier: Any):
        self.purifier = purifier

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.purifier.steps(images, generator=generator)[0]


class KnownMask:
    """A purifier whose mask the attacker knows: the same (N,) or (B, N) mask at every call."""

    def __init__(self, purifier: Any, mask: Tensor):
        self.purifier, self.mask = purifier, mask

    def inverted(self) -> KnownMask:
        return KnownMask(self.purifier, complement(self.mask))

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.purifier(images, mask=self.mask)


@dataclass(frozen=True)
class Adaptive:
    """A defended encoder as its strongest adaptive attacker sees it."""

    features: Features
    samples: int  # draws per step that the defense asks for
    penalty: Callable[[Tensor, Tensor], Tensor] | None  # detector fooling
    gradient: str  # "exact", "eot" or "bpda"


def adaptive(encoder: Any, defense: Any, fooling_weight: float = 1.0) -> Adaptive:
    """Attack ``encoder`` behind ``defense`` with the gradient that the defense declares.

    Works with anything that has a ``gradient`` (kind and samples), as all of
    ``pair.defenses`` do, and with a bare ``Purifier``; refuses a defense that declares none, for
    then a table would show an attack that nobody vouches for.
    """
    from pair.purifier import Purifier

    if isinstance(defense, Purifier):
        defense = defense.differentiable()  # the final clamp must not stop gradients
        samples = 7 if defense.random else 1  # h_adv of PAIR, section 5.1
        kind = "eot" if defense.random else "exact"
        return Adaptive(pipeline(encoder, defense), samples, None, kind)
    declared = getattr(defense, "gradient", None)
    if declared is None:
        raise ValueError(
            f"{type(defense).__name__} declares no gradient: give it a property 'gradient' (see "
            "pair.defenses.base.Gradient), or wrap it in BPDA and attack that"
        )
    harden = getattr(defense, "harden", None)
    victim = harden(encoder) if harden is not None else encoder
    fool = getattr(defense, "detector_loss", None)

    def penalty(images: Tensor, covered: Tensor) -> Tensor:
        loss = None if fool is None else fool(images, covered)
        return images.new_zeros(()) if loss is None else fooling_weight * loss

    return Adaptive(pipeline(victim, defense), declared.samples, penalty, declared.kind)
