"""Does a faster purifier keep its quality? bf16, int8, a distilled generator, against fp32.

    python benchmarks/quality.py --out results/int8.json
    python benchmarks/quality.py --precision bf16 --backend openvino --out results/bf16.json
    python benchmarks/quality.py --model runs/distil/best --precision fp32 --out results/distil.json

The demonstration's text search (its gallery, captions nobody trained with), purified twice under
the same masks, which makes every figure a pair:

* clean R@10, P@10 and mAP, as points and as the difference with a 95 % interval over classes;
* share of advertisements in the top 10 under the patches that ``benchmarks/adaptive.py`` left:
  TTH as published, made against the undefended search, and adaptive ones, whose gradients went
  through the fp32 purifier (int8 has none of its own); interval over keywords and pictures;
* how alike both results are: cosine of their embeddings, largest and mean difference of pixels.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import torch.nn.functional as F

from pair import __version__
from pair.attacks.patch import Patch
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, sentences
from pair.demo import ADS, SIZE
from pair.files import write_atomic
from pair.images import load_batch, quantise
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.metrics import average_precision, precision_at_k, recall
from pair.retrieval.statistics import paired, summarise
from pair.work import both_passes

PER = len(HELD_OUT_TEMPLATES)
ATTACKS = {  # name in the table -> ending of the file after the keyword
    "TTH": "undefended--tth-as-published",
    "adaptive, EOT-1": "pair--adam--eot-1",
    "adaptive, EOT-20": "pair--adam--eot-20",
}


class Search:
    """Text queries over the package's photos; embeddings of purified photos per draw of masks."""

    def __init__(self) -> None:
        self.clip = SmallClip.from_pretrained("clip-small").requires_grad_(False)
        gallery, self.names = embedded.gallery(), embedded.labels()
        self.photos = load_batch([path for path, _ in gallery], SIZE)
        self.ads = load_batch([path for path, _ in embedded.ads()[:ADS]], SIZE)
        self.wanted = [name for name in self.names for _ in range(PER)]
        self.relevant = torch.tensor([[x == w for _, x in gallery] for w in self.wanted])
        texts = self.clip.encode_text(sentences(self.names, HELD_OUT_TEMPLATES))
        self.queries = F.normalize(texts, dim=1)

    def embed(self, purifier: Purifier | None, images: torch.Tensor, seed: int) -> torch.Tensor:
        """(B, D) unit vectors; masks depend on ``seed`` alone."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for chunk in images.split(32):
            seen = chunk if purifier is None else purifier(chunk, generator=generator)
            parts.append(self.clip.encode_image(seen))
        return F.normalize(torch.cat(parts), dim=1)

    def figures(self, gallery: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.queries @ gallery.T
        return {
            "R@10": recall(scores, self.relevant, 10),
            "P@10": precision_at_k(scores, self.relevant, 10),
            "mAP": average_precision(scores, self.relevant),
        }

    def success(self, gallery: torch.Tensor, ads: torch.Tensor, keyword: str) -> torch.Tensor:
        """(ads,) share of the keyword's queries that have each advertisement in their top 10."""
        start = self.names.index(keyword) * PER
        mine = self.queries[start : start + PER]
        scores = torch.cat([mine @ gallery.T, mine @ ads.T], 1)
        top = scores.topk(10, 1).indices - len(gallery)
        return torch.stack([(top == k).any(1).double().mean() for k in range(len(ads))])


def patches(search: Search, folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(attack, keyword) -> patched advertisements, 8 bits."""
    out = {}
    for attack, ending in ATTACKS.items():
        for path in sorted(folder.glob(f"*-{ending}.png")):
            keyword = path.stem.removesuffix(f"-{ending}")
            out[attack, keyword] = quantise(Patch.load(path).apply(search.ads))
    if not out:
        raise SystemExit(f"no patches in {folder}: run benchmarks/adaptive.py first")
    return out


def percent(interval) -> list[float]:
    return [round(100 * x, 2) for x in (interval.mean, interval.low, interval.high)]


@torch.no_grad()
def compare(search: Search, forms: dict[str, Purifier], patched, seeds: list[int]) -> dict:
    """Both forms on the same masks; all rows are paired."""
    galleries = {n: [search.embed(p, search.photos, s) for s in seeds] for n, p in forms.items()}
    before, after = forms
    rows: dict[str, dict] = {}

    def row(name: str, values: dict[str, torch.Tensor], groups: list, units: list | None) -> None:
        change = paired(values[after], values[before], groups, units).micro
        rows[name] = {
            **{n: percent(summarise(v.clamp(0, 1), groups, units).micro)
               for n, v in values.items()},
            "change": percent(change),
        }  # fmt: skip
        print(name, rows[name], flush=True)

    per_form = {n: [search.figures(gallery) for gallery in galleries[n]] for n in forms}
    for name in ("R@10", "P@10", "mAP"):
        values = {n: torch.stack([f[name] for f in per_form[n]]).mean(0) for n in forms}
        row(name, values, search.wanted, None)
    for attack in dict.fromkeys(kind for kind, _ in patched):
        values = {n: [] for n in forms}
        keywords = [k for kind, k in patched if kind == attack]
        for n, purifier in forms.items():
            for keyword in keywords:
                draws = [
                    search.success(
                        gallery, search.embed(purifier, patched[attack, keyword], s + 1000), keyword
                    )
                    for s, gallery in zip(seeds, galleries[n], strict=True)
                ]
                values[n].append(torch.stack(draws).mean(0))
        groups = [k for k in keywords for _ in range(ADS)]
        units = [i for _ in keywords for i in range(ADS)]
        joined = {n: torch.cat(v) for n, v in values.items()}
        row(f"{attack} ads in top 10", joined, groups, units)
    cosines = [(a * b).sum(1) for a, b in zip(galleries[before], galleries[after], strict=True)]
    seen = [
        p(search.photos[:64], generator=torch.Generator().manual_seed(0)) for p in forms.values()
    ]
    apart = (seen[0] - seen[1]).abs()
    undefended = search.figures(search.embed(None, search.photos, 0))
    return {
        "undefended": {n: round(100 * float(v.mean()), 2) for n, v in undefended.items()},
        "rows": rows,
        "cosine of embeddings, mean": round(float(torch.cat(cosines).mean()), 4),
        "cosine of embeddings, lowest": round(float(torch.cat(cosines).min()), 4),
        "difference of pixels, mean": round(float(apart.mean()), 5),
        "difference of pixels, largest": round(float(apart.max()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", default="pair-small", help="generator, in fp32")
    parser.add_argument("--model", help="generator to compare; default: the reference")
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="int8")
    parser.add_argument("--backend", choices=["auto", "torch", "openvino"], default="auto")
    parser.add_argument("--seeds", type=int, default=2, help="draws of masks")
    parser.add_argument("--patches", type=Path, default=Path("results/adaptive/patches"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.model is None and options.precision == "fp32":
        parser.error("nothing to compare: give --model, or a --precision")
    torch.set_num_threads(options.threads)
    fp32 = Purifier.from_pretrained(options.reference).requires_grad_(False)
    model = options.model or options.reference
    settings = {"backend": options.backend, "precision": options.precision}
    other = Purifier.from_pretrained(model, **settings).requires_grad_(False)
    name = options.precision if options.model is None else "smaller"
    forms = {"fp32" if options.model is None else "teacher": fp32, name: other}
    with torch.no_grad():
        search = Search()
    patched = patches(search, options.patches)
    keywords = sorted({keyword for _, keyword in patched})
    found = compare(search, forms, patched, list(range(options.seeds)))
    cost = [sum(w.multiply_adds for w in both_passes(p.autoencoder.config)) for p in forms.values()]
    before, after = forms
    record = {
        "benchmark": "quality",
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "generators": [options.reference, Path(model).name],
        "multiply-adds, ratio": round(cost[0] / cost[1], 3),
        "classes": len(search.names),
        "queries": len(search.wanted),
        "keywords": keywords,
        "advertisements": ADS,
        "mask draws": options.seeds,
        **found,
        "columns": ["percent", before, after, "change, 95 % interval"],
    }
    table = []
    for title, row in found["rows"].items():
        change, low, high = row["change"]
        table.append(
            [title, row[before][0], row[after][0], f"{change:+.1f} [{low:.1f}, {high:.1f}]"]
        )
    record["figures"], record["rows"] = found["rows"], table
    record["note"] = (
        f"{len(search.photos)} photos, {len(search.wanted)} queries, {options.seeds} draws of "
        f"masks, the same for both; patches for {', '.join(keywords)} on {ADS} advertisements: "
        f"TTH against the undefended search, adaptive ones through {before}. Cosine of embeddings "
        f"{found['cosine of embeddings, mean']:.3f} on average, mean difference of pixels "
        f"{found['difference of pixels, mean']:.4f}."
    )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
