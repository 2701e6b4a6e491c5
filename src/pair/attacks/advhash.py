"""AdvHash [15]: one patch that gives many images the hash code of another class."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pair.attacks.carriers import area_side, pixels
from pair.attacks.objectives import HashGoal, TextGoal
from pair.attacks.optimise import AttackResult, Progress, load_state, save_state
from pair.attacks.patch import Patch, Placement, Transform
from pair.attacks.tth import Penalty, TTHConfig, tth
from pair.attacks.wrappers import expectation
from pair.generator import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class AdvHashConfig:
    """Settings of :func:`advhash`. Defaults: the published code in pixel space.

    ``compat`` repeats its normalised-space quirks: start, step and one clamp range for all
    channels, [-2.118, 2.640], in ImageNet-normalised units. Features then receive values outside
    [0, 1] and must not refuse them (``HashNet.image_features`` does not).

    ``optimiser="adam"`` is not AdvHash but the stronger attack on the same target (presets
    ``std`` to ``max``): Adam with a cosine schedule on 1 - cos(H, c), which moves bits that are
    already right too, ``batch`` photos drawn anew in every update, ``budget`` updates, and
    successive halving over ``restarts`` (see :mod:`pair.attacks.search`).
    """

    epochs: int = 5
    batch: int = 10
    iterations: int = 1000  # updates per mini-batch, at most
    step: float = 1 / 255
    margin: float = 0.3
    alpha: float = 0.01  # until ``switch`` of the bits agree, then 1
    switch: float = 0.9
    average: int = 2  # the next mini-batch starts from the mean of the last so many patches
    weighting: str = "product"  # or "mean"
    area: float = 0.05
    size: float | None = None  # share of the side; overrides ``area``
    eot: int = 1
    form: str = "mean_embedding"
    compat: bool = False
    micro_batch: int = 64
    precision: str = "fp32"  # or "bf16", see pair.attacks.wrappers.EOT
    held: int | None = None  # images kept in memory instead of recomputed, see there
    optimiser: str = "sign"  # or "adam"
    lr: float = 0.03  # of Adam
    restarts: tuple[str, ...] = ()  # of Adam: starts beside the given patch or noise
    plateau: tuple[int, float] | None = None  # of Adam, see TTHConfig
    shrink: float | None = None  # of Adam: share of the side that the patch begins with
    placement: str = "advhash"  # lower right corner at 200/224 of the side; or a named place
    budget: int | None = None  # updates in all, at most
    good_map: float = 0.8  # with ``evaluate``: enough to stop after an epoch
    snapshots: tuple[int, ...] = ()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> AdvHashConfig:
        """``paper``, ``released``, ``std``, ``strong`` or ``max``; keyword arguments override."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: use one of {', '.join(PRESETS)}")
        return replace(cls(), **{**PRESETS[name], **changes})


_ADAM: dict[str, Any] = {"size": 0.22, "optimiser": "adam"}
_SHRINK: dict[str, Any] = {**_ADAM, "lr": 0.05, "shrink": 0.5, "placement": "centre"}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"size": 0.22, "eot": 7},
    "released": {"compat": True},
    "std": {**_ADAM, "restarts": ("grey", "dct"), "eot": 20, "budget": 500},
    "strong": {**_SHRINK, "eot": 50, "budget": 1000},
    "max": {**_SHRINK, "eot": 100, "budget": 2000},
}


def advhash_patch(
    image_size: int, config: AdvHashConfig, generator: torch.Generator | None = None
) -> Patch:
    """AdvHash's start: uniform noise, by default with its lower-right corner at 200/224."""
    if config.size is not None:
        side = pixels(config.size, image_size)
    else:
        side = area_side(config.area, image_size)
    place = advhash_place(config.placement, (side, side), image_size)
    return Patch.make("noise", side, image_size, place, generator=generator)


def advhash_place(name: str, size: tuple[int, int], image_size: int) -> Placement:
    """A named place, or ``advhash``: the lower-right corner at 200/224 of the side."""
    if name != "advhash":
        return Placement(name)
    corner = round(200 / 224 * image_size)
    top, left = (max(0, corner - n) for n in size)
    return Placement("fixed", top=top, left=left)


@dataclass
class _State:
    """Everything that changes; what a checkpoint holds."""

    content: Tensor  # in the units of the optimisation
    started: Tensor  # start of the current mini-batch
    recent: list[Tensor]
    order: Tensor | None = None  # shuffled images of the current epoch
    epoch: int = 0
    at: int = 0  # mini-batch within the epoch
    finished: int = 0  # mini-batches in all
    iteration: int = 0  # within the mini-batch
    updates: int = 0
    used: int = 0
    forwards: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    snapshots: dict[int, Tensor] = field(default_factory=dict)


class _Units:
    """Pixel space, or the normalised space of the published code."""

    def __init__(self, compat: bool, like: Tensor):
        self.compat = compat
        # Made in the dtype of the images: float32 would cost double its precision.
        mean, std = (like.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.mean, self.std = mean, std
        self.low = float(((0 - mean) / std).min()) if compat else 0.0
        self.high = float(((1 - mean) / std).max()) if compat else 1.0

    def pixels(self, content: Tensor) -> Tensor:
        return content * self.std + self.mean if self.compat else content


def advhash(
    features: Any,
    images: Tensor,
    code: Tensor,
    *,
    config: AdvHashConfig | None = None,
    patch: Patch | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    penalty: Penalty | None = None,
    transform: Transform | None = None,
    evaluate: Callable[[Patch], float] | None = None,
) -> AttackResult:
    """Optimise one patch on source ``images`` (N, 3, H, W) towards the anchor ``code`` (K,).

    ``features`` gives real hash outputs before tanh and sign, (B, K). Mini-batches are shuffled
    anew in each epoch; a mini-batch ends after ``iterations`` updates, when every code equals the
    anchor, or when no bit is left to move. ``evaluate(patch)`` returns t-mAP in [0, 1]; with it,
    the attack ends after an epoch whose last codes all agree and whose t-mAP exceeds ``good_map``.

    The result is the mean of the last ``average`` optimised patches; with ``compat`` it is the
    patch that the last mini-batch started from, which is what the published code evaluates.
    ``losses`` is the relaxed share of wrong bits, (1 - mean tanh(H) c) / 2; ``curves`` has the
    published objective (its alpha changes on the way) and the share of agreeing bits. With Adam,
    ``losses`` is 1 - cos(H, c) and ``evaluate`` is not used.
    """
    config = config or AdvHashConfig()
    generator = generator or torch.Generator().manual_seed(0)
    if images.ndim != 4 or not len(images):
        raise ValueError(f"source images must be a batch (N, 3, H, W), got {tuple(images.shape)}")
    code = code.reshape(-1).to(images)
    if not bool((code.abs() == 1).all()):
        raise ValueError("an anchor code consists of +1 and -1")
    seed = generator.initial_seed()
    if patch is None:
        patch = advhash_patch(min(images.shape[-2:]), config, generator)
    if config.optimiser == "adam":
        options: dict[str, Any] = {
            "config": _adam(config, len(images)), "patch": patch, "generator": generator,
            "checkpoint": checkpoint, "checkpoint_every": checkpoint_every, "progress": progress,
            "penalty": penalty, "transform": transform,
        }  # fmt: skip
        if config.shrink is None:
            result = tth(features, images, TextGoal(code), **options)
        else:
            from pair.attacks.search import shrinking

            result = shrinking(features, images, TextGoal(code), first=config.shrink, **options)
        return replace(result, config=asdict(config))
    if config.optimiser != "sign":
        raise ValueError(f"optimiser must be 'sign' or 'adam', got {config.optimiser!r}")
    run = _Run(features, images, code, config, patch.to(images.device), generator)
    run.penalty, run.transform, run.progress = penalty, transform, progress
    run.checkpoint, run.checkpoint_every = checkpoint, checkpoint_every
    stopped = run.epochs(evaluate)
    state = run.state
    final = state.started if config.compat else run.averaged()
    return AttackResult(
        patch=run.patch_of(final, state.updates),
        losses=state.losses,
        config=asdict(config),
        seeds={"optimise": seed},
        gradients_used=state.used,
        forwards=state.forwards,
        seconds=state.seconds,
        stopped=stopped,
        snapshots={k: run.patch_of(v, k) for k, v in state.snapshots.items()},
        curves={"objective": state.objective, "agreement": state.agreement},
    )


def _adam(config: AdvHashConfig, images: int) -> TTHConfig:
    """The same attack in the terms of :func:`pair.attacks.tth.tth`."""
    if config.compat:
        raise ValueError("compat repeats the published code: it needs optimiser='sign'")
    return TTHConfig(
        steps=config.budget or 500,
        lr=config.lr,
        schedule="cosine",
        distortion=0.0,
        retry=False,
        carriers=min(config.batch, images),
        **{name: getattr(config, name) for name in _SHARED},
    )


_SHARED = ("eot", "form", "micro_batch", "precision", "held", "restarts", "plateau", "snapshots")


class _Run:
    penalty: Penalty | None
    transform: Transform | None
    progress: Progress | None
    checkpoint: Path | None
    checkpoint_every: int

    def __init__(
        self,
        features: Any,
        images: Tensor,
        code: Tensor,
        config: AdvHashConfig,
        patch: Patch,
        generator: torch.Generator,
    ):
        self.images, self.code, self.config = images, code, config
        self.patch, self.generator = patch, generator
        self.features = expectation(features, config)
        self.units = _Units(config.compat, images)
        batches = math.ceil(len(images) / config.batch)
        self.limit = config.epochs * batches * config.iterations
        if config.budget is not None:
            self.limit = min(self.limit, config.budget)
        # The published start is uniform in [0, 1) in whichever space is optimised.
        start = patch.content
        self.state = _State(start, start, [start])
        self.key = {
            "attack": "advhash",
            "config": asdict(config),
            "seed": generator.initial_seed(),
            "images": [*images.shape, float(images.double().sum())],
            "start": [*start.shape, float(start.double().sum())],
            "code": code.tolist(),
        }

    def patch_of(self, content: Tensor, steps: int) -> Patch:
        shown = self.units.pixels(content).clamp(0, 1)
        return self.patch.with_content(
            shown, attack="advhash", steps=steps, seed=self.generator.initial_seed()
        )

    def averaged(self) -> Tensor:
        """Mean of the last patches, without the noise that the first mini-batch started from."""
        count = min(self.config.average, max(1, self.state.finished))
        return torch.stack(self.state.recent[-count:]).mean(0)

    def epochs(self, evaluate: Callable[[Patch], float] | None) -> str:
        state, config, bits = self.state, self.config, len(self.code)
        if saved := load_state(self.checkpoint, self.key):
            self.generator.set_state(saved["generator"])
            state = self.state = _State(**saved["state"])
        while state.epoch < config.epochs:
            if state.order is None:
                where = self.generator.device
                state.order = torch.randperm(
                    len(self.images), generator=self.generator, device=where
                )
            for rows in state.order.to(self.images.device).split(config.batch)[state.at :]:
                agreed = self.mini_batch(self.images[rows])
                if state.updates >= self.limit:
                    return "budget"
            state.epoch, state.at, state.order = state.epoch + 1, 0, None
            if evaluate is not None and agreed >= 0.8 * bits:
                patch = self.patch_of(self.averaged(), state.updates)
                if evaluate(patch) > config.good_map and agreed >= bits - 0.8:
                    return "success"
        return "epochs"

    def mini_batch(self, batch: Tensor) -> float:
        """Up to ``iterations`` updates on one mini-batch; returns the mean product at the end."""
        state, config, bits = self.state, self.config, len(self.code)
        if state.iteration == 0:
            state.started = state.content = torch.stack(state.recent).mean(0)
        begin, spent = time.perf_counter(), state.seconds
        while True:
            gradient, agreed = self.gradient(batch)
            enough = state.iteration > 0 and agreed >= bits  # the first update always happens
            over = state.iteration >= config.iterations or state.updates >= self.limit
            if gradient is None or enough or over:
                break
            moved = state.content - config.step * gradient.sign()
            state.content = moved.clamp(self.units.low, self.units.high)
            state.iteration, state.updates = state.iteration + 1, state.updates + 1
            state.used += len(batch) * config.eot
            state.seconds = spent + time.perf_counter() - begin
            if state.updates in config.snapshots:
                state.snapshots[state.updates] = state.content
            if self.progress is not None:
                self.progress(state.updates, self.limit, state.losses[-1])
            if self.checkpoint is not None and state.updates % self.checkpoint_every == 0:
                self.save(self.checkpoint)
        state.recent = [*state.recent, state.content][-config.average :]
        state.at, state.iteration = state.at + 1, 0
        state.finished += 1
        return agreed

    def gradient(self, batch: Tensor) -> tuple[Tensor | None, float]:
        """Aggregated gradient (3, h, w), None if no bit is active; and the mean product."""
        state, config, bits = self.state, self.config, len(self.code)
        # One copy of the patch per image: one backward pass gives every image's own gradient.
        copies = state.content.expand(len(batch), -1, -1, -1).clone().requires_grad_(True)
        shown = self.units.pixels(copies)
        pasted, covered = self.patch.paste(
            batch, self.generator, content=shown, transform=self.transform
        )
        outputs = self.features(pasted, generator=self.generator)  # (B, K) or (n, B, K)
        with torch.no_grad():
            products = (outputs.sign() * self.code).sum(-1)  # K - 2 x Hamming
            products = products.reshape(-1, len(batch)).mean(0)  # (B,)
            agreed = float(products.mean())
            relaxed = float((outputs.tanh() * self.code).mean())
        state.forwards += len(batch) * config.eot
        sure = state.iteration > 0 and agreed / bits > config.switch
        goal = HashGoal(self.code, 1.0 if sure else config.alpha, config.margin)
        if not bool(goal.active(outputs).any()):
            return None, agreed
        loss = goal(outputs)
        state.losses.append((1 - relaxed) / 2)
        state.objective.append(float(loss.detach()))
        state.agreement.append((1 + agreed / bits) / 2)
        if self.penalty is not None:
            loss = loss + self.penalty(pasted, covered)
        (each,) = torch.autograd.grad(loss, copies)  # (B, 3, h, w)
        if config.weighting == "mean":
            return each.mean(0), agreed
        weight = products + products.min().abs() + 2  # nearer to the anchor, larger weight
        return (weight.view(-1, 1, 1, 1) * each).sum(0) / weight.sum(), agreed

    def save(self, path: Path) -> None:
        state = {k: getattr(self.state, k) for k in self.state.__dataclass_fields__}
        save_state(path, {"key": self.key, "generator": self.generator.get_state(), "state": state})
