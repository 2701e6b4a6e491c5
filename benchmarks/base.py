"""What the paper's size costs: ViT-B/16 at 224 pixels with random weights, on this machine.

    python benchmarks/base.py --out results/base.json

Parity with ViTMAE of transformers on the same weights, then purification, one training step
(generator and a ViT-B/32 discriminator) and one step of an adaptive attack, each in a process of
its own: seconds, peak memory, floating-point operations. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pair.files import write_atomic
from pair.generator import BASE, Block, GeneratorConfig, MaskedAutoencoder
from pair.kernels import set_fused
from pair.masks import ExactCount
from pair.purifier import Purifier

PARTS = ("parity", "purification", "training step", "recomputed step", "attack step")
COLUMNS = ["ViT-B/16, 224 px, random weights", "images", "GFLOP an image", "CPU seconds", "GB"]
TINY = GeneratorConfig(32, 8, 32, 2, 2, 32, 1, 2)  # for trying this file out


class VisionTower(nn.Module):
    """The image tower of CLIP ViT-B/32 in shape and cost, with random weights."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, dim: int):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width) * 0.02)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, 1e-5) for _ in range(depth))
        self.project = nn.Linear(width, dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.project(x[:, 0])


def parity(config: GeneratorConfig) -> float:
    """Largest difference of all predicted pixels from transformers, in [0, 1] units."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from pair.checkpoints import from_hf_vitmae

    torch.manual_seed(0)
    settings = ViTMAEConfig(
        hidden_size=config.width, num_hidden_layers=config.depth,
        num_attention_heads=config.heads, intermediate_size=4 * config.width,
        image_size=config.image_size, patch_size=config.patch_size, mask_ratio=0.5,
        decoder_hidden_size=config.decoder_width, decoder_num_hidden_layers=config.decoder_depth,
        decoder_num_attention_heads=config.decoder_heads,
        decoder_intermediate_size=4 * config.decoder_width, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(settings).eval()
    ours = from_hf_vitmae(theirs.state_dict(), settings.to_dict())
    images = torch.rand(1, 3, config.image_size, config.image_size)
    mask = ExactCount(0.5)(1, config.grid, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inside = (images - ours.mean.view(3, 1, 1)) / ours.std.view(3, 1, 1)
        wanted = theirs(inside, noise=(~mask).float()).logits  # (1, N, p*p*3), normalised
        wanted = wanted * ours.std.repeat(config.patch_size**2)
        wanted = wanted + ours.mean.repeat(config.patch_size**2)
        got = ours(images, mask)
        return float((got - ours.to_image(wanted)).abs().max())


def purification(config: GeneratorConfig, batch: int):
    purifier = Purifier(MaskedAutoencoder(config)).eval().requires_grad_(False)
    images = torch.rand(batch, 3, config.image_size, config.image_size)
    return lambda: purifier(images, generator=torch.Generator().manual_seed(0))


def training_step(config: GeneratorConfig, batch: int, recompute: bool):
    from pair.losses import patch_loss, semantic_loss, total_loss
    from pair.training.generator import _recompute

    model, critic = MaskedAutoencoder(config), tower(config).requires_grad_(False)
    if recompute:
        _recompute(model)
    adam = torch.optim.Adam(model.parameters(), lr=1e-5)
    images = torch.rand(batch, 3, config.image_size, config.image_size)

    def step() -> None:
        mask = ExactCount(0.5)(batch, config.grid, generator=torch.Generator().manual_seed(0))
        rebuilt = model(images, mask)
        with torch.no_grad():
            wanted = critic(images)
        l_p = patch_loss(images, rebuilt, config.patch_size)
        total_loss(l_p, semantic_loss(wanted, critic(rebuilt))).backward()
        adam.step()
        adam.zero_grad()

    return step


def attack_step(config: GeneratorConfig, batch: int):
    """One step of Adam on a patch, through both passes: one of the seven draws of EOT."""
    purifier = Purifier(MaskedAutoencoder(config)).eval().requires_grad_(False)
    encoder, size = tower(config).requires_grad_(False), config.image_size
    side = int(0.35 * size)
    patch = torch.rand(3, side, side, requires_grad=True)
    images = torch.rand(batch, 3, size, size)
    target = torch.randn(1, encoder.project.out_features)
    adam = torch.optim.Adam([patch], lr=0.01)

    def step() -> None:
        seen = images.clone()
        seen[..., :side, size - side :] = patch.clamp(0, 1)
        clean = purifier(seen, generator=torch.Generator().manual_seed(0))
        (1 - F.cosine_similarity(encoder(clean), target)).mean().backward()
        adam.step()
        adam.zero_grad()

    return step


def tower(config: GeneratorConfig) -> VisionTower:
    if config is TINY:
        return VisionTower(32, 8, 32, 1, 2, 16)
    return VisionTower(224, 32, 768, 12, 12, 512)


def measure(part: str, config: GeneratorConfig, batch: int, repeats: int) -> dict[str, float]:
    """Processor seconds of the fastest run, peak memory of this process, operations."""
    if part == "parity":
        return {"difference": parity(config)}
    torch.manual_seed(0)
    if part == "purification":
        run = purification(config, batch)
    elif part == "attack step":
        run = attack_step(config, batch)
    else:
        run = training_step(config, batch, part == "recomputed step")
    seconds = []
    for _ in range(repeats):
        start = time.process_time()  # of this process only: the machine may be shared
        run()
        seconds.append(time.process_time() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux: kilobytes
    set_fused(False)  # the counter does not know fused kernels
    with FlopCounterMode(display=False) as counter:
        run()
    return {
        "images": batch,
        "seconds": round(min(seconds), 3),
        "gigabytes": round(memory, 2),
        "gflop": round(counter.get_total_flops() / 1e9 / batch, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a toy, to try this file out")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TINY if args.tiny else BASE
    if args.part:
        print(json.dumps(measure(args.part, config, args.batch, args.repeats)))
        return 0
    found = {}
    for part in PARTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(part, found[part], flush=True)
    rows = [
        [
            part,
            str(m["images"]),
            f"{m['gflop']:.1f}",
            f"{m['seconds']:.2f}",
            f"{m['gigabytes']:.2f}",
        ]
        for part, m in found.items()
        if part != "parity"
    ]
    result = {
        "columns": COLUMNS,
        "rows": rows,
        "note": f"fp32, {args.threads} thread(s) of a shared CPU; best of {args.repeats}. Largest "
        f"difference from transformers on all pixels: {found['parity']['difference']:.1e}.",
        "found": found,
        "clock": "processor time",
        "facts": {"torch": torch.__version__, "threads": args.threads, "load": os.getloadavg()[0]},
    }
    write_atomic(args.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
