"""Cells of Table 5: invisible noise on a whole advertisement, optimised for that one picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pair.attacks import sanity
from pair.attacks.perturbation import perturb
from pair.attacks.wrappers import EOT
from pair.bench.checks import plain
from pair.bench.grid import Bench, Cell, seed_of
from pair.bench.store import key_of
from pair.bench.text import CURVE, ranks_after
from pair.images import quantise


def attacked(bench: Bench, cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """One keyword: each advertisement is inserted alone, with noise of its own.

    The ranks of all of them are stored; with one picture in the gallery, no other is ahead of it.
    """
    row, unit = cell.row, cell.unit
    s, search, world = bench.settings_of(row), bench.search(row), bench.text
    images, losses = noisy(bench, cell)
    seeds = {
        "optimise": [seed_of("optimise", s.seed, unit)],
        "evaluate": [seed_of("evaluate", s.seed, unit, d) for d in range(s.seeds)],
    }
    at = world.rows(unit)
    queries, relevant = search.text([world.queries[i] for i in at]), world.relevant[at]
    attacks: dict[str, Any] = {}
    for name, shown in (("gradient", quantise(images)), ("none", world.ads)):
        after, inserted = [], []
        for draw in bench.draws(row):
            rows = search.rows(shown, seed_of("evaluate", s.seed, unit, draw))
            known = search.scores(queries, bench.gallery(row, draw))
            planted = search.scores(queries, rows)
            alone = [ranks_after(known, planted[:, [a]], relevant) for a in range(len(shown))]
            inserted.append([[one[1][q][0] for one in alone] for q in range(len(at))])
            after.append([[one[0][q] for one in alone] for q in range(len(at))])
        attacks[name] = {"after": after, "inserted": inserted}
    result = {
        "chosen": "gradient",
        "attacks": attacks,
        "details": {"gradient": {"steps": s.steps, "losses": _curve(losses),
                                 "epsilon": s.epsilon, "eot": search.samples(s)}},
        "checks": [plain(sanity.s8_converged(losses)), plain(sanity.s11_seeds(seeds))],
        "threat": {
            "surface": "one picture inserted into the gallery",
            "knowledge": "white box, the masks of the index unknown",
            "patch": f"l_inf noise of {255 * s.epsilon:g}/255 on the whole picture",
            "goal": f"appear in the top {s.k} for {unit!r}",
        },
        "seeds": seeds,
    }  # fmt: skip
    return result, {}


def noisy(bench: Bench, cell: Cell) -> tuple[Tensor, list[float]]:
    """The perturbed advertisements (A, 3, S, S), and the loss of every step."""
    row, unit = cell.row, cell.unit
    s, search, world = bench.settings_of(row), bench.search(row), bench.text
    facts = bench.facts(cell)
    key = key_of({**facts, "what": "noise"})
    kept = bench.store.tensor(key)
    if kept is not None:
        return kept, _list(bench.store.tensor(f"{key}-losses"))
    victim, goal = search.victim(search.target(world.targets[unit]))
    features = EOT(victim.features, 1)
    result = perturb(
        features, world.ads.to(s.device), goal, epsilon=s.epsilon, steps=s.steps,
        eot=search.samples(s), momentum=0.9, progress=bench.progress,
        generator=torch.Generator().manual_seed(seed_of("optimise", s.seed, unit)),
    )  # fmt: skip
    images, losses = result.images.cpu(), torch.tensor(result.losses)
    bench.store.keep_tensor(f"{key}-losses", losses)
    bench.store.keep_tensor(key, images)
    return images, _list(losses)


def _list(losses: Tensor | None) -> list[float]:
    return [] if losses is None else losses.tolist()


def _curve(losses: list[float]) -> list[float]:
    every = max(1, len(losses) // CURVE)
    return [round(v, 5) for v in losses[::every]]
