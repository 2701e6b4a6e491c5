"""How much faster is EOT as one batch than a Python loop over draws?

    python benchmarks/attack.py --out results/attack.json

Time of one EOT-n gradient to the pixels of B images, through the purifier and the image tower that
ship, in forms that compute the same gradient:

* batched: ``EOT(features, n)``, slices kept whole, no recomputation;
* checkpointed: the same with recomputation, whose memory does not grow with n;
* checkpointed, bf16: the same in half precision (its gradient is an approximation);
* loop over draws: n calls, their losses averaged, one backward pass;
* loop over draws, backward each: the same with constant memory;
* loop over draws and images: one image and one draw at a time, as ART's EOT does.

The forms take turns, so that a change of the machine's load meets all of them; the minimum and
median of the rounds are reported. On a CPU the time is that of the process (what other programs
take does not count), on a GPU it is wall time.
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


def forms(features, goal, images, n, micro):
    """name -> function that returns the gradient (B, 3, H, W)."""

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

    def loop_images(generator):
        total = torch.zeros_like(images)
        for _ in range(n):
            for i in range(len(images)):
                x = images[i : i + 1].clone().requires_grad_(True)
                total[i : i + 1] += once(features, x, generator) / (n * len(images))
        return total

    return {
        "batched": batched(False),
        "checkpointed": batched(True),
        "checkpointed, bf16": batched(True, "bf16"),
        "loop over draws": loop,
        "loop over draws, backward each": loop_each,
        "loop over draws and images": loop_images,
    }


def measure(features, images, n, micro, rounds):
    clock = time.perf_counter if images.is_cuda else time.process_time
    goal = TextGoal(features(images[:1], generator=torch.Generator().manual_seed(9)).detach())
    runs = forms(features, goal, images, n, micro)
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
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--draws", type=int, nargs="+", default=[7, 20])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    purifier = Purifier.from_pretrained("pair-small").requires_grad_(False).to(options.device)
    purifier = purifier.differentiable()
    clip = SmallClip.from_pretrained("clip-small").to(options.device)
    features = pipeline(clip, purifier)
    cells = []
    for batch in options.images:
        images = torch.rand(batch, 3, 112, 112, generator=torch.Generator().manual_seed(0))
        for n in options.draws:
            cell = measure(features, images.to(options.device), n, options.micro_batch,
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
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
