"""Which files become which files, and what of it is done already.

The folder ``out`` mirrors the tree below the *root*: the given folder, or the common parent of
what was given. ``a.jpg`` keeps its name; where the kind changes, the new suffix is appended
(``a.gif`` -> ``a.gif.png``), so two inputs never share an output, also across runs.

An output only ever appears by rename, complete, with a time not before its input's. So an input
is *done* when its output exists and is not older than the input, nor than the last start with
``overwrite``. No list of finished files is needed, and nothing can disagree with one.
``out/purify.json`` records the settings and the root; other ones are refused, so the outputs in
one folder always belong together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pair.files import write_atomic
from pair.images import WRITABLE

RECORD, FAILURES = "purify.json", "failures.jsonl"
FORMATS = {"keep": "", "png": ".png", "jpg": ".jpg", "webp": ".webp"}
# Names that promise an image. Some cannot be read, and are reported instead of overlooked.
SUFFIXES = {*WRITABLE, ".gif", ".tif", ".tiff", ".bmp", ".dib"}
SUFFIXES |= {".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd"}


@dataclass(frozen=True, slots=True)
class Job:
    """One input: its path, its name below the root (with "/"), and its output."""

    source: str
    name: str
    target: str


@dataclass
class Plan:
    """All jobs in order of name, those already done, and what is not an image."""

    root: Path
    out: Path
    jobs: list[Job] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    ignored: int = 0
    unreadable: list[OSError] = field(default_factory=list)  # folders


def output_name(name: str, format: str = "keep") -> str:
    """The output's name for an input that is named like an image; one-to-one.

    >>> output_name("a/b.jpg"), output_name("a/b.jpg", "png"), output_name("b.tif")
    ('a/b.jpg', 'a/b.jpg.png', 'b.tif.png')
    """
    stem, suffix = os.path.splitext(name)
    kind = WRITABLE.get(suffix.lower())
    wanted = FORMATS[format]
    if kind and (not wanted or kind == WRITABLE[wanted]):
        # "b.tif.png" must not collide with what becomes of "b.tif".
        taken = os.path.splitext(stem)[1].lower() in SUFFIXES and output_name(stem, format) == name
        if not taken:
            return name
    return name + (wanted or (suffix.lower() if kind else ".png"))


def make_plan(paths: Iterable[str | os.PathLike[str]], out: Path, format: str = "keep") -> Plan:
    """List the inputs below ``paths`` (files, or folders to walk) without opening any.

    Raises ``ValueError`` if a path does not exist, nothing is found, or an output would replace
    an input.
    """
    given = [Path(os.path.abspath(p)) for p in paths]
    for path in given:
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
    try:
        parents = [p if p.is_dir() else p.parent for p in given]
        root = Path(os.path.commonpath(parents))
    except ValueError as error:  # nothing given, or several drives
        raise ValueError("the inputs have no common folder: purify them one by one") from error
    plan = Plan(root, out)
    found: dict[str, Job] = {}
    for path in given:
        folder = path.is_dir()
        for file in _walk(path, plan) if folder else [str(path)]:
            if folder and not named_like_image(file):
                plan.ignored += 1
                continue
            name = Path(os.path.relpath(file, root)).as_posix()
            found[name] = Job(file, name, str(out / output_name(name, format)))
    if not found:
        others = f" ({plan.ignored} other files)" if plan.ignored else ""
        raise ValueError(f"no image found in {', '.join(map(str, given))}{others}")
    plan.jobs = [found[name] for name in sorted(found)]
    _check_disjoint(plan, given)
    return plan


def named_like_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SUFFIXES


def _walk(folder: Path, plan: Plan) -> Iterator[str]:
    """Files below ``folder`` without what lies in the output; links to folders are not followed."""
    out = os.path.realpath(plan.out)
    for where, folders, names in os.walk(folder, onerror=plan.unreadable.append):
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(where, f)) != out]
        yield from (os.path.join(where, name) for name in names)


def _check_disjoint(plan: Plan, given: list[Path]) -> None:
    """Refuse outputs among the inputs: they would replace originals, or be inputs next time."""
    out = Path(os.path.realpath(plan.out))
    inside = [p for g in given if (p := Path(os.path.realpath(g))) == out or out in p.parents]
    for job in plan.jobs if inside else []:
        target = Path(os.path.realpath(job.target))
        if any(p == target or p in target.parents for p in inside):
            raise ValueError(
                f"{job.target} would land among the inputs: choose an --out beside them"
            )


def find_done(plan: Plan, since: int) -> None:
    """Fill ``plan.done`` with the names whose output is there and current."""
    for job in plan.jobs:
        if not named_like_image(job.source):
            continue  # given by name, has no output: to be reported each time
        try:
            made = os.stat(job.target).st_mtime_ns
            if made >= since and made >= os.stat(job.source).st_mtime_ns:
                plan.done.add(job.name)
        except OSError:
            continue


def settle_record(plan: Plan, settings: dict[str, Any], overwrite: bool, now: int) -> int:
    """Compare ``settings`` with those of earlier runs into ``out`` and store them.

    Returns the time (ns) from which on outputs count. Raises ``ValueError`` if old and new
    outputs would not belong together.
    """
    path = plan.out / RECORD
    try:
        root = Path(os.path.relpath(plan.root, plan.out)).as_posix()
    except ValueError:  # another drive
        root = plan.root.as_posix()
    record = {"format": 1, "input": root, "settings": settings, "since": now if overwrite else 0}
    try:
        old = json.loads(path.read_text())
        earlier = {"input": old["input"], **old["settings"]}
        since = int(old["since"])
    except FileNotFoundError:
        if not overwrite:
            foreign = next((j.target for j in plan.jobs if os.path.lexists(j.target)), None)
            if foreign:
                raise ValueError(
                    f"{foreign} is not from 'pair purify': choose another --out, or --overwrite"
                ) from None
    except (ValueError, KeyError, TypeError) as error:
        if not overwrite:
            raise ValueError(f"{path} is damaged: choose another --out, or --overwrite") from error
    else:
        changed = [k for k, v in {"input": root, **settings}.items() if earlier.get(k) != v]
        if changed and not overwrite:
            raise ValueError(
                f"{plan.out} holds results with another {' and '.join(changed)}: use the same, "
                "another --out, or --overwrite to do everything again"
            )
        if not overwrite:
            return since
    write_atomic(path, (json.dumps(record, indent=2) + "\n").encode())
    return now if overwrite else 0
