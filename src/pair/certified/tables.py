"""Markdown tables of the certified benchmark's records."""

from __future__ import annotations

from typing import Any

import torch

from pair.retrieval.statistics import paired

COLUMNS = ("P", "AP", "R", "CertASR", "no_attack", "CertASR_any", "CertR", "CertAP")
TITLES = ("P@10", "mAP", "R@10", "CertASR@10", "no attack", "any carrier", "CertR@10", "CertmAP")

Record = dict[str, Any]


def main_table(records: list[Record]) -> str:
    """All cells: clean figures and bounds in percent, with 95 % intervals."""
    head = ("patch", "views (hidden)", "fill", "pooling", *TITLES)
    rows = [["-", "-", "-", r["pool"], *_figures(r)] for r in _of(records, "uncertified")]
    for r in _of(records, "certified"):
        views = f"{r['made_views']} ({100 * r['hidden']:.0f} %)"
        rows.append([f"{r['patch']:g}", views, r["fill"], r["pool"], *_figures(r)])
    return _markdown(head, rows)


def fill_table(records: list[Record], keywords: list[str], pool: str = "delta 0") -> str:
    """Paired differences, window fill minus each other fill, in points with intervals."""
    head = ("patch", "views", "window minus", "pooling", "P@10", "mAP", "CertASR@10")
    return _markdown(head, fill_rows(records, keywords, pool))


def fill_rows(records: list[Record], keywords: list[str], pool: str = "delta 0") -> list[list[str]]:
    """Rows of :func:`fill_table`: patch, views, the other fill, pooling, three differences."""
    cells = {(r["patch"], r["views"], r["fill"]): r for r in _of(records, "certified", pool)}
    rows = []
    for (patch, views, fill), other in cells.items():
        own = cells.get((patch, views, "window"))
        if fill == "window" or own is None:
            continue
        figures = []
        for name in ("P", "AP", "CertASR"):
            a, b = (torch.tensor(r["each"][name]) for r in (own, other))
            d = paired(a, b, keywords).micro
            figures.append(f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]")
        rows.append([f"{patch:g}", str(views), fill, pool, *figures])
    return rows


def cost_table(records: list[Record]) -> str:
    """Views per second, numerical slack, evidence and alarm rate of clean hits."""
    head = ("patch", "views", "fill", "views/s", "slack", "drop 50/95/99 %", "alarms on clean hits")
    rows = []
    for r in _of(records, "evidence"):
        drops = " / ".join(f"{v:.2f}" for v in r["drop_quantiles"].values())
        alarms = ", ".join(
            f"{d}: {100 * v:.0f} %" for d, v in r["alarms"].items() if d not in ("0", "inf")
        )
        speed = f"{r['views_per_second']:.0f}"
        row = [f"{r['patch']:g}", str(r["made_views"]), r["fill"], speed, f"{r['slack']:.0e}"]
        rows.append([*row, drops, alarms])
    return _markdown(head, rows)


def query_table(records: list[Record]) -> str:
    """Patched queries: means of :class:`pair.certified.query_side.QueryFigures`."""
    head = ("target", "patch", "views", "diameter", "radius S", "worst S", "mAP", "CertmAP",
            "CertR@10", "union hit", "union size")  # fmt: skip
    rows = []
    for r in _of(records, "query"):
        m = r["means"]
        sizes = [f"{m[n]:.2f}" for n in ("diameter", "radius", "live")]
        rates = [f"{100 * m[n]:.1f}" for n in ("ap", "cert_ap", "cert_recall", "union_hit")]
        row = [r["target"], f"{r['patch']:g}", str(r["made_views"]), *sizes, *rates]
        rows.append([*row, f"{m['union_size']:.1f}"])
    return _markdown(head, rows)


def _of(records: list[Record], kind: str, pool: str | None = None) -> list[Record]:
    return [r for r in records if r["kind"] == kind and (pool is None or r["pool"] == pool)]


def _figures(record: Record) -> list[str]:
    out = []
    for name in COLUMNS:
        interval = record["summary"].get(name)
        if interval is None:
            out.append("none")
        else:
            mean, low, high = (100 * v for v in interval)
            out.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
    return out


def _markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
