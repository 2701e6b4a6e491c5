"""Was the attack any good? The checks that one attack on a text search can answer by itself."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pair.attacks import sanity
from pair.attacks.objectives import Goal
from pair.attacks.optimise import AttackResult
from pair.attacks.patch import Patch
from pair.attacks.sanity import Check
from pair.attacks.wrappers import EOT, Adaptive, pipeline
from pair.bench.grid import Bench, Cell, seed_of
from pair.bench.search import CertifiedSearch, Search
from pair.purifier import Purifier

PICTURES, DIRECTIONS, DRAWS = 3, 6, 6  # of a check; the patch is judged on all pictures
STEP = 1e-6  # of finite differences, in float64


def seeds_of(bench: Bench, unit: str) -> dict[str, list[int]]:
    s = bench.settings
    return {
        "optimise": [seed_of("optimise", s.seed, unit)],
        "select": [seed_of("select", s.seed, unit, d) for d in range(s.selection)],
        "evaluate": [seed_of("evaluate", s.seed, unit, d) for d in range(s.seeds)]
        + [seed_of("gallery", s.seed, draw=d) for d in range(s.seeds)],
    }


def checks_of(
    bench: Bench,
    cell: Cell,
    search: Search,
    victim: Adaptive,
    goal: Goal,
    patch: Patch,
    notes: dict[str, Any],
    start: Patch,
) -> list[Check]:
    """S4, S5 and S8 to S12 of one finished attack (S6 needs the other attacks)."""
    world, unit = bench.text, cell.unit
    texts, queries = world.targets[unit], [world.queries[i] for i in world.rows(unit)]
    pictures = world.ads.to(bench.settings.device)
    images = pictures[:PICTURES]
    seeds = seeds_of(bench, unit)
    late = notes["late_gain"]
    met = late is not None and late < 0.01
    found = [Check("S8", late, 0.01, met, "" if met else "budget-limited")]
    if isinstance(search, CertifiedSearch):  # an attack of another form: see its tests
        return [*found, sanity.s11_seeds(seeds), sanity.s12_text_leak(texts, queries)]
    made = AttackResult(
        patch,
        notes["losses"],
        {**notes["config"], "eot": search.samples(bench.settings_of(cell.row))},
        {},
        0,
        0,
        0.0,
    )
    found += [
        c
        for c in sanity.of_attack(
            made, victim.features, images, goal, evaluation=search.features, start=start,
            directions=1, draws=DRAWS, seeds=seeds, captions=texts, queries=queries,
        )
        if c.name not in ("S4", "S5", "S8")
    ]  # fmt: skip
    # What a step averages: so many pictures, each under masks of its own.
    pictures = pictures[: notes["config"].get("carriers") or len(pictures)]
    drawn = EOT(victim.features, search.samples(bench.settings_of(cell.row)))
    for at, shown in (("step 0", start), ("final patch", patch)):
        found.append(sanity.s5_agreement(_gradient(drawn, pictures, goal, shown), at))
    if victim.gradient != "bpda":  # a replaced gradient is not the slope, on purpose
        found.append(slope(search, goal, patch, images))
    return found


def _gradient(features, images: Tensor, goal: Goal, patch: Patch):
    def of(generator: torch.Generator) -> Tensor:
        x = patch.content.clone().requires_grad_(True)
        outputs = features(patch.apply(images, generator, content=x), generator=generator)
        return torch.autograd.grad(goal(outputs).mean(), x)[0]

    return of


def slope(search: Search, goal: Goal, patch: Patch, images: Tensor) -> Check:
    """S4 in float64: in float32, rounding and curvature leave 1 % of error at any step size.

    Clamps that pass gradients straight through are ordinary clamps here: only those have a slope.
    """
    encoder = copy.deepcopy(search.encoder).double()
    defense = copy.deepcopy(search.defense).double()
    purifier = getattr(defense, "purifier", None)
    if isinstance(purifier, Purifier):
        purifier.straight_through = False
    features = pipeline(encoder, defense)  # the target is hardened already
    pictures = images.double()

    def loss(content: Tensor) -> Tensor:
        seed = torch.Generator().manual_seed(0)
        return goal(features(patch.apply(pictures, seed, content=content), generator=seed)).mean()

    noise = torch.rand(patch.content.shape, generator=torch.Generator().manual_seed(4))
    return sanity.s4_finite_differences(
        loss, (0.05 + 0.9 * noise).double(), directions=DIRECTIONS, epsilon=STEP
    )


def late_step(steps: int) -> int:
    """The step after which S8 expects no more gain."""
    return max(1, round(0.8 * steps))


@torch.no_grad()
def gain_of(
    victim: Adaptive,
    goal: Goal,
    images: Tensor,
    start: Patch,
    result: AttackResult,
    seed: int,
    draws: int,
) -> float | None:
    """S8 where every step sees other masks or other photos, so that its losses are noise.

    The patch before, at ``late_step`` and after its optimisation, on the same photos under the
    same ``draws``: the share of the gain that came late. None if nothing was gained.
    """
    levels = []
    for patch in (start, result.snapshots[late_step(len(result.losses) - 1)], result.patch):
        found = []
        for draw in range(draws):
            random = torch.Generator().manual_seed(seed + 1 + draw)
            shown = patch.to(images.device).apply(images, random)
            found.append(goal(victim.features(shown, generator=random)).mean())
        levels.append(float(torch.stack(found).mean()))
    gain = levels[0] - levels[2]
    return round((levels[1] - levels[2]) / gain, 5) if gain > 0 else None


def plain(check: Check) -> dict[str, Any]:
    value = None if check.value is None else float(f"{float(check.value):.6g}")
    return {**asdict(check), "value": value}
