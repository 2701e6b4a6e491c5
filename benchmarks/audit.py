"""How well does the audit find patched pictures, and how does an attacker evade it?

    python benchmarks/audit.py --out results/audit.json

Text search on the embedded photos with the models that ship. Per keyword, three universal patches
(0.35 of the side, top right, ten advertisements):

* ``does not know``: TTH against the undefended encoder;
* ``knows PAIR``: optimised through the purifier with fresh masks (EOT-1);
* ``knows the audit``: the same, and pays for exceeding the thresholds of ``drop`` and ``shift``.
  ``drop`` is bounded from below by what the windows over the patch show, which no patch can
  change, so the attacker's only way is to lift the undefended score less.

The patched advertisements are audited among the gallery; thresholds come from the query photos.
Counted are the share of advertisements in the top 10, before and after purification, and of these
the ones without an alarm; AUROC and recall against the clean photos of the gallery.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pair import __version__
from pair.attacks import TTHConfig, pipeline, tth
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.files import write_atomic
from pair.guard import conformal
from pair.guard.audit import STATISTICS, Auditor, Finding
from pair.guard.models import Models
from pair.images import load_batch, quantise

SIZE, ADS, SHARE, BUDGET, PENALTY = 112, 10, 0.35, 0.01, 20.0
ADAM = {"distortion": 0.0, "lr": 0.05, "schedule": "constant", "retry": False, "start": "grey"}


class Bench:
    def __init__(self, gallery: int, clean: int, draws: int):
        self.models = Models.load("clip-small", None, "pair-small")
        bank = sentences(embedded.labels(), HELD_OUT_TEMPLATES[1:2])
        self.auditor = Auditor(self.models, bank, draws=draws, patch=SHARE)
        photos = embedded.gallery()  # every second one is searched, the others are set aside
        aside = [*embedded.queries(), *photos[1::2]][:clean]
        self.gallery = self.examine(load_batch([p for p, _ in photos[::2][:gallery]], SIZE), 0)
        self.clean = self.examine(load_batch([p for p, _ in aside], SIZE), 1)
        self.ads = load_batch([p for p, _ in embedded.ads()[:ADS]], SIZE)
        self.auditor.compare([*self.gallery, *self.clean], self.gallery)
        share = max(BUDGET / len(STATISTICS), 1.01 / (len(self.clean) + 1))
        values = {s: [f.statistics[s] for f in self.clean] for s in STATISTICS}
        self.bars = {s: conformal.threshold(values[s], share) for s in STATISTICS}

    def examine(self, images: torch.Tensor, part: int) -> list[Finding]:
        found: list[Finding] = []
        for start in range(0, len(images), 8):
            x = images[start : start + 8]
            seeds = [10**6 * part + 100 * (start + i) for i in range(len(x))]
            found += self.auditor.examine(x, [f"{part}/{start + i}" for i in range(len(x))],
                                          seeds=seeds)  # fmt: skip
            print(f"examined {start + len(x)} of {len(images)}", end="\r", flush=True)
        return found

    def attack(self, keyword: str, kind: str, steps: int) -> torch.Tensor:
        encoder, purifier = self.models.encoder, self.models.purifier
        with torch.no_grad():
            target = encoder.encode_text(sentences([keyword], TRAIN_TEMPLATES)).mean(0)
        generator = torch.Generator().manual_seed(1)
        if kind == "does not know":
            result = tth(
                encoder, self.ads, target, config=TTHConfig(steps=steps), generator=generator
            )
            return quantise(result.patch.apply(self.ads))
        penalty = self.penalty(target) if kind == "knows the audit" else None
        purifier.straight_through = True
        result = tth(
            pipeline(encoder, purifier), self.ads, target,
            config=TTHConfig(**{**ADAM, "steps": steps}), generator=generator, penalty=penalty,
        )  # fmt: skip
        purifier.straight_through = False
        return quantise(result.patch.apply(self.ads))

    def penalty(self, target: torch.Tensor):
        encoder, purifier = self.models.encoder, self.models.purifier
        text = F.normalize(target, dim=0)
        side = round(SHARE * SIZE)
        with torch.no_grad():  # views that hide the whole patch: the same for every content
            cover = self.auditor.views.cover
            hides = [i for i, (x0, y0, x1, y1) in enumerate(cover.boxes())
                     if x0 <= SIZE - side and y0 <= 0 and x1 >= SIZE and y1 >= side]  # fmt: skip
            views = self.auditor.views.embed(encoder, self.ads).masked[:, hides]
            floor = (views @ text).amin(1)  # (B,)

        def value(images: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
            plain = F.normalize(encoder.encode_image(images), dim=1)
            clean = F.normalize(encoder.encode_image(purifier(images)), dim=1)
            drop = plain @ text - floor - self.bars["drop"]
            shift = 1 - (plain * clean).sum(1) - self.bars["shift"]
            return PENALTY * (drop.clamp(min=0) + shift.clamp(min=0)).mean()

        return value

    def score(self, images: torch.Tensor, keyword: str, part: int) -> dict:
        found = self.examine(images, part)
        everything = [*self.gallery, *found]
        self.auditor.compare([*everything, *self.clean], everything)
        self.auditor.judge(everything, self.clean, BUDGET)
        texts = sentences([keyword], HELD_OUT_TEMPLATES)
        queries = self.models.text(texts)
        hits = {}
        for kind in ("plain", "clean"):
            rows = np.stack([getattr(f, kind) for f in everything])
            top = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
            hits[kind] = np.array(
                [[len(self.gallery) + i in t for i in range(len(found))] for t in top]
            )
        out: dict = {
            "top10_before": float(hits["plain"].mean()),
            "top10_after": float(hits["clean"].mean()),
            "auroc": {}, "recall": {},
        }  # fmt: skip
        names = [*STATISTICS, "focus", "combined"]
        for name in names:
            bad, good = ([value_of(f, name) for f in part] for part in (found, self.gallery))
            out["auroc"][name] = auroc(bad, good)
            if name == "combined":
                caught = [f.alarm for f in found]
            else:
                bar = conformal.threshold([f.statistics[name] for f in self.clean], BUDGET)
                caught = [b > bar for b in bad]
            out["recall"][name] = float(np.mean(caught))
            if name in ("drop", "combined"):
                for kind, label in (("plain", "before"), ("clean", "after")):
                    silent = hits[kind] & ~np.array(caught)[None]
                    out[f"top10_{label}_unnoticed_by_{name}"] = float(silent.mean())
        out["one_window"] = float(np.mean([f.one_window for f in found]))
        out["false_alarms"] = {
            "combined": float(np.mean([f.alarm for f in self.gallery])),
            "one_window": float(np.mean([f.one_window for f in self.gallery])),
        }
        return out


def value_of(finding: Finding, name: str) -> float:
    return -finding.p if name == "combined" else finding.statistics[name]


def auroc(bad: list[float], good: list[float]) -> float:
    """Chance that an attacked picture scores above a clean one; ties count half."""
    b, g = np.array(bad)[:, None], np.array(good)[None]
    return float((b > g).mean() + (b == g).mean() / 2)


def table(records: list[dict]) -> list[list]:
    rows = []
    for kind in dict.fromkeys(r["attack"] for r in records):
        mine = [r for r in records if r["attack"] == kind]

        def mean(*path: str, mine: list[dict] = mine) -> float:
            values = []
            for r in mine:
                value = r
                for key in path:
                    value = value[key]
                values.append(value)
            return 100 * float(np.mean(values))

        rows.append([
            kind, mean("top10_before"), mean("top10_after"),
            *[f"{mean('auroc', s):.1f} / {mean('recall', s):.1f}"
              for s in (*STATISTICS, "combined")],
            mean("top10_before_unnoticed_by_combined"), mean("top10_after_unnoticed_by_combined"),
        ])  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keywords", default="laptop,sunflower,stop sign,grand piano,watch")
    parser.add_argument("--gallery", type=int, default=368, help="clean photos in the gallery")
    parser.add_argument("--clean", type=int, default=736, help="clean photos for the thresholds")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs=3, default=(300, 200, 200))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keywords = [k for k in arguments.keywords.split(",") if k in embedded.labels()]
    bench, records = Bench(arguments.gallery, arguments.clean, arguments.draws), []
    part = 2
    for keyword in keywords:
        kinds = ("does not know", "knows PAIR", "knows the audit")
        for kind, steps in zip(kinds, arguments.steps, strict=True):
            began = time.time()
            images = bench.attack(keyword, kind, steps)
            record = {"attack": kind, "keyword": keyword, "steps": steps,
                      **bench.score(images, keyword, part)}  # fmt: skip
            record["seconds"] = round(time.time() - began)
            records.append(record)
            part += 1
            print(json.dumps(record), flush=True)
    alarms = 100 * float(np.mean([r["false_alarms"]["combined"] for r in records]))
    hangs = 100 * float(np.mean([r["false_alarms"]["one_window"] for r in records]))
    columns = ["attacker", "in top 10, no defense, %", "in top 10, PAIR, %"]
    columns += [f"{s}: AUROC / recall, %" for s in (*STATISTICS, "combined")]
    columns += ["in top 10 and unnoticed, no defense, %", "in top 10 and unnoticed, PAIR, %"]
    note = (
        f"Keywords {', '.join(keywords)}; {ADS} advertisements each; {len(bench.gallery)} clean "
        f"photos in the gallery, {len(bench.clean)} for the thresholds; {arguments.draws} draws. "
        f"Recall at a false-alarm budget of {100 * BUDGET:.0f} % (combined: four statistics share "
        f"it; alarms on {alarms:.1f} % of the clean photos). {hangs:.1f} % of the clean photos are "
        "hits that hang on one window."
    )
    facts = {"version": __version__, "steps": list(arguments.steps), "penalty": PENALTY}
    result = {"columns": columns, "rows": table(records), "note": note, "facts": facts,
              "records": records}  # fmt: skip
    write_atomic(arguments.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
