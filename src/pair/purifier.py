"""PAIR's purifier: rebuild the whole image twice under complementary masks (equations 5-13)."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from pair import hub
from pair.engine import HALF, Engines, choose
from pair.generator import GeneratorConfig, MaskedAutoencoder, patchify
from pair.images import check_images, resize
from pair.masks import (
    Bernoulli,
    ExactCount,
    MaskRule,
    NoMask,
    complement,
    rule_from_config,
    rule_to_config,
)
from pair.tokens import Selection

STORED = ("mask", "passes", "encoder", "output")  # settings kept beside the weights

# What the paper's text says, and what the authors' published code does.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"rule": Bernoulli(0.5), "encoder": "zero", "output": "decoder", "passes": 2},
    "released": {
        "rule": ExactCount(0.5, shared=True),
        "encoder": "drop",
        "output": "decoder",
        "passes": 2,
    },
}


class Purifier(nn.Module):
    """``purifier(images) -> images``: (B, 3, H, W) in [0, 1] -> (B, 3, S, S) in [0, 1].

    Images of another size are resized (antialiased, whole image, aspect ratio not kept) to the
    generator's S x S; set ``restore_size`` to get the input size back. The result has the
    floating-point type of the weights. Each image gets a fresh
    mask from ``generator`` (a ``torch.Generator``; default: torch's global one), or the mask
    that you pass, (B, N) or (N,), True = visible in the first pass.

    ``passes=2`` is equation 13: the second pass sees the first reconstruction through the
    inverted mask. ``output="decoder"`` returns what the decoder says for every token (equations
    11-12); ``output="paste"`` takes each token from the pass in which it was hidden. In both, no
    original pixel survives. With ``passes=1`` and "paste", visible originals are kept.

    ``straight_through`` passes gradients through the final clamp, for attacks; the values are
    the same (:meth:`differentiable` makes such a twin).

    ``backend="openvino"`` computes on the CPU by OpenVINO (:mod:`pair.engine`); the default is
    torch. ``precision`` is "fp32", "bf16" (both backends; fast where the processor knows it),
    "fp16" (torch, for GPUs) or "int8" (OpenVINO). Gradients, and :meth:`steps`, always come from
    torch; images that ask for gradients are refused by OpenVINO in less than fp32.

    Raises ``ValueError`` on anything that is not (B, 3, H, W) floats in [0, 1].
    """

    def __init__(
        self,
        generator: MaskedAutoencoder,
        rule: MaskRule | None = None,
        *,
        passes: int = 2,
        encoder: str = "drop",
        output: str = "decoder",
        restore_size: bool = False,
        straight_through: bool = False,
        backend: str = "auto",
        precision: str = "fp32",
    ):
        super().__init__()
        self.backend, self.precision = choose(backend, precision), precision
        if passes not in (1, 2):
            raise ValueError(f"passes must be 1 or 2, got {passes}")
        if encoder not in ("drop", "zero"):
            raise ValueError(f"encoder must be 'drop' or 'zero', got {encoder!r}")
        if output not in ("decoder", "paste"):
            raise ValueError(f"output must be 'decoder' or 'paste', got {output!r}")
        self.autoencoder = generator
        self.rule: MaskRule = ExactCount(0.5) if rule is None else rule
        if isinstance(self.rule, NoMask) and passes == 2:
            raise ValueError("with no mask the second pass would see nothing: use passes=1")
        self.passes, self.encoder, self.output = passes, encoder, output
        self.restore_size = restore_size
        self.straight_through = straight_through
        self.engines: Engines | None = None
        if self.backend == "openvino":
            if (passes, encoder) != (2, "drop"):
                raise ValueError("the backend 'openvino' needs two passes and encoder='drop'")
            self.engines = Engines(generator, self.rule, output == "paste", precision)

    @property
    def image_size(self) -> int:
        return self.autoencoder.config.image_size

    @property
    def random(self) -> bool:
        return self.rule.random

    def extra_repr(self) -> str:
        text = f"{self.rule}, passes={self.passes}, encoder={self.encoder}, output={self.output}"
        exact = self.engines is None and self.precision == "fp32"
        return text if exact else f"{text}, {self.backend} {self.precision}"

    def differentiable(self) -> Purifier:
        """The same purifier for an attacker: shared weights, and the clamp passes gradients."""
        twin = type(self)(
            self.autoencoder,
            self.rule,
            passes=self.passes,
            encoder=self.encoder,
            output=self.output,
            restore_size=self.restore_size,
            straight_through=True,
        )
        return twin.train(self.training)

    def draw_mask(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Fresh masks (B, N), True = visible in the first pass."""
        device = next(self.parameters()).device
        return self.rule(batch, self.autoencoder.grid, generator=generator, device=device)

    def forward(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        tokens, mask = self._prepare(images, generator, mask)
        out = self._purify(tokens, mask)[-1]
        return self._finish(out, images)

    def draws(
        self,
        images: Tensor,
        n: int,
        *,
        generator: torch.Generator | None = None,
        micro_batch: int = 64,
    ) -> Tensor:
        """``n`` purifications of every image under fresh masks: (n, B, 3, S, S).

        All run as one batch, in slices of at most ``micro_batch``. The masks are those that ``n``
        calls one after the other would take from ``generator``.
        """
        if n < 1 or micro_batch < 1:
            raise ValueError(f"draws need n >= 1 and micro_batch >= 1, got {n} and {micro_batch}")
        batch = len(images)
        masks = torch.cat([self.draw_mask(batch, generator) for _ in range(n)])
        tokens, masks = self._prepare(images, None, masks, n)
        parts = []
        for part in torch.arange(n * batch, device=tokens.device).split(micro_batch):
            out = self._purify(tokens[part % batch], masks[part])[-1]
            parts.append(self._finish(out, images))
        size = tuple(images.shape[-2:]) if self.restore_size else (self.image_size,) * 2
        return torch.cat(parts).view(n, batch, 3, *size)

    def steps(
        self,
        images: Tensor,
        *,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """The first reconstruction (if there are two passes) and the purified images."""
        tokens, mask = self._prepare(images, generator, mask)
        return [self._finish(out, images) for out in self._purify(tokens, mask, both=True)]

    def _prepare(
        self,
        images: Tensor,
        generator: torch.Generator | None,
        mask: Tensor | None,
        copies: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Checked tokens (B, N, p*p*3) in the type of the weights, masks (copies * B, N)."""
        images = check_images(images)
        # Resizing exists in full precision only; the rest runs in the precision of the weights.
        x = resize(images.float() if images.itemsize < 4 else images, self.image_size)
        x = x.to(next(self.parameters()).dtype)
        if mask is None:
            mask = self.draw_mask(len(x), generator)
        mask = self._check_mask(mask.to(x.device), copies * len(x))
        return patchify(x, self.autoencoder.config.patch_size), mask

    def _purify(self, tokens: Tensor, mask: Tensor, both: bool = False) -> list[Tensor]:
        """Equations 7-13 on tokens: the last result, and the first before it if ``both``.

        Nothing is computed for naught: the second pass sees only what the first had hidden, so
        only that is predicted in the first; and pasting needs half of the second.
        """
        if self.engines is not None and not both:
            if not (tokens.requires_grad and torch.is_grad_enabled()):
                return [self.engines(tokens, mask)]
            if self.precision != "fp32":
                raise ValueError(f"{self.precision} has no gradients: use the backend 'torch'")
        if self.engines is None and self.precision in HALF:
            with torch.autocast(tokens.device.type, HALF[self.precision]):
                return self._both_passes(tokens, mask, both)
        return self._both_passes(tokens, mask, both)

    def _both_passes(self, tokens: Tensor, mask: Tensor, both: bool) -> list[Tensor]:
        model = self.autoencoder
        seen = Selection.of(mask)
        states = model.states(seen.take(tokens), seen, self.encoder)
        paste = self.output == "paste"
        if self.passes == 1 and not paste:
            return [model.predict(states)]
        hidden = Selection.of(complement(mask))
        if self.passes == 1 and not hidden.count:  # nothing is hidden, nothing to paste
            return [tokens]
        rebuilt = model.predict(states, hidden)
        if self.passes == 1:
            return [hidden.put(tokens, rebuilt)]
        first = [model.predict(states)] if both else []
        states = model.states(rebuilt, hidden, self.encoder)
        if not paste:
            return [*first, model.predict(states)]
        pasted = seen.put(tokens.new_zeros(tokens.shape), model.predict(states, seen))
        return [*first, hidden.put(pasted, rebuilt)]

    def _finish(self, tokens: Tensor, images: Tensor) -> Tensor:
        out = self._clamp(self.autoencoder.to_image(tokens))
        return resize(out, (images.shape[-2], images.shape[-1])) if self.restore_size else out

    def _clamp(self, x: Tensor) -> Tensor:
        clamped = x.clamp(0, 1)
        return x + (clamped - x).detach() if self.straight_through else clamped

    def _check_mask(self, mask: Tensor, batch: int) -> Tensor:
        n = self.autoencoder.grid**2
        if mask.ndim == 1:
            mask = mask.expand(batch, -1)
        if tuple(mask.shape) != (batch, n) or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be a boolean tensor of shape ({batch}, {n}), "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        if not bool(mask.any(1).all()):
            raise ValueError("a mask hides every token: the first pass would see nothing")
        if self.passes == 2 and bool(mask.all(1).any()):
            raise ValueError("a mask shows every token: the second pass would see nothing")
        return mask

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] = "pair-small", **options) -> Purifier:
        """Load a generator by shipped name, folder or hub repository (strict safetensors).

        ``preset="paper"`` or ``"released"`` selects a documented reading of the method; other
        keyword arguments override the settings stored with the weights.
        """
        preset = options.pop("preset", None)
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
        folder = hub.resolve(name)
        config = hub.read_config(folder, "generator")
        if (target := config.get("pixel_target")) != "plain":
            # De-normalising with the input's own patch statistics would put the patch back.
            raise hub.ModelError(f"{folder} has pixel target {target!r}: only 'plain' is safe")
        geometry = hub.section(config, "model", [f.name for f in fields(GeneratorConfig)], folder)
        settings = hub.section(config, "purifier", STORED, folder)
        settings["rule"] = rule_from_config(settings.pop("mask"))
        model = MaskedAutoencoder(GeneratorConfig(**geometry))
        hub.load_into(model, hub.read_weights(folder, config), str(folder))
        return cls(model, **{**settings, **PRESETS.get(preset, {}), **options}).eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        card: str | None = None,
        **facts: Any,
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``; ``facts`` join the config."""
        config = {
            "kind": "generator",
            "model": self.autoencoder.config.to_dict(),
            "pixel_target": "plain",
            "purifier": {
                "mask": rule_to_config(self.rule),
                **{name: getattr(self, name) for name in STORED if name != "mask"},
            },
            **facts,
        }
        hub.save(folder, self.autoencoder, config, dtype, card)
