"""The service under load on the loopback, and what it costs over the library.

    python benchmarks/serve.py --minutes 5 --out results/serve.json

1. Overhead: one picture at a time, alternately through the library and through a running service
   (pairs, so that a change of the machine's load meets both); the difference of each pair.
2. Load: ``--clients`` threads send mixed traffic without pause to a service whose limits are set
   so that the queue is always full. Counted are statuses (anything but 200 and the documented 429
   and 503 is an error), latencies of the answered requests, and the resident memory of the
   service's process every second. Memory is judged over the second half: a fitted line says by
   how much it still grows, in MiB for a thousand answers.
3. Stop: SIGTERM in the middle of that traffic. Counted apart: every request that reached the
   service must get its answer (later ones find nobody listening), and the process must end with 0.

The service is a process of its own, ``pair serve``, with the shipped models and a collection of
the embedded photos, made anew in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import httpx
import numpy as np
import torch

from pair import __version__
from pair.data import embedded
from pair.files import write_atomic
from pair.guard.collection import Collection
from pair.guard.models import Models
from pair.images import load_image
from pair.serve.client import Client
from pair.serve.engine import Engine, Work, encoded
from pair.serve.settings import Limits

MIX = (("purify", 4), ("embed", 3), ("text", 2), ("image", 2), ("form", 1), ("broken", 1))
EXPECTED = {"broken": 422}
RAW = {"content-type": "application/octet-stream"}


def start(uri: str, options: list[str]) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "pair", "serve", "--collection", uri, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "serving on" in line:
            break
    else:
        raise SystemExit("the service did not start")
    threading.Thread(target=process.stderr.read, daemon=True).start()  # keep the pipe empty
    url = line.split()[-1]
    with Client(url) as client:
        while not client.ready():
            time.sleep(0.05)
    return process, url


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = np.sort(np.asarray(values)) * 1000
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {name: round(float(np.quantile(ordered, q)), 2) for name, q in at.items()}


def overhead(engine: Engine, url: str, pictures: list[bytes], rounds: int) -> dict:
    """Milliseconds of the library, of the service, and of the difference within each pair."""
    limits = Limits()

    def purify(data: bytes) -> None:
        view = engine.view(engine.picture(data, limits), "purify")
        encoded(engine.compute(Work("purify"), [view])[0], "png")

    def search(data: bytes) -> None:
        view = engine.view(engine.picture(data, limits), "embedding")
        (row,) = engine.compute(Work("embedding", True), [view])
        engine.search(row, "embedding", None, 10, None)

    found = {}
    with httpx.Client(base_url=url, timeout=60, headers=RAW) as http:
        for name, path, library in (
            ("purify", "/purify", purify),
            ("search by picture", "/search/image", search),
        ):
            times: dict[str, list[float]] = {"library": [], "service": []}
            for turn in range(-3, rounds):
                data = pictures[turn % len(pictures)]
                calls = [
                    ("library", lambda d=data, f=library: f(d)),
                    ("service", lambda d=data, p=path: http.post(p, content=d).raise_for_status()),
                ]
                for which, call in calls if turn % 2 else reversed(calls):
                    begin = time.perf_counter()
                    call()
                    if turn >= 0:
                        times[which].append(time.perf_counter() - begin)
            more = [s - b for s, b in zip(times["service"], times["library"], strict=True)]
            found[name] = {
                **{which: quantiles(values) for which, values in times.items()},
                "difference, median": round(1000 * statistics.median(more), 2),
                "pairs": rounds,
            }
    return found


class Traffic:
    """Threads that send until told to stop; what came back, by kind and status."""

    def __init__(self, url: str, pictures: list[bytes], clients: int):
        self.url, self.pictures = url, pictures
        self.statuses: dict[str, Counter[str]] = {name: Counter() for name, _ in MIX}
        self.seconds: dict[str, list[float]] = {name: [] for name, _ in MIX}
        self.open, self.lost, self.late = 0, 0, 0
        self.lock, self.stop, self.leaving = threading.Lock(), threading.Event(), False
        self.threads = [threading.Thread(target=self._run, args=(n,)) for n in range(clients)]
        for thread in self.threads:
            thread.start()

    def _request(self, http: httpx.Client, kind: str, pick: random.Random) -> httpx.Response:
        data = pick.choice(self.pictures)
        if kind == "text":
            words = f"a photo of a {pick.choice(embedded.labels())}"
            return http.post("/search/text", json={"query": words, "k": 10})
        if kind == "form":
            files = [("image", ("x", p)) for p in pick.sample(self.pictures, 4)]
            return http.post("/embed", files=files)
        if kind == "broken":
            return http.post("/purify", content=data[: len(data) // 2], headers=RAW)
        path = {"purify": "/purify", "embed": "/embed", "image": "/search/image?k=5"}[kind]
        return http.post(path, content=data, headers=RAW)

    def _run(self, number: int) -> None:
        pick = random.Random(number)
        kinds, weights = zip(*MIX, strict=True)
        with httpx.Client(base_url=self.url, timeout=90) as http:
            while not self.stop.is_set():
                kind = pick.choices(kinds, weights)[0]
                begin = time.perf_counter()
                try:
                    answer = self._request(http, kind, pick)
                    status = str(answer.status_code)
                except httpx.ConnectError:
                    status = "refused"  # it listens no longer: never accepted
                except httpx.TransportError as error:
                    status = type(error).__name__
                seconds = time.perf_counter() - begin
                with self.lock:
                    if self.leaving and status == "refused":
                        return
                    self.statuses[kind][status] += 1
                    if status == str(EXPECTED.get(kind, 200)):
                        self.seconds[kind].append(seconds)
                if status in ("429", "503"):
                    time.sleep(min(0.2, float(answer.headers["retry-after"])))

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def resident(process: subprocess.Popen) -> float:
    """MiB; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def load(process: subprocess.Popen, url: str, pictures: list[bytes], args) -> dict:
    traffic = Traffic(url, pictures, args.clients)
    memory: list[float] = []
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < 60 * args.minutes:
        time.sleep(1)
        if passed > min(15, 12 * args.minutes):  # after the warm-up
            memory.append(resident(process))
    with traffic.lock:
        statuses = {kind: dict(counts) for kind, counts in traffic.statuses.items()}
        seconds = {kind: list(values) for kind, values in traffic.seconds.items()}
    text = httpx.get(f"{url}/metrics", timeout=60).text
    traffic.leaving = True
    process.send_signal(signal.SIGTERM)
    code = process.wait(120)
    traffic.end()
    answered = sum(len(v) for v in seconds.values())
    late = {k: c - Counter(statuses[k]) for k, c in traffic.statuses.items()}  # of the stop
    batches = re.search(r'\npair_batch_pictures_count{work="purify"} (\S+)', text)
    sizes = re.search(r'\npair_batch_pictures_sum{work="purify"} (\S+)', text)
    half = memory[len(memory) // 2 :]
    slope = float(np.polyfit(range(len(half)), half, 1)[0]) if len(half) > 1 else 0.0
    return {
        "minutes": args.minutes,
        "clients": args.clients,
        "limits": {"queue": args.queue, "requests": args.requests},
        "answered": answered,
        "answered per second": round(answered / (60 * args.minutes), 1),
        "refused (429, 503)": sum(c.get("429", 0) + c.get("503", 0) for c in statuses.values()),
        "errors": _wrong(statuses),
        "statuses": statuses,
        "latency, ms": {kind: quantiles(v) for kind, v in seconds.items() if v},
        "pictures per batch": round(float(sizes[1]) / float(batches[1]), 2)
        if batches and sizes and float(batches[1])
        else None,
        "resident memory, MiB": {
            "every ten seconds": [round(m, 1) for m in memory[::10]],
            "first quarter": round(statistics.median(memory[: max(1, len(memory) // 4)]), 1),
            "third quarter": round(statistics.median(half[: max(1, len(half) // 2)]), 1),
            "last quarter": round(statistics.median(half[-max(1, len(half) // 2) :]), 1),
            "most": round(max(memory), 1),
            "growth per 1,000 answers, second half": round(
                1000 * slope * 60 * args.minutes / max(1, answered), 2
            ),
        },
        "stop": {
            "exit code": code,
            "answered or refused": sum(
                n for c in late.values() for s, n in c.items() if s.isdigit()
            ),
            "errors": _wrong(late),
        },
    }


def _wrong(statuses: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """What should not have happened, by kind: other statuses, and connections that broke."""
    fine = {"200", "429", "503"}
    found = {
        kind: {s: n for s, n in counts.items() if s not in fine | {str(EXPECTED.get(kind, 200))}}
        for kind, counts in statuses.items()
    }
    return {kind: counts for kind, counts in found.items() if counts}


def _count(errors: Mapping[str, Mapping[str, int]], none: str = "no") -> int | str:
    return sum(n for counts in errors.values() for n in counts.values()) or none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/serve.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    files = [path for path, _ in embedded.gallery()[: args.photos]]
    pictures = [path.read_bytes() for path, _ in embedded.queries()[:64]]
    assert all(load_image(data).ndim == 3 for data in pictures)
    threads = ["--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        models = Models.load("clip-small", None, "pair-small")
        collection = Collection.create(f"{folder}/photos.lance", models)
        print(collection.add(*files))
        engine = Engine(models, collection)
        process, url = start(collection.uri, [*threads, "--wait-ms", "0"])
        try:
            cost = overhead(engine, url, pictures, args.pairs)
        finally:
            process.terminate()
            process.wait(60)
        print(json.dumps(cost, indent=1))
        limits = ["--queue", str(args.queue), "--requests", str(args.requests)]
        process, url = start(collection.uri, [*threads, *limits])
        try:
            under = load(process, url, pictures, args)
            busy = os.getloadavg()[1]
        finally:
            process.kill()
        print(json.dumps(under, indent=1))
    rows = [
        [f"{name}, {which}, alone", values[which]["p50"], values[which]["p99"]]
        for name, values in cost.items()
        for which in ("library", "service")
    ]
    for kind, values in under["latency, ms"].items():
        rows.append([f"{kind}, under load", values["p50"], values["p99"]])
    facts = {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "photos": len(files),
    }
    memory, stop = under["resident memory, MiB"], under["stop"]
    results = {
        "columns": ["milliseconds", "p50", "p99"],
        "rows": rows,
        "note": (
            f"{facts['cores']} cores, {args.threads} of them for the models, shared with the "
            f"{args.clients} clients and other programs (load {busy:.1f}). The service cost "
            + " and ".join(f"{v['difference, median']:.0f} ms ({k})" for k, v in cost.items())
            + f" over the library. {args.minutes:g} minutes of load on a queue of {args.queue}: "
            f"{under['answered']:,} requests answered, {under['refused (429, 503)']:,} refused, "
            f"{_count(under['errors'])} errors; resident memory {memory['first quarter']:.0f}, "
            f"{memory['third quarter']:.0f} and {memory['last quarter']:.0f} MiB in the first, "
            f"third and last quarter ({memory['growth per 1,000 answers, second half']:+.1f} MiB "
            "for a thousand answers at the end). Stopped in the middle of it: "
            f"{stop['answered or refused']} requests answered or refused, "
            f"{_count(stop['errors'], 'none')} broken off, exit code {stop['exit code']}."
        ),
        "facts": facts,
        "overhead": cost,
        "load": under,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
