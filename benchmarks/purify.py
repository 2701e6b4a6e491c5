"""How fast is a purification, and against what?

    python benchmarks/purify.py --geometry small base --batch 1 8 32 --out results/speed.json

Images per second of both passes, for each geometry and batch size:

* torch: the purifier as it comes, exact masks; and with Bernoulli masks;
* compile: the purifier under ``torch.compile``, where a C++ compiler is installed;
* bf16: torch in half precision, for processors that know it;
* openvino, openvino bf16, int8: its other backend, where installed;
* transformers: two passes of its ViTMAE with the same weights and the same exact masks;
* zero tokens: the purifier with hidden tokens fed as black ones, as the paper's text has it;
* naive: the same, one image at a time, whole passes, plain kernels.

All forms take turns in every round, together with a matrix multiplication that says what the
machine can do at that moment; medians of the rounds, and ratios within rounds, are reported. The
weights are random: speed does not depend on them. What torch, OpenVINO and transformers return is
compared (largest difference), and so are certified views with single passes and draws with calls.

On a busy machine use ``--clock process --threads 1``: processor time instead of wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from pair import __version__, kernels
from pair.certified import CertifiedPurifier
from pair.checkpoints import from_hf_vitmae
from pair.files import write_atomic
from pair.generator import BASE, LARGE, GeneratorConfig, MaskedAutoencoder
from pair.masks import Bernoulli, ExactCount, complement
from pair.purifier import Purifier
from pair.work import both_passes

GEOMETRIES = {
    "tiny": GeneratorConfig(112, 8, 96, 2, 3, 64, 1, 2),
    "small": GeneratorConfig(),
    "base": BASE,
    "large": LARGE,
}
LABELS = (
    "torch", "compile", "bernoulli", "bf16", "openvino", "openvino bf16", "int8",
    "transformers", "zero tokens", "naive",
)  # fmt: skip
EXACT = ("torch", "compile", "openvino", "transformers")  # return the same pictures
Run = Callable[[], torch.Tensor]


def reference(config: GeneratorConfig):
    """A ViTMAE of transformers with random weights, and the generator with the same."""
    try:
        import transformers
    except ImportError:
        torch.manual_seed(0)
        return None, MaskedAutoencoder(config).eval().requires_grad_(False)
    torch.manual_seed(0)
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=round(config.width * config.mlp_ratio),
            decoder_hidden_size=config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            decoder_intermediate_size=round(config.decoder_width * config.mlp_ratio),
            image_size=config.image_size,
            patch_size=config.patch_size,
            mask_ratio=0.5,
            layer_norm_eps=config.eps,
        )
    ).eval()
    theirs.requires_grad_(False)
    ours = from_hf_vitmae(theirs.state_dict(), theirs.config.to_dict())
    return theirs, ours.requires_grad_(False)


def two_passes(theirs, config, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Both passes by transformers, without leaving its normalised pixels in between."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    x = (images - mean) / std
    for seen in (mask, complement(mask)):
        x = theirs.unpatchify(theirs(pixel_values=x, noise=(~seen).float()).logits)
    return (x * std + mean).clamp(0, 1)


def forms(theirs, generator, images, wanted: list[str], int8: bool) -> dict[str, Run]:
    """name -> function that purifies all images once."""
    config = generator.config
    exact, uneven = ExactCount(0.5), Bernoulli(0.5)
    seeded = torch.Generator().manual_seed(0)
    mask = exact(len(images), config.grid, generator=seeded)
    ragged = uneven(len(images), config.grid, generator=seeded)
    plain = Purifier(generator, exact).eval()
    zero = Purifier(generator, exact, encoder="zero").eval()

    def one_by_one() -> torch.Tensor:
        before = kernels.set_fused(False)
        out = []
        for x, m in zip(images.split(1), mask.split(1), strict=True):
            first = generator(x, m, encoder="zero")
            out.append(generator(first, complement(m), encoder="zero").clamp(0, 1))
        kernels.set_fused(before)
        return torch.cat(out)

    runs: dict[str, Run] = {
        "torch": lambda: plain(images, mask=mask),
        "bernoulli": lambda: plain(images, mask=ragged),
        "zero tokens": lambda: zero(images, mask=mask),
        "naive": one_by_one,
    }
    if "compile" in wanted:
        compiled = torch.compile(plain)
        runs["compile"] = lambda: compiled(images, mask=mask)
    settings = {
        "bf16": ("torch", "bf16"),
        "openvino": ("openvino", "fp32"),
        "openvino bf16": ("openvino", "bf16"),
        "int8": ("openvino", "int8"),
    }
    for name, (backend, precision) in settings.items():
        if name in wanted and (int8 or precision != "int8"):
            engine = Purifier(generator, exact, backend=backend, precision=precision).eval()
            runs[name] = partial(engine, images, mask=mask)
    if theirs is not None:
        runs["transformers"] = lambda: two_passes(theirs, config, images, mask)
    return {name: runs[name] for name in LABELS if name in runs and name in wanted}


def take_turns(runs: dict[str, Run], rounds: int, clock) -> dict[str, list[float]]:
    """Seconds of each run in each round; round 0 warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds + 1):
        for name, run in runs.items():
            begin = clock()
            run()
            if k:
                times[name].append(clock() - begin)
    return times


def multiplication(side: int = 2048) -> tuple[Run, float]:
    a, b = torch.rand(side, side), torch.rand(side, side)
    return lambda: a @ b, 2 * side**3 / 1e9


def measure(name, theirs, generator, batch, wanted, rounds, clock, int8) -> dict:
    config = generator.config
    images = torch.rand(batch, 3, config.image_size, config.image_size)
    runs = forms(theirs, generator, images, wanted, int8)
    same = {k: run() for k, run in runs.items() if k in EXACT}
    product, gflop = multiplication()
    times = take_turns({**runs, "product": product}, rounds, clock)
    peak = gflop / min(times.pop("product"))
    work = sum(2 * w.multiply_adds / 1e9 for w in both_passes(config))
    median = {k: statistics.median(t) for k, t in times.items()}
    ratios = {
        k: statistics.median(b / a for a, b in zip(times["torch"], t, strict=True))
        for k, t in times.items()
    }
    return {
        "geometry": name,
        "batch": batch,
        "GFLOP per image": round(work, 3),
        "peak GFLOP/s": round(peak, 1),
        "images/s": {k: round(batch / t, 2) for k, t in median.items()},
        "ms per call": {k: round(1e3 * t, 2) for k, t in median.items()},
        "torch is faster by": {k: round(r, 3) for k, r in ratios.items() if k != "torch"},
        "share of peak": round(batch * work / median["torch"] / peak, 3),
        "largest difference from torch": {
            k: float((same[k] - same["torch"]).abs().max()) for k in same if k != "torch"
        },
    }


def views_and_draws(generator, rounds, clock) -> dict:
    """Certified views against one pass each, and n draws against one."""
    certified = CertifiedPurifier.covering(generator)
    images = torch.rand(2, 3, certified.image_size, certified.image_size)
    masks = certified.cover.visible
    purifier = Purifier(generator).eval()
    few, many = (lambda n=n: purifier.draws(images, n) for n in (1, 8))
    times = take_turns(
        {
            "views": lambda: certified.views(images),
            "single": lambda: torch.cat(
                [generator(x[None], m[None]) for x in images for m in masks]
            ),
            "1 draw": few,
            "8 draws": many,
        },
        rounds,
        clock,
    )
    views = [a / b for a, b in zip(times["views"], times["single"], strict=True)]
    draws = [b / a / 8 for a, b in zip(times["1 draw"], times["8 draws"], strict=True)]
    return {
        "views": len(masks),
        "views over single passes": round(statistics.median(views), 3),
        "8 draws over 8 times one": round(statistics.median(draws), 3),
    }


def tables(record: dict) -> dict[str, dict]:
    """For the documentation: work, pace, and how the ratios stand against what was asked."""
    cells = record["cells"]
    names = [n for n in LABELS if any(n in c["images/s"] for c in cells)]
    label = [f"{c['geometry']}, batch {c['batch']}" for c in cells]
    pace = [
        [name, *(c["images/s"].get(n) for n in names), 100 * c["share of peak"]]
        for name, c in zip(label, cells, strict=True)
    ]
    peak = max(c["peak GFLOP/s"] for c in cells)
    note = (
        f"Images per second, {record['clock']} time, {record['threads']} threads, "
        f"{record['cpu']}; fp32 matrix product {peak:.0f} GFLOP/s in the same run."
    )
    against = [n for n in names if n != "torch"]
    ratios = [
        [name, *(_ratio(c["torch is faster by"].get(n)) for n in against)]
        for name, c in zip(label, cells, strict=True)
    ]
    gains = [n for n in names if n != "naive"]
    gained = [
        [name, *(_ratio(_over_naive(c["torch is faster by"], n)) for n in gains)]
        for name, c in zip(label, cells, strict=True)
        if "naive" in c["images/s"]
    ]
    work = []
    for name, config in GEOMETRIES.items():
        first, second = both_passes(config)
        total = first + second
        flops, words = 2 * total.multiply_adds / 1e9, total.weight_bytes / 2**20 / 2
        intensity = [f"{total.intensity(b):.0f}" for b in (1, 8, 32)]
        sizes = [f"{flops:.2f}", f"{words:.0f}", f"{total.activation_bytes / 2**20:.0f}"]
        work.append([name, *sizes, *intensity])
    extra = record["certified views and draws (small)"]
    found = "" if extra is None else (
        f"Small geometry: {extra['views']} certified views take "
        f"{extra['views over single passes']:.2f} of as many single passes, and eight draws "
        f"{extra['8 draws over 8 times one']:.2f} of eight times one."
    )  # fmt: skip
    return {
        "pace": {"columns": ["two passes", *names, "torch: % of peak"], "rows": pace, "note": note},
        "ratios": {"columns": ["torch is faster than", *against], "rows": ratios, "note": found},
        "naive": {"columns": ["faster than naive", *gains], "rows": gained},
        "work": {
            "columns": ["geometry", "GFLOP per image", "weights, MiB", "activations, MiB per image",
                        "operations per byte, batch 1", "batch 8", "batch 32"],
            "rows": work,
        },
    }  # fmt: skip


def _over_naive(torch_is_faster: dict[str, float], form: str) -> float | None:
    slower = 1.0 if form == "torch" else torch_is_faster.get(form)
    return None if slower is None else torch_is_faster["naive"] / slower


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def joined(old: dict, new: dict) -> dict:
    """``new`` with the cells of an earlier result that it did not measure again."""
    for fact in ("versions", "cpu", "threads", "clock"):
        if old[fact] != new[fact]:
            raise SystemExit(f"--keep: the earlier result has another {fact}: measure all again")
    again = [(c["geometry"], c["batch"]) for c in new["cells"]]
    kept = [c for c in old["cells"] if (c["geometry"], c["batch"]) not in again]
    order = list(GEOMETRIES)
    cells = sorted([*kept, *new["cells"]], key=lambda c: (order.index(c["geometry"]), c["batch"]))
    extra = "certified views and draws (small)"
    return {**new, "cells": cells, extra: new[extra] or old[extra]}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"pair": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "openvino", "nncf"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", nargs="+", default=["small", "base"], choices=GEOMETRIES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--forms", nargs="+", default=list(LABELS), choices=LABELS)
    parser.add_argument("--int8", nargs="*", default=["small", "base"], help="geometries")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", action="store_true", help="other cells of --out stay as they are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    wanted = ["torch", *options.forms]
    have = versions()
    wanted = [n for n in wanted if not n.startswith("openvino") or "openvino" in have]
    wanted = [n for n in wanted if n != "compile" or shutil.which("c++")]
    cells, extra = [], None
    with tempfile.TemporaryDirectory() as cache, torch.inference_mode():
        os.environ.setdefault("PAIR_CACHE", cache)  # random weights are of no use later
        for name in options.geometry:
            theirs, generator = reference(GEOMETRIES[name])
            int8 = "nncf" in have and "openvino" in have and name in options.int8
            for batch in options.batch:
                cells.append(
                    measure(name, theirs, generator, batch, wanted, options.rounds, clock, int8)
                )
                print(json.dumps(cells[-1]), flush=True)
            if name == "small":
                extra = views_and_draws(generator, options.rounds, clock)
                print(json.dumps(extra), flush=True)
    record = {
        "benchmark": "purify",
        "versions": have,
        "cpu": cpu_name(),
        "threads": options.threads,
        "clock": options.clock,
        "rounds": options.rounds,
        "cells": cells,
        "certified views and draws (small)": extra,
    }
    if options.keep and options.out and options.out.is_file():
        record = joined(json.loads(options.out.read_text()), record)
    record["tables"] = tables(record)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
