"""Does the semantic loss earn its place? Two generators, same start and budget, beta 0 and 1.

    python benchmarks/semantic.py --models runs/ablation-beta0/best runs/ablation-beta1/best \\
        --names "beta 0" "beta 1" --out results/semantic.json

Clean figures of both searches on the embedded photos, and non-adaptive TTH patches (the same
patches for all). Purification draws are averaged over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from pair.attacks import tth
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.files import write_atomic
from pair.images import load_batch, quantise
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.hashing import HashNet, binarise
from pair.retrieval.metrics import mean_average_precision, precision_at_k, recall_at_k

SIZE, KEYWORDS, SEEDS = 112, ("laptop", "sunflower"), (11, 12)
COLUMNS = [
    "generator",
    "text R@10",
    "text P@10",
    "text mAP",
    "hash mAP",
    "patched ads in top 10, any",
    "keyword P@10 under attack",
]


def batched(function, images, size=32):
    return torch.cat([function(chunk) for chunk in images.split(size)])


class Bench:
    """Both searches on the embedded photos, and patches made against the undefended one."""

    def __init__(self) -> None:
        self.clip = SmallClip.from_pretrained("clip-small")
        self.net = HashNet.from_pretrained("csq-small")
        gallery, queries = embedded.gallery(), embedded.queries()
        labels, names = [label for _, label in gallery], embedded.labels()
        self.photos = load_batch([p for p, _ in gallery], SIZE)
        self.ads = load_batch([p for p, _ in embedded.ads()[:10]], SIZE)
        self.queries = load_batch([p for p, _ in queries], SIZE)
        wanted = [n for n in names for _ in HELD_OUT_TEMPLATES]
        self.rows = {k: [i for i, w in enumerate(wanted) if w == k] for k in KEYWORDS}
        self.relevant = torch.tensor([[x == w for x in labels] for w in wanted])
        self.same = torch.tensor([[x == w for x in labels] for _, w in queries])
        with torch.no_grad():
            texts = sentences(names, HELD_OUT_TEMPLATES)
            self.text = F.normalize(self.clip.encode_text(texts), dim=1)
            self.codes = binarise(batched(self.net.encode_image, self.photos))
        self.patched = {k: self.attack(k) for k in KEYWORDS}

    def attack(self, keyword: str) -> torch.Tensor:
        with torch.no_grad():
            target = self.clip.encode_text(sentences([keyword], TRAIN_TEMPLATES)).mean(0)
        generator = torch.Generator().manual_seed(1)
        result = tth(self.clip, self.ads, target, generator=generator)
        return quantise(result.patch.apply(self.ads))

    @torch.no_grad()
    def row(self, purifier: Purifier | None, seed: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed)

        def see(images):
            if purifier is None:
                return images
            return batched(lambda x: purifier(x, generator=generator), images)

        def scores(images):
            return self.text @ F.normalize(batched(self.clip.encode_image, see(images)), dim=1).T

        clean = scores(self.photos)
        u = batched(self.net.encode_image, see(self.queries))
        figures = [
            recall_at_k(clean, self.relevant, 10),
            float(precision_at_k(clean, self.relevant, 10).mean()),
            mean_average_precision(clean, self.relevant),
            mean_average_precision(binarise(u) @ self.codes.T, self.same),
        ]
        anys, precisions = [], []
        for keyword, rows in self.rows.items():
            table = torch.cat([clean, scores(self.patched[keyword])], 1)[rows]
            none = self.relevant.new_zeros(len(rows), len(self.ads))
            relevant = torch.cat([self.relevant[rows], none], 1)
            precisions.append(float(precision_at_k(table, relevant, 10).mean()))
            top = table.topk(10, 1).indices >= clean.shape[1]
            anys.append(float(top.any(1).float().mean()))
        return [*figures, sum(anys) / len(anys), sum(precisions) / len(precisions)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", required=True, help="generators")
    parser.add_argument("--names", nargs="+", required=True, help="their names in the table")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if len(arguments.models) != len(arguments.names):
        print("give as many --names as --models", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    bench = Bench()
    rows: list[list] = [["undefended", *(100 * x for x in bench.row(None, 0))]]
    for name, model in zip(arguments.names, arguments.models, strict=True):
        purifier = Purifier.from_pretrained(model).requires_grad_(False)
        draws = torch.tensor([bench.row(purifier, seed) for seed in SEEDS])
        rows.append([name, *(100 * draws.mean(0)).tolist()])
        print(rows[-1], flush=True)
    note = (
        f"Percent. 736 photos of 46 classes, {len(bench.text)} text queries, "
        f"{len(bench.queries)} hash queries; TTH patches for {', '.join(KEYWORDS)} made against "
        f"the undefended search; mean over purifier seeds {', '.join(map(str, SEEDS))}; one "
        "training seed per generator."
    )
    table = {"columns": COLUMNS, "rows": rows, "note": note}
    write_atomic(arguments.out, (json.dumps(table, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
