"""A tiny grid: random models of 32 pixels, four classes, two or three rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pair.bench.grid import Bench
from pair.bench.scenario import at_scale, load, settings
from pair.bench.store import Store

SCENARIO = """
title = "a small table"
kind = "text"
citation = "nobody, nowhere"
differences = "everything"
datasets = ["one", "two"]
columns = [
    ["clean", "clean"],
    ["adaptive.irrelevant", "irrelevant"],
    ["adaptive.relevant", "relevant"],
]
modes = ["adaptive"]

[smoke]
static_steps = 2
steps = 2
selection = 1

[[rows]]
label = "undefended"
paper.one = [91.5, 94.0, 71.0]

[[rows]]
label = "PAIR"
defense = "pair"
paper.one = [88.5, 2.5, 92.0]
paper.two = [87.5, 1.5, 72.0]

[[rows]]
label = "absent"
defense = "pair"
options = { name = "nowhere" }
"""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def scenario_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "own.toml"
    path.write_text(SCENARIO)
    return path


def bench_at(name: str, root: Path, **changes) -> Bench:
    found = at_scale(load(str(name)), "smoke")
    return Bench(found, settings(found, "smoke", **changes), Store(root))


@pytest.fixture(scope="session")
def finished(scenario_file, tmp_path_factory) -> Bench:
    """The small table, measured once, undisturbed."""
    from pair.bench import runner

    torch.set_num_threads(1)
    bench = bench_at(scenario_file, tmp_path_factory.mktemp("run"))
    bench.outcome = runner.run(bench)
    return bench
