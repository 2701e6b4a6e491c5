"""Adding on many machines: a Ray Data job whose workers run the local engine on units of work.

A unit is a shard, or a part of the other paths. Workers open the collection by its uri and load the
models that it names, so the collection and the files must be reachable from every machine. A unit
that is done again (after a failure, or by the next run) finds its rows there: nothing is doubled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pair.guard import ingest, sources
from pair.guard.collection import Collection
from pair.guard.ingest import AddReport
from pair.guard.stores import Row

COUNTS = ("seen", "added", "present", "repeated", "failed")
_WORKER = re.compile(r"^(?!ray\.)[\w.]*(?:Error|Exception): (.+)$", re.M)
PARTS = 4  # units per worker, of paths that are not shards


def _library() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'pair-retrieval[ray]'") from error
    return ray


def units(paths: Sequence[str | os.PathLike[str]], parts: int) -> list[dict[str, Any]]:
    """One unit per shard that is named, and ``parts`` of everything else."""
    named = [p for path in paths for p in sources.expand(os.fspath(path))]
    if missing := [p for p in named if not os.path.exists(p)]:
        raise ValueError(f"no such file or folder: {missing[0]}")
    absolute = [os.path.abspath(p) for p in named]
    shards = [p for p in absolute if p.lower().endswith(".tar") and os.path.isfile(p)]
    rest = [p for p in absolute if p not in set(shards)]
    whole = [{"paths": [p], "number": 1, "of": 1} for p in shards]
    split = [{"paths": rest, "number": i + 1, "of": parts} for i in range(parts)] if rest else []
    return whole + split


class Worker:
    """Lives on one machine; opens the collection once."""

    def __init__(self, uri: str, options: dict[str, Any]):
        self.collection, self.options = Collection.open(uri, device=options.pop("device")), options

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        rows: list[dict[str, str]] = []

        def committed(done: list[Row]) -> None:
            rows.extend({"id": r.id, "uri": r.uri} for r in done)

        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "failures.jsonl"
            report = self.collection.add(
                *unit["paths"], part=(int(unit["number"]), int(unit["of"])), failures=log,
                index=False, committed=committed, **self.options,
            )  # fmt: skip
            failures = log.read_text() if log.exists() else ""
        counts = {name: getattr(report, name) for name in COUNTS}
        return {**counts, "failures": failures, "rows": json.dumps(rows)}


def add_with_ray(
    collection: Collection,
    paths: Sequence[str | os.PathLike[str]],
    *,
    failures: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    commit_rows: int = 256,
    index: bool = True,
    workers: int | None = None,
    committed: Callable[[list[Row]], None] = lambda rows: None,
    progress: Callable[[AddReport], None] = lambda report: None,
    stop: Callable[[], bool] = lambda: False,
) -> AddReport:
    """Like :meth:`Collection.add`, on the Ray cluster that ``ray.init`` finds (or this machine).

    ``workers``: default one per GPU of the cluster with a collection on "cuda", else one per two
    CPUs. ``committed`` and ``progress`` are told after each unit; ``stop`` is asked then too.
    """
    if unnamed := [r for r, m in collection.record["models"].items() if not m["name"]]:
        raise ValueError(f"the {unnamed[0]} has no name: workers could not load it")
    ray = _library()
    with _plain_errors("start"):
        if not ray.is_initialized():
            _knock(os.environ.get("RAY_ADDRESS", ""), ray)
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
    # Progress is told by the caller, in its own words.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    cuda = collection.device.startswith("cuda")
    there = ray.cluster_resources()
    count = workers or max(1, int(there.get("GPU", 0) if cuda else there.get("CPU", 2) // 2))
    options = {"batch_size": batch_size, "commit_rows": commit_rows, "device": collection.device}
    place, _, name = collection.uri.rpartition("#")
    if "://" not in place:
        place = os.path.abspath(place)
    work = units(paths, PARTS * count)
    # A block for each: a unit is what a worker takes. (A repartition would wait for a processor
    # that the workers hold.)
    data = ray.data.from_items(work, override_num_blocks=len(work))
    data = data.map(
        Worker, fn_constructor_args=(f"{place}#{name}", options), num_gpus=1 if cuda else 0,
        num_cpus=1, compute=ray.data.ActorPoolStrategy(size=count),
    )  # fmt: skip
    log = Path(failures) if failures else ingest.default_failures(collection.uri)
    report = AddReport()
    for row in _rows(data):
        for field in COUNTS:
            setattr(report, field, getattr(report, field) + int(row[field]))
        for line in row["failures"].splitlines():
            ingest.append(log, json.loads(line))
            report.failures = log
        committed([Row(r["id"], r["uri"], "") for r in json.loads(row["rows"])])
        progress(report)
        if stop():
            report.stopped = True
            break
    if index and report.added:
        collection.optimise()
    return report


def _knock(address: str, ray: Any) -> None:
    """Ray itself tries for a quarter of an hour to reach a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if not host or "://" in address or not port.isdecimal():
        return  # none, "auto", "local", or a client's address
    # Of this machine Ray takes the outer address.
    for name in (host, ray.util.get_node_ip_address()):
        try:
            socket.create_connection((name, int(port)), 10).close()
            return
        except (OSError, OverflowError):
            pass
        if host not in ("127.0.0.1", "localhost", "::1"):
            break
    raise OSError(f"nobody answers at {address}, see RAY_ADDRESS")


def _rows(data: Any) -> Iterator[dict[str, Any]]:
    with _plain_errors("finish"):
        yield from data.iter_rows()


@contextmanager
def _plain_errors(doing: str) -> Iterator[None]:
    """Ray tells of a failure with the stacks of all processes, and has no common type for those
    of its start: keep the sentence of what was first."""
    try:
        with warnings.catch_warnings():
            # Ray starts programs, it does not go on in a copy of this one.
            warnings.filterwarnings("ignore", message="lancedb fork support")
            yield
    except Exception as error:
        first: BaseException = error
        while (cause := getattr(first, "cause", None) or first.__cause__) is not None:
            first = cause
        # A worker's own error is a line between the stacks; Ray's advice comes after it.
        worker = _WORKER.search(str(error))
        text = worker[1] if worker else str(first).strip() or type(first).__name__
        kind = ValueError if isinstance(first, ValueError) else OSError
        raise kind(f"Ray could not {doing}: {text.splitlines()[-1][:300]}") from error
