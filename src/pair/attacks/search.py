"""Around one optimisation: successive halving of restarts, shrinking, the search for a place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.attacks.carriers import carrier, pixels
from pair.attacks.evaluate import score
from pair.attacks.objectives import Goal, TextGoal
from pair.attacks.optimise import AttackResult, Progress
from pair.attacks.patch import Patch, Placement
from pair.attacks.tth import TTHConfig, tth

SHARES = (0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Start:
    """Where one restart begins: contents (a patch) and what is optimised."""

    patch: Patch
    parameters: str = "pixels"


def default_starts(
    names: tuple[str, ...],
    patch: Patch,
    config: TTHConfig,
    generator: torch.Generator,
    tile: int = 16,
) -> dict[str, Start]:
    """Starts by name in the shape and place of ``patch``.

    A name is a carrier, "dct" (grey, low frequencies), "tiles" (noise, one repeated tile) or
    "given" (the contents of ``patch``: a warm start, a collage).
    """
    starts = {}
    for name in names:
        kind = {"dct": "grey", "tiles": "noise"}.get(name, name)
        content = patch.content
        if name != "given":
            content = carrier(kind, *patch.size, generator).to(content)
        side = min(tile, *patch.size)
        space = {"dct": "dct:12", "tiles": f"tiles:{side}"}.get(name, config.parameters)
        starts[name] = Start(patch.with_content(content), space)
    return starts


def successive_halving(
    features: Any,
    images: Tensor,
    target: Tensor | Goal,
    starts: Mapping[str, Start],
    config: TTHConfig,
    *,
    generator: torch.Generator | None = None,
    selection_seed: int = 1_000_003,
    selection_draws: int = 6,
    shares: tuple[float, ...] = SHARES,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AttackResult:
    """Run every start for the first share of the steps, keep the better half, and so on.

    The choice uses draws of its own (``selection_seed``), never those of the optimisation or of
    an evaluation. The learning rate follows one schedule over all rungs; Adam's moments start
    anew in each. ``curves`` gets the selection loss of every start that was ever ranked.
    """
    if not starts:
        raise ValueError("successive halving needs at least one start")
    generator = generator or torch.Generator().manual_seed(0)
    seed = generator.initial_seed()
    goal: Goal = TextGoal(target) if isinstance(target, Tensor) else target
    alive = dict(starts)
    results: dict[str, AttackResult] = {}
    used = forwards = 0
    seconds = 0.0
    curves: dict[str, list[float]] = {}
    first = 0
    for rung, share in enumerate(shares):
        last = rung == len(shares) - 1
        steps = config.steps - first if last else round(share * config.steps)
        part = replace(
            config, restarts=(), steps=steps, first_step=first, total_steps=config.steps,
            snapshots=tuple(s - first for s in config.snapshots if first < s <= first + steps),
        )  # fmt: skip
        ranked = {}
        for name, start in alive.items():
            own = torch.Generator(device=generator.device)
            own.manual_seed((seed * 7_919 + 101 * rung + sum(name.encode())) & 0x7FFFFFFF)
            file = None
            if checkpoint is not None:
                file = checkpoint.with_name(f"{checkpoint.name}-{rung}-{_plain(name)}")
            result = tth(
                features, images, goal, config=replace(part, parameters=start.parameters),
                patch=start.patch, generator=own, checkpoint=file, progress=progress, **options,
            )  # fmt: skip
            if (before := results.get(name)) is not None:
                result.losses = before.losses[:-1] + result.losses
                shifted = {k + first: v for k, v in result.snapshots.items()}
                result.snapshots = {**before.snapshots, **shifted}
            results[name] = result
            used += result.gradients_used
            forwards += result.forwards + selection_draws * len(images)
            seconds += result.seconds
            chooser = torch.Generator(device=generator.device).manual_seed(selection_seed + rung)
            ranked[name] = score(features, images, result.patch, goal, selection_draws, chooser)
            curves.setdefault(name, []).append(ranked[name])
        order = sorted(ranked, key=lambda n: ranked[n])
        keep = order[: 1 if last or rung == len(shares) - 2 else max(1, (len(order) + 1) // 2)]
        alive = {n: replace(starts[n], patch=results[n].patch) for n in keep}
        first += steps
    winner = next(iter(alive))
    best = results[winner]
    best.config = {**best.config, "steps": config.steps, "restarts": tuple(starts)}
    best.seeds = {"optimise": seed, "select": selection_seed}
    best.gradients_used, best.forwards = used, forwards
    best.seconds, best.curves = seconds, curves
    best.patch = best.patch.with_content(best.patch.content, start=winner, seed=seed)
    return best


def shrinking(
    features: Any,
    images: Tensor,
    target: Tensor | Goal,
    patch: Patch,
    config: TTHConfig,
    *,
    first: float = 0.5,
    stages: int = 8,
    generator: torch.Generator | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> AttackResult:
    """Begin with a large patch around the place of ``patch`` and cut it down, optimising always.

    A hash code has no slope to follow as long as the photo outweighs the patch: from any start a
    small patch may gain nothing, where one of ``first`` of the side succeeds at once. What is left
    of that one after each cut is a start that the small patch does not find by itself. A quarter
    of ``config.steps`` belongs to the largest, a third to the final size, the rest in equal parts
    to those between; each stage has its own schedule. ``losses`` are those of the final size,
    ``curves`` has the loss at the end of every stage and the side of its patch as a share of the
    image, ``snapshots`` the patch of every larger stage at its last step.
    """
    if patch.placement.random or config.scope != "universal" or config.restarts:
        raise ValueError("shrinking needs one place, one universal patch and no restarts")
    generator = generator or torch.Generator().manual_seed(0)
    seed, image = generator.initial_seed(), (int(images.shape[-2]), int(images.shape[-1]))
    boxes = _boxes(patch, image, first, stages)
    # The largest must succeed, or there is nothing to hand on: a quarter; the final size: a third.
    begin, between = config.steps // 4, len(boxes) - 2
    rest = config.steps - config.steps // 3 - begin
    ends = [begin + rest * i // max(1, between) for i in range(len(boxes) - 1)] + [config.steps]
    content = F.interpolate(patch.content[None], boxes[0][1], mode="bilinear")[0]
    used = forwards = done = 0
    seconds = 0.0
    curves: dict[str, list[float]] = {"stage loss": [], "stage side": []}
    larger: dict[int, Patch] = {}
    for i, ((top, left), size) in enumerate(boxes):
        if i:  # cut out of the one before
            y, x = top - boxes[i - 1][0][0], left - boxes[i - 1][0][1]
            content = content[:, y : y + size[0], x : x + size[1]]
        final = i == len(boxes) - 1
        current = patch.with_content(content) if final else Patch(
            content, torch.ones(size), Placement("fixed", top, left), patch.image_size
        )  # fmt: skip
        own = torch.Generator(device=generator.device)
        own.manual_seed((seed * 7_919 + 101 * i) & 0x7FFFFFFF)
        file = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}-{i}")
        kept = tuple(s - done for s in config.snapshots if done < s) if final else ()
        part = replace(config, steps=ends[i] - done, snapshots=kept)

        def tell(step: int, _: int, loss: float, begun: int = done) -> None:
            if progress is not None:
                progress(begun + step, config.steps, loss)

        result = tth(features, images, target, config=part, patch=current, generator=own,
                     checkpoint=file, progress=tell, **options)  # fmt: skip
        content, used = result.patch.content, used + result.gradients_used
        forwards, seconds = forwards + result.forwards, seconds + result.seconds
        curves["stage loss"].append(result.losses[-1])
        curves["stage side"].append(size[0] / image[0])
        if not final:
            done = ends[i]
            larger[done] = result.patch
    result.config = {**result.config, "steps": config.steps, "shrink": first}
    result.seeds = {"optimise": seed}
    result.gradients_used, result.forwards, result.seconds = used, forwards, seconds
    result.snapshots = {**larger, **{k + done: v for k, v in result.snapshots.items()}}
    result.curves = curves
    return result


def _boxes(
    patch: Patch, image: tuple[int, int], first: float, stages: int
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(top, left), (h, w) of every stage, largest first; each lies within the one before."""
    place, size = patch.placement.at(1, image, patch.size)[0], patch.size
    large = tuple(max(s, pixels(first, n)) for s, n in zip(size, image, strict=True))
    boxes = [(place, size)]
    for i in range(1, stages):
        grown = [round(s + (n - s) * i / (stages - 1)) for s, n in zip(size, large, strict=True)]
        at, inner = boxes[-1]
        corner = [
            min(max(a - (g - s) // 2, 0), n - g)
            for a, s, g, n in zip(at, inner, grown, image, strict=True)
        ]
        if tuple(grown) != inner:
            boxes.append(((corner[0], corner[1]), (grown[0], grown[1])))
    return boxes[::-1]


def location_search(
    features: Any,
    images: Tensor,
    target: Tensor | Goal,
    patch: Patch,
    config: TTHConfig,
    *,
    grid: int = 5,
    coarse_steps: int = 30,
    keep: int = 3,
    hill: int = 8,
    hill_every: int = 50,
    generator: torch.Generator | None = None,
    selection_seed: int = 2_000_003,
    selection_draws: int = 6,
    progress: Progress | None = None,
    **options: Any,
) -> AttackResult:
    """Choose the place too: a coarse grid, the best few again, then hill climbing while optimising.

    The budget of the last phase is ``config.steps``; the grid costs grid^2 * coarse_steps more,
    and ``keep`` * coarse_steps again. ``options`` go to :func:`pair.attacks.tth.tth`.
    """
    generator = generator or torch.Generator().manual_seed(0)
    goal: Goal = TextGoal(target) if isinstance(target, Tensor) else target
    height, width = images.shape[-2:]
    room = (height - patch.size[0], width - patch.size[1])
    used = forwards = taken = 0
    seconds = 0.0

    def rate(candidate: Patch) -> float:
        chooser = torch.Generator(device=generator.device).manual_seed(selection_seed)
        return score(features, images, candidate, goal, selection_draws, chooser)

    def run(start: Patch, steps: int, first: int, total: int) -> AttackResult:
        nonlocal used, forwards, seconds, taken
        before = taken

        def tell(step: int, _: int, loss: float) -> None:
            if progress is not None:
                progress(before + step, whole, loss)

        part = replace(config, steps=steps, restarts=(), first_step=first, total_steps=total,
                       snapshots=())  # fmt: skip
        result = tth(features, images, goal, config=part, patch=start, generator=generator,
                     progress=tell, **options)  # fmt: skip
        taken += steps
        used, forwards = used + result.gradients_used, forwards + result.forwards
        seconds += result.seconds
        return result

    def moved(p: Patch, top: int, left: int) -> Patch:
        top, left = min(max(top, 0), room[0]), min(max(left, 0), room[1])
        return replace(p, placement=Placement("fixed", top, left))

    spots = [
        (round(room[0] * y / max(1, grid - 1)), round(room[1] * x / max(1, grid - 1)))
        for y in range(grid)
        for x in range(grid)
    ]
    spots = sorted(set(spots))  # a patch as large as the image has one place only
    whole = coarse_steps * (len(spots) + min(keep, len(spots))) + config.steps
    tried = [run(moved(patch, *spot), coarse_steps, 0, coarse_steps).patch for spot in spots]
    best = sorted(tried, key=rate)[:keep]
    best = sorted((run(p, coarse_steps, 0, coarse_steps).patch for p in best), key=rate)
    current, done = best[0], 0
    losses: list[float] = []
    while done < config.steps:
        steps = min(hill_every, config.steps - done)
        result = run(current, steps, done, config.steps)
        losses = losses[:-1] + result.losses
        current, done = result.patch, done + steps
        if done < config.steps:
            top, left = current.placement.top, current.placement.left
            moves = [(0, 0), (hill, 0), (-hill, 0), (0, hill), (0, -hill)]
            current = min((moved(current, top + y, left + x) for y, x in moves), key=rate)
    result.patch, result.losses = current, losses
    result.config = {**result.config, "steps": config.steps}
    result.gradients_used, result.forwards, result.seconds = used, forwards, seconds
    result.seeds = {"optimise": generator.initial_seed(), "select": selection_seed}
    return result


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
