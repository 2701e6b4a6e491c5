"""How well does the audit find patched pictures, and how does an attacker evade it?

    python benchmarks/audit.py --out results/audit.json

Text search on the embedded photos with the models that ship. For each keyword, universal patches
(0.35 of the side, top right) on ten advertisements by attackers who know more and more:

* ``no patch``: the advertisements as they are, to see what they do by themselves;
* ``does not know``: optimised against the undefended encoder;
* ``knows PAIR``: optimised through the purifier with fresh masks (EOT-1);
* ``knows the audit``: aims at the undefended search, and pays for exceeding what raises an alarm;
* ``knows PAIR and the audit``: the same, aimed at the search among purified pictures;
* ``knows both, risks alarms``: pays a tenth of that, so that single pictures may be caught.

The last three know the bank of queries, the windows and the alarm thresholds of ``drop``, ``shift``
and ``spread``. What the windows over the patch leave of a score no patch can change, so the only
way under ``drop`` is to lift the undefended score less (Theorem 10).

The pictures go through :func:`pair.guard.audit_run.audit` as files, in a gallery of clean photos;
thresholds come from other clean photos. The same command continues where it was stopped: findings
lie in ``--work``, finished attacks in ``--out``. Gradients are computed in bfloat16, everything
that is reported in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pair import __version__
from pair.attacks import TextGoal, TTHConfig, pipeline, tth
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.files import write_atomic
from pair.guard import conformal
from pair.guard.audit import STATISTICS, Auditor, Finding
from pair.guard.audit_run import audit
from pair.guard.models import Models
from pair.images import decode, save_image, shrink
from pair.retrieval.statistics import summarise

SIZE, SHARE, BUDGET, SEED = 112, 0.35, 0.01, 7
PENALTY, MARGIN = 20.0, 0.9  # the audit's attackers stay below this share of every threshold
CARRIERS = 4  # advertisements per step of the attacks through the purifier, drawn anew
KINDS = ("no patch", "does not know", "knows PAIR", "knows the audit", "knows PAIR and the audit",
         "knows both, risks alarms")  # fmt: skip
ADAM = TTHConfig(distortion=0.0, lr=0.03, schedule="cosine", retry=False, start="grey",
                 precision="bf16")  # fmt: skip


class Bench:
    """Everything that all keywords share: models, clean findings, advertisements."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.models = Models.load("clip-small", None, "pair-small")
        bank = sentences(embedded.labels(), HELD_OUT_TEMPLATES[1:2])
        self.auditor = Auditor(self.models, bank, draws=args.draws, patch=SHARE)
        photos = [path for path, _ in embedded.gallery()]  # every second one is searched
        aside = [*(path for path, _ in embedded.queries()), *photos[1::2]]
        clean = audit(photos[::2][: args.gallery], self.auditor, args.work / "clean", seed=SEED,
                      clean=aside[: args.clean], progress=self._progress)  # fmt: skip
        self.gallery, self.clean = clean.findings, clean.clean
        share = max(BUDGET / len(STATISTICS), 1.01 / (len(self.clean) + 1))
        values = {s: [f.statistics[s] for f in self.clean] for s in STATISTICS}
        self.bars = {s: conformal.threshold(values[s], share) for s in STATISTICS}
        files = [path for path, _ in embedded.ads()[: args.ads]]
        self.ads = torch.stack([shrink(decode(path), SIZE) for path in files])

    @staticmethod
    def _progress(count: int) -> None:
        print(f"  examined {count}", end="\r", file=sys.stderr, flush=True)

    def run(self, keyword: str, kind: str) -> dict:
        """Attack, audit and search; the record of one attacker."""
        began = time.process_time()
        folder = self.args.work / f"{keyword} {kind}".replace(" ", "-")
        loss = self.attack(keyword, kind, folder / "pictures")
        found = audit([folder / "pictures"], self.auditor, folder / "audit", seed=SEED).findings
        found.sort(key=lambda f: f.uri)
        record = {"keyword": keyword, "attack": kind, "loss": loss, **self.score(found, keyword)}
        return {**record, "processor seconds": round(time.process_time() - began)}

    def attack(self, keyword: str, kind: str, folder: Path) -> list[float] | None:
        """Patched advertisements as files in ``folder``; the first and the last loss."""
        losses, pictures = None, self.ads
        if kind != "no patch":
            encoder, purifier = self.models.encoder, self.models.purifier.differentiable()
            with torch.no_grad():
                target = encoder.encode_text(sentences([keyword], TRAIN_TEMPLATES)).mean(0)
            steps = self.args.steps[KINDS.index(kind) - 1]
            features, goal, carriers = encoder, TextGoal(target), min(CARRIERS, len(self.ads))
            if kind == "does not know":
                carriers = len(self.ads)
            elif kind == "knows PAIR":
                features = pipeline(encoder, purifier)
            else:
                features = Seen(encoder, purifier, self.ads)
                weight = PENALTY / 10 if kind == KINDS[5] else PENALTY
                goal = Quiet(self, target, purified=kind != KINDS[3], weight=weight)
            config = replace(ADAM, steps=steps, carriers=carriers)
            result = tth(features, self.ads, goal, config=config,
                         generator=torch.Generator().manual_seed(1),
                         progress=lambda step, total, loss: print(
                             f"  {keyword}, {kind}: step {step} of {total}, loss {loss:.3f}   ",
                             end="\r", file=sys.stderr, flush=True))  # fmt: skip
            losses = [round(result.losses[0], 4), round(result.losses[-1], 4)]
            pictures = result.patch.apply(self.ads)
        made = folder.with_name("pictures.partial")
        for old in (made, folder):
            shutil.rmtree(old, ignore_errors=True)
        made.mkdir(parents=True)
        for number, picture in enumerate(pictures):
            save_image(made / f"{number:03}.png", picture)
        os.replace(made, folder)
        return losses

    def score(self, found: list[Finding], keyword: str) -> dict:
        everything = [*self.gallery, *found]
        self.auditor.compare([*everything, *self.clean], everything)
        self.auditor.judge(everything, self.clean, BUDGET)
        queries = self.models.text(sentences([keyword], HELD_OUT_TEMPLATES))
        hits = {}
        for label, kind in (("no defense", "plain"), ("PAIR", "clean")):
            rows = np.stack([getattr(f, kind) for f in everything])
            top = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
            hits[label] = np.array(
                [[len(self.gallery) + i in t for i in range(len(found))] for t in top]
            )
        alarm = np.array([f.alarm for f in found])
        auc, recall = {}, {}
        for name in (*STATISTICS, "focus", "combined"):
            bad, good = ([value_of(f, name) for f in part] for part in (found, self.gallery))
            auc[name] = auroc(bad, good)
            if name == "combined":
                recall[name] = float(alarm.mean())
            else:
                bar = conformal.threshold([f.statistics[name] for f in self.clean], BUDGET)
                recall[name] = float(np.mean([b > bar for b in bad]))
        return {
            "any": {k: float(h.any(1).mean()) for k, h in hits.items()},
            "share": {k: float(h.mean()) for k, h in hits.items()},
            "unnoticed any": {k: float((h & ~alarm).any(1).mean()) for k, h in hits.items()},
            "unnoticed share": {k: float((h & ~alarm).mean()) for k, h in hits.items()},
            "auroc": auc, "recall": recall,
            "one window": float(np.mean([f.one_window for f in found])),
            "false alarms": {
                "combined": float(np.mean([f.alarm for f in self.gallery])),
                "one window": float(np.mean([f.one_window for f in self.gallery])),
            },
            "mean statistics": {
                s: float(np.mean([f.statistics[s] for f in found])) for s in STATISTICS
            },
        }  # fmt: skip


class Seen:
    """What an audit looks at: (B, 3 D + 1), the unit features of a picture and of two draws of it,
    and which advertisement it is (told by its lower half, where no patch lies)."""

    def __init__(self, encoder, purifier, ads: Tensor):
        self.encoder, self.purifier = encoder, purifier
        self.half = ads.shape[-2] // 2
        self.parts = ads[:, :, self.half :].flatten(1)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        count = len(images)
        drawn = self.purifier.draws(images, 2, generator=generator).flatten(0, 1)
        z = F.normalize(self.encoder.encode_image(torch.cat([images, drawn])).float(), dim=1)
        which = torch.cdist(images[:, :, self.half :].flatten(1), self.parts).argmin(1)
        return torch.cat([*z.split(count), which[:, None].to(z)], 1)


class Quiet:
    """1 - cos to the keyword, plus what would raise an alarm."""

    def __init__(self, bench: Bench, target: Tensor, purified: bool, weight: float = PENALTY):
        self.target, self.purified = F.normalize(target, dim=0), purified
        self.weight = weight
        self.bars = {name: MARGIN * bar for name, bar in bench.bars.items()}
        self.queries = bench.auditor.queries
        side = round(SHARE * SIZE)
        with torch.no_grad():  # views that hide the whole patch: the same for every content
            boxes = bench.auditor.views.cover.boxes()
            hides = [i for i, (x0, y0, x1, y1) in enumerate(boxes)
                     if x0 <= SIZE - side and y0 <= 0 and x1 >= SIZE and y1 >= side]  # fmt: skip
            views = bench.auditor.views.embed(bench.models.encoder, bench.ads).masked[:, hides]
            self.floor = (views @ self.queries.T).amin(1)  # (B, Q)

    def __call__(self, outputs: Tensor) -> Tensor:
        plain, one, two = outputs[:, :-1].chunk(3, 1)
        floor = self.floor[outputs[:, -1].long()]
        clean = F.normalize(one + two, dim=1)
        aim = (one + two) / 2 if self.purified else plain
        drop = (plain @ self.queries.T - floor).amax(1) - self.bars["drop"]
        shift = 1 - (plain * clean).sum(1) - self.bars["shift"]
        spread = 1 - (one * two).sum(1) - self.bars["spread"]
        excess = drop.clamp(min=0) + shift.clamp(min=0) + spread.clamp(min=0)
        return 1 - aim @ self.target + self.weight * excess


def value_of(finding: Finding, name: str) -> float:
    return -finding.p if name == "combined" else finding.statistics[name]


def auroc(bad: list[float], good: list[float]) -> float:
    """Chance that an attacked picture scores above a clean one; ties count half."""
    b, g = np.array(bad)[:, None], np.array(good)[None]
    return float((b > g).mean() + (b == g).mean() / 2)


def report(records: list[dict], bench: Bench, facts: dict) -> dict:
    keywords = list(dict.fromkeys(r["keyword"] for r in records))

    def values(kind: str, *path: str) -> list[float]:
        """One a keyword."""
        found = []
        for record in records:
            if record["attack"] == kind:
                value = record
                for key in path:
                    value = value[key]
                found.append(value)
        return found

    def mean(kind: str, *path: str) -> float:
        return 100 * float(np.mean(values(kind, *path)))

    def sure(kind: str, *path: str) -> str:
        """With its interval over keywords."""
        found = summarise(torch.tensor(values(kind, *path), dtype=torch.float64)).micro
        return f"{100 * found.mean:.0f} [{100 * found.low:.0f}, {100 * found.high:.0f}]"

    def both(kind: str, *path: str) -> str:
        return f"{mean(kind, f'{path[0]} any', path[1]):.0f} / " \
               f"{sure(kind, f'{path[0]} share', path[1])}"  # fmt: skip

    done = [kind for kind in KINDS if any(r["attack"] == kind for r in records)]
    found, searches = [], ("no defense", "PAIR")
    for kind in done:
        cells = [f"{mean(kind, 'auroc', s):.0f} / {mean(kind, 'recall', s):.0f}"
                 for s in STATISTICS]  # fmt: skip
        cells.append(" / ".join(sure(kind, of, "combined") for of in ("auroc", "recall")))
        found.append([kind, *cells, f"{mean(kind, 'one window'):.0f}"])
    evaded = [
        [kind,
         *[f"{mean(kind, 'any', s):.0f} / {mean(kind, 'share', s):.1f}" for s in searches],
         *[both(kind, "unnoticed", s) for s in searches]]
        for kind in done
    ]  # fmt: skip
    alarms, hangs = (
        mean(done[0], "false alarms", "combined"),
        mean(done[0], "false alarms", "one window"),
    )
    return {
        "columns": ["attacker", *[f"{s}, %" for s in (*STATISTICS, "combined")], "one window, %"],
        "rows": found,
        "note": (
            f"AUROC / recall at a false-alarm budget of {100 * BUDGET:.0f} %. "
            f"Keywords {', '.join(keywords)}; {len(bench.ads)} advertisements each, in a gallery "
            f"of {len(bench.gallery)} clean photos; thresholds from {len(bench.clean)} others; "
            f"{bench.args.draws} draws. Combined: the four share the budget; it raised alarms on "
            f"{alarms:.1f} % of the clean photos, and {hangs:.1f} % of them are hits that hang on "
            "one window. In brackets: 95 % bootstrap intervals over keywords."
        ),
        "tables": {
            "evaded": {
                "columns": ["attacker", *[f"{s}: any / share, %" for s in searches],
                            *[f"{s}, without an alarm: any / share, %" for s in searches]],
                "rows": evaded,
                "note": (
                    "Any: lists of ten with at least one of the advertisements; share: how many "
                    "of the ten advertisements are in a list. Five held-out queries a keyword."
                ),
            }
        },
        "facts": facts,
        "records": records,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--keywords", default="laptop,sunflower,umbrella,chandelier,elephant,minaret"
    )
    parser.add_argument("--ads", type=int, default=10)
    parser.add_argument("--gallery", type=int, default=368, help="clean photos in the gallery")
    parser.add_argument("--clean", type=int, default=440, help="clean photos for the thresholds")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs=5, default=(100, 150, 120, 120, 120),
                        help="of each attacker")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/audit"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keywords = args.keywords.split(",")
    if unknown := set(keywords) - set(embedded.labels()):
        raise SystemExit(f"there are no photos of {', '.join(sorted(unknown))}")
    bench, records = Bench(args), []
    facts = {
        "version": __version__, "torch": torch.__version__, "threads": args.threads,
        "models": bench.auditor.settings["models"], "views": len(bench.auditor.views.cover),
        "patch": SHARE, "ads": args.ads, "gallery": args.gallery, "clean": args.clean,
        "draws": args.draws, "steps": dict(zip(KINDS[1:], args.steps, strict=True)),
        "attack": "Adam, lr 0.03 falling by a cosine, no distortion, bf16 gradients",
        "carriers": CARRIERS, "penalty": PENALTY, "margin": MARGIN, "thresholds": bench.bars,
    }  # fmt: skip
    if args.out.is_file():
        earlier = json.loads(args.out.read_text())
        if earlier["facts"] != json.loads(json.dumps(facts)):
            raise SystemExit(f"{args.out} is of other settings or models: delete it")
        records = earlier["records"]
    for keyword in keywords:
        for kind in KINDS:
            if any((r["keyword"], r["attack"]) == (keyword, kind) for r in records):
                continue
            records.append(bench.run(keyword, kind))
            print(json.dumps(records[-1]), flush=True)
            result = report(records, bench, facts)
            write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
