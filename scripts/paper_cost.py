"""Hours and memory of the paper's training on several GPUs, computed from results/base.json.

    python scripts/paper_cost.py        writes results/paper-cost.json

Operations of one training step come from the benchmark; peaks from the makers' data sheets (dense,
without sparsity); the share of the peak is an assumption and is stated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pair.files import write_atomic
from pair.generator import BASE, LARGE, GeneratorConfig, MaskedAutoencoder
from pair.work import one_pass

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH, SHARE = 326_769, 32, 0.4
PEAKS = {"V100 (fp16)": 125e12, "A100": 312e12, "H100 or H200": 989e12}  # operations a second
COLUMNS = ["100 epochs of 104,566 photos", *(f"hours, {name}" for name in PEAKS), "GB of weights"]


def parameters(config: GeneratorConfig) -> int:
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in MaskedAutoencoder(config).parameters())


def main() -> int:
    source = ROOT / "results" / "base.json"
    if not source.is_file():
        sys.exit("results/base.json is missing: run benchmarks/base.py")
    found = json.loads(source.read_text())["found"]
    half = BASE.grid**2 // 2
    forward = {c: 2 * one_pass(c, half).multiply_adds for c in (BASE, LARGE)}
    step = found["training step"]["gflop"] * 1e9
    # Backward costs twice the forward pass; the rest of the step is the discriminator's.
    critic = step - 3 * forward[BASE]
    # With both passes it looks at two outputs, forward and backward, and once at the photo.
    large = 2 * 3 * forward[LARGE] + 5 / 3 * critic
    attack = found["attack step"]["gflop"] * 1e9
    images = STEPS * BATCH
    rows = []
    plans = {
        "Base, one pass (`generator.toml`)": (step * images, BASE),
        "Base, no semantic loss (`generator-beta0.toml`)": (3 * forward[BASE] * images, BASE),
        "Large, both passes (`generator-released.toml`)": (large * 80_556 * 36, LARGE),
        "adaptive TTH: 23 keywords, 10 photos, 7 draws, 301 steps": (
            attack * 23 * 10 * 7 * 301,
            BASE,
        ),
    }
    for name, (total, config) in plans.items():
        hours = [f"{total / (peak * SHARE) / 3600:.1f}" for peak in PEAKS.values()]
        # Weights, gradients and the two moments of Adam in fp32; an attack needs weights only.
        size = parameters(config) * (16 if "toml" in name else 4) / 1e9
        rows.append([name, *hours, f"{size:.1f}"])
    result = {
        "columns": COLUMNS,
        "rows": rows,
        "note": f"Computed, not measured: operations / ({SHARE:.0%} of the peak). One step of "
        f"Base takes {step / 1e9:.0f} GFLOP an image, {critic / 1e9:.0f} of them for the "
        "discriminator. Activations come on top of the weights.",
    }
    write_atomic(
        ROOT / "results" / "paper-cost.json", (json.dumps(result, indent=1) + "\n").encode()
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
