"""Hours and memory of the paper's training on several GPUs, computed from results/base.json.

    python scripts/paper_cost.py        writes results/paper-cost.json

Operations of one training step come from the benchmark; peaks from the makers' data sheets (dense,
without sparsity); the share of the peak is an assumption and is stated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pair.defenses.denoise import ArnNet, CafdNet
from pair.defenses.network import NetworkConfig
from pair.defenses.patchzero import PyramidNet
from pair.defenses.sac import UNet
from pair.files import write_atomic
from pair.generator import BASE, LARGE, GeneratorConfig, MaskedAutoencoder
from pair.retrieval.resnet import BOTTLENECK50, ResNet
from pair.training.loop import LoopConfig
from pair.training.run import read_recipe
from pair.work import one_pass

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH, SHARE = 326_769, 32, 0.4
PEAKS = {"V100 (fp16)": 125e12, "A100": 312e12, "H100 or H200": 989e12}  # operations a second
COLUMNS = ["100 epochs of 104,566 photos", *(f"hours, {name}" for name in PEAKS), "GB of weights"]


CLIP_ALL, CLIP_IMAGE = 151_277_313, 87_849_216  # weights of ViT-B/32, and of its image tower
PATCHZERO = ("patchzero", "patchzero-adaptive")


def parameters(config: GeneratorConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MaskedAutoencoder(config).parameters())


def hours(operations: float) -> list[str]:
    return [f"{operations / (peak * SHARE) / 3600:.1f}" for peak in PEAKS.values()]


def forward_pass(network: torch.nn.Module, side: int) -> float:
    """Operations of one picture, counted by torch on a device without memory."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(1, 3, side, side, device="meta"))
    return float(counter.get_total_flops())


def baselines(clip: float) -> list[tuple[str, float, float]]:
    """Recipe, operations and bytes of weights, gradients and moments of each baseline.

    ``clip``: operations of one forward pass of CLIP's image tower. A step of an inner attack is a
    forward pass and as much again back to the pixels; a training step is three forward passes.
    """
    with torch.device("meta"):
        resnet = ResNet(BOTTLENECK50)
        nets = {
            "sac": UNet(NetworkConfig(224, 16)),
            "patchzero": PyramidNet(NetworkConfig(224, 64)),
            "arn": ArnNet(NetworkConfig(224, 32)),
            "cafd": CafdNet(NetworkConfig(224, 32)),
        }
    csq = forward_pass(resnet, 224)
    cost = {name: forward_pass(net, 224) for name, net in nets.items()}
    size = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    size["csq"] = sum(p.numel() for p in resnet.parameters())

    def plan(name: str, kind: str) -> tuple[LoopConfig, Any]:
        return read_recipe(ROOT / "configs" / "paper" / f"{name}.toml", kind)

    found = []
    towers = {"at-clip": clip, "at-csq": csq, "hm-clip": clip}
    for name, forward in towers.items():
        loop, task = plan(name, name.partition("-")[0])
        photos = float(loop.batch_size)  # of a step, as many as forward passes
        inner = task.inner_steps
        if name == "hm-clip":  # all are looked at once, then a positive and a negative of each
            each = photos * (1 + 2 * (2 * inner + 3))
        else:
            each = photos * (2 * inner + 3)
        state = CLIP_ALL * 4 + CLIP_IMAGE * 12 if forward == clip else size["csq"] * 16
        found.append((name, loop.steps * each * forward, state))
    for kind, names in {"sac": ("sac", "sac-self"), "patchzero": PATCHZERO}.items():
        for name in names:
            loop, task = plan(name, kind)
            # SAC attacks its network alone, PatchZero looks twice and at the target behind it.
            look = cost[kind] if kind == "sac" else 2 * cost[kind] + (clip + csq) / 2
            each = 3 * cost[kind] + task.adaptive * task.inner_steps * 2 * look
            found.append((name, loop.steps * loop.batch_size * each, size[kind] * 16))
    for name in ("arn", "cafd"):
        loop, task = plan(name, name)
        attacks, pictures = (2, 3) if name == "arn" else (1, 1)
        each = attacks * (2 * task.inner_steps + 1) * clip + 3 * pictures * cost[name]
        each += 4 * clip if name == "cafd" else 0  # its loss lies behind the target
        found.append((name, loop.steps * loop.batch_size * each, size[name] * 16))
    return [(f"`{name}.toml`", total, state) for name, total, state in found]


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
        # Weights, gradients and the two moments of Adam in fp32; an attack needs weights only.
        size = parameters(config) * (16 if "toml" in name else 4) / 1e9
        rows.append([name, *hours(total), f"{size:.1f}"])
    rows += [[n, *hours(total), f"{size / 1e9:.1f}"] for n, total, size in baselines(critic / 3)]
    result = {
        "columns": COLUMNS,
        "rows": rows,
        "note": f"Computed, not measured: operations / ({SHARE:.0%} of the peak). One step of "
        f"Base takes {step / 1e9:.0f} GFLOP an image, {critic / 1e9:.0f} of them for the "
        "discriminator. Activations come on top of the weights. Convolutions of small networks "
        "reach less of the peak. Baselines train as long as their recipes say: our choice.",
    }
    write_atomic(
        ROOT / "results" / "paper-cost.json", (json.dumps(result, indent=1) + "\n").encode()
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
