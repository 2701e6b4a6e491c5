"""Running a grid: what is left, what it will cost, then cell by cell until everything is done."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from pair.attacks.cost import halved_steps, measure
from pair.attacks.tth import TTHConfig
from pair.bench import codes, ladder, noise, panels, text
from pair.bench.grid import Bench, Cell
from pair.bench.ladder import MASKS
from pair.bench.models import CERTIFIED

Say = Callable[[str], None]
# Kind of scenario and mode -> the function that measures such a cell.
WORK: dict[tuple[str, str], Callable[[Bench, Cell], tuple[dict[str, Any], dict[str, Any]]]] = {
    ("text", "clean"): text.clean,
    ("text", "nonadaptive"): text.attacked,
    ("text", "adaptive"): text.attacked,
    ("hash", "clean"): codes.clean,
    ("hash", "nonadaptive"): codes.attacked,
    ("hash", "adaptive"): codes.attacked,
    ("noise", "clean"): text.clean,
    ("noise", "adaptive"): noise.attacked,
    ("ladder", "clean"): text.clean,
    ("ladder", "adaptive"): ladder.rung,
    ("panels", "panel"): panels.panel,
    ("map", "panel"): panels.feature_map,
}


@dataclass
class Outcome:
    """Cells finished by this call, those found finished, and (title, message) of failures."""

    done: int = 0
    found: int = 0
    failed: list[tuple[str, str]] | None = None


def compute(bench: Bench, cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    work = WORK.get((bench.scenario.kind, cell.mode))
    if work is None:
        known = sorted(m for k, m in WORK if k == bench.scenario.kind)
        raise ValueError(f"mode {cell.mode!r} is unknown here: use one of {', '.join(known)}")
    return work(bench, cell)


def run(
    bench: Bench,
    say: Say = lambda text: None,
    *,
    only: str = "",
    retry: bool = False,
    wait: float = 1.0,
) -> Outcome:
    """Finish every cell whose label contains ``only``; a failed one is recorded, not raised.

    Cells that another process is working on are waited for. ``retry`` measures recorded failures
    again (a missing model that has appeared since does so by itself: it changes the key).
    """
    cells = [(c, bench.key(c)) for c in bench.cells() if only in c.row.label]
    outcome = Outcome(failed=[])
    waiting = cells
    again = {key for _, key in cells if retry and _failed(bench, key)}
    while waiting:
        busy = []
        for cell, key in waiting:
            known = bench.store.read(key)
            if known is not None and key not in again:
                outcome.found += 1
                continue
            with bench.store.lock(key) as mine:
                if not mine:
                    busy.append((cell, key))
                    continue
                if bench.store.read(key) is not None and key not in again:
                    outcome.found += 1
                    continue
                again.discard(key)
                say(f"{bench.scenario.name}: {cell.title}")
                message = _one(bench, cell, key)
            outcome.done += 1
            if message:
                say(f"failed: {message}")
                assert outcome.failed is not None
                outcome.failed.append((cell.title, message))
        if len(busy) == len(waiting):
            time.sleep(wait)
        waiting = busy
    return outcome


def _failed(bench: Bench, key: str) -> bool:
    record = bench.store.read(key)
    return record is not None and record["status"] == "failed"


def _one(bench: Bench, cell: Cell, key: str) -> str:
    """Measure and store one cell; the message of a failure, "" if there was none."""
    head = {"scenario": bench.scenario.name, "title": cell.title, "facts": bench.facts(cell)}
    began, cpu = time.time(), time.process_time()
    try:
        torch.manual_seed(0)  # nothing should use the global generator; if so, the same way
        result, extra = compute(bench, cell)
        body: dict[str, Any] = {"status": "done", "result": result}
        message = ""
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        body, extra = {"status": "failed", "message": message}, {}
    spent = {
        "seconds": round(time.time() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": bench.settings.device,
        "threads": torch.get_num_threads(),
    }
    bench.store.write(key, {**head, **body, "run": {**spent, **extra}})
    return message


# --- what it will cost ------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Open cells, sample gradients and forward passes of images, and minutes if measured."""

    cells: int
    finished: int
    gradients: int
    forwards: int
    minutes: float | None

    def __str__(self) -> str:
        text = (
            f"{self.cells} cells to do, {self.finished} done; about {self.gradients:,} gradients "
            f"and {self.forwards:,} forward passes of images"
        )
        return text if self.minutes is None else f"{text}, {self.minutes:.1f} minutes here"


def estimate(bench: Bench, only: str = "", timed: bool = True) -> Estimate:
    """Cost of the open cells. Patches that rows share are counted once."""
    todo, finished = [], 0
    for cell in bench.cells():
        if only not in cell.row.label:
            continue
        if bench.store.read(bench.key(cell)) is None:
            todo.append(cell)
        else:
            finished += 1
    gradients = forwards = 0
    seconds = 0.0
    paces: dict[str, float] = {}
    shared: set[str] = set()
    for cell in todo:
        own, static, passes = _amount(bench, cell, shared)
        gradients, forwards = gradients + own + static, forwards + passes
        if timed:
            pace = _pace(bench, cell, paces)
            bare = _pace(bench, replace(cell, row=replace(cell.row, defense="none", options={})),
                         paces)  # fmt: skip
            seconds += own * pace + static * bare + passes * pace / 3
    return Estimate(
        len(todo), finished, gradients, forwards, seconds / 60 if timed else None
    )  # fmt: skip


def _amount(bench: Bench, cell: Cell, shared: set[str]) -> tuple[int, int, int]:
    """(gradients through the defense, gradients of the bare encoder, forward passes)."""
    s, row = bench.settings_of(cell.row), cell.row
    hashing = bench.hashing(row)
    drawn = s.seeds
    if cell.mode == "clean":
        world_size = len(bench.hash.query_files) if hashing else len(bench.text.files)
        views = s.views * (s.views + 1) // 2 if hashing else s.views + 1
        return 0, 0, world_size * (views if row.defense == CERTIFIED else drawn)
    if bench.scenario.kind == "noise":
        return s.steps * s.ads * s.eot, 0, 2 * drawn * s.ads
    if bench.scenario.kind == "ladder":
        return _rung_amount(bench, cell)
    noisy = row.defense.startswith(("pair", "mae"))
    text_steps = s.random_steps if noisy and s.random_steps else s.steps
    few = s.random_ads if noisy and s.random_ads else s.ads
    steps, batch = (s.hash_steps, s.sources) if hashing else (text_steps, few)
    static = s.hash_static * s.sources if hashing else s.static_steps * s.ads
    place = f"{cell.unit} {row.attack}"
    if place in shared:
        static = 0
    shared.add(place)
    if cell.mode != "adaptive":
        return 0, static, 2 * drawn * batch
    if row.defense == CERTIFIED and hashing:
        return s.member_steps * 4 * 3, static, s.member_steps * 4 * 3 * s.views
    if row.defense == CERTIFIED:
        return s.member_steps * batch * 2, static, s.member_steps * batch * (s.views + 1)
    eot = s.eot if noisy else 1
    return steps * batch * eot, static, 5 * drawn * batch + 20 * batch


def _rung_amount(bench: Bench, cell: Cell) -> tuple[int, int, int]:
    s, attack = bench.settings_of(cell.row), cell.row.attack
    kind = attack.get("rung", "curve")
    config = TTHConfig.preset(attack["preset"]) if "preset" in attack else None
    eot = config.eot if config else s.eot
    steps = ladder.steps_of(s, attack)
    if config and config.restarts:
        steps = halved_steps(replace(config, steps=steps))
    whole = steps * s.ads * eot
    if kind == "known":
        return steps * s.ads * MASKS, 0, MASKS * s.ads
    if kind == "unbounded":
        return whole, whole, 3 * s.seeds * s.ads
    if kind == "floor":
        return 0, 0, 60 * 3 * s.selection + 5 * s.seeds * s.ads
    if kind == "uploads":  # its patch belongs to a curve
        return 0, 0, s.uploads * s.ads
    return whole, 0, 5 * s.seeds * s.ads


def _pace(bench: Bench, cell: Cell, paces: dict[str, float]) -> float:
    """Measured seconds per sample gradient through the row's defense; 0 if it cannot be built."""
    row, hashing = cell.row, bench.hashing(cell.row)
    name = f"{hashing} {row.defense} {row.options}"
    if name not in paces:
        try:
            if hashing:
                images = bench.hash.photos[:4]
                features = bench.hash_search(row).victim()[0].features
            else:
                images, search = bench.text.ads[:4], bench.search(row)
                target = search.target(next(iter(bench.text.targets.values())))
                features = search.victim(target)[0].features
            paces[name] = measure(features, images.to(bench.settings.device), repeats=1)
        except (ValueError, OSError, RuntimeError):
            paces[name] = 0.0
    return paces[name]
