"""How long does random-mask PAIR withstand an attacker who knows it?

    python benchmarks/adaptive.py laptop sunflower umbrella revolver --folder results/adaptive
    python benchmarks/adaptive.py --merge --folder results/adaptive --out results/adaptive.json

Text search on the embedded photos with the models that ship. For each keyword, universal patches
(0.35 of the side, top right) are optimised through the defense, and snapshots are scored on fresh
masks: the share of the ten advertisements in the top 10, and whether any is there. EOT-1, 7, 20
and 50 get the same number of sample gradients (one picture, one mask), so their rows compare what
the same money buys. Gradients are computed in bfloat16, scores in float32.

A keyword's file grows run by run; the same command continues where it was stopped. ``--budget``
sets the sample gradients of each curve, ``--minutes`` stops before a run that would begin later
(CPU time, all keywords together). Beside the curves each file has the checks S1 and S4 to S12 of
``pair.attacks.sanity``; S2 and S3 need all keywords and are computed when merging. With ``--runs``
only those runs are made whose names begin so, and no checks: S2 needs more masks than a curve needs
keywords. The table then says which rows such a keyword is part of.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from adaptive_report import merge

from pair import __version__, hub
from pair.attacks import BPDA, EOT, AttackResult, Patch, TextGoal, TTHConfig, pipeline, sanity, tth
from pair.attacks.blackbox import random_search
from pair.attacks.floor import floor
from pair.attacks.wrappers import OnePassSurrogate
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.files import write_atomic
from pair.images import load_batch, quantise
from pair.masks import FixedPattern
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip

SIZE, ADS, DRAWS, CARRIERS = 112, 10, 5, 2
MODELS = ("pair-small", "clip-small")
ADAM = TTHConfig(distortion=0.0, lr=0.05, schedule="constant", retry=False, start="grey",
                 precision="bf16", form="mean_loss", micro_batch=32, held=256)  # fmt: skip
STEPS = (50, 100, 200, 400, 1000)  # of EOT-1; the others stop at the same numbers of gradients
DRAWN = (1, 7, 20, 50)
SEEDS = {"optimise": [1], "select": [3_000_003], "evaluate": [9_000 + d for d in range(DRAWS)]}


def batched(function, images, size=32):
    return torch.cat([function(chunk) for chunk in images.split(size)])


class Search:
    """The gallery behind one defense (None: bare), the advertisements, and what is found."""

    def __init__(self, clip, photos, ads, defense):
        self.clip, self.ads, self.defense = clip, ads, defense
        self.count = len(photos)
        self.gallery = self.embed(photos, 8_000)
        attacked = None if defense is None else defense.differentiable()
        self.features = clip if attacked is None else pipeline(clip, attacked)

    @torch.no_grad()
    def embed(self, images, seed):
        generator = torch.Generator().manual_seed(seed)

        def encode(chunk):
            rebuilt = chunk if self.defense is None else self.defense(chunk, generator=generator)
            return F.normalize(self.clip.encode_image(rebuilt), dim=1)

        return batched(encode, images)

    def score(self, patch, queries) -> dict[str, list[float]]:
        """Per draw: share of the advertisements in the top 10, any of them there (over queries)."""
        return self.found(self.ads if patch is None else quantise(patch.apply(self.ads)), queries)

    def found(self, images, queries) -> dict[str, list[float]]:
        shares, anys = [], []
        random = self.defense is not None and self.defense.random
        for seed in SEEDS["evaluate"] if random else SEEDS["evaluate"][:1]:
            z = self.embed(images, seed)
            top = (queries @ torch.cat([self.gallery, z]).T).topk(10, 1).indices
            inside = top >= self.count
            shares.append(float(inside.sum(1).float().mean()) / len(images))
            anys.append(float(inside.any(1).float().mean()))
        return {"share": shares, "any": anys}


class Bench:
    """Everything that all keywords share."""

    def __init__(self):
        self.clip = SmallClip.from_pretrained("clip-small").requires_grad_(False)
        self.files = embedded.gallery()
        self.photos = load_batch([path for path, _ in self.files], SIZE)
        self.ads = load_batch([path for path, _ in embedded.ads()[:ADS]], SIZE)
        self.pair = Purifier.from_pretrained("pair-small").requires_grad_(False)
        self.searches: dict[str, Search] = {}

    def search(self, name: str) -> Search:
        """ "bare", "pair", or "mask <seed>": PAIR with one mask that the attacker knows."""
        if name not in self.searches:
            defense = {"bare": None, "pair": self.pair}.get(name)
            if name.startswith("mask "):
                defense = Purifier(self.pair.autoencoder, FixedPattern(f"seed:{name[5:]}")).eval()
            self.searches[name] = Search(self.clip, self.photos, self.ads, defense)
        return self.searches[name]


class Keyword:
    """One keyword: its target, its queries, its file."""

    def __init__(self, bench: Bench, keyword: str, number: int, budget: int, precision: str,
                 path: Path):  # fmt: skip
        self.bench, self.keyword, self.budget, self.path = bench, keyword, budget, path
        self.adam = replace(ADAM, precision=precision)
        self.captions = sentences([keyword], TRAIN_TEMPLATES)
        self.texts = sentences([keyword], HELD_OUT_TEMPLATES)
        with torch.no_grad():
            self.target = bench.clip.encode_text(self.captions).mean(0)
            self.queries = F.normalize(bench.clip.encode_text(self.texts), dim=1)
        self.masks = [2 * number + 1, 2 * number + 2]  # other masks for every keyword
        facts = {
            "keyword": keyword,
            "seeds": SEEDS,
            "budget": budget,
            "precision": precision,
            "carriers per update": CARRIERS,
            "masks": self.masks,
            "models": {m: hub.read_config(hub.resolve(m), kind)["sha256"][:12]
                       for m, kind in zip(MODELS, ("generator", "clip"), strict=True)},
            "version": __version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        self.data = {"facts": facts, "runs": {}, "checks": None}
        if path.is_file():
            found = json.loads(path.read_text())
            # Files from before the option --precision: every gradient was computed in bfloat16.
            found["facts"].setdefault("precision", "bf16")
            if found["facts"] != facts:
                raise ValueError(f"{path} was begun with other settings or models: delete it")
            self.data = found

    def save(self):
        write_atomic(self.path, (json.dumps(self.data, indent=1) + "\n").encode())

    def plan(self):
        """name -> (search, features or None, settings, snapshots)."""
        rows = {
            "undefended, TTH as published": ("bare", None, TTHConfig(), (50, 300)),
            "undefended, Adam": ("bare", None, self.adam, (50, 100, 200)),
        }
        for mask in self.masks:
            rows[f"known mask {mask}, Adam"] = (f"mask {mask}", None, self.adam, (50, 100, 200))
        for n in DRAWN:
            steps = sorted({max(1, round(s * self.budget / STEPS[-1] / CARRIERS / n))
                            for s in STEPS})  # fmt: skip
            rows[f"PAIR, Adam, EOT-{n}"] = ("pair", None, replace(self.adam, eot=n), tuple(steps))
        published = replace(TTHConfig(), precision=self.adam.precision, micro_batch=32)
        rows["PAIR, TTH as published (EOT-1)"] = ("pair", None, published, (50, 150, 300))
        pair = self.bench.pair.differentiable()
        short = rows["PAIR, Adam, EOT-1"][3][-2:-1]
        for name, substitute in (("identity", None), ("one pass", OnePassSurrogate(pair))):
            features = pipeline(self.bench.clip, BPDA(pair, substitute))
            rows[f"PAIR, BPDA ({name})"] = ("pair", features, self.adam, short)
        rows["whole picture, undefended"] = ("bare", None, replace(self.adam, size=1.0), (100,))
        rows["whole picture, PAIR"] = ("pair", None, replace(self.adam, size=1.0), (200,))
        return rows

    def run(self, name: str):
        which, features, config, snapshots = self.plan()[name]
        search = self.bench.search(which)
        few = which != "bare" and config.distortion == 0
        carriers = {"pair": CARRIERS, "bare": ADS}.get(which, 5) if few else None
        half = snapshots[-1] // 2
        config = replace(config, steps=snapshots[-1] + 1, snapshots=(half, *snapshots),
                         carriers=carriers)  # fmt: skip
        began = time.process_time()
        generator = torch.Generator().manual_seed(SEEDS["optimise"][0])
        result = tth(features or search.features, search.ads, self.target, config=config,
                     generator=generator)  # fmt: skip
        points = [{"steps": 0, "gradients": 0, **search.score(None, self.queries)}]
        for steps in snapshots:
            patch = result.snapshots[steps]
            gradients = steps * (carriers or ADS) * config.eot
            points.append({"steps": steps, "gradients": gradients,
                           **search.score(patch, self.queries)})  # fmt: skip
        for end, last in (("", patch), ("-half", result.snapshots[half])):
            last.save(self.path.parent / "patches" / f"{self.keyword}-{plain(name)}{end}")
        self.data["runs"][name] = {
            "points": points,
            "losses": [round(v, 4) for v in result.losses],
            "settings": {k: v for k, v in result.config.items() if k != "snapshots"},
            "cpu_seconds": round(time.process_time() - began),
        }
        self.save()
        share = 100 * mean(points[-1]["share"])
        print(f"{self.keyword}: {name}: {share:.1f} % after {snapshots[-1]} steps, "
              f"{self.data['runs'][name]['cpu_seconds']} s", flush=True)  # fmt: skip

    def final(self, name: str, figure: str = "share") -> float:
        return mean(self.data["runs"][name]["points"][-1][figure])

    def patch(self, name: str, end: str = "") -> Patch:
        return Patch.load(self.path.parent / "patches" / f"{self.keyword}-{plain(name)}{end}")

    def check(self):
        """S1, S4 to S12, and what they compare with, on fresh masks."""
        bench, pair, bare = self.bench, self.bench.search("pair"), self.bench.search("bare")
        goal = TextGoal(self.target)
        best = max((f"PAIR, Adam, EOT-{n}" for n in DRAWN), key=self.final)
        white = self.final(best)
        genuine = load_batch([p for p, _ in embedded.queries([self.keyword])], SIZE)
        photos = mean(pair.found(genuine, self.queries)["share"])
        others = {
            "transfer": mean(pair.score(self.patch("undefended, Adam"), self.queries)["share"])
        }
        start = self.patch(best).with_content(torch.full_like(self.patch(best).content, 0.5))
        pool = [bench.photos[i] for i, (_, label) in enumerate(bench.files)
                if label == self.keyword][:4]  # fmt: skip
        for entry in floor(pair.features, bench.ads[:4], goal, start, words=self.keyword,
                           photos=pool, collages=60, draws=1, prescreen=bare.features):  # fmt: skip
            others[entry.family] = mean(pair.score(entry.patch, self.queries)["share"])
        blind = random_search(pair.features, bench.ads[:4], goal, start, queries=100)
        others["random search"] = mean(pair.score(blind.patch, self.queries)["share"])
        substitutes = {n: self.final(n) for n in self.data["runs"] if "BPDA" in n}
        at = self.data["runs"]["PAIR, BPDA (identity)"]["points"][-1]["steps"]
        equal = next(mean(p["share"]) for p in self.data["runs"]["PAIR, Adam, EOT-1"]["points"]
                     if p["steps"] == at)  # fmt: skip
        run = self.data["runs"][best]
        function = EOT(pair.features, 1, precision=self.adam.precision)  # as the attack computes
        exact = pipeline(deepcopy(bench.clip).double(), deepcopy(bench.pair).double())
        evaluation = pipeline(bench.clip, bench.pair)
        result = AttackResult(self.patch(best), run["losses"], run["settings"],
                              {"optimise": SEEDS["optimise"][0]}, 0, 0, 0.0)  # fmt: skip
        checks = [
            sanity.s1_unbounded(self.final("whole picture, PAIR"), photos,
                                self.final("whole picture, undefended")),
            *sanity.of_attack(result, pair.features, bench.ads[:2], goal,
                              evaluation=evaluation, seeds=SEEDS,
                              captions=self.captions, queries=self.texts, start=start,
                              middle=self.patch(best, "-half"), exact=exact,
                              directions=16, draws=16),
            sanity.s10_same_forward(function, evaluation, self.patch(best).apply(bench.ads)),
            sanity.s6_strongest(white, others),
            sanity.s7_full_gradient(equal, substitutes),
        ]  # fmt: skip
        self.data["checks"] = sanity.records(checks)
        self.data["compared"] = {"best": best, "white": white, "genuine photos": photos,
                                 **others, **substitutes}  # fmt: skip
        self.save()


def plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("keywords", nargs="*", help="class names of the embedded gallery")
    parser.add_argument("--folder", type=Path, default=Path("results/adaptive"))
    parser.add_argument("--budget", type=int, default=2000, help="sample gradients per curve")
    parser.add_argument(
        "--runs", nargs="+", metavar="NAME", help='only these: undefended "known mask" ...'
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="CPU time, at most")
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        default="bf16",
        help="of the gradients; S10 holds in fp32 only, at twice the time",
    )
    parser.add_argument("--merge", action="store_true", help="one table of the finished keywords")
    parser.add_argument("--out", type=Path, default=Path("results/adaptive.json"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.merge:
        merge(options.folder, options.out)
        return 0
    wrong = [k for k in options.keywords if k not in embedded.labels()]
    if wrong or not options.keywords:
        print(f"keywords must be some of: {', '.join(embedded.labels())}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    bench = Bench()
    try:
        for i, name in enumerate(options.keywords):
            keyword = Keyword(bench, name, i, options.budget, options.precision,
                              options.folder / f"{name}.json")  # fmt: skip
            if options.runs and keyword.data["checks"] is None:
                keyword.data["only"] = options.runs
                keyword.save()
            for run in keyword.plan():
                if options.runs and not run.startswith(tuple(options.runs)):
                    continue
                if time.process_time() > 60 * options.minutes:
                    print("out of time: the same command continues", file=sys.stderr)
                    return 0
                if run not in keyword.data["runs"]:
                    keyword.run(run)
            if keyword.data["checks"] is None and not options.runs:
                keyword.check()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
