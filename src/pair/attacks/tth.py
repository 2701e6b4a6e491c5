"""TTH [14]: a universal patch that pulls its carriers to a keyword, and stronger variants of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pair.attacks.objectives import Goal, TextGoal
from pair.attacks.optimise import AttackResult, Progress, Schedule, load_state, minimise
from pair.attacks.parametrise import parametrisation
from pair.attacks.patch import Patch, Transform
from pair.attacks.wrappers import expectation

Penalty = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TTHConfig:
    """Settings of :func:`tth`. Defaults: the published code, one mask per step.

    ``steps`` counts updates. ``distortion`` is lambda, the weight of sum((p - p0)^2) / (H*W).
    ``eot`` draws per step are averaged in the ``form`` of :class:`pair.attacks.wrappers.EOT`.
    ``retry`` is TTH's rule: a loss above twice its minimum so far (as long as it never was below
    1e-4) restarts with a fifth of the learning rate and twice the steps, at most 10 times.
    ``plateau=(window, share)`` stops early, and only if you ask for it.
    """

    steps: int = 300
    lr: float = 0.01
    schedule: str = "step"  # "step": x decay every ``decay_every``; "cosine"; "constant"
    decay: float = 0.95
    decay_every: int = 10
    distortion: float = 1.0
    eot: int = 1
    form: str = "mean_embedding"
    start: str = "qr"
    size: float = 0.35
    placement: str = "top-right"
    parameters: str = "pixels"  # or "tiles:<side>", "dct:<k>"
    retry: bool = True
    trials: int = 10
    plateau: tuple[int, float] | None = None
    snapshots: tuple[int, ...] = ()
    micro_batch: int = 64
    precision: str = "fp32"  # or "bf16", see pair.attacks.wrappers.EOT
    held: int | None = None  # images kept in memory instead of recomputed, see there
    carriers: int | None = None  # this many of the carriers per update, drawn anew; default: all
    restarts: tuple[str, ...] = ()  # starts for successive halving, see pair.attacks.search
    scope: str = "universal"  # or "per-image": every carrier gets a patch of its own
    total_steps: int | None = None  # length of the schedule, if this run is a part of a longer one
    first_step: int = 0

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TTHConfig:
        """``paper``, ``released``, ``std``, ``strong`` or ``max``; keyword arguments override."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: use one of {', '.join(PRESETS)}")
        return replace(cls(), **{**PRESETS[name], **changes})


_STRONG: dict[str, Any] = {
    "distortion": 0.0,
    "lr": 0.03,
    "schedule": "cosine",
    "retry": False,
    "start": "grey",
    "restarts": ("grey", "qr", "noise", "dct", "tiles"),
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"eot": 7},
    "released": {"eot": 1},
    "std": {**_STRONG, "steps": 500, "eot": 20},
    "strong": {**_STRONG, "steps": 1000, "eot": 50},
    "max": {**_STRONG, "steps": 2000, "eot": 100},
}


def tth(
    features: Any,
    images: Tensor,
    target: Tensor | Goal,
    *,
    config: TTHConfig | None = None,
    patch: Patch | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    penalty: Penalty | None = None,
    transform: Transform | None = None,
) -> AttackResult:
    """Optimise one patch for all ``images`` (B, 3, H, W) in [0, 1], together.

    ``features`` is an encoder or a function ``(images, generator=...) -> (B, D)``, a defense
    included (:func:`pair.attacks.wrappers.pipeline`). ``target`` is e_t, (D,) or (1, D), or any
    goal of :mod:`pair.attacks.objectives`. ``patch`` gives start, shape and place; by default
    they come from ``config``. The distortion is measured from its contents; an already optimised
    patch therefore makes a warm start. ``penalty(images, covered)`` is added to the loss
    (detector fooling), ``transform`` prints and photographs the patch anew in every step.

    With default settings this is the published algorithm: the returned patch is the one that the
    last evaluation saw. Rounding to 8 bits happens when the patch is saved.

    With ``config.restarts`` the budget goes through successive halving over those starts (and
    over ``patch``, if you give one). With ``scope="per-image"`` the result has ``patches``, one
    per carrier, and ``patch`` is the first of them.
    """
    config = config or TTHConfig()
    generator = generator or torch.Generator().manual_seed(0)
    seed = generator.initial_seed()
    goal: Goal = TextGoal(target) if isinstance(target, Tensor) else target
    if images.ndim != 4 or not len(images):
        raise ValueError(f"carriers must be a batch (B, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if patch is None:
        side = min(height, width)
        patch = Patch.make(config.start, config.size, side, config.placement, generator=generator)
        names = config.restarts
    else:
        names = ("given", *config.restarts) if config.restarts else ()
    patch = patch.to(images.device)
    if names:
        from pair.attacks.search import default_starts, successive_halving

        return successive_halving(
            features,
            images,
            goal,
            default_starts(names, patch, config, generator),
            config,
            generator=generator,
            progress=progress,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            penalty=penalty,
            transform=transform,
        )
    each = config.scope == "per-image"
    if config.scope not in ("universal", "per-image"):
        raise ValueError(f"scope must be 'universal' or 'per-image', got {config.scope!r}")
    if each and config.parameters != "pixels":
        raise ValueError("per-image patches are optimised in pixels: set parameters='pixels'")
    if config.carriers is not None and (each or not 1 <= config.carriers <= len(images)):
        raise ValueError(
            f"carriers must lie in 1 to {len(images)} (the number of images) and needs a "
            f"universal patch, got {config.carriers}"
        )
    count = config.carriers or len(images)
    function = expectation(features, config)
    space = parametrisation(config.parameters, *patch.size)
    start, cover = patch.content, (patch.mask > 0).to(patch.content.dtype)
    random = generator

    def loss(parameter: Tensor) -> tuple[Tensor, float]:
        content = space.render(parameter)
        batch = images
        if count < len(images):
            chosen = torch.randperm(len(images), generator=random, device=random.device)[:count]
            batch = images[chosen.to(images.device)]
        pasted, covered = patch.paste(batch, random, content=content, transform=transform)
        performance = goal(function(pasted, generator=random)).mean()
        # Adam is blind to the scale, the distortion is not: the sum keeps carriers independent.
        total = performance * len(images) if each else performance
        if config.distortion:
            moved = ((content - start) ** 2 * cover).sum() / (height * width)
            total = total + config.distortion * moved
        if penalty is not None:
            total = total + penalty(pasted, covered)
        return total, float(performance.detach())

    def diverged(losses: list[float]) -> bool:
        low = min(losses)
        return low >= 1e-4 and losses[-1] > 2 * low

    facts = {
        "attack": "tth",
        "config": asdict(config),
        "seed": seed,
        "images": [*images.shape, float(images.double().sum())],
        "start": [*start.shape, float(start.double().sum())],
    }
    trial, used, forwards, seconds = 0, 0, 0, 0.0
    if checkpoint is not None and checkpoint.is_file():
        trial = _trial(checkpoint)
    while True:
        factor = 2**trial
        schedule = Schedule(
            config.lr / 5**trial,
            config.schedule,
            config.decay,
            config.decay_every,
            (config.total_steps or config.steps) * factor,
            config.first_step,
        )
        trace = minimise(
            start.expand(len(images), -1, -1, -1) if each else space.init(start),
            loss,
            steps=config.steps * factor,
            schedule=schedule,
            generator=generator,
            project=space.project,
            key={**facts, "trial": trial},
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            plateau=config.plateau,
            diverged=diverged if config.retry and trial + 1 < config.trials else None,
            snapshots=config.snapshots,
            progress=progress,
        )
        used += trace.updates * count * config.eot
        forwards += len(trace.losses) * count * config.eot
        seconds += trace.seconds
        if trace.stopped != "diverged":
            break
        trial += 1
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)

    def finished(parameter: Tensor, steps: int) -> Patch:
        content = space.render(parameter).clamp(0, 1)
        return patch.with_content(content, attack="tth", steps=steps, seed=seed)

    rows = trace.parameter if each else trace.parameter[None]
    patches = [finished(row, trace.updates) for row in rows]
    return AttackResult(
        patch=patches[0],
        patches=patches,
        losses=trace.losses,
        config=asdict(config),
        seeds={"optimise": seed},
        gradients_used=used,
        forwards=forwards,
        seconds=seconds,
        stopped=trace.stopped,
        trials=trial + 1,
        snapshots={k: finished(v[0] if each else v, k) for k, v in trace.snapshots.items()},
    )


def _trial(checkpoint: Path) -> int:
    state = load_state(checkpoint, None)
    return state["key"].get("trial", 0) if state else 0
