"""How long does random-mask PAIR withstand an attacker who knows it?

    python benchmarks/adaptive.py --keyword laptop --out results/adaptive/laptop.json
    python benchmarks/adaptive.py --merge results/adaptive --out results/adaptive.json

Text search on the embedded photos with the models that ship. For one keyword, a universal patch
(0.35 of the side, top right) is optimised through the defense with fresh masks in every step, and
snapshots are scored on fresh masks: the share of the ten advertisements in the top 10, and whether
any is there. Rows with the same number of gradients cost the attacker the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from pair import __version__
from pair.attacks import TTHConfig, pipeline, tth
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.files import write_atomic
from pair.images import load_batch, quantise
from pair.masks import FixedPattern
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.statistics import summarise

SIZE, ADS, DRAWS, PER = 112, 10, 5, len(HELD_OUT_TEMPLATES)
PLAIN = {"distortion": 0.0, "lr": 0.05, "schedule": "constant", "retry": False, "start": "grey"}
# name, defense, settings of the attack, snapshots (updates)
RUNS: list[tuple[str, str, dict, tuple[int, ...]]] = [
    ("undefended, TTH as published", "none", {}, (50, 300)),
    ("known mask, Adam 0.05", "fixed", PLAIN, (50, 100)),
    ("PAIR, TTH as published (EOT-1)", "pair", {}, (50, 150, 300)),
    ("PAIR, Adam 0.05, EOT-1", "pair", PLAIN, (50, 100, 200)),
    ("PAIR, Adam 0.05, EOT-7", "pair", {**PLAIN, "eot": 7}, (7, 14, 28)),
    ("PAIR, Adam 0.05, EOT-20", "pair", {**PLAIN, "eot": 20}, (5, 10)),
]


def batched(function, images, size=32):
    return torch.cat([function(chunk) for chunk in images.split(size)])


class Bench:
    """The gallery, the queries of a keyword, and the score of patched advertisements."""

    def __init__(self, keyword: str):
        self.keyword = keyword
        self.clip = SmallClip.from_pretrained("clip-small")
        files = embedded.gallery()
        self.photos = load_batch([path for path, _ in files], SIZE)
        self.ads = load_batch([path for path, _ in embedded.ads()[:ADS]], SIZE)
        with torch.no_grad():
            self.target = self.clip.encode_text(sentences([keyword], TRAIN_TEMPLATES)).mean(0)
            texts = sentences([keyword], HELD_OUT_TEMPLATES)
            self.queries = F.normalize(self.clip.encode_text(texts), dim=1)

    def embed(self, images, purifier, seed):
        generator = torch.Generator().manual_seed(seed)

        def encode(chunk):
            rebuilt = chunk if purifier is None else purifier(chunk, generator=generator)
            return F.normalize(self.clip.encode_image(rebuilt), dim=1)

        with torch.no_grad():
            return batched(encode, images)

    def score(self, patch, purifier, gallery) -> dict[str, list[float]]:
        """Per draw: share of the advertisements in the top 10, any of them there (over queries)."""
        images = self.ads if patch is None else quantise(patch.apply(self.ads))
        shares, anys = [], []
        for draw in range(1 if purifier is None or not purifier.random else DRAWS):
            z = self.embed(images, purifier, 9_000 + draw)  # evaluation seeds, used nowhere else
            top = (self.queries @ torch.cat([gallery, z]).T).topk(10, 1).indices
            inside = top >= len(gallery)
            shares.append(float(inside.sum(1).float().mean()) / ADS)
            anys.append(float(inside.any(1).float().mean()))
        return {"share": shares, "any": anys}


def run(keyword: str, out: Path) -> None:
    torch.manual_seed(0)
    bench = Bench(keyword)
    pair = Purifier.from_pretrained("pair-small").requires_grad_(False)
    fixed = Purifier(pair.autoencoder, FixedPattern("seed:1")).eval()
    defenses = {"none": None, "pair": pair, "fixed": fixed}
    galleries = {name: bench.embed(bench.photos, d, 8_000) for name, d in defenses.items()}
    records = []
    for name, which, settings, snapshots in RUNS:
        defense = defenses[which]
        if defense is not None:
            defense.straight_through = True
        features = bench.clip if defense is None else pipeline(bench.clip, defense)
        config = TTHConfig(**{**settings, "steps": snapshots[-1] + 1, "snapshots": snapshots})
        began = time.time()
        generator = torch.Generator().manual_seed(1)  # the attacker's draws
        result = tth(features, bench.ads, bench.target, config=config, generator=generator)
        if defense is not None:
            defense.straight_through = False
        clean = bench.score(None, defense, galleries[which])
        records.append({"attack": name, "steps": 0, "gradients": 0, **clean})
        for steps in snapshots:
            scores = bench.score(result.snapshots[steps], defense, galleries[which])
            gradients = steps * ADS * config.eot
            records.append({"attack": name, "steps": steps, "gradients": gradients, **scores})
            mean = 100 * sum(scores["share"]) / len(scores["share"])
            print(f"{keyword}: {name}, {steps} steps: {mean:.1f} %", flush=True)
        records[-1]["seconds"] = round(time.time() - began)
    facts = {
        "keyword": keyword,
        "seeds": {"attack": 1, "gallery": 8_000, "evaluation": [9_000 + d for d in range(DRAWS)]},
        "version": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    write_atomic(out, (json.dumps({"facts": facts, "records": records}, indent=1) + "\n").encode())


def merge(folder: Path, out: Path) -> None:
    """Means over keywords with 95 % bootstrap intervals over keywords and draws."""
    runs = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    keywords = [r["facts"]["keyword"] for r in runs]
    rows = []
    keys = [(r["attack"], r["steps"], r["gradients"]) for r in runs[0]["records"]]
    for i, (attack, steps, gradients) in enumerate(keys):
        cells = []
        for figure in ("share", "any"):
            values = [v for r in runs for v in r["records"][i][figure]]
            groups = [k for k, r in enumerate(runs) for _ in r["records"][i][figure]]
            interval = summarise(torch.tensor(values), groups, seed=0).macro
            cells.append(
                f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
            )
        rows.append([attack, str(steps), f"{gradients:,}", *cells])
    note = (
        f"Keywords {', '.join(keywords)}; 10 advertisements, {PER} held-out queries each, "
        f"{DRAWS} fresh purifications per picture; 736 photos. In brackets: 95 % bootstrap "
        "interval over keywords and draws (few keywords: read it as a range). Step 0 is the "
        "advertisement without a patch."
    )
    columns = ["attack", "steps", "gradients", "share of ads in top 10, %", "any ad, %"]
    table = {"columns": columns, "rows": rows, "note": note}
    write_atomic(out, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keyword", help="class name of the embedded gallery")
    parser.add_argument("--merge", type=Path, help="folder of finished keywords")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.merge:
        merge(arguments.merge, arguments.out)
    elif arguments.keyword in embedded.labels():
        run(arguments.keyword, arguments.out)
    else:
        print(f"--keyword must be one of: {', '.join(embedded.labels())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
