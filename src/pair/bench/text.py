"""Cells of a text search: without attack, and with patched advertisements in the gallery."""

from __future__ import annotations

import importlib
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from pair.attacks import floor, sanity
from pair.attacks.carriers import circle, rectangle
from pair.attacks.evaluate import score
from pair.attacks.objectives import Goal, TextGoal
from pair.attacks.optimise import AttackResult
from pair.attacks.patch import Patch, Placement
from pair.attacks.sanity import Check
from pair.attacks.tth import TTHConfig, tth
from pair.attacks.wrappers import Adaptive, as_features
from pair.bench.checks import DRAWS, checks_of, gain_of, late_step, plain, seeds_of
from pair.bench.grid import Bench, Cell, seed_of
from pair.bench.photos import whole
from pair.bench.scenario import Row, Settings
from pair.bench.search import CertifiedSearch, Search, milliseconds
from pair.bench.store import key_of
from pair.images import quantise
from pair.retrieval.metrics import item_ranks

CURVE = 25  # points of a loss curve that a record keeps


# --- ranks ------------------------------------------------------------------------------------


def ranks_before(scores: Tensor, relevant: Tensor) -> list[list[int]]:
    """Ranks of each query's relevant photos, best first; a tie counts against the defender."""
    rows = []
    for line, wanted in zip(scores, relevant, strict=True):
        items = wanted.nonzero()[:, 0][None]
        rows.append(sorted(int(r) for r in item_ranks(line[None], items)[0]))
    return rows


def ranks_after(
    scores: Tensor, inserted: Tensor, relevant: Tensor
) -> tuple[list[list[int]], list[list[int]]]:
    """Ranks in the gallery with the inserted pictures: of the relevant photos, of the inserted.

    ``scores`` (Q, N), ``inserted`` (Q, A). In a tie the inserted picture is ahead.
    """
    both = torch.cat([scores, inserted], 1)
    count = scores.shape[1]
    wide = torch.cat([relevant, relevant.new_zeros(len(relevant), inserted.shape[1])], 1)
    ids = torch.arange(count, both.shape[1]).expand(len(both), -1)
    planted = item_ranks(both, ids, ties="optimistic")
    return ranks_before(both, wide), [[int(r) for r in line] for line in planted]


# --- the attacker -----------------------------------------------------------------------------


def start_patch(attack: dict[str, Any], s: Settings, start: str, seed: int) -> Patch:
    """The patch before its optimisation, in the shape and place that a row asks for.

    ``attack`` may hold ``height`` and ``width`` (shares of the side, for rectangles), ``shape``
    ("square" or "circle", of ``size``), ``placement`` and ``start``. Table 4's lengths are given
    as shares of 224 pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    side = s.image_size
    place = Placement(attack.get("placement", "top-right"), seed=seed)
    start = attack.get("start", start)
    if "height" in attack:
        h, w = (max(1, round(float(attack[n]) * side)) for n in ("height", "width"))
        mask = rectangle(h, w)
    elif attack.get("shape") == "circle":
        mask = circle(max(1, round(s.size * side)))
    else:
        return Patch.make(start, s.size, side, place, generator=generator)
    return Patch.make(start, image_size=side, placement=place, mask=mask, generator=generator)


def adaptive_config(s: Settings, search: Search) -> TTHConfig:
    steps = (s.random_steps or s.steps) if search.random else s.steps
    few = min(s.random_ads, s.ads) if search.random and s.random_ads else None
    if isinstance(search, CertifiedSearch):
        steps = s.member_steps
    return TTHConfig(
        steps=steps, lr=s.lr, schedule=s.schedule, distortion=s.distortion, eot=search.samples(s),
        start=s.start, size=s.size, retry=False, carriers=few,
    )  # fmt: skip


def settled(config: Any) -> dict[str, Any]:
    """The settings of an attack that are not left open: what its patch depends on."""
    return {k: v for k, v in asdict(config).items() if v not in (None, ())}


def optimise(
    bench: Bench,
    victim: Adaptive,
    goal: Goal,
    patch: Patch,
    config: TTHConfig,
    unit: str,
    facts: dict[str, Any],
    draws: int = 0,
) -> tuple[Patch, dict[str, Any]]:
    """The optimised patch as its PNG holds it; the same ``facts`` are never optimised twice.

    With ``draws`` the record says how it levelled off on so many draws of its own (S8), not on
    the losses of the steps, which are noise where the defense is random.
    """
    s = bench.settings
    seed = seed_of("optimise", s.seed, unit)
    key = key_of({**facts, "config": settled(config), "unit": unit, "seed": seed})
    with bench.store.lock(f"patch-{key}", wait=True):
        if (kept := bench.store.patch(key)) is not None:
            return kept, kept.notes
        pictures = bench.text.ads.to(s.device)
        own = replace(config, snapshots=(late_step(config.steps),)) if draws else config
        result = tth(
            victim.features, pictures, goal, config=own, patch=patch,
            generator=torch.Generator().manual_seed(seed), penalty=victim.penalty,
            checkpoint=bench.store.folder("locks") / f"{key}.state", progress=bench.progress,
        )  # fmt: skip
        notes = {**summary(result), "unit": unit, "patch": key}
        if draws:
            notes["late_gain"] = gain_of(victim, goal, pictures, patch, result, seed, draws)
        made = result.patch.to("cpu").with_content(result.patch.content.cpu(), **notes)
        kept = bench.store.keep_patch(key, made)
        (bench.store.root / "locks" / f"{key}.state").unlink(missing_ok=True)
    return kept, kept.notes


def summary(result: AttackResult) -> dict[str, Any]:
    """How an optimisation went, without times: what a record says about a patch."""
    losses = result.losses
    every = max(1, len(losses) // CURVE)
    gain = result.late_gain()
    return {
        "config": {k: v for k, v in result.config.items() if v not in ((), None)},
        "steps": len(losses) - 1,
        "gradients": result.gradients_used,
        "losses": [round(v, 5) for v in [*losses[::every], losses[-1]]],
        "late_gain": round(gain, 5) if gain < 1e6 else None,
    }


def adaptive_patch(
    bench: Bench, row: Row, unit: str
) -> tuple[Patch, dict[str, Any], tuple[Patch, Adaptive, Goal]]:
    """TTH through the defense, by its strongest gradient; with start, victim and goal."""
    s, search = bench.settings_of(row), bench.search(row)
    start = start_patch(row.attack, s, s.start, seed_of("optimise", s.seed, unit))
    target = search.target(bench.text.targets[unit])
    victim, goal = search.victim(target, covered(start, s.image_size))
    facts = {"what": "adaptive", "models": bench.models.facts(row, False),
             "row": [row.defense, row.options], "views": s.views,
             **_patch_facts(bench, row, s)}  # fmt: skip
    config = adaptive_config(s, search)
    draws = DRAWS if search.random else 0
    kept, notes = optimise(bench, victim, goal, start, config, unit, facts, draws)
    return kept, notes, (start, victim, goal)


def own_patch(
    bench: Bench, row: Row, unit: str, victim: Adaptive, goal: Goal, start: Patch
) -> Patch:
    """The patch of an attack from elsewhere, ``attack = { function = "package.module:name" }``.

    It is called as ``function(features, images, goal, patch, steps=, generator=)`` and returns a
    :class:`Patch`.
    """
    path = str(row.attack["function"])
    module, _, name = path.partition(":")
    try:
        attack = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"attack {path!r} cannot be imported: {error}") from error
    s = bench.settings_of(row)
    made = attack(
        victim.features, bench.text.ads.to(s.device), goal, start, steps=s.steps,
        generator=torch.Generator().manual_seed(seed_of("optimise", s.seed, unit, 1)),
    )  # fmt: skip
    return made.to("cpu").quantised()


def static_patch(bench: Bench, row: Row, unit: str) -> tuple[Patch, dict[str, Any]]:
    """The paper's non-adaptive attack: TTH as published, against the encoder without defense.

    Where a defense replaces the encoder (AT, HM) that encoder itself is attacked, as in the paper.
    """
    s = bench.settings_of(row)
    search = bench.search(row)
    hardened = row.defense in ("at", "hm")
    encoder = search.encoder if hardened else bench.models.clip()
    config = TTHConfig(steps=s.static_steps, size=s.size, start="qr")
    patch = start_patch(row.attack, s, "qr", seed_of("optimise", s.seed, unit))
    with torch.no_grad():
        target = encoder.encode_text(bench.text.targets[unit]).float().mean(0)
    names = bench.models.facts(row if hardened else Row("", "none"), False)
    facts = {"what": "static", "models": names, **_patch_facts(bench, row, s)}
    victim = Adaptive(as_features(encoder), 1, None, "exact")
    return optimise(bench, victim, TextGoal(target), patch, config, unit, facts)


def _patch_facts(bench: Bench, row: Row, s: Settings) -> dict[str, Any]:
    shape = {k: v for k, v in row.attack.items() if k in SHAPE}
    return {"shape": shape, "size": s.size, "side": s.image_size, "ads": s.ads,
            "data": bench.text.digest}  # fmt: skip


SHAPE = ("height", "width", "shape", "placement", "start")


def covered(patch: Patch, side: int) -> Tensor | None:
    """(S, S) pixels that the patch covers; None where its place is random."""
    if patch.placement.random:
        return None
    return patch.paste(torch.zeros(1, 3, side, side))[1][0, 0]


def still_patches(bench: Bench, row: Row, unit: str, patch: Patch) -> dict[str, Patch]:
    """The best written word and the best photo of the concept, chosen by the bare encoder."""
    s, h, w = bench.settings, *patch.size
    with torch.no_grad():
        target = bench.models.clip().encode_text(bench.text.targets[unit]).float().mean(0)
    features = as_features(bench.models.clip())
    ads = bench.text.ads[:4].to(s.device)
    families = {"typographic": floor.typographic(unit, h, w)[:6]}
    if files := bench.text.concepts.get(unit):
        photos = [whole(item) for item in files[:8]]
        families["collage"] = floor.crops(
            photos, h, w, 12, torch.Generator().manual_seed(seed_of("select", s.seed, unit, 900))
        )
    chosen = {}
    for name, contents in families.items():
        made = [patch.with_content(c) for c in contents]
        losses = [score(features, ads, p, TextGoal(target), 1) for p in made]
        chosen[name] = made[min(range(len(losses)), key=losses.__getitem__)].quantised()
    return chosen


# --- cells ------------------------------------------------------------------------------------


def clean(bench: Bench, cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every query against the clean gallery, one ranking per purification."""
    search, world = bench.search(cell.row), bench.text
    queries = search.text(world.queries)
    ranks = [
        ranks_before(search.scores(queries, bench.gallery(cell.row, draw)), world.relevant)
        for draw in bench.draws(cell.row)
    ]
    owner = {i: n for n, (_, at) in enumerate(sorted(world.members.items())) for i in at}
    result = {"ranks": ranks, "photos": len(world.files),
              "groups": [owner.get(i, -1 - i) for i in range(len(world.queries))]}  # fmt: skip
    return result, {"ms_per_image": milliseconds(search.rows, world.photos[:16])}


def attacked(bench: Bench, cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """One keyword: the patches of every attack, the one that selection prefers, all ranks."""
    row, unit = cell.row, cell.unit
    s, search, world = bench.settings_of(row), bench.search(row), bench.text
    target = search.target(world.targets[unit])
    transfer, notes = static_patch(bench, row, unit)
    patches = {"transfer": transfer}
    details: dict[str, Any] = {"transfer": notes}
    checks: list[Check] = []
    if cell.mode == "adaptive":
        best, notes, found = adaptive_patch(bench, row, unit)
        start, victim, goal = found
        patches = {"gradient": best, **patches, **still_patches(bench, row, unit, start)}
        details["gradient"] = notes
        if "function" in row.attack:
            patches["own"] = own_patch(bench, row, unit, victim, goal, start)
        if row.patches:
            patches["submitted"] = Patch.load(f"{row.patches}/{unit}").fit(s.image_size)
        if s.checks:
            checks = checks_of(bench, cell, search, victim, goal, best, notes, start)
    selection = _selection(bench, search, target, patches, unit) if len(patches) > 1 else {}
    chosen = min(selection, key=lambda n: selection[n]) if selection else "transfer"
    attacks = {name: insert(bench, row, unit, patch) for name, patch in patches.items()}
    attacks["none"] = insert(bench, row, unit, None)
    if cell.mode == "adaptive" and s.checks:
        shown = {n: share(a["inserted"], s.k) for n, a in attacks.items()}
        others = {n: v for n, v in shown.items() if n not in ("gradient", "none")}
        checks.append(sanity.s6_strongest(shown["gradient"], others, 0.02))
    result = {
        "chosen": chosen,
        "selection": {n: round(v, 6) for n, v in selection.items()},
        "attacks": attacks,
        "details": details,
        "checks": [plain(c) for c in checks],
        "threat": threat(cell, patches[chosen], s),
        "seeds": seeds_of(bench, unit),
    }
    return result, {}


def insert(bench: Bench, row: Row, unit: str, patch: Patch | None) -> dict[str, Any]:
    """Ranks with the (patched) advertisements in the gallery, a list per purification."""
    s, search, world = bench.settings_of(row), bench.search(row), bench.text
    at = world.rows(unit)
    queries, relevant = search.text([world.queries[i] for i in at]), world.relevant[at]
    images = world.ads if patch is None else quantise(patch.apply(world.ads))
    after, inserted = [], []
    for draw in bench.draws(row):
        ads = search.rows(images, seed_of("evaluate", s.seed, unit, draw))
        known = search.scores(queries, bench.gallery(row, draw))
        own, planted = ranks_after(known, search.scores(queries, ads), relevant)
        after.append(own)
        inserted.append(planted)
    return {"after": after, "inserted": inserted}


def share(inserted: list, k: int) -> float:
    """Mean share of the inserted pictures in the top K."""
    return float((torch.tensor(inserted, dtype=torch.float64) <= k).double().mean())


def threat(cell: Cell, patch: Patch, s: Settings) -> dict[str, Any]:
    """The threat card of a result."""
    return {
        "surface": "pictures inserted into the gallery",
        "knowledge": "white box, the masks of the index unknown" if cell.mode == "adaptive"
        else "white box of the undefended search",
        "patch": f"{patch.size[0]} x {patch.size[1]} px of {s.image_size}, "
        f"{100 * patch.area((s.image_size, s.image_size)):.1f} % of the area, "
        f"{patch.placement.kind}, one for {s.ads} pictures",
        "goal": f"appear in the top {s.k} for {cell.unit!r}",
    }  # fmt: skip


def _selection(bench, search, target, patches: dict[str, Patch], unit: str) -> dict[str, float]:
    """Mean cosine distance of every candidate on draws that serve nothing else."""
    s, losses = bench.settings, {}
    wanted = torch.nn.functional.normalize(target.cpu(), dim=-1)[None]
    for name, patch in patches.items():
        images = quantise(patch.apply(bench.text.ads))
        draws = range(s.selection if search.random else 1)
        seeds = [seed_of("select", s.seed, unit, draw) for draw in draws]
        found = [float(search.scores(wanted, search.rows(images, seed)).mean()) for seed in seeds]
        losses[name] = 1 - sum(found) / len(found)
    return losses
