"""One table from the files of ``adaptive.py``: means over keywords with intervals, and S1-S12."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import torch

from pair.attacks import sanity
from pair.files import write_atomic
from pair.retrieval.statistics import summarise


def merge(folder: Path, out: Path) -> None:
    found = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    files = [f for f in found if f.get("checks") is not None]
    if not files:
        raise SystemExit(f"{folder} has no finished keyword")
    # Keywords that were begun with --runs take part in the rows that they have.
    partial = [f for f in found if f.get("checks") is None and f.get("only")]
    every = [*files, *partial]
    if len({json.dumps(f["facts"]["models"]) for f in every}) > 1:
        raise SystemExit(f"the keywords in {folder} were measured with different models")
    rows = []
    for name in sorted({group(n) for f in files for n in f["runs"]}, key=order):
        curves = [[r["points"] for n, r in f["runs"].items() if group(n) == name] for f in every]
        curves = [runs for runs in curves if runs]
        for i in range(len(curves[0][0])):
            steps, gradients = (curves[0][0][i][k] for k in ("steps", "gradients"))
            cells = [interval([[c[i][figure] for c in runs] for runs in curves])
                     for figure in ("share", "any")]  # fmt: skip
            if steps:
                last = i == len(curves[0][0]) - 1
                rows.append([name, f"{steps:,}", f"{gradients:,}", *cells,
                             unfinished(every, name) if last else ""])  # fmt: skip
    keywords = [f["facts"]["keyword"] for f in files]
    table = {
        "columns": [
            "attack",
            "steps",
            "gradients",
            "share of ads in top 10, %",
            "any ad, %",
            "still improving",
        ],
        "rows": rows,
        "note": (
            f"Keywords {', '.join(keywords)}; {only(partial)}10 advertisements, 5 held-out "
            "queries each, 5 fresh purifications per picture; 736 photos. A gradient is that of "
            "one picture under one mask; PAIR's curves draw "
            f"{files[0]['facts']['carriers per update']} of the ten "
            "pictures per step. In brackets: 95 % bootstrap interval over keywords and draws "
            "(few keywords: read it as a range). Without a patch the shares are those of "
            f"{unattacked(files)}. Still improving: in how many runs the last fifth of the steps "
            "brought 1 % of the gain or more (S8), so that more steps would do more."
        ),
        "facts": {k: v for k, v in files[0]["facts"].items() if k not in ("keyword", "masks")},
        "tables": {"checks": checks(files, partial)},
    }
    write_atomic(out, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())


def only(partial) -> str:
    """Which rows have more keywords than the others."""
    if not partial:
        return ""
    names = ", ".join(f["facts"]["keyword"] for f in partial)
    rows = sorted({group(n) for f in partial for n in f["runs"]}, key=order)
    return f"also {names} in the rows {' and '.join(f'“{r}”' for r in rows)}; "


def group(name: str) -> str:
    """Runs of one row: the known masks are pooled."""
    return "known mask, Adam" if name.startswith("known mask") else name


def order(name: str) -> tuple[int, int, str]:
    starts = ("undefended", "known mask", "PAIR, TTH", "PAIR, Adam", "PAIR, BPDA", "whole")
    return next(i for i, s in enumerate(starts) if name.startswith(s)), len(name), name


def unfinished(files, name: str) -> str:
    """In how many runs of a row the loss was still falling at the end."""
    losses = [r["losses"] for f in files for n, r in f["runs"].items()
              if group(n) == name and "losses" in r]  # fmt: skip
    falling = [sanity.s8_converged(curve).passed is False for curve in losses]
    return f"{sum(falling)} of {len(falling)}" if falling else "–"


def interval(values: list[list[list[float]]]) -> str:
    """``values[keyword][run][draw]`` in [0, 1]."""
    flat = [v for runs in values for draws in runs for v in draws]
    groups = [k for k, runs in enumerate(values) for draws in runs for _ in draws]
    found = summarise(torch.tensor(flat), groups, seed=0).macro
    return f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def unattacked(files) -> str:
    text = []
    for which, name in (("bare", "undefended, Adam"), ("PAIR", "PAIR, Adam, EOT-1")):
        value = mean(mean(f["runs"][name]["points"][0]["share"]) for f in files)
        text.append(f"{100 * value:.1f} % ({which})")
    return " and ".join(text)


def checks(files, partial=()) -> dict:
    """S1 to S12: in how many keywords each was passed; S2 and S3 over all of them."""

    def last(f, name):
        return mean(f["runs"][name]["points"][-1]["share"])

    broken = [f for f in (*files, *partial) if "undefended, Adam" in f["runs"]]
    known = [last(f, n) for f in broken for n in f["runs"] if n.startswith("known mask")]
    bare = mean(last(f, "undefended, Adam") for f in broken)
    curve = [[mean(f["runs"]["PAIR, Adam, EOT-1"]["points"][i]["share"]) for f in files]
             for i in range(len(files[0]["runs"]["PAIR, Adam, EOT-1"]["points"]))]  # fmt: skip
    together = {"S2": sanity.s2_known_mask(known, bare), "S3": sanity.s3_monotone(curve)}
    rows = []
    for name, title in sanity.TITLES.items():
        if name in together:
            check = together[name]
            found = [(check.passed, check.value, check.note)]
        else:
            found = [(c["passed"], c["value"], c["note"]) for f in files for c in f["checks"]
                     if c["name"] == name]  # fmt: skip
        passed = sum(p is True for p, _, _ in found)
        values = [v for _, v, _ in found if v is not None]
        if values:
            low, high = min(values), max(values)
            span = f"{low:.3g}" if len(values) == 1 else f"{low:.3g} to {high:.3g}"
        else:
            why = {note for _, _, note in found} - {"", "not measured"}
            span = f"not measured: {', '.join(sorted(why))}" if why else "not measured"
        rows.append([name, title, f"{passed} of {len(found)}", span])
    limits = "known masks against undefended - 0.10" if known else ""
    return {
        "columns": ["check", "says", "passed", "value"],
        "rows": rows,
        "note": f"Values as `pair.attacks.sanity` defines them ({limits}: {bare - 0.1:.3f}).",
    }
