"""Cells of the ladder: how far PAIR holds as the attacker spends more, and what needs no attack.

A rung is a row whose ``attack`` has a ``rung``: "curve" (a gradient attack, scored along the way),
"known" (the attacker knows the masks), "unbounded" (the patch is the whole picture), "estimator"
(another gradient, ``gradient = "bpda" | "surrogate" | "second" | "first"``), "floor" (no gradient
at all) or "uploads" (a finished patch, tried n times).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.attacks import sanity
from pair.attacks.evaluate import best_of
from pair.attacks.floor import floor
from pair.attacks.objectives import TextGoal
from pair.attacks.patch import Patch
from pair.attacks.tth import TTHConfig, tth
from pair.attacks.wrappers import (
    BPDA,
    FirstPass,
    KnownMask,
    OnePassSurrogate,
    SecondPassBPDA,
    pipeline,
)
from pair.bench.grid import Bench, Cell, seed_of
from pair.bench.photos import decoded
from pair.bench.scenario import Row, Settings
from pair.bench.search import Search
from pair.bench.store import key_of
from pair.bench.text import (
    adaptive_config,
    insert,
    ranks_after,
    settled,
    share,
    start_patch,
    static_patch,
    summary,
)
from pair.images import quantise

PARTS = (8, 4, 2, 1)  # a curve is scored after these fractions of its steps
MASKS = 8
Result = tuple[dict[str, Any], dict[str, Any]]


def rung(bench: Bench, cell: Cell) -> Result:
    kind = cell.row.attack.get("rung", "curve")
    if kind not in RUNGS:
        raise ValueError(f"unknown rung {kind!r}: use one of {', '.join(RUNGS)}")
    result = RUNGS[kind](bench, cell)
    return {"rung": kind, **result}, {}


# --- one optimisation, with its patches along the way -------------------------------------------


def steps_of(s: Settings, attack: dict[str, Any]) -> int:
    """Updates of a rung: ``effort`` times the scale's, or those of its preset."""
    if "effort" not in attack and "preset" in attack:
        return TTHConfig.preset(attack["preset"]).steps
    return max(1, round(s.steps * float(attack.get("effort", 1.0))))


def _config(bench: Bench, cell: Cell, search: Search) -> TTHConfig:
    s, attack = bench.settings_of(cell.row), cell.row.attack
    base = replace(adaptive_config(s, search), steps=steps_of(s, attack))
    if "preset" in attack:
        base = TTHConfig.preset(attack["preset"], steps=base.steps, size=s.size)
    marks = tuple(sorted({max(1, base.steps // part) for part in PARTS}))
    return replace(base, snapshots=marks)


def _run(
    bench: Bench, cell: Cell, features: Any, config: TTHConfig, start: Patch | None = None, tag=""
) -> tuple[dict[int, Patch], dict[str, Any]]:
    """Patches by number of steps, all as their files hold them, and how the run went."""
    s, unit = bench.settings_of(cell.row), cell.unit
    seed = seed_of("optimise", s.seed, unit)
    facts = bench.facts(cell)
    facts["row"] = {**facts["row"], "attack": {
        k: v for k, v in cell.row.attack.items() if k not in ("rung",)}}  # fmt: skip
    facts["settings"] = {k: facts["settings"][k] for k in ("image_size", "ads", "size", "seed")}
    key = key_of({**facts, "what": "ladder", "tag": tag, "config": settled(config)})
    store = bench.store
    with store.lock(f"patch-{key}", wait=True):
        last = store.patch(key)
        if last is None:
            start = start or start_patch(cell.row.attack, s, config.start, seed)
            search = bench.search(cell.row)
            goal = TextGoal(search.target(bench.text.targets[unit]))
            result = tth(
                features, bench.text.ads.to(s.device), goal, config=config, patch=start,
                generator=torch.Generator().manual_seed(seed), progress=bench.progress,
                checkpoint=store.folder("locks") / f"{key}.state",
            )  # fmt: skip
            for steps, patch in result.snapshots.items():
                store.keep_patch(f"{key}-{steps}", patch.to("cpu"))
            notes = {**summary(result), "unit": unit, "patch": key}
            last = store.keep_patch(key, result.patch.to("cpu").with_content(
                result.patch.content.cpu(), **notes))  # fmt: skip
            for file in store.folder("locks").glob(f"{key}.state*"):
                file.unlink(missing_ok=True)
    steps = int(last.notes["steps"])
    found = {n: p for n in config.snapshots if (p := store.patch(f"{key}-{n}")) is not None}
    return {**found, steps: last}, last.notes


def _scored(bench: Bench, cell: Cell, patches: dict[int, Patch], config: TTHConfig) -> list[dict]:
    s, points = bench.settings_of(cell.row), []
    for steps, patch in patches.items():
        ranks = insert(bench, cell.row, cell.unit, patch)["inserted"]
        points.append({"steps": steps, "gradients": steps * s.ads * config.eot, "inserted": ranks})
    return points


def _curve(bench: Bench, cell: Cell) -> dict[str, Any]:
    search = bench.search(cell.row)
    config = _config(bench, cell, search)
    victim, _ = search.victim(search.target(bench.text.targets[cell.unit]))
    patches, notes = _run(bench, cell, victim.features, config)
    points = [{"steps": 0, "gradients": 0,
               "inserted": insert(bench, cell.row, cell.unit, None)["inserted"]}]  # fmt: skip
    points += _scored(bench, cell, patches, config)
    late = notes["late_gain"]
    check = sanity.Check("S8", late, 0.01, late is not None and late < 0.01)
    return {"eot": config.eot, "points": points, "details": notes, "checks": [asdict(check)]}


def _estimator(bench: Bench, cell: Cell) -> dict[str, Any]:
    """The attack with a substitute for the purifier's gradient; values stay those of PAIR."""
    search = bench.search(cell.row)
    purifier = _purifier(search)
    stages: dict[str, Callable[[], Any]] = {
        "bpda": lambda: BPDA(purifier),
        "surrogate": lambda: BPDA(purifier, OnePassSurrogate(purifier)),
        "second": lambda: SecondPassBPDA(purifier),
        "first": lambda: FirstPass(purifier),
    }
    name = cell.row.attack.get("gradient", "bpda")
    if name not in stages:
        raise ValueError(f"unknown gradient {name!r}: use one of {', '.join(stages)}")
    config = _config(bench, cell, search)
    features = pipeline(search.encoder, stages[name]())
    patches, notes = _run(bench, cell, features, config, tag=name)
    last = max(patches)
    points = _scored(bench, cell, {last: patches[last]}, config)
    return {"eot": config.eot, "points": points, "details": notes, "checks": []}


def _purifier(search: Search) -> Any:
    purifier = getattr(search.defense, "purifier", None)
    if purifier is None or not hasattr(purifier, "draw_mask"):
        raise ValueError("this rung attacks the masks of PAIR: use it with a defense 'pair'")
    return purifier


# --- what the attacker knows ------------------------------------------------------------------


def _known(bench: Bench, cell: Cell) -> dict[str, Any]:
    """S2: the index purifies the attacker's pictures with a mask that the attacker knows."""
    search, s, unit = bench.search(cell.row), bench.settings_of(cell.row), cell.unit
    purifier, world = _purifier(search), bench.text
    config = replace(_config(bench, cell, search), eot=1, snapshots=())
    at = world.rows(unit)
    queries, relevant = search.text([world.queries[i] for i in at]), world.relevant[at]
    known = search.scores(queries, bench.gallery(cell.row, 0))
    ranks = []
    for number in range(MASKS):
        drawn = torch.Generator().manual_seed(seed_of("evaluate", s.seed, unit, 500 + number))
        mask = purifier.draw_mask(1, drawn)[0]
        features = pipeline(search.encoder, KnownMask(purifier, mask))
        patches, _ = _run(bench, cell, features, config, tag=f"mask {number}")
        images = quantise(patches[max(patches)].apply(world.ads)).to(s.device)
        with torch.no_grad():
            rows = F.normalize(features(images), dim=-1).cpu()[:, None]
        _, planted = ranks_after(known, search.scores(queries, rows), relevant)
        ranks.append(planted)
    bare = insert(bench, Row("", "none"), unit, static_patch(bench, Row("", "none"), unit)[0])
    shares = [share([r], s.k) for r in ranks]
    check = sanity.s2_known_mask(shares, share(bare["inserted"], s.k))
    point = {"steps": config.steps, "gradients": config.steps * s.ads, "inserted": ranks}
    return {"eot": 1, "points": [point], "checks": [asdict(check)]}


def _unbounded(bench: Bench, cell: Cell) -> dict[str, Any]:
    """S1: a patch as large as the picture must do at least what genuine photos do."""
    search, s, unit = bench.search(cell.row), bench.settings_of(cell.row), cell.unit
    config = replace(_config(bench, cell, search), size=1.0, snapshots=())
    start = Patch.make("grey", 1.0, s.image_size, "top-left")
    victim, _ = search.victim(search.target(bench.text.targets[unit]))
    patches, notes = _run(bench, cell, victim.features, config, start, "whole")
    whole = insert(bench, cell.row, unit, patches[max(patches)])
    bare = Cell(replace(cell.row, defense="none", options={}), cell.mode, unit)
    plain, _ = _run(bench, bare, bench.models.clip().encode_image, config, start, "whole")
    alone = insert(bench, bare.row, unit, plain[max(plain)])
    files = bench.text.concepts.get(unit, [])[: s.ads]
    genuine = _genuine(bench, cell, decoded(files, s.image_size)) if files else []
    check = sanity.s1_unbounded(
        share(whole["inserted"], s.k), share(genuine, s.k) if genuine else 0.0,
        share(alone["inserted"], s.k),
    )  # fmt: skip
    point = {"steps": config.steps, "gradients": config.steps * s.ads * config.eot,
             "inserted": whole["inserted"]}  # fmt: skip
    return {"eot": config.eot, "points": [point], "genuine": genuine,
            "undefended": alone["inserted"], "details": notes,
            "checks": [asdict(check)]}  # fmt: skip


def _genuine(bench: Bench, cell: Cell, photos: Tensor) -> list:
    """Ranks of real photos of the concept in the place of the advertisements."""
    search, world, s = bench.search(cell.row), bench.text, bench.settings
    at = world.rows(cell.unit)
    queries, relevant = search.text([world.queries[i] for i in at]), world.relevant[at]
    ranks = []
    for draw in bench.draws(cell.row):
        rows = search.rows(photos, seed_of("evaluate", s.seed, cell.unit, 600 + draw))
        known = search.scores(queries, bench.gallery(cell.row, draw))
        ranks.append(ranks_after(known, search.scores(queries, rows), relevant)[1])
    return ranks


def _floor(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Grey, noise, QR, collage, typography: the best of each family, chosen on selection draws."""
    search, s, unit = bench.search(cell.row), bench.settings_of(cell.row), cell.unit
    world = bench.text
    patch = start_patch(cell.row.attack, s, "grey", 0)
    files = world.concepts.get(unit, [])
    entries = floor(
        search.features, world.ads[:3].to(s.device), search.target(world.targets[unit]), patch,
        words=unit, photos=[decoded([f], s.image_size)[0] for f in files[:6]], collages=40,
        draws=s.selection, seed=seed_of("select", s.seed, unit, 700),
        prescreen=bench.models.clip().encode_image,
    )  # fmt: skip
    families = {}
    for entry in entries:
        ranks = insert(bench, cell.row, unit, entry.patch.quantised())["inserted"]
        families[entry.family] = {"inserted": ranks, "candidates": entry.candidates,
                                  "loss": round(entry.loss, 5)}  # fmt: skip
    return {"families": families, "best": entries[0].family, "checks": []}


def _uploads(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Best of n uploads: every upload is one more independent purification."""
    search, s, unit = bench.search(cell.row), bench.settings_of(cell.row), cell.unit
    world, config = bench.text, _config(bench, cell, search)
    victim, _ = search.victim(search.target(world.targets[unit]))
    patches, notes = _run(bench, cell, victim.features, config)
    images = quantise(patches[max(patches)].apply(world.ads))
    at = world.rows(unit)
    queries = search.text([world.queries[i] for i in at])
    known = search.scores(queries, bench.gallery(cell.row, 0))
    limit = known.topk(min(s.k, known.shape[1]), 1).values[:, -1:]  # (Q, 1)
    drawn = [
        search.scores(queries, search.rows(images, seed_of("uploads", s.seed, unit, draw))) > limit
        for draw in range(s.uploads)
    ]
    hits = torch.stack(drawn)  # (draws, Q, A)
    curve = best_of(hits, [n for n in (1, 2, 5, 10, 20, 50, 100) if n <= s.uploads])
    return {"eot": config.eot, "curve": {str(n): round(v, 5) for n, v in curve.items()},
            "draws": s.uploads, "hits": hits.sum(0).tolist(), "details": notes,
            "checks": []}  # fmt: skip


RUNGS: dict[str, Callable[[Bench, Cell], dict[str, Any]]] = {
    "curve": _curve,
    "estimator": _estimator,
    "known": _known,
    "unbounded": _unbounded,
    "floor": _floor,
    "uploads": _uploads,
}
