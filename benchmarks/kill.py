"""kill -9 at random points of ``pair index add``, with two writers: what is left each time.

    python benchmarks/kill.py --rounds 50 --out results/kill.json

The rounds are those of ``tests/guard/test_kill.py`` (run from a checkout): in each, two processes
add the same twenty pictures to one collection and are killed at a moment drawn at random. After
each, every row that a writer had reported must be there, once, and the collection must open and
search; at the end the rest is added. The first violation stops the run with its sentence, and no
file is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from pair import __version__
from pair.files import write_atomic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "guard"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from test_kill import Launcher, run_rounds

    launcher, began = Launcher(), time.time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            facts = run_rounds(Path(folder), launcher, arguments.rounds, arguments.seed)
    finally:
        launcher.process.kill()
        launcher.process.wait()
    rows = [
        ["rounds, with two writers each", str(arguments.rounds)],
        ["writers killed", str(facts["killed"])],
        ["of these after their first report and before their last", str(facts["midway"])],
        ["rows that had been reported by a writer", f"{facts['promised']:,}"],
        ["of these lost", "0"],
        ["rows that are there twice", "0"],
        ["collections that did not open or search afterwards", "0"],
        ["rows at the end, after the rest was added", f"{facts['pictures']:,}"],
    ]
    facts |= {
        "rounds": arguments.rounds, "seed": arguments.seed, "version": __version__,
        "seconds": round(time.time() - began), "load": os.getloadavg()[0],
    }  # fmt: skip
    result = {"columns": ["", "measured"], "rows": rows, "facts": facts}
    write_atomic(arguments.out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
