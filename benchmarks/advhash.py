"""How far does AdvHash get against the hash network that ships, and what limits it?

    python benchmarks/advhash.py --out results/advhash.json

One patch (0.22 of the side, AdvHash's own place) is optimised on the 16 gallery photos of a source
class, towards the centre of a target class, and scored on the 8 query photos of the source class,
which nobody saw: t-mAP among the gallery. The ceiling is the t-mAP of the centre itself, which a
query reaches when all of its bits agree; no attack on this target can count on more.

* Side by side, same photos, same start, same number of sample gradients: the published algorithm
  written out step by step (``literal.py``), ours, and the presets' optimiser (Adam). In float32.
* Pairs drawn by a seed, not picked: among all classes, and among the targets whose ceiling is 90 or
  more, which only the model decides. Adam; gradients in bfloat16, scores in float32.
* The first of the latter pairs again with five times the budget.
* ``--shrink``, added to an existing file: the latter pairs by the optimiser of the presets
  ``strong`` and ``max``, in the centre: the patch begins with half of the side, from a photo of
  the target, and is cut down to 0.22; the source photos are also mirrored and moved. Its larger
  stages show what a patch of that size reaches (single precision).
* ``--universal``, added likewise: the same optimiser, one patch for each target with a ceiling of
  90 or more, on the gallery photos of all other classes at once, scored on the query photos of
  every other class; and, for the pairs above, a patch for each single query photo that begins with
  the universal one.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from pathlib import Path
from statistics import mean, median

import literal
import torch

from pair import __version__, hub
from pair.attacks import AdvHashConfig, Patch, TextGoal, TTHConfig, advhash, advhash_patch, tth
from pair.attacks.carriers import photo
from pair.data import embedded
from pair.files import write_atomic
from pair.images import load_batch, quantise
from pair.retrieval.hashing import HashNet, binarise
from pair.retrieval.metrics import average_precision
from pair.retrieval.statistics import summarise

SIZE, SEED = 112, 7


class Search:
    """The gallery's codes, and what a patch does to a class."""

    def __init__(self):
        self.net = HashNet.from_pretrained("csq-small").requires_grad_(False)
        files = embedded.gallery()
        self.labels = [label for _, label in files]
        self.photos = load_batch([path for path, _ in files], SIZE)
        self.codes = torch.cat([self.encode(part) for part in self.photos.split(64)])
        self.classes = embedded.labels()

    @torch.no_grad()
    def encode(self, images):
        return binarise(self.net.encode_image(images))

    def source(self, name):
        return self.photos[[i for i, label in enumerate(self.labels) if label == name]]

    def centre(self, name):
        return self.net.centres[self.net.config.classes.index(name)]

    def precision(self, found, target):
        relevant = torch.tensor([label == target for label in self.labels])
        return 100 * average_precision(found @ self.codes.T, relevant.expand(len(found), -1))

    def ceiling(self, target):
        return float(self.precision(self.centre(target)[None], target)[0])

    def score(self, patch, source, target) -> dict[str, float]:
        """Of a patch (None: none), as its file would be; loss is the relaxed share of wrong bits"""
        code, out = self.centre(target), {}
        seen = {"source": self.source(source),
                "test": load_batch([p for p, _ in embedded.queries([source])], SIZE)}  # fmt: skip
        for name, images in seen.items():
            shown = images if patch is None else quantise(patch.apply(images))
            found = self.encode(shown)
            out[f"{name} t-mAP"] = float(self.precision(found, target).mean())
            out[f"{name} bits"] = 100 * float((found == code).float().mean())
            with torch.no_grad():
                real = self.net.encode_image(shown)
            out[f"{name} loss"] = float((1 - (real.tanh() * code).mean()) / 2)
        return out

    def adam(self, source, target, updates, precision="bf16"):
        config = AdvHashConfig(size=0.22, optimiser="adam", batch=10, lr=0.05, budget=updates,
                               precision=precision)  # fmt: skip
        start = advhash_patch(SIZE, config, torch.Generator().manual_seed(SEED))
        start = Patch.make("grey", start.size[0], SIZE, start.placement)
        return advhash(self.net.encode_image, self.source(source), self.centre(target),
                       config=config, patch=start,
                       generator=torch.Generator().manual_seed(SEED))  # fmt: skip


def side_by_side(search: Search, source: str, target: str, updates: int) -> list[dict]:
    photos, code = search.source(source), search.centre(target)
    config = AdvHashConfig(size=0.22, iterations=updates // 2, epochs=1, budget=updates)
    start = advhash_patch(SIZE, config, torch.Generator().manual_seed(SEED))
    corner = start.placement.at(1, (SIZE, SIZE), start.size)[0]
    content, _, losses = literal.advhash(
        photos, start.content, corner, code, search.net.encode_image, config,
        torch.Generator().manual_seed(SEED),
    )  # fmt: skip
    ours = advhash(search.net.encode_image, photos, code, config=config, patch=start,
                   generator=torch.Generator().manual_seed(SEED))  # fmt: skip
    adam = search.adam(source, target, ours.gradients_used // 10, "fp32")
    found = [
        ("AdvHash, published step by step", start.with_content(content), ours.gradients_used),
        ("AdvHash, ours", ours.patch, ours.gradients_used),
        ("Adam on 1 - cos(H, c)", adam.patch, adam.gradients_used),
    ]
    assert abs(len(losses) - len(ours.losses)) <= 2  # ours evaluates once more per mini-batch
    return [{"attack": "no patch", "gradients": 0, **search.score(None, source, target)}] + [
        {"attack": name, "gradients": used, **search.score(patch, source, target)}
        for name, patch, used in found
    ]


# For one photo alone, from where the universal patch ended.
OWN = TTHConfig(steps=150, lr=0.03, schedule="cosine", distortion=0.0, retry=False,
                scope="per-image", size=0.22)  # fmt: skip
SHIFTS = ((0, 0), (6, -6), (-6, 6))


def shrunk(search: Search, source: str, target: str, updates: int) -> dict:
    """The strongest form: what it reaches at every size on its way down."""
    config = AdvHashConfig(size=0.22, optimiser="adam", batch=4, lr=0.05, budget=updates,
                           shrink=0.5, placement="centre")  # fmt: skip
    place = advhash_patch(SIZE, config)
    start = photo(search.source(target)[0], *place.size)
    photos = search.source(source)
    photos = torch.cat([photos, photos.flip(-1)])
    photos = torch.cat([photos.roll(by, (2, 3)) for by in SHIFTS])
    result = advhash(search.net.encode_image, photos, search.centre(target), config=config,
                     patch=place.with_content(start),
                     generator=torch.Generator().manual_seed(SEED))  # fmt: skip
    stages = [*(p for _, p in sorted(result.snapshots.items())), result.patch]
    return {
        "source": source, "target": target, "ceiling": search.ceiling(target),
        "gradients": result.gradients_used, "losses": result.losses[::10],
        "stages": [{"side": p.size[0] / SIZE, **search.score(p, source, target)} for p in stages],
    }  # fmt: skip


def universal(search: Search, target: str, updates: int, drawn: list[str]) -> dict:
    """One patch for photos of any other class; its score on each class's query photos. For
    ``drawn`` source classes also the score of a patch of its own for every query photo."""
    config = AdvHashConfig.preset("strong", eot=1, lr=0.03, batch=8, budget=updates)
    place = advhash_patch(SIZE, config)
    start = photo(search.source(target)[0], *place.size)
    others = [c for c in search.classes if c != target]
    photos = torch.cat([search.source(c) for c in others])
    result = advhash(search.net.encode_image, photos, search.centre(target), config=config,
                     patch=place.with_content(start),
                     generator=torch.Generator().manual_seed(SEED))  # fmt: skip
    code, found = search.centre(target), {}
    for name in others:
        images = load_batch([p for p, _ in embedded.queries([name])], SIZE)
        shown = search.encode(quantise(result.patch.apply(images)))
        found[name] = {
            "none": float(search.precision(search.encode(images), target).mean()),
            "t-mAP": float(search.precision(shown, target).mean()),
            "bits": 100 * float((shown == code).float().mean()),
        }
        if name in drawn:
            again = torch.Generator().manual_seed(SEED)
            own = tth(search.net.encode_image, images, TextGoal(code), config=OWN,
                      patch=result.patch, generator=again)  # fmt: skip
            reached = search.precision(search.encode(quantise(own.apply(images))), target)
            found[name]["own"] = float(reached.mean())
    return {"target": target, "ceiling": search.ceiling(target), "photos": len(photos),
            "gradients": result.gradients_used, "classes": found}  # fmt: skip


def by_target(found: list[dict]) -> dict:
    """One row per target: what its universal patch does to the photos of all other classes."""
    rows = []
    for run in sorted(found, key=lambda r: -mean(c["t-mAP"] for c in r["classes"].values())):
        values = {name: c["t-mAP"] for name, c in run["classes"].items()}
        best = sorted(values, key=lambda name: -values[name])[:3]
        rows.append([
            run["target"], f"{run['gradients']:,}",
            f"{mean(c['none'] for c in run['classes'].values()):.1f}",
            interval([*values.values()]), f"{median(values.values()):.1f}",
            f"{sum(v >= 90 for v in values.values())} of {len(values)}",
            ", ".join(f"{name} {values[name]:.0f}" for name in best),
            f"{mean(c['bits'] for c in run['classes'].values()):.1f}", f"{run['ceiling']:.1f}",
        ])  # fmt: skip
    return {
        "columns": [
            "target",
            "gradients",
            "t-mAP without a patch",
            "t-mAP, test photos",
            "median class",
            "classes with 90 or more",
            "best classes",
            "bits that agree, %",
            "ceiling",
        ],
        "rows": rows,
        "note": (
            f"One patch of 0.22 per target, preset strong, optimised on {found[0]['photos']} "
            "gallery photos of all other classes and scored on the 8 query photos of each of them. "
            "In brackets: 95 % bootstrap interval over classes. Targets: all whose ceiling is 90 "
            "or more. For the pairs above, this patch, and one for each single photo that begins "
            "with it: " + "; ".join(
                f"{name} → {run['target']} {c['t-mAP']:.0f}, {c['own']:.0f}"
                for run in found for name, c in run["classes"].items() if "own" in c
            ) + "."
        ),
    }  # fmt: skip


def by_size(found: list[dict]) -> dict:
    """Rows of the area curve: means over pairs, one row per size."""
    rows = []
    for i, stage in enumerate(found[0]["stages"]):
        test = [p["stages"][i]["test t-mAP"] for p in found]
        rows.append([
            f"{stage['side']:.2f}", f"{100 * stage['side'] ** 2:.1f}", interval(test),
            f"{median(test):.1f}", f"{max(test):.1f}",
            f"{sum(v >= 90 for v in test)} of {len(test)}",
            f"{mean(p['stages'][i]['source t-mAP'] for p in found):.1f}",
            f"{mean(p['stages'][i]['source bits'] for p in found):.1f}",
        ])  # fmt: skip
    return {
        "columns": ["side", "area, %", "t-mAP, test photos", "median", "best", "90 or more",
                    "t-mAP, source photos", "bits that agree, source, %"],
        "rows": rows,
        "note": (
            f"{len(found)} pairs with a ceiling of 90 or more, of those above: "
            + "; ".join(f"{p['source']} → {p['target']} "
                        f"{p['stages'][-1]['test t-mAP']:.0f}" for p in found)
            + " at 0.22. Patch in the centre, begun at half of the side and cut down, "
            f"{found[0]['gradients']:,} sample gradients for all sizes together: a row is a stage "
            "on the way, not the best that a patch of that size could do."
        ),
    }  # fmt: skip


def interval(values: list[float]) -> str:
    s = summarise(torch.tensor(values) / 100, list(range(len(values))), seed=0).macro
    return f"{100 * s.mean:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]"


def report(search: Search, data: dict, facts: dict) -> dict:
    rows = []
    for pair in data["side by side"]:
        for r in pair["attacks"]:
            rows.append([f"{pair['source']} → {pair['target']}", r["attack"],
                         f"{r['gradients']:,}", f"{r['source loss']:.3f}",
                         f"{r['source bits']:.1f}", f"{r['source t-mAP']:.1f}",
                         f"{r['test bits']:.1f}", f"{r['test t-mAP']:.1f}",
                         f"{pair['ceiling']:.1f}"])  # fmt: skip
    groups = []
    for name in ("any class", "ceiling of 90 or more", "the first of these, five times the budget"):
        found = [p for p in data["pairs"] if p["group"] == name]
        if not found:
            continue
        test = [p["patch"]["test t-mAP"] for p in found]
        groups.append([
            name, str(len(found)), f"{found[0]['gradients']:,}",
            f"{mean(p['none']['test t-mAP'] for p in found):.1f}",
            interval(test) if len(test) > 1 else f"{test[0]:.1f}",
            f"{median(test):.1f}", f"{max(test):.1f}",
            f"{sum(v >= 90 for v in test)} of {len(test)}",
            f"{mean(p['patch']['source t-mAP'] for p in found):.1f}",
            f"{mean(p['patch']['source bits'] for p in found):.1f}",
            f"{mean(p['ceiling'] for p in found):.1f}",
        ])  # fmt: skip
    more = {"area": by_size(data["shrink"])} if data.get("shrink") else {}
    if data.get("universal"):
        more["universal"] = by_target(data["universal"])
    ceilings = [search.ceiling(c) for c in search.classes]
    return {
        "columns": ["source → target", "attack", "gradients", "loss, source photos",
                    "bits that agree, source, %", "t-mAP, source", "bits, test, %",
                    "t-mAP, test", "ceiling"],
        "rows": rows,
        "note": (
            "Source photos: those that the patch was optimised on (16 of the gallery); test: the "
            "8 query photos of the class. Loss: relaxed share of wrong bits, (1 - mean "
            "tanh(H) c) / 2."
        ),
        "tables": {**more, "pairs": {
            "columns": ["targets", "pairs", "gradients each", "t-mAP without a patch",
                        "t-mAP, test photos", "median", "best", "90 or more",
                        "t-mAP, source photos", "bits that agree, source, %", "ceiling"],
            "rows": groups,
            "note": (
                f"Pairs drawn by seed {SEED}, every one listed in the result file. The ceiling is "
                f"{mean(ceilings):.1f} on average over all {len(ceilings)} classes and 90 or more "
                f"for {sum(c >= 90 for c in ceilings)} of them. In brackets: 95 % bootstrap "
                "interval over pairs."
            ),
        }},
        "facts": facts,
        "measured": data,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10, help="pairs of each group")
    parser.add_argument("--updates", type=int, default=150, help="of ten photos each, per pair")
    parser.add_argument("--published", type=int, default=2, help="pairs attacked three ways")
    parser.add_argument("--shrink", type=int, metavar="UPDATES", help="see above; 400 was used")
    parser.add_argument("--universal", type=int, metavar="UPDATES", help="likewise; 400 was used")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/advhash.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    search = Search()
    facts = {"model": hub.read_config(hub.resolve("csq-small"), "csq")["sha256"][:12],
             "updates": options.updates, "seed": SEED, "version": __version__,
             "torch": torch.__version__, "machine": platform.machine(),
             "threads": options.threads}  # fmt: skip
    data: dict[str, list] = {"side by side": [], "pairs": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def save():
        text = json.dumps(report(search, data, facts), indent=1, ensure_ascii=False)
        write_atomic(options.out, (text + "\n").encode())

    if options.shrink:
        before = json.loads(options.out.read_text())
        data, facts = before["measured"], {**before["facts"], "shrink": options.shrink}
        data["shrink"] = []
        chosen = [p for p in data["pairs"] if p["group"] == "ceiling of 90 or more"]
        for p in chosen[: options.pairs]:
            data["shrink"].append(shrunk(search, p["source"], p["target"], options.shrink))
            print(json.dumps(data["shrink"][-1]), flush=True)
            save()
        return
    if options.universal:
        before = json.loads(options.out.read_text())
        data, facts = before["measured"], {**before["facts"], "universal": options.universal}
        data["universal"] = []
        for target in (c for c in search.classes if search.ceiling(c) >= 90):
            high = [p for p in data["pairs"] if p["group"] == "ceiling of 90 or more"]
            drawn = [p["source"] for p in high if p["target"] == target]
            data["universal"].append(universal(search, target, options.universal, drawn))
            print(json.dumps(data["universal"][-1]), flush=True)
            save()
        return
    draw = random.Random(SEED)
    high = [c for c in search.classes if search.ceiling(c) >= 90]
    groups = {}
    for name, targets in (("any class", search.classes), ("ceiling of 90 or more", high)):
        chosen = draw.sample(targets, min(options.pairs, len(targets)))
        groups[name] = [(draw.choice([c for c in search.classes if c != t]), t) for t in chosen]
    for source, target in groups["ceiling of 90 or more"][: options.published]:
        data["side by side"].append({
            "source": source, "target": target, "ceiling": search.ceiling(target),
            "attacks": side_by_side(search, source, target, options.updates),
        })  # fmt: skip
        print(json.dumps(data["side by side"][-1]), flush=True)
        save()
    longer = "the first of these, five times the budget"
    groups[longer] = groups["ceiling of 90 or more"][:1]
    for name, pairs in groups.items():
        updates = options.updates * (5 if name == longer else 1)
        for source, target in pairs:
            result = search.adam(source, target, updates)
            data["pairs"].append({
                "group": name, "source": source, "target": target,
                "ceiling": search.ceiling(target), "gradients": result.gradients_used,
                "none": search.score(None, source, target),
                "patch": search.score(result.patch, source, target),
            })  # fmt: skip
            print(json.dumps(data["pairs"][-1]), flush=True)
            save()


if __name__ == "__main__":
    main()
