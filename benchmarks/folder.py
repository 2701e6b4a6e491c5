"""How much of the purifier's pace does a folder of photos keep, and does its memory stay flat?

    python benchmarks/folder.py --photos 500 2000 --memory 2000 20000 --out results/folder.json

Folders are made of hard links to the package's photos. Each measurement is a process of its own,
so that its largest memory is that of one run:

* pace: ``purify_folder`` with the small model against the purifier alone on as many images in
  batches of the same size, before, and after; a quarter of the images each time;
* memory: the same with a tiny generator of the same image size, which makes many photos
  affordable: what is read, waits and is written does not depend on the model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch

from pair import __version__
from pair.data.embedded import gallery
from pair.files import write_atomic
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.guard.folder import Summary, purify_folder
from pair.purifier import Purifier

TINY = GeneratorConfig(112, 28, 32, 1, 2, 32, 1, 2)


def link_photos(folder: Path, count: int) -> None:
    """``count`` names for copies of the package's photos, a thousand to a folder."""
    copies = folder.parent / "copies"
    copies.mkdir(parents=True)
    sources = []
    for i, (path, _) in enumerate(gallery()):
        sources.append(copies / f"{i}.jpg")
        sources[-1].write_bytes(path.read_bytes())
    for i, source in enumerate(islice(cycle(sources), count)):
        target = folder / f"{i // 1000:03d}" / f"{i:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)


def resident() -> float:
    """MB in use now (Linux), 0 elsewhere."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / 2**20


def one_run(count: int, batch: int, clock, tiny: bool) -> dict:
    if tiny:
        purifier = Purifier(MaskedAutoencoder(TINY)).eval()
    else:
        purifier = Purifier.from_pretrained("pair-small")
    images = torch.rand(batch, 3, purifier.image_size, purifier.image_size)
    seen: list[float] = []

    def alone() -> float:
        steps = max(4, count // batch // 4)
        begin = clock()
        with torch.inference_mode():
            for _ in range(steps):
                purifier(images)
        return (clock() - begin) / (steps * batch)

    def progress(summary: Summary) -> None:
        seen.append(resident())

    with tempfile.TemporaryDirectory() as scratch:
        link_photos(Path(scratch) / "in", count)
        purifier(images)
        before = alone()
        begin = clock()
        summary = purify_folder(
            [Path(scratch) / "in"],
            Path(scratch) / "out",
            purifier,
            batch_size=batch,
            progress=progress,
        )
        seconds = clock() - begin
        pure = (before + alone()) / 2
    early = seen[len(seen) // 10]
    return {
        "photos": summary.purified,
        "failed": summary.failed,
        "images/s": round(count / seconds, 2),
        "purifier alone, images/s": round(1 / pure, 2),
        "share of that pace": round(pure * count / seconds, 3),
        "where the wall time goes": {
            k: round(v / sum(summary.seconds.values()), 3) for k, v in summary.seconds.items()
        },
        "memory after a tenth, MB": round(early, 1),
        "memory at the end, MB": round(seen[-1], 1),
        "peak memory, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def apart(count: int, options: argparse.Namespace, tiny: bool) -> dict:
    """:func:`one_run` in a process of its own."""
    arguments = ["--one", str(count), "--batch", str(options.batch), "--clock", options.clock]
    arguments += ["--threads", str(options.threads), *(["--tiny"] if tiny else [])]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, end="", flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(record: dict) -> dict:
    rows = []
    for kind, cells in (("pair-small", record["pace"]), ("tiny", record["memory"])):
        for c in cells:
            share = f"{100 * c['share of that pace']:.0f} %" if kind != "tiny" else "–"
            rows.append(
                [f"{c['photos']:,}, {kind}", f"{c['images/s']:.1f}", share,
                 f"{c['memory after a tenth, MB']:.0f}", f"{c['peak memory, MB']:.0f}"]
            )  # fmt: skip
    return {
        "columns": ["photos, model", "images/s", "of the purifier alone", "MB after a tenth",
                    "largest MB"],
        "rows": rows,
        "note": f"{record['clock'].capitalize()} time, {record['threads']} threads, batches of "
        f"{record['batch']}; JPEG photos of 144 px (shorter side). Every run is a process of its "
        "own. The tiny model stands in where only memory is asked.",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, nargs="*", default=[500, 2000])
    parser.add_argument("--memory", type=int, nargs="*", default=[2000, 20000])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    if options.one:
        print(json.dumps(one_run(options.one, options.batch, clock, options.tiny)))
        return
    record = {
        "benchmark": "folder",
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": options.threads,
        "clock": options.clock,
        "batch": options.batch,
        "pace": [apart(n, options, False) for n in options.photos],
        "memory": [apart(n, options, True) for n in options.memory],
    }
    record |= table(record)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
