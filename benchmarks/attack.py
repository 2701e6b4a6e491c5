"""How much faster is EOT as one batch than a Python loop over draws?

    python benchmarks/attack.py --out results/attack.json

Time of one EOT-n gradient to the pixels of B images, through the purifier and the image tower that
ship. Forms of this package:

* batched: ``EOT(features, n)``, all activations kept;
* constant memory: the same with slices recomputed, whose memory does not grow with n;
* both in bf16: their gradient is an approximation, whose error is given beside that of the
  expectation itself (the difference between two independent sets of n draws).

Loops that compute the same gradient:

* loop over draws: n calls, their losses averaged, one backward pass;
* loop, backward each: the same with constant memory;
* loop, as first written: the same on models as they are loaded, whose weights ask for gradients
  too, with ``loss.backward()``;
* loop over draws and images: one image and one draw at a time, as ART's EOT does.

The forms take turns, so that a change of the machine's load meets all of them; the minimum and
median of the rounds are kept, and the table shows the minimum. On a CPU the time is that of the
process (what other programs take does not count), on a GPU it is wall time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from pair import __version__
from pair.attacks import EOT, TextGoal, pipeline
from pair.files import write_atomic
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip


def forms(features, loaded, goal, images, n, micro):
    """name -> function that returns the gradient (B, 3, H, W); ``loaded`` has live weights."""

    def once(function, x, generator):
        return torch.autograd.grad(goal(function(x, generator=generator)).mean(), x)[0]

    def batched(save, precision="fp32"):
        def run(generator):
            eot = EOT(
                features, n, "mean_loss", micro_batch=micro, checkpoint=save, precision=precision
            )
            return once(eot, images.clone().requires_grad_(True), generator)

        return run

    def loop(generator):
        x = images.clone().requires_grad_(True)
        losses = [goal(features(x, generator=generator)).mean() for _ in range(n)]
        return torch.autograd.grad(torch.stack(losses).mean(), x)[0]

    def loop_each(generator):
        total = torch.zeros_like(images)
        for _ in range(n):
            total += once(features, images.clone().requires_grad_(True), generator) / n
        return total

    def loop_written(generator):
        x = images.clone().requires_grad_(True)
        for _ in range(n):
            (goal(loaded(x, generator=generator)).mean() / n).backward()
        return x.grad

    def loop_images(generator):
        total = torch.zeros_like(images)
        for _ in range(n):
            for i in range(len(images)):
                x = images[i : i + 1].clone().requires_grad_(True)
                total[i : i + 1] += once(features, x, generator) / (n * len(images))
        return total

    return {
        "batched": batched(False),
        "constant memory": batched(True),
        "batched, bf16": batched(False, "bf16"),
        "constant memory, bf16": batched(True, "bf16"),
        "loop over draws": loop,
        "loop, backward each": loop_each,
        "loop, as first written": loop_written,
        "loop over draws and images": loop_images,
    }


def measure(features, loaded, images, n, micro, rounds):
    clock = time.perf_counter if images.is_cuda else time.process_time
    goal = TextGoal(features(images[:1], generator=torch.Generator().manual_seed(9)).detach())
    runs = forms(features, loaded, goal, images, n, micro)
    times: dict[str, list[float]] = {name: [] for name in runs}
    gradients = {}
    for k in range(rounds + 1):  # the first round warms up and is not counted
        for name, run in runs.items():
            if images.is_cuda:
                torch.cuda.synchronize()
            begin = clock()
            gradients[name] = run(torch.Generator().manual_seed(k))
            if images.is_cuda:
                torch.cuda.synchronize()
            if k:
                times[name].append(clock() - begin)
    want = gradients["loop over draws"]
    apart = {name: float((g - want).norm() / want.norm()) for name, g in gradients.items()}
    other = runs["batched"](torch.Generator().manual_seed(rounds + 1))
    best = {name: min(t) for name, t in times.items()}
    return {
        "images": len(images),
        "draws": n,
        "seconds_min": best,
        "seconds_median": {name: statistics.median(t) for name, t in times.items()},
        "speedup": {
            ours: {loop: round(best[loop] / best[ours], 3) for loop in best if "loop" in loop}
            for ours in best
            if "loop" not in ours
        },
        "relative_difference_of_gradients": apart,
        "relative_difference_of_other_draws": float((other - want).norm() / want.norm()),
    }


def table(cells):
    """The cells as the documentation shows them: time per sample gradient, speed against loops."""
    loops = [name for name in cells[0]["seconds_min"] if "loop" in name]
    rows = []
    for cell in cells:
        size = cell["images"] * cell["draws"]
        for name, seconds in cell["seconds_min"].items():
            ratios = cell["speedup"].get(name, {})
            apart = cell["relative_difference_of_gradients"][name]
            rows.append([
                f"{cell['images']} x {cell['draws']}", name, f"{1000 * seconds / size:.1f}",
                *(f"{ratios[loop]:.2f}" if ratios else "–" for loop in loops),
                f"{100 * apart:.1g}",
                f"{100 * cell['relative_difference_of_other_draws']:.0f}",
            ])  # fmt: skip
    columns = ["images x draws", "form", "ms per sample gradient",
               *(f"times as fast as “{loop}”" for loop in loops),
               "differs by, %", "other draws differ by, %"]  # fmt: skip
    return {"columns": columns, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[10])
    parser.add_argument("--draws", type=int, nargs="+", default=[7, 20])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def models(live):
        purifier = Purifier.from_pretrained("pair-small").differentiable().to(options.device)
        clip = SmallClip.from_pretrained("clip-small").to(options.device)
        return pipeline(clip.requires_grad_(live), purifier.requires_grad_(live))

    features, loaded = models(False), models(True)
    cells = []
    for batch in options.images:
        images = torch.rand(batch, 3, 112, 112, generator=torch.Generator().manual_seed(0))
        for n in options.draws:
            cell = measure(features, loaded, images.to(options.device), n, options.micro_batch,
                           options.rounds)  # fmt: skip
            cells.append(cell)
            print(json.dumps(cell), flush=True)
    gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else None
    record = {
        "benchmark": "attack",
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "gpu": gpu,
        "threads": options.threads,
        "micro_batch": options.micro_batch,
        "rounds": options.rounds,
        "models": ["pair-small", "clip-small"],
        "cells": cells,
        **table(cells),
        "note": (
            f"One {'GPU' if gpu else 'thread'}, the fastest of {options.rounds} rounds. The last "
            "column is the error of the expectation itself: by so much differ the gradients of two "
            "independent sets of that many draws."
        ),
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
