"""A collection of 100,000 rows: build time, size, latency, recall, memory.

    python benchmarks/index.py --out results/index.json

Synthetic rows go through the real write path (``Collection.add_rows``: commits of 1,024 rows, each
checked for rows that are there already), every photo of the package through all of it (decode,
purify, embed, commit). A synthetic row has all a real one has: an embedding and a code, raw and
purified. Its vectors lie around cluster centres, as embeddings do; on vectors without structure no
approximate index is any good. Exact and approximate searches take turns, so that a change of the
machine's load meets both, and the exact result is compared with numpy.

Times are wall time, with the load of the machine beside them, and processor time of all threads
(``cpu``), which other programs disturb less.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from pair import __version__
from pair.data import embedded
from pair.files import write_atomic
from pair.guard.collection import Collection
from pair.guard.models import Models
from pair.guard.stores import Row

CENTRES, SPREAD, BITS = 1000, 0.7, 64


class Numbers:
    """Stands for models whose vectors are made elsewhere."""

    fingerprint = "synthetic"

    def __init__(self, dim: int, bits: int):
        self.dim, self.bits, self.image_size = dim, bits, 1


class Rows:
    """Reproducible rows around cluster centres; a code is the signs of fixed projections."""

    def __init__(self, dim: int):
        rng = np.random.default_rng(0)
        self.dim = dim
        self.centres = unit(rng.standard_normal((CENTRES, dim)))
        self.planes = rng.standard_normal((dim, BITS))

    def vectors(self, count: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        around = self.centres[rng.integers(0, CENTRES, count)]
        noise = unit(rng.standard_normal((count, self.dim)))
        return unit(around + SPREAD * noise).astype(np.float32)

    def raw(self, vectors: np.ndarray, seed: int) -> np.ndarray:
        """The same pictures before purification: a little off."""
        noise = unit(np.random.default_rng((seed, 1)).standard_normal(vectors.shape))
        return unit(vectors + 0.3 * noise).astype(np.float32)

    def codes(self, vectors: np.ndarray) -> np.ndarray:
        return np.packbits(vectors @ self.planes > 0, axis=1)

    def rows(self, count: int, step: int = 1024) -> Iterator[Row]:
        for start in range(0, count, step):
            n = min(step, count - start)
            vectors = self.vectors(n, 1 + start)
            raw = self.raw(vectors, 1 + start)
            codes, raw_codes = self.codes(vectors), self.codes(raw)
            for i in range(n):
                digest = hashlib.sha256(f"{start + i}".encode()).hexdigest()
                yield Row(digest[:32], f"{start + i}.jpg", digest, vector=vectors[i],
                          vector_raw=raw[i], code=codes[i], code_raw=raw_codes[i],
                          meta={"half": (start + i) % 2})  # fmt: skip


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def peak() -> float:
    """Largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident() -> float:
    """Memory of this process now, MB; the peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak()
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def latencies(searches, queries: int) -> dict[str, dict[str, float]]:
    """Milliseconds per query of each named search; they take turns."""
    wall: dict[str, list[float]] = {name: [] for name in searches}
    cpu = dict.fromkeys(searches, 0.0)
    for i in range(-3, queries):  # the first ones warm up
        for name, search in searches.items():
            began, used = time.perf_counter(), time.process_time()
            search(i % queries)
            if i >= 0:
                wall[name].append(1000 * (time.perf_counter() - began))
                cpu[name] += 1000 * (time.process_time() - used) / queries
    return {name: {**quantiles(times), "cpu": cpu[name]} for name, times in wall.items()}


def size(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20


def watched(rows: Iterator[Row], every: int, memory: list[float]) -> Iterator[Row]:
    """The same rows; notes the memory at each ``every``-th."""
    for number, row in enumerate(rows, 1):
        yield row
        if number % every == 0:
            memory.append(round(resident(), 1))


def run(rows: int, dim: int, queries: int, photos: int, folder: Path) -> dict:
    source = Rows(dim)
    numbers: Any = Numbers(dim, BITS)
    models = Models(encoder=numbers, hasher=numbers, purifier=numbers)
    before = peak()
    made = Collection.create(str(folder / "c"), models, fields={"half": "int"},
                             approximate_from=min(50_000, rows))  # fmt: skip
    memory: list[float] = []
    began, used = time.perf_counter(), time.process_time()
    made.add_rows(watched(source.rows(rows), max(1, rows // 10), memory), index=False)
    writing, write_cpu = time.perf_counter() - began, time.process_time() - used
    written = peak()
    print(f"written: {rows / writing:.0f} rows/s, memory {memory}", flush=True)
    began, used = time.perf_counter(), time.process_time()
    made.optimise()
    indexing, index_cpu = time.perf_counter() - began, time.process_time() - used
    print(f"tidied up and indexed: {indexing:.1f} s", flush=True)
    built = peak()
    megabytes = size(folder / "c")
    made.store.table.optimize(cleanup_older_than=timedelta(0))  # type: ignore[attr-defined]
    kept = size(folder / "c")
    asked = source.vectors(queries, 10**9)
    codes = source.codes(asked)
    store, where = made.store, made._where("half = 1")

    def search(column, query, **options):
        return lambda i: store.nearest(column, query[i], 10, **options)

    times = latencies(
        {
            "embedding, exact": search("vector", asked, exact=True),
            "embedding, approximate": search("vector", asked),
            "embedding, approximate, filter": search("vector", asked, where=where),
            "code, exact": search("code", codes, exact=True),
            "code, approximate": search("code", codes),
        },
        queries,
    )
    searched = peak()
    matrix = np.concatenate(
        [source.vectors(min(1024, rows - s), 1 + s) for s in range(0, rows, 1024)]
    )
    recall, agree = [], []
    for q in asked:
        best = {f"{i}.jpg" for i in np.argpartition(-(matrix @ q), 10)[:10]}
        exact = {r.uri for r, _ in store.nearest("vector", q, 10, exact=True)}
        agree.append(len(exact & best) / 10)
        recall.append(len({r.uri for r, _ in store.nearest("vector", q, 10)} & best) / 10)
    bits = np.unpackbits(source.codes(matrix), axis=1)
    code_recall = []
    for code in codes:  # by distance: many codes are equally far
        far = np.sort((bits != np.unpackbits(code)).sum(1))[9]
        found = [round((1 - s) * BITS / 2) for _, s in store.nearest("code", code, 10)]
        code_recall.append(sum(d <= far for d in found) / 10)
    info = made.info(recall=50)
    facts = {
        "rows": len(made), "dim": dim, "bits": BITS, "queries": queries,
        "write_rows_per_s": rows / writing, "write_rows_per_cpu_s": rows / write_cpu,
        "index_s": indexing, "index_cpu_s": index_cpu,
        "megabytes": {"first hour": megabytes, "then": kept}, "bytes_per_row": 2**20 * kept / rows,
        "peak_mb": {"before": before, "written": written, "built": built, "searched": searched},
        "resident_mb_while_writing": memory,
        "recall_at_10": float(np.mean(recall)), "exact_equals_numpy": float(np.mean(agree)),
        "code_recall_at_10": float(np.mean(code_recall)),
        "recall_by_info": info.recall, "indexes": info.indexes, "latency_ms": times,
    }  # fmt: skip
    if photos:
        facts["photos"] = full_path(folder, photos)
    return facts


def full_path(folder: Path, count: int) -> dict:
    """Real photos through decode, purify, embed, hash and commit."""
    models = Models.load("clip-small", "csq-small", "pair-small")
    made = Collection.create(str(folder / "photos"), models)
    every = (embedded.gallery(), embedded.queries(), embedded.pool(), embedded.ads())
    files = [p for part in every for p, _ in part][:count]
    began, cpu = time.perf_counter(), time.process_time()
    report = made.add(*files)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert report.added + report.repeated == len(files) and not report.failed, report
    again = time.perf_counter()
    assert made.add(*files).added == 0
    again = time.perf_counter() - again
    return {
        "photos": len(files), "rows": len(made), "per_s": len(files) / took,
        "per_cpu_s": len(files) / cpu, "checked_again_per_s": len(files) / again,
    }  # fmt: skip


def quantiles(times: list[float]) -> dict[str, float]:
    return {"p50": float(np.quantile(times, 0.5)), "p99": float(np.quantile(times, 0.99))}


def table(facts: dict) -> list[list]:
    memory, trace = facts["peak_mb"], facts["resident_mb_while_writing"]
    rows = [
        ["rows", f"{facts['rows']:,}"],
        ["writing, rows a second (a processor second)",
         f"{facts['write_rows_per_s']:,.0f} ({facts['write_rows_per_cpu_s']:,.0f})"],
        ["tidying up and indexing, seconds (processor seconds)",
         f"{facts['index_s']:.1f} ({facts['index_cpu_s']:.1f})"],
        ["size on disk with indexes, MB (in the first hour, with what was merged)",
         f"{facts['megabytes']['then']:.0f} ({facts['megabytes']['first hour']:.0f})"],
        *([f"{name}: p50 / p99, ms (processor ms)",
           f"{t['p50']:.1f} / {t['p99']:.1f} ({t['cpu']:.1f})"]
          for name, t in facts["latency_ms"].items()),
        ["recall@10 of the approximate search, embeddings / codes, %",
         f"{100 * facts['recall_at_10']:.1f} / {100 * facts['code_recall_at_10']:.1f}"],
        ["exact search agrees with numpy, %", f"{100 * facts['exact_equals_numpy']:.1f}"],
        ["memory after a tenth / half / all of the writing, MB",
         f"{trace[0]:.0f} / {trace[len(trace) // 2 - 1]:.0f} / {trace[-1]:.0f}"],
        ["peak memory: start / written / indexed / searched, MB",
         f"{memory['before']:.0f} / {memory['written']:.0f} / {memory['built']:.0f} / "
         f"{memory['searched']:.0f}"],
    ]  # fmt: skip
    if photos := facts.get("photos"):
        rows += [
            ["photos sent through the full path", f"{photos['photos']:,}"],
            ["photos a second (a processor second)",
             f"{photos['per_s']:.1f} ({photos['per_cpu_s']:.1f})"],
            ["photos that are there already, a second", f"{photos['checked_again_per_s']:.0f}"],
        ]  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--photos", type=int, default=10_000, help="at most; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to build; default: a temporary one")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        facts = run(
            arguments.rows, arguments.dim, arguments.queries, arguments.photos, Path(folder)
        )
    facts |= {
        "version": __version__, "machine": platform.machine(), "cores": os.cpu_count(),
        "threads": arguments.threads, "clock": "wall; processor time where it says so",
        "load": os.getloadavg()[0],
    }  # fmt: skip
    note = (
        f"LanceDB on local disk; {facts['dim']} floats and {BITS} bits a row, raw and purified; "
        f"{arguments.queries} queries, top 10; {facts['cores']} cores, shared with other programs "
        f"(load {facts['load']:.1f})."
    )
    result = {"columns": ["", "measured"], "rows": table(facts), "note": note, "facts": facts}
    write_atomic(arguments.out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result["rows"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
