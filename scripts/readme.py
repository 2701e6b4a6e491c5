"""Put measured numbers into README.md and docs: between markers, from result files.

    python scripts/readme.py          rewrite the marked blocks
    python scripts/readme.py --check  exit 1 if a block does not agree with its result file

A block looks like ``<!-- table: results/demo.json -->`` ... ``<!-- end -->``; of a file with
several tables, ``results/certified.json#curve`` names one.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def demo_table(results: dict) -> str:
    """The table of ``pair demo``: percentages without and with PAIR."""
    lines = [
        "| percent | undefended | attacked | PAIR | attacked | certified | attacked |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for part in results["parts"]:
        lines.append(f"| **{part['title']}** | | | | | | |")
        for row in part["rows"]:
            cells = (figure(value) for key, value in row.items() if key != "name")
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    facts = results["facts"]
    lines += [
        "",
        f"`pair demo --seed {facts['seed']}`, {facts['seconds']} s on {facts['threads']} CPU "
        f"cores. PAIR: the features of {facts['draws']} purifications of a picture, averaged.",
    ]
    return "\n".join(lines) + "\n"


def rows_table(results: dict) -> str:
    """Any result file with ``columns``, ``rows`` and an optional ``note``."""
    columns = results["columns"]
    lines = [f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    for row in results["rows"]:
        cells = (v if isinstance(v, str) else figure(v) for v in row)
        lines.append(f"| {' | '.join(cells)} |")
    if note := results.get("note"):
        lines += ["", note]
    return "\n".join(lines) + "\n"


def tables(folder: Path) -> str:
    """Every table of a folder of ``pair bench report``, in the order of the scenarios."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    order = {"leaderboard": "0", "alpha": "u", "ladder": "v"}
    found.sort(key=lambda r: order.get(r.get("scenario", "leaderboard"), r.get("scenario", "")))
    parts = [f"### {r.get('title', 'Leaderboard')}\n\n{rows_table(r)}" for r in found]
    return "\n".join(parts)


def table(results: dict) -> str:
    return demo_table(results) if "parts" in results else rows_table(results)


def refreshed(text: str) -> str:
    """``text`` with every marked block rendered from its result file."""

    def fill(match: re.Match[str]) -> str:
        name, _, part = match.group(2).partition("#")
        source = ROOT / name
        if source.is_dir():
            return f"{match.group(1)}{tables(source)}{match.group(3)}"
        if not source.is_file():
            sys.exit(f"{name} is missing: run the command that makes it")
        results = json.loads(source.read_text())
        if part:
            results = results["tables"][part]
        return f"{match.group(1)}{table(results)}{match.group(3)}"

    return BLOCK.sub(fill, text)


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        fresh = refreshed(text)
        if fresh != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(fresh)
    for path in stale:
        print(f"{path}: {'does not agree with its result files' if check else 'rewritten'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
