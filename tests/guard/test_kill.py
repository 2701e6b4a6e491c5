"""kill -9 at random points of `pair index add`, with two writers on one collection.

Every row that a writer has reported must be there afterwards, once, and the collection must open,
search, and take the rest. Disk full and missing rights: one sentence, and nothing is lost.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from collections_tiny import draw, save_models

from pair.guard.collection import Collection
from pair.guard.models import Models

pytest.importorskip("lancedb")

# Imports once what takes seconds, then forks for each command; LanceDB itself (which has threads)
# is imported in the child. A line on stdin: {"out": file, "arguments": [...]}; answers its pid.
LAUNCHER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import pair.cli, pair.guard.collection, pair.guard.models
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with open(job["out"], "wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.argv = ["pair", *job["arguments"]]
        code = 1
        try:
            pair.cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(pid, flush=True)
"""


class Launcher:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, out: Path, *arguments: str) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"out": str(out), "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    made = Launcher()
    yield made
    made.process.kill()
    made.process.wait()


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def effort(pid: int) -> int:
    """Processor time so far: what moves as long as a process does not hang, however slow it is."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended, or there is no such file here
        return -1
    return int(fields[11]) + int(fields[12])


def acknowledged(out: Path) -> list[str]:
    """Ids in whole lines of a writer's report."""
    text = out.read_text() if out.exists() else ""
    ids = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        with contextlib.suppress(ValueError):
            ids += [row["id"] for row in json.loads(line).get("committed", [])]
    return ids


def stored(collection: Collection) -> Counter:
    return Counter(r.id for part in collection.store.rows() for r in part)


def run_rounds(
    tmp_path: Path, launcher: Launcher, rounds: int, seed: int, kills: int = 0
) -> dict[str, int]:
    """So many rounds, and more until ``kills`` writers died: a fast one may end unharmed."""
    rng = random.Random(seed)
    names = save_models(tmp_path / "models")
    models = Models.load(**names)
    collection = Collection.create(str(tmp_path / "c"), models)
    promised: set[str] = set()
    killed = midway = pictures = 0
    for number in itertools.count():
        if number >= rounds and (killed >= kills or number >= 4 * rounds):
            break
        folder = tmp_path / "photos" / f"{number:02d}"
        for i in range(20):
            draw(folder / f"{i:02d}.png", 1000 * number + i)
        pictures += 20
        writers = []
        for w in range(2):
            out = tmp_path / f"out-{number}-{w}"
            pid = launcher.start(
                out, "index", "add", collection.uri, str(folder), "--json",
                "--commit-rows", "4", "--batch-size", "2", "--threads", "1",
            )  # fmt: skip
            # At the n-th report, or some time after the start, or in the tidying up at the end.
            writers.append([pid, out, rng.randrange(-1, 6), rng.uniform(0, 0.12), False])
        moved, since = [], time.monotonic()
        while any(alive(w[0]) for w in writers):
            if moved != (efforts := [effort(w[0]) for w in writers]):
                moved, since = efforts, time.monotonic()
            assert time.monotonic() < since + 120, "a writer hangs"
            for writer in writers:
                pid, out, reports, pause, done = writer
                lines = out.read_bytes().count(b"\n") if out.exists() else 0
                if not done and alive(pid) and lines >= reports:
                    time.sleep(pause + (rng.uniform(0, 3) if reports < 0 else 0))
                    midway += 0 < lines < 6
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
                    writer[4] = True
            time.sleep(0.002)
        for _, out, *_ in writers:
            promised |= set(acknowledged(out))
        found = stored(Collection.open(collection.uri, models))
        lost = promised - set(found)
        assert not lost, f"round {number}: {len(lost)} acknowledged rows are gone"
        assert max(found.values(), default=1) == 1, f"round {number}: a row twice"
        assert collection.search_text("a red photo", 3) or not found
        print(f"round {number}: {killed} killed, {len(promised)} rows promised", flush=True)
    report = collection.add(tmp_path / "photos")
    assert report.failed == 0 and len(collection) == pictures
    assert set(stored(collection).values()) == {1}
    assert collection.add(tmp_path / "photos").added == 0
    counts = {"killed": killed, "midway": midway, "promised": len(promised)}
    return {**counts, "pictures": pictures}


def test_kill_nine(tmp_path, launcher):
    facts = run_rounds(tmp_path, launcher, 4, seed=1, kills=6)
    assert facts["killed"] >= 6 and facts["promised"] > 0, facts


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kill_nine_fifty_times(tmp_path, launcher):
    facts = run_rounds(tmp_path, launcher, 50, seed=2)
    print(facts)
    assert facts["killed"] >= 80 and facts["midway"] >= 30, facts


# -- no room, no rights ----------------------------------------------------------------------

LIMITED = """
import resource, sys
import pair.cli
limit = int(sys.argv[1])
sys.argv = ["pair", *sys.argv[2:]]
import lancedb, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
pair.cli.main()
"""


def test_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    names = save_models(tmp_path / "models")
    made = Collection.create(str(tmp_path / "c"), Models.load(**names))
    for i in range(8):
        draw(tmp_path / "a" / f"{i}.png", i)
    for i in range(100):
        draw(tmp_path / "b" / f"{i}.png", 100 + i)
    made.add(tmp_path / "a")
    done = subprocess.run(
        # No file may grow beyond this many bytes: the system's answer is that of a full disk.
        [sys.executable, "-c", LIMITED, "9000", "index", "add", made.uri, str(tmp_path / "b"),
         "--commit-rows", "100", "--batch-size", "50"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("pair: cannot write to the collection"), done.stderr
    assert "File too large" in done.stderr and len(done.stderr.splitlines()) == 1
    assert len(made) == 8 and len(made.search_text("a red photo", 20)) == 8
    assert made.add(tmp_path / "b").added == 100 and len(made) == 108  # when there is room again


def test_missing_rights_are_one_sentence(tmp_path, monkeypatch):
    names = save_models(tmp_path / "models")
    models = Models.load(**names)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot (open|create) the collection .*Not a directory"):
        Collection.create(str(tmp_path / "file" / "c"), models)
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OSError, match=r"cannot (open|create) .*Permission denied"):
        Collection.create(str(tmp_path / "closed" / "c"), models)
    made = Collection.create(str(tmp_path / "c"), models)
    draw(tmp_path / "a" / "0.png", 0)
    for folder in (tmp_path / "c").rglob("*"):
        if folder.is_dir():
            folder.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot write to the collection .*Permission denied"):
        made.add(tmp_path / "a")
    for folder in (tmp_path / "c").rglob("*"):
        if folder.is_dir():
            folder.chmod(0o700)
    assert made.add(tmp_path / "a").added == 1
