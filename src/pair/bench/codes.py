"""Cells of a search by photo: AdvHash patches on the queries of one class, aimed at another."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from pair.attacks import sanity
from pair.attacks.advhash import AdvHashConfig, advhash
from pair.attacks.carriers import pixels
from pair.attacks.objectives import Goal, TextGoal, anchor_code
from pair.attacks.patch import Patch, Placement
from pair.attacks.sanity import Check
from pair.attacks.tth import TTHConfig, tth
from pair.attacks.wrappers import Adaptive, as_features
from pair.bench.checks import DRAWS, gain_of, late_step
from pair.bench.grid import Bench, Cell, seed_of
from pair.bench.masked import DoubleMasked
from pair.bench.scenario import Row, Settings
from pair.bench.search import BATCH, HashSearch, milliseconds
from pair.bench.store import key_of
from pair.bench.text import covered, settled, summary
from pair.defenses.localise import Localiser
from pair.images import quantise
from pair.retrieval.metrics import average_precision
from pair.retrieval.scores import Hamming, Rows

SELECT = 8  # photos of the pool that choose among patches, never optimised on
PHOTOS = 10  # on which an optimisation is asked whether it has levelled off


def ends(unit: str) -> tuple[str, str]:
    """'airplanes > watch' -> source and target class."""
    source, _, target = unit.partition(">")
    return source.strip(), target.strip()


def packed(codes: Tensor) -> list[str]:
    """Codes (B, K) of +-1 as hexadecimal numbers: everything else can be recomputed from them."""
    width = -(-codes.shape[1] // 4)
    rows = (codes > 0).long().tolist()
    return [f"{int(''.join(map(str, row)), 2):0{width}x}" for row in rows]


def unpacked(rows: list[str], bits: int) -> Tensor:
    """Inverse of :func:`packed`."""
    digits = [[int(c) for c in f"{int(row, 16):0{bits}b}"] for row in rows]
    return torch.tensor(digits, dtype=torch.float32) * 2 - 1


def precisions(codes: Tensor, gallery: Tensor, relevant: Rows, top: int) -> list[float]:
    """Expected AP@top of each query; ties are averaged over all their orders."""
    k = min(top, len(gallery))
    found = average_precision(Hamming(codes, gallery), relevant, k)
    return [round(float(v), 6) for v in found]


def place(row: Row, s: Settings) -> Placement:
    """AdvHash's own place, its lower right corner at 200/224 of the side, or a named one."""
    kind = row.attack.get("placement", s.hash_place)
    if kind != "advhash":
        return Placement(kind)
    corner = round(200 / 224 * s.image_size) - pixels(s.hash_size, s.image_size)
    return Placement("fixed", top=corner, left=corner)


def start_of(row: Row, s: Settings, start: str, generator: torch.Generator) -> Patch:
    return Patch.make(start, s.hash_size, s.image_size, place(row, s), generator=generator)


def optimise(
    bench: Bench, row: Row, victim: Adaptive, goal: Goal, unit: str,
    config: AdvHashConfig | TTHConfig, facts: dict[str, Any], draws: int = 1,
    start: Patch | None = None,
) -> tuple[Patch, dict[str, Any]]:  # fmt: skip
    """The patch of a pair of classes as its PNG holds it: by AdvHash on so many photos of the
    source, or by Adam on photos drawn anew for every step from all but those that select."""
    s = bench.settings_of(row)
    pool = _pool(bench, ends(unit)[0])
    adam = isinstance(config, TTHConfig)
    most = max(s.sources, len(pool) - SELECT) if adam else s.sources
    seed = seed_of("optimise", s.seed, unit)
    key = key_of({
        **facts, "config": settled(config), "unit": unit, "seed": seed, "sources": most,
        "place": asdict(place(row, s)), "side": s.image_size, "data": bench.hash.digest,
    })  # fmt: skip
    with bench.store.lock(f"patch-{key}", wait=True):
        if (kept := bench.store.patch(key)) is not None:
            return kept, kept.notes
        images = bench.hash.drawn(pool[:most]).to(s.device)
        generator = torch.Generator().manual_seed(seed)
        patch = start or start_of(
            row, s, config.start if isinstance(config, TTHConfig) else "noise", generator
        )
        shared: Any = {
            "patch": patch, "generator": generator, "penalty": victim.penalty,
            "progress": bench.progress, "checkpoint": bench.store.folder("locks") / f"{key}.state",
        }  # fmt: skip
        if isinstance(config, TTHConfig):
            few = min(config.carriers or len(images), len(images))
            own = replace(config, carriers=few, snapshots=(late_step(config.steps),))
            result = tth(victim.features, images, goal, config=own, **shared)
            gain = gain_of(victim, goal, images[:PHOTOS], patch, result, seed, draws)
            notes = {**summary(result), "late_gain": gain}
        else:
            assert isinstance(goal, TextGoal)
            code = goal.embedding.to(s.device)
            result = advhash(victim.features, images, code, config=config, **shared)
            notes = {**summary(result), "agreement": round(result.curves["agreement"][-1], 4)}
        notes |= {"unit": unit, "patch": key}
        content = result.patch.content.cpu()
        kept = bench.store.keep_patch(key, result.patch.to("cpu").with_content(content, **notes))
        (bench.store.root / "locks" / f"{key}.state").unlink(missing_ok=True)
    return kept, kept.notes


def _pool(bench: Bench, label: str):
    if label not in bench.hash.pool:
        known = ", ".join(sorted(bench.hash.pool))
        raise ValueError(f"no photos to optimise on for the class {label!r}: use one of {known}")
    return bench.hash.pool[label]


@torch.no_grad()
def _anchor(bench: Bench, encoder: Any, target: str) -> Tensor:
    """Majority code of the target class in the gallery, as AdvHash votes."""
    rows = bench.hash.having(target)
    if not rows:
        raise ValueError(f"the gallery has no photo of the class {target!r}")
    outputs = [
        encoder.encode_image(bench.hash.photos[rows[at : at + BATCH]].to(bench.settings.device))
        for at in range(0, len(rows), BATCH)
    ]
    return anchor_code(torch.where(torch.cat(outputs) > 0, 1.0, -1.0).cpu())


def static_patch(bench: Bench, row: Row, unit: str) -> tuple[Patch, dict[str, Any]]:
    """AdvHash against the network without defense (the hardened one of AT)."""
    s, hardened = bench.settings_of(row), row.defense in ("at", "hm")
    encoder = bench.hash_search(row).encoder if hardened else bench.models.csq()
    facts = {"what": "static hash",
             "models": bench.models.facts(row if hardened else Row("", "none"), True)}  # fmt: skip
    victim = Adaptive(as_features(encoder), 1, None, "exact")
    goal = TextGoal(_anchor(bench, encoder, ends(unit)[1]))
    return optimise(bench, row, victim, goal, unit, published(s, s.hash_static, 1), facts)


def published(s: Settings, budget: int, eot: int) -> AdvHashConfig:
    return AdvHashConfig(
        step=s.hash_step, iterations=100, budget=budget, size=s.hash_size, eot=eot
    )  # fmt: skip


def adaptive_config(s: Settings, search: HashSearch) -> AdvHashConfig | TTHConfig:
    """AdvHash itself, or Adam on the cosine to the same anchor; always that for the certified
    mode, whose attacker has no single code to move.

    It starts from noise, as AdvHash does; from ``start`` where a detector would see that at once.
    """
    certified = isinstance(search, DoubleMasked)
    if s.hash_optimiser == "sign" and not certified:
        return published(s, s.hash_steps, search.samples(s))
    return TTHConfig(
        steps=s.member_steps if certified else s.hash_steps, lr=s.lr, schedule=s.schedule,
        distortion=0.0, retry=False, eot=1 if certified else search.samples(s),
        start=s.start if not certified and isinstance(search.defense, Localiser) else "noise",
        size=s.hash_size, carriers=4 if certified else max(1, s.sources // 2),
    )  # fmt: skip


def adaptive_patch(bench: Bench, row: Row, unit: str) -> tuple[Patch, dict[str, Any]]:
    """The patch that was made through the defense, by its strongest gradient."""
    s, search = bench.settings_of(row), bench.hash_search(row)
    anchor = _anchor(bench, search.encoder, ends(unit)[1]).to(s.device)
    shape = start_of(row, s, "grey", torch.Generator())
    victim, goal = search.victim(anchor, covered(shape, s.image_size))
    facts = {"what": "adaptive hash", "models": bench.models.facts(row, True),
             "row": [row.defense, row.options], "views": s.views}  # fmt: skip
    draws, start = (DRAWS if search.random else 1), None
    if isinstance(search, DoubleMasked):  # few of its steps are affordable: go on from there
        start, notes = static_patch(bench, row, unit)
        facts |= {"start": notes["patch"], "weight": getattr(goal, "weight", 1.0)}
    config = adaptive_config(s, search)
    return optimise(bench, row, victim, goal, unit, config, facts, draws, start)


def clean(bench: Bench, cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every query photo against the clean gallery."""
    search, world, s = bench.hash_search(cell.row), bench.hash, bench.settings
    gallery, relevant = bench.codes(cell.row), world.same(world.query_labels)
    values, codes = [], []
    for draw in bench.draws(cell.row):
        found = search.codes(world.queries, seed_of("gallery", s.seed, draw=draw))
        values.append(precisions(found, gallery, relevant, s.top))
        codes.append(packed(found))
    result = {"ap": values, "codes": codes, "gallery": packed(gallery), "bits": gallery.shape[1],
              "labels": world.labels, "query_labels": world.query_labels}  # fmt: skip
    return result, {"ms_per_image": milliseconds(search.codes, world.photos[:16])}


def attacked(bench: Bench, cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """One pair of classes: patched queries of the source, ranked as source and as target."""
    row, unit = cell.row, cell.unit
    s, search, world = bench.settings_of(row), bench.hash_search(row), bench.hash
    transfer, notes = static_patch(bench, row, unit)
    patches, details = {"transfer": transfer}, {"transfer": notes}
    checks: list[Check] = []
    if cell.mode == "adaptive":
        best, notes = adaptive_patch(bench, row, unit)
        patches, details = {"gradient": best, **patches}, {"gradient": notes, **details}
        if row.patches:
            patches["submitted"] = Patch.load(f"{row.patches}/{ends(unit)[0]}").fit(s.image_size)
        late = notes["late_gain"]
        met = late is not None and late < 0.01
        checks.append(Check("S8", late, 0.01, met, "" if met else "budget-limited"))
        checks.append(sanity.s11_seeds(_seeds(bench, unit)))
    source, target = ends(unit)
    at = world.of(source)
    images = world.queries[at]
    gallery = bench.codes(row)
    own = world.same([world.query_labels[i] for i in at])
    other = world.same([target] * len(at))
    selection = {}
    if len(patches) > 1:
        pool = world.drawn(_pool(bench, source)[-SELECT:])  # never those optimised on
        for name, patch in patches.items():
            draws = range(s.selection if search.random else 1)
            seeds = [seed_of("select", s.seed, unit, d) for d in draws]
            codes = [search.codes(quantise(patch.apply(pool)), seed) for seed in seeds]
            wanted = world.same([target] * len(pool))
            found = [precisions(c, gallery, wanted, s.top) for c in codes]
            selection[name] = round(1 - _mean(found), 6)
    chosen = min(selection, key=lambda n: selection[n]) if selection else "transfer"
    attacks: dict[str, Any] = {}
    for name, kept in [*patches.items(), ("none", None)]:
        shown = images if kept is None else quantise(kept.apply(images))
        drawn = [
            search.codes(shown, seed_of("evaluate", s.seed, unit, d)) for d in bench.draws(row)
        ]
        attacks[name] = {
            "irrelevant": [precisions(c, gallery, other, s.top) for c in drawn],
            "relevant": [precisions(c, gallery, own, s.top) for c in drawn],
            "codes": [packed(c) for c in drawn],
        }
    if cell.mode == "adaptive":
        level = {n: _mean(a["irrelevant"]) for n, a in attacks.items() if n != "none"}
        others = {n: v for n, v in level.items() if n != "gradient"}
        checks.append(sanity.s6_strongest(level["gradient"], others, 0.02))
    proof: dict[str, Any] = {}
    if isinstance(search, DoubleMasked) and len(gallery) <= s.top:  # of AP over the whole gallery
        rows = slice(0, len(at))
        least, most = search.proved(images, gallery, own[rows], other[rows])
        proof = {"proved": {"relevant": [round(float(v), 6) for v in least],
                            "irrelevant": [round(float(v), 6) for v in most]}}  # fmt: skip
    result = {
        **proof,
        "chosen": chosen,
        "selection": selection,
        "attacks": attacks,
        "details": details,
        "checks": [asdict(c) for c in checks],
        "threat": _threat(cell, patches[chosen], s),
        "seeds": _seeds(bench, unit),
    }
    return result, {}


def _mean(values: list[list[float]]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())


def _threat(cell: Cell, patch: Patch, s: Settings) -> dict[str, Any]:
    source, target = ends(cell.unit)
    adaptive = cell.mode == "adaptive"
    return {
        "surface": "query photos",
        "knowledge": "white box, the masks of the service unknown" if adaptive
        else "white box of the undefended network",
        "patch": f"{patch.size[0]} x {patch.size[1]} px of {s.image_size}, "
        f"{100 * patch.area((s.image_size, s.image_size)):.1f} % of the area, "
        f"{patch.placement.kind}, one for the class",
        "goal": f"photos of {source!r} find {target!r}",
    }  # fmt: skip


def _seeds(bench: Bench, unit: str) -> dict[str, list[int]]:
    s = bench.settings
    return {
        "optimise": [seed_of("optimise", s.seed, unit)],
        "select": [seed_of("select", s.seed, unit, d) for d in range(s.selection)],
        "evaluate": [seed_of("evaluate", s.seed, unit, d) for d in range(s.seeds)],
    }
