"""How far does AdvHash get against the hash network that ships, and what limits it?

    python benchmarks/advhash.py --out results/advhash.json

For each target class, one patch (0.22 of the side, AdvHash's own place) is optimised on gallery
photos of all other classes, by the published algorithm (50 instead of up to 1,000 updates
per mini-batch, so that the budget reaches more than one) and by Adam, with the same number of
sample gradients. It is scored on query photos, which neither saw: t-mAP among the gallery. The
ceiling is the t-mAP of the anchor itself, which a query reaches when all of its bits agree.
Gradients are computed in bfloat16, scores in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from pair import __version__, hub
from pair.attacks import AdvHashConfig, Patch, advhash, advhash_patch
from pair.data import embedded
from pair.files import write_atomic
from pair.images import load_batch, quantise
from pair.retrieval.hashing import HashNet, binarise
from pair.retrieval.metrics import average_precision
from pair.retrieval.statistics import summarise

SIZE = 112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["stop sign", "motorbikes"])
    parser.add_argument("--budget", type=int, default=8000, help="sample gradients per attack")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/advhash.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    net = HashNet.from_pretrained("csq-small")
    files, queries = embedded.gallery(), embedded.queries()
    labels = [label for _, label in files]
    photos = load_batch([path for path, _ in files], SIZE)

    @torch.no_grad()
    def codes(images):
        return binarise(torch.cat([net.encode_image(part) for part in images.split(32)]))

    gallery = codes(photos)

    def precision(found, target):
        relevant = torch.tensor([label == target for label in labels]).expand(len(found), -1)
        return average_precision(found @ gallery.T, relevant)

    def cell(values, groups):
        s = summarise(values, groups, seed=0).macro
        return f"{100 * s.mean:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]"

    common = {"size": 0.22, "precision": "bf16"}
    sign = AdvHashConfig(batch=10, iterations=50, budget=options.budget // 10, **common)
    adam = AdvHashConfig(optimiser="adam", batch=16, budget=options.budget // 16, **common)
    rows = []
    for target in options.targets:
        anchor = net.centres[net.config.classes.index(target)]
        ceiling = 100 * float(precision(anchor[None], target).mean())
        images = photos[[i for i, label in enumerate(labels) if label != target]]
        sources = [label for _, label in queries if label != target]
        test = load_batch([path for path, label in queries if label != target], SIZE)
        for name, config in (("no patch", None), ("AdvHash", sign), ("Adam", adam)):
            shown = test
            if config is not None:
                generator = torch.Generator().manual_seed(7)
                patch = advhash_patch(SIZE, config, generator)
                if config is adam:
                    patch = Patch.make("grey", patch.size[0], SIZE, patch.placement)
                result = advhash(net.encode_image, images, anchor, config=config, patch=patch,
                                 generator=generator)  # fmt: skip
                shown = quantise(result.patch.apply(test))
            reached = codes(shown)
            values = precision(reached, target)
            each = {s: values[[i for i, x in enumerate(sources) if x == s]].mean().item()
                    for s in set(sources)}  # fmt: skip
            best = sorted(each, key=lambda s: (-each[s], s))[:3]
            text = ", ".join(f"{s} {100 * each[s]:.1f}" for s in best)
            agree = f"{100 * float((reached == anchor).float().mean()):.1f}"
            used = "0" if config is None else f"{result.gradients_used:,}"
            rows.append([target, name, used, agree, cell(values, sources), text, f"{ceiling:.1f}"])
            print(*rows[-1], sep=" | ", flush=True)
    table = {
        "columns": ["target", "attack", "gradients", "bits that agree, %",
                    "t-mAP, all other classes", "t-mAP, the three easiest", "ceiling"],
        "rows": rows,
        "note": (
            f"{len(queries)} query photos of {len(set(labels))} classes against {len(files)} "
            "photos. One patch for all source classes; in brackets: 95 % bootstrap interval over "
            "classes. The easiest sources are named after the attack, so read them as what an "
            "attacker can pick, not as an average."
        ),
        "facts": {"model": hub.read_config(hub.resolve("csq-small"), "csq")["sha256"][:12],
                  "budget": options.budget, "version": __version__, "torch": torch.__version__,
                  "machine": platform.machine(), "threads": options.threads},
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
