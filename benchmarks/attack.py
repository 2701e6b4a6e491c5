"""How much faster is EOT as one batch than a Python loop over draws?

    python benchmarks/attack.py --out results/attack.json

Time of one EOT-n gradient to the pixels of B images, through the purifier and the image tower that
ship. Forms of this package:

* batched: ``EOT(features, n)``, all activations kept;
* constant memory: the same with slices recomputed, whose memory does not grow with n;
* both in bf16: their gradient is an approximation, whose error is given beside that of the
  expectation itself (the difference between two independent sets of n draws).

Loops that compute the same gradient, draw by draw:

* best: this package's purifier, the losses averaged, one backward pass;
* backward each: the same with constant memory;
* live weights: the same on models as they are loaded, whose weights ask for gradients too, with
  ``loss.backward()``;
* one image: one image and one draw at a time, as ART's EOT does;
* published: the purifier written down step by step as MAE's and PAIR's code does it
  (``literal.py``): every token predicted in both passes, attention in three lines, live weights.

And one whose gradient is that of another reading:

* equations: the published loop with hidden patches as black tokens in a full-length encoder, as
  PAIR's equations 7 to 9 say. Each form of ours is compared with it although it computes the
  other reading; "zero tokens" is ours of this one.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import literal
import torch

from pair import __version__
from pair.attacks import EOT, TextGoal, pipeline
from pair.data import embedded
from pair.files import write_atomic
from pair.images import load_batch
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip


@dataclass(frozen=True)
class Victim:
    """The purifier with an image tower, in the forms that are compared."""

    purifier: Purifier
    clip: SmallClip
    features: Any  # frozen weights
    zero: Any  # the same, hidden tokens black
    loaded: Any  # weights that ask for gradients

    @classmethod
    def load(cls, device: str) -> Victim:
        def models(live, **options):
            purifier = Purifier.from_pretrained("pair-small", **options).differentiable()
            clip = SmallClip.from_pretrained("clip-small")
            return (purifier.to(device).requires_grad_(live), clip.to(device).requires_grad_(live))

        purifier, clip = models(True)
        return cls(purifier, clip, *(pipeline(c, p) for p, c in (models(False),
                   models(False, encoder="zero"))), pipeline(clip, purifier))  # fmt: skip

    def literal(self, images, generator, encoder):
        """As published: one purification of the batch, all steps written out."""
        mask = self.purifier.draw_mask(len(images), generator)
        shown = literal.purify(self.purifier.autoencoder, images, mask.to(images.device), encoder)
        return self.clip.encode_image(shown)


def forms(victim, goal, images, n, micro):
    """name -> function that returns the gradient (B, 3, H, W)."""

    def once(function, x, generator):
        return torch.autograd.grad(goal(function(x, generator=generator)).mean(), x)[0]

    def batched(save, precision="fp32", features=victim.features):
        def run(generator):
            eot = EOT(
                features, n, "mean_loss", micro_batch=micro, checkpoint=save, precision=precision
            )
            return once(eot, images.clone().requires_grad_(True), generator)

        return run

    def best(generator):
        x = images.clone().requires_grad_(True)
        losses = [goal(victim.features(x, generator=generator)).mean() for _ in range(n)]
        return torch.autograd.grad(torch.stack(losses).mean(), x)[0]

    def each(generator):
        total = torch.zeros_like(images)
        for _ in range(n):
            total += once(victim.features, images.clone().requires_grad_(True), generator) / n
        return total

    def written(function):
        def run(generator):
            x = images.clone().requires_grad_(True)
            for _ in range(n):
                (goal(function(x, generator)).mean() / n).backward()
            return x.grad

        return run

    def one_image(generator):
        total = torch.zeros_like(images)
        for _ in range(n):
            for i in range(len(images)):
                x = images[i : i + 1].clone().requires_grad_(True)
                total[i : i + 1] += once(victim.features, x, generator) / (n * len(images))
        return total

    return {
        "batched": batched(False),
        "constant memory": batched(True),
        "batched, bf16": batched(False, "bf16"),
        "constant memory, bf16": batched(True, "bf16"),
        "zero tokens, batched": batched(False, features=victim.zero),
        "loop: best": best,
        "loop: backward each": each,
        "loop: live weights": written(lambda x, g: victim.loaded(x, generator=g)),
        "loop: one image": one_image,
        "loop: published": written(lambda x, g: victim.literal(x, g, "drop")),
        "loop: equations": written(lambda x, g: victim.literal(x, g, "zero")),
    }


ZERO = ("zero tokens, batched", "loop: equations")  # another reading: gradients of their own


def measure(victim, images, n, micro, rounds):
    clock = time.perf_counter if images.is_cuda else time.process_time
    goal = TextGoal(victim.features(images[:1], generator=torch.Generator().manual_seed(9)))
    runs = forms(victim, goal, images, n, micro)
    times: dict[str, list[float]] = {name: [] for name in runs}
    gradients = {}
    for run in forms(victim, goal, images, 1, micro).values():  # warm up
        run(torch.Generator().manual_seed(0))
    for k in range(1, rounds + 1):
        for name, run in runs.items():
            if images.is_cuda:
                torch.cuda.synchronize()
            begin = clock()
            gradients[name] = run(torch.Generator().manual_seed(k))
            if images.is_cuda:
                torch.cuda.synchronize()
            times[name].append(clock() - begin)
    want = {name: gradients["loop: equations" if name in ZERO else "loop: best"] for name in runs}
    apart = {name: float((gradients[name] - w).norm() / w.norm()) for name, w in want.items()}
    other = runs["batched"](torch.Generator().manual_seed(rounds + 1)) - want["batched"]
    best = {name: min(t) for name, t in times.items()}
    loops = [name for name in best if name.startswith("loop")]
    return {
        "images": len(images),
        "draws": n,
        "clock": "wall time" if images.is_cuda else "processor time of the process",
        "seconds_min": best,
        "seconds_median": {name: statistics.median(t) for name, t in times.items()},
        "speedup": {
            ours: {loop: round(best[loop] / best[ours], 3) for loop in loops}
            for ours in best
            if ours not in loops
        },
        "relative_difference_of_gradients": apart,
        "relative_difference_of_other_draws": float(other.norm() / want["batched"].norm()),
    }


def table(cells):
    """The cells as the documentation shows them: time per sample gradient, speed against loops."""
    loops = [name for name in cells[0]["seconds_min"] if name.startswith("loop")]
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
               *(f"÷ {loop.removeprefix('loop: ')}" for loop in loops),
               "differs by, %", "other draws differ by, %"]  # fmt: skip
    return {"columns": columns, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[10])
    parser.add_argument("--draws", type=int, nargs="+", default=[7, 20])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    victim = Victim.load(options.device)
    cells = []
    for batch in options.images:
        images = load_batch([path for path, _ in embedded.queries()[:batch]], 112)
        for n in options.draws:
            cell = measure(victim, images.to(options.device), n, options.micro_batch,
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
            f"One {'GPU' if gpu else 'thread'}, the fastest of {options.rounds} rounds"
            f"{'' if gpu else ', processor time'}. The columns with ÷ say how many times as fast "
            "as that loop a form is. “published” writes the purifier out as MAE's and PAIR's code "
            "do, “equations” also sends hidden patches through the encoder as black tokens "
            "(another reading: equal only to “zero tokens”). The last column is the error of the "
            "expectation itself: by so much differ the gradients of two independent sets of that "
            "many draws."
        ),
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
