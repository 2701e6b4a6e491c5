"""What averaging several purifications of a picture brings, and what it does not.

    python benchmarks/draws.py --out results/draws.json

PAIR purifies a picture once. Features of ``n`` purifications under fresh masks may be averaged
instead, for ``n`` times the cost. On the demonstration's searches:

* clean R@10, P@10 and mAP of text search (photos purified), mAP of search by photo (queries
  purified), as differences from the undefended search: mean over disjoint groups of draws;
* share of advertisements in the top 10 and how many lists hold one, under the patches that
  ``benchmarks/adaptive.py`` left: TTH as published against the undefended search, and Adam through
  the purifier with one and with twenty masks a step, which is already the attack on an average.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from quality import ATTACKS, PER, Search, patches

from pair import __version__
from pair.data import embedded
from pair.demo import SIZE
from pair.files import write_atomic
from pair.images import load_batch
from pair.purifier import Purifier
from pair.retrieval.hashing import HashNet, binarise
from pair.retrieval.metrics import mean_average_precision

COLUMNS = ["purifications", "R@10", "P@10", "mAP", "hash mAP"]


def features(purifier: Purifier | None, encode, images, draws: int, seed: int) -> torch.Tensor:
    """(draws, B, D); ``purifier`` None: (1, B, D) of the images as they are."""
    if purifier is None:
        return torch.cat([encode(chunk) for chunk in images.split(32)])[None]
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for chunk in images.split(8):
        views = purifier.draws(chunk, draws, generator=generator)
        parts.append(encode(views.flatten(0, 1)).unflatten(0, (draws, -1)))
    return torch.cat(parts, 1)


def groups(found: torch.Tensor, n: int) -> list[torch.Tensor]:
    """Averages of disjoint groups of ``n`` draws: each (B, D)."""
    return [part.mean(0) for part in found.split(n) if len(part) == n]


class Codes:
    """Search by photo: queries against the codes of clean photos."""

    def __init__(self) -> None:
        self.net = HashNet.from_pretrained("csq-small").requires_grad_(False)
        gallery, queries = embedded.gallery(), embedded.queries()
        photos = load_batch([path for path, _ in gallery], SIZE)
        self.codes = binarise(features(None, self.net.encode_image, photos, 1, 0)[0])
        self.queries = load_batch([path for path, _ in queries], SIZE)
        self.relevant = torch.tensor([[x == w for _, x in gallery] for _, w in queries])

    def mean_ap(self, real: torch.Tensor) -> float:
        return float(mean_average_precision(binarise(real) @ self.codes.T, self.relevant))


def in_top(search: Search, gallery: torch.Tensor, ads: torch.Tensor, keyword: str) -> torch.Tensor:
    """(2,): share of the advertisements in the top 10, share of queries with one or more."""
    start = search.names.index(keyword) * PER
    mine = search.queries[start : start + PER]
    scores = mine @ torch.cat([gallery, ads]).T
    hits = (scores.topk(10, 1).indices >= len(gallery)).float().sum(1)
    return torch.stack([hits.mean() / len(ads), (hits > 0).float().mean()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--patches", type=Path, default=Path("results/adaptive/patches"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    most = max(options.draws)
    purifier = Purifier.from_pretrained("pair-small").requires_grad_(False)
    with torch.inference_mode():
        search, codes = Search(), Codes()
        look = search.clip.encode_image
        bare = F.normalize(features(None, look, search.photos, 1, 0)[0], dim=1)
        base = {k: float(v.mean()) for k, v in search.figures(bare).items()}
        base["hash mAP"] = codes.mean_ap(
            features(None, codes.net.encode_image, codes.queries, 1, 0)[0]
        )
        print("undefended", base, flush=True)
        photos = features(purifier, look, search.photos, most, 1)
        queries = features(purifier, codes.net.encode_image, codes.queries, most, 2)
        found_patches = patches(search, options.patches)
        words = {word for _, word in found_patches}
        keywords = sorted(w for w in words if all((a, w) in found_patches for a in ATTACKS))
        attacked = {}
        for name in ((a, w) for a in ATTACKS for w in keywords):
            attacked[name] = features(purifier, look, found_patches[name], most, 3)
            print(*name, flush=True)
        found = []
        for n in options.draws:
            row = {"draws": n}
            galleries = [F.normalize(g, dim=1) for g in groups(photos, n)]
            clean = [search.figures(g) for g in galleries]
            for key in ("R@10", "P@10", "mAP"):
                row[key] = sum(float(c[key].mean()) for c in clean) / len(clean) - base[key]
            hashed = [codes.mean_ap(real) for real in groups(queries, n)]
            row["hash mAP"] = sum(hashed) / len(hashed) - base["hash mAP"]
            for attack in ATTACKS:
                figures = [
                    in_top(search, gallery, F.normalize(ads, dim=1), keyword)
                    for (name, keyword), draws in attacked.items()
                    if name == attack
                    for gallery, ads in zip(galleries, groups(draws, n), strict=True)
                ]
                share, some = torch.stack(figures).mean(0).tolist()
                row[f"{attack}: share"], row[f"{attack}: any"] = share, some
            found.append(row)
            print(row, flush=True)
    start = ", ".join(f"{key} {100 * value:.1f}" for key, value in base.items())
    names = [f"{attack}: {what}" for attack in ATTACKS for what in ("any", "share")]
    record = {
        "benchmark": "draws",
        "version": __version__,
        "seeds": {"gallery": 1, "queries": 2, "advertisements": 3},
        "undefended": base,
        "found": found,
        "columns": [*COLUMNS, *names],
        "rows": [
            [
                str(row["draws"]),
                *(f"{100 * row[key]:+.1f}" for key in COLUMNS[1:]),
                *(f"{100 * row[key]:.1f}" for key in names),
            ]
            for row in found
        ],
        "note": "Percent. R@10, P@10, mAP: change against the undefended search "
        f"({start}), mean over {most} / n groups of draws. Then: lists with an advertisement in "
        f"their top 10, and share of the ten advertisements there, keywords "
        f"{', '.join(keywords)}.",
    }  # fmt: skip
    if options.out is not None:
        write_atomic(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
