"""How fast do files become tensors, and how much of the purifier's pace does a folder keep?

    python benchmarks/decode.py --photos 500 --folder 2000 --out results/decode.json

* decode: the package's reading and shrinking, strip by strip and upright, against the loop that
  people write with plain Pillow (open, convert, resize, to tensor), on the same JPEG files, which
  are scaled up from the package's photos to the given sizes; forms take turns in every round;
* folder: ``purify_folder`` on a folder of JPEG files against the purifier alone on as many images
  in batches of the same size, once before and once after; with the largest memory of the process.
  Give two numbers, such as ``--folder 2000 20000``, to see whether memory grows.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
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
from pair.guard.folder import purify_folder
from pair.images import load_image
from pair.purifier import Purifier


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


def folder_run(purifier: Purifier, count: int, batch: int, clock) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        write_photos(Path(scratch) / "in", count, None)
        images = torch.rand(batch, 3, purifier.image_size, purifier.image_size)

        def alone() -> float:
            steps = max(4, count // batch // 4)
            begin = clock()
            with torch.inference_mode():
                for _ in range(steps):
                    purifier(images)
            return (clock() - begin) / (steps * batch)

        alone()  # warm
        before = alone()
        begin = clock()
        summary = purify_folder(
            [Path(scratch) / "in"], Path(scratch) / "out", purifier, batch_size=batch
        )
        seconds = clock() - begin
        pure = (before + alone()) / 2
    cell = {
        "photos": summary.purified,
        "images/s": round(count / seconds, 2),
        "purifier alone, images/s": round(1 / pure, 2),
        "share of that pace": round(pure * count / seconds, 3),
        "where the time goes": {
            k: round(v / sum(summary.seconds.values()), 3) for k, v in summary.seconds.items()
        },
        "peak memory, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    print(json.dumps(cell), flush=True)
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[144, 480, 1600])
    parser.add_argument("--folder", type=int, nargs="*", default=[2000])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--precision", choices=["fp32", "int8"], default="fp32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    decode = decoding(options.photos, options.sizes, options.rounds, clock)
    purifier = Purifier.from_pretrained("pair-small", precision=options.precision)
    folders = [folder_run(purifier, n, options.batch, clock) for n in options.folder]
    record = {
        "benchmark": "decode",
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": Image.__version__,
        "threads": options.threads,
        "clock": options.clock,
        "decode": decode,
        "folder": folders,
        "columns": ["photos of", "pair, images/s", "plain Pillow, images/s", "ratio"],
        "rows": [
            [f"{c['short side']} px (shorter side)", *c["images/s"].values(),
             f"{c['pair is faster by']:.2f}"]
            for c in decode
        ],
        "note": f"{options.clock.capitalize()} time, {options.threads} threads. "
        + " ".join(
            f"A folder of {c['photos']:,} photos: {c['images/s']:.1f} images/s, "
            f"{100 * c['share of that pace']:.0f} % of the purifier alone; "
            f"largest memory {c['peak memory, MB']:.0f} MB."
            for c in folders
        ),
    }  # fmt: skip
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
