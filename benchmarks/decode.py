"""How fast do files become tensors, next to the loop that people write?

    python benchmarks/decode.py --photos 300 --out results/decode.json

The package's reading and shrinking (checked, upright, in floating point) against plain Pillow
(open, convert, resize, to tensor), on the same JPEG files: the package's photos, scaled up to the
given sizes. Forms take turns in every round. For whole folders see ``benchmarks/folder.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pair import __version__
from pair.data.embedded import gallery
from pair.files import write_atomic
from pair.images import load_image


def plain_pillow(path: Path, side: int) -> torch.Tensor:
    """What a user would write."""
    picture = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def write_photos(folder: Path, count: int, short: int | None) -> list[Path]:
    """``count`` JPEG files made of the package's photos; ``short`` scales the shorter side."""
    folder.mkdir()
    out = []
    for i, (source, _) in enumerate(islice(cycle(gallery()), count)):
        target = folder / f"{i:06d}.jpg"
        if short is None:
            target.write_bytes(source.read_bytes())
        else:
            picture = Image.open(source)
            scale = short / min(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            picture.resize(size, Image.Resampling.BICUBIC).save(target, quality=90)
        out.append(target)
    return out


def decoding(count: int, sizes: list[int], rounds: int, clock) -> list[dict]:
    cells = []
    for short in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            paths = write_photos(Path(scratch) / "in", count, short)
            forms = {
                "pair": lambda p: load_image(p, size=112),
                "plain pillow": lambda p: plain_pillow(p, 112),
            }
            times: dict[str, list[float]] = {name: [] for name in forms}
            for _ in range(rounds):
                for name, form in forms.items():
                    begin = clock()
                    for path in paths:
                        form(path)
                    times[name].append(clock() - begin)
            apart = [(forms["pair"](p) - forms["plain pillow"](p)).abs().mean() for p in paths[:20]]
        cells.append(
            {
                "short side": short,
                "images/s": {k: round(count / statistics.median(t), 1) for k, t in times.items()},
                "pair is faster by": round(
                    statistics.median(
                        b / a for a, b in zip(times["pair"], times["plain pillow"], strict=True)
                    ),
                    3,
                ),
                "mean difference": float(torch.stack(apart).mean()),
            }
        )
        print(json.dumps(cells[-1]), flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[144, 480, 1600])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    decode = decoding(options.photos, options.sizes, options.rounds, clock)
    record = {
        "benchmark": "decode",
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": Image.__version__,
        "threads": options.threads,
        "clock": options.clock,
        "decode": decode,
        "columns": ["photos of", "pair, images/s", "plain Pillow, images/s", "ratio"],
        "rows": [
            [f"{c['short side']} px (shorter side)", *c["images/s"].values(),
             f"{c['pair is faster by']:.2f}"]
            for c in decode
        ],
        "note": f"{options.clock.capitalize()} time, {options.threads} threads, to 112 px.",
    }  # fmt: skip
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
