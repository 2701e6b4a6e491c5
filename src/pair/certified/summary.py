"""The certified benchmark's records as one result file: tables that pages show, and curves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from pair.certified.tables import fill_rows
from pair.files import write_atomic

Record = dict[str, Any]
Table = dict[str, Any]
CURVE, PARETO = "certified-curve.png", "certified-pareto.png"


def summarise(records: list[Record], keywords: list[str]) -> dict[str, Any]:
    """``facts``, ``environment`` and ``tables`` (name -> columns, rows, note) of a finished run."""
    main = next((r for r in records if r["kind"] == "uncertified"), {})
    built = {
        "pareto": _pareto(records),
        "fills": _fills(records, keywords),
        "curve": _curve(records),
        "variants": _variants(records),
        "attack": _attack(records),
        "evidence": _evidence(records),
        "demotion": _demotion(records),
        "queries": _queries(records),
        "votes": _votes(records),
        "cost": _cost(records),
    }
    return {
        "facts": main.get("facts", {}),
        "environment": main.get("environment", {}),
        "tables": {name: table for name, table in built.items() if table["rows"]},
    }


def save(path: Path, summary: dict[str, Any]) -> None:
    """Write the result file whole or not at all."""
    write_atomic(path, (json.dumps(summary, indent=1) + "\n").encode())


def _pareto(records: list[Record]) -> Table:
    names = ("P", "AP", "R", "no_attack", "CertASR", "CertASR_any", "CertR", "CertAP")
    titles = (
        "P@10",
        "mAP",
        "R@10",
        "no attack",
        "CertASR@10",
        "any carrier",
        "CertR@10",
        "CertmAP",
    )
    rows = [
        [r["pool"], "–", "–", "–", *_percent(r, names)]
        for r in records
        if r["kind"] == "uncertified"
    ]
    for r in _cells(records, "certified"):
        if r["fill"] == "window" and r["pool"].startswith("delta ") and "inf" not in r["pool"]:
            delta = r["pool"].removeprefix("delta ")
            views = f"{r['made_views']} ({100 * r['hidden']:.0f} %)"
            rows.append([f"{r['patch']:g}", views, delta, f"{r['slack']:.0e}", *_percent(r, names)])
    return {
        "columns": ["patch", "views (hidden)", "delta", "slack", *titles],
        "rows": rows,
        "note": f"Percent. {_size(records)} CertASR@10 and the certified columns are bounds on "
        "every patch of that size, at any place; 'no attack' is the same share without any patch.",
    }


def _fills(records: list[Record], keywords: list[str]) -> Table:
    rows = []
    for pool in ("delta 0", "delta 0.2"):
        for patch, views, fill, _, *differences in fill_rows(records, keywords, pool):
            rows.append([patch, views, pool.removeprefix("delta "), fill, *differences])
    return {
        "columns": ["patch", "views", "delta", "generator minus", "P@10", "mAP", "CertASR@10"],
        "rows": rows,
        "note": "Differences in points, window fill minus the other, with 95 % intervals (paired, "
        "keywords resampled): above 0 is better for the generator in P@10 and mAP, below 0 in "
        "CertASR@10.",
    }


def curve_rows(records: list[Record], delta: str) -> list[tuple[float, Record]]:
    """(patch share, record) of the window fill with as many views at every patch size."""
    cells = [
        r
        for r in _cells(records, "certified", f"delta {delta}")
        if r["fill"] == "window" and r["views"] == _curve_views(records)
    ]
    return sorted(((r["patch"], r) for r in cells), key=lambda pair: pair[0])


def _curve(records: list[Record]) -> Table:
    names = ("P", "AP", "no_attack", "CertASR", "CertR", "CertAP")
    rows = []
    for delta in ("0", "0.2"):
        for patch, r in curve_rows(records, delta):
            views = f"{r['made_views']} ({100 * r['hidden']:.0f} %)"
            rows.append([f"{patch:g}", views, delta, *_percent(r, names)])
    titles = ["P@10", "mAP", "no attack", "CertASR@10", "CertR@10", "CertmAP"]
    return {"columns": ["patch", "views (hidden)", "delta", *titles], "rows": rows}


def _attack(records: list[Record]) -> Table:
    rows = []
    attacks = [r for r in records if r["kind"] == "attack"]
    for patch in sorted({r["patch"] for r in attacks}):
        own = [r for r in attacks if r["patch"] == patch]
        bare = [100 * fmean(r["undefended"][n] for r in own) for n in _STAGES]
        rows.append([f"{patch:g}", "undefended", *bare, "none", "–", "–"])
        for delta in own[0]["pools"]:
            pools = [r["pools"][delta] for r in own]
            shares = [100 * fmean(p[n] for p in pools) for n in (*_STAGES, "certified")]
            way = 100 * fmean(p["of_the_way"] for p in pools)
            broken = sum(p["violations"] for p in pools)
            rows.append([f"{patch:g}", f"certified, delta {delta}", *shares, way, str(broken)])
    pairs = sum(r["pairs"] for r in attacks)
    return {
        "columns": ["patch", "search", "no attack", "genuine picture", "attacked", "bound",
                    "of the room used", "beaten"],
        "rows": rows,
        "note": f"Percent of {pairs} (query, carrier) pairs in the top 10, carriers with the "
        "highest bounds. A patch per carrier, white box, through the exact views, begun as a "
        "genuine picture of the keyword at the place with the highest bound. 'beaten' counts "
        "scores above their bound.",
    }  # fmt: skip


def _variants(records: list[Record]) -> Table:
    names = ("P", "AP", "no_attack", "CertASR", "CertR", "CertAP")
    rows = [
        [f"{r['patch']:g}", r["look"], r["rule"], *_percent(r, names)]
        for r in _cells(records, "variant")
    ]
    titles = ["P@10", "mAP", "no attack", "CertASR@10", "CertR@10", "CertmAP"]
    return {
        "columns": ["patch", "encoder sees", "rule, capped by plain", *titles],
        "rows": rows,
        "note": "The same windows throughout. 'mirrored': mean of the scores of each view and of "
        "its mirror image.",
    }


_STAGES = ("clean", "collage", "attacked")


def _evidence(records: list[Record]) -> Table:
    rows = []
    for r in _cells(records, "evidence"):
        if r["fill"] == "window":
            drops = [f"{v:.2f}" for v in r["drop_quantiles"].values()]
            alarms = [100 * v for d, v in r["alarms"].items() if d not in ("0", "inf")]
            rows.append([f"{r['patch']:g}", str(r["made_views"]), *drops, *alarms])
    found: Record = next(iter(_cells(records, "evidence")), {"alarms": {}})
    deltas = [f"alarms at {d}" for d in found["alarms"] if d not in ("0", "inf")]
    return {
        "columns": ["patch", "views", "drop, median", "95 %", "99 %", *deltas],
        "rows": rows,
        "note": "Plain minus worst score of the relevant hits in the plain top 10, no attack; "
        "alarms in percent of them.",
    }


def _demotion(records: list[Record]) -> Table:
    names = ("P", "AP", "R", "CertKept")
    rows = [
        [f"{r['patch']:g}", str(r["made_views"]), *_percent(r, names)]
        for r in _cells(records, "demotion")
        if r["fill"] == "window"
    ]
    return {
        "columns": ["patch", "views", "P@10", "mAP", "R@10", "certain to stay"],
        "rows": rows,
        "note": "Percent, maximum pooling. 'certain to stay': relevant hits that no patch on the "
        "item itself can push out of the top 10.",
    }


def _queries(records: list[Record]) -> Table:
    columns = ["target", "patch", "views", "diameter", "radius S", "worst S", "mAP", "CertmAP",
               "CertR@10", "target mAP", "at most", "union hit", "union size",
               "intersection"]  # fmt: skip
    rows = []
    for r in records:
        if r["kind"] == "query":
            m = r["means"]
            sizes = [f"{m[n]:.2f}" for n in ("diameter", "radius", "live")]
            names = ("ap", "cert_ap", "cert_recall", "target_ap", "cert_target_ap", "union_hit")
            lists = (m["union_size"], m["intersection_size"])
            row = [r["target"], f"{r['patch']:g}", str(r["made_views"]), *sizes]
            rows.append([*row, *(100 * m[n] for n in names), *lists])
    found: Record = next((r["facts"] for r in records if r["kind"] == "query"), {})
    return {
        "columns": columns,
        "rows": rows,
        "note": f"{found.get('queries', 0)} query photos; diameter and radii in chord (CLIP) or "
        "bits (hash), shares in percent.",
    }


def _votes(records: list[Record]) -> Table:
    rows = []
    for r in records:
        if r["kind"] == "votes":
            m = r["means"]
            rates = [100 * m[n] for n in ("ap", "cert_ap", "recall", "cert_recall")]
            row = [r["target"], f"{r['patch']:g}", str(r["made_views"])]
            rows.append([*row, f"{m['radius']:.1f}", *rates])
    return {
        "columns": ["hash network", "patch", "blocks", "bits that can flip", "mAP", "CertmAP",
                    "R@10", "CertR@10"],
        "rows": rows,
    }  # fmt: skip


def _cost(records: list[Record]) -> Table:
    columns = ["patch", "views", "PAIR, ms", "certified, ms", "views/s", "bytes, plain",
               "bytes, certified", "rows", "query, plain ms", "query, certified ms",
               "looked at"]  # fmt: skip
    rows = []
    for r in records:
        if r["kind"] == "cost":
            views = [f"{r['patch']:g}", str(r["views"])]
            times = [r["ms_purify"], r["ms_certify"], r["views_per_second"]]
            sizes = [str(r["bytes_plain"]), str(r["bytes_certified"]), f"{r['rows']:,}"]
            search = [f"{r[n]:.2f}" for n in ("ms_query_plain", "ms_query_certified")]
            looked = f"{r['certified_per_query']:.0f} of {r['items']}"
            rows.append([*views, *times, *sizes, *search, looked])
    return {
        "columns": columns,
        "rows": rows,
        "note": "Per image or query, CPU time of one thread, taken in turns; bytes per item. "
        "'looked at': photos of the gallery that a query certifies when it is the first to ask.",
    }


def figures(records: list[Record], folder: Path) -> list[Path]:
    """Draw the curves over the patch size and the Pareto picture; returns the files."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "drawing curves needs matplotlib: pip install matplotlib, or use --no-figures"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, draw in ((CURVE, _draw_curve), (PARETO, _draw_pareto)):
        figure = pyplot.figure(figsize=(8.4, 3.6), layout="constrained")
        draw(figure, records)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)
        write_atomic(folder / name, data.getvalue())
        made.append(folder / name)
    return made


def _draw_curve(figure: Any, records: list[Record]) -> None:
    left, right = figure.subplots(1, 2)
    for delta, colour in (("0", "tab:blue"), ("0.2", "tab:orange")):
        rows = curve_rows(records, delta)
        sides = [patch for patch, _ in rows]

        def line(axes, name, label, style, rows=rows, sides=sides, colour=colour) -> None:
            values = [r["summary"][name] for _, r in rows]
            axes.plot(sides, [100 * v[0] for v in values], style, color=colour, label=label)
            low, high = ([100 * v[i] for v in values] for i in (1, 2))
            axes.fill_between(sides, low, high, color=colour, alpha=0.12, linewidth=0)

        line(left, "CertASR", f"bound on every patch, delta {delta}", "o-")
        attacks = [r for r in records if r["kind"] == "attack" and delta in r["pools"]]
        for i, side in enumerate(sorted({r["patch"] for r in attacks})):
            own = [r["pools"][delta] for r in attacks if r["patch"] == side]
            for name, mark in (("certified", "_"), ("attacked", "x")):
                what = {"certified": "bound, attacked carriers", "attacked": "strongest attack"}
                label = f"{what[name]}, delta {delta}" if i == 0 else None
                share = 100 * fmean(p[name] for p in own)
                left.plot([side], [share], mark, color=colour, markersize=9, label=label)
        line(right, "AP", f"clean mAP, delta {delta}", "o-")
        line(right, "CertAP", f"certified mAP, delta {delta}", "o--")
    for r in records:
        if r["kind"] == "uncertified":
            right.axhline(100 * r["summary"]["AP"][0], color="grey", linewidth=0.8)
            right.annotate(r["pool"], (0.01, 100 * r["summary"]["AP"][0]), color="grey",
                           fontsize=7, xycoords=("axes fraction", "data"), va="bottom")  # fmt: skip
    left.set_ylabel("carriers in the top 10, %")
    right.set_ylabel("%")
    for axes in (left, right):
        axes.set_xlabel("side of the patch, share of the image")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=6.5)
        axes.grid(alpha=0.3)


def _draw_pareto(figure: Any, records: list[Record]) -> None:
    rows = [r for r in _cells(records, "certified") if r["fill"] == "window"]
    sizes = sorted({r["patch"] for r in rows})
    found = [s for s in sizes if len({r["views"] for r in rows if r["patch"] == s}) > 1] or sizes
    plots = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    place = ("axes fraction", "data")
    for axes, patch in zip(plots, found, strict=True):
        for views in sorted({r["made_views"] for r in rows if r["patch"] == patch}):
            own = [
                (float(r["pool"].removeprefix("delta ")), r["summary"])
                for r in rows
                if (r["patch"], r["made_views"]) == (patch, views)
                and r["pool"].startswith("delta ") and "inf" not in r["pool"]
            ]  # fmt: skip
            own.sort(key=lambda pair: pair[0])
            x, y = ([100 * s[n][0] for _, s in own] for n in ("CertASR", "AP"))
            axes.plot(x, y, "o-", label=f"{views} views")
            for (delta, _), a, b in zip(own, x, y, strict=True):
                axes.annotate(f"{delta:g}", (a, b), fontsize=6)
        for r in records:
            if r["kind"] == "uncertified":
                level = 100 * r["summary"]["AP"][0]
                axes.axhline(level, color="grey", linewidth=0.8)
                label = f"{r['pool']} (no bound)"
                axes.annotate(label, (0.35, level), xycoords=place, color="grey", fontsize=7)
        axes.set_title(f"patches up to {patch:g} of the side", fontsize=9)
        axes.set_xlabel("CertASR@10, %")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    plots[0].set_ylabel("clean mAP, %")


def _cells(records: list[Record], kind: str, pool: str | None = None) -> list[Record]:
    found = [r for r in records if r["kind"] == kind and (pool is None or r["pool"] == pool)]
    return sorted(found, key=lambda r: (r["patch"], r["views"]))


def _curve_views(records: list[Record]) -> int:
    """The number of views for which most patch sizes were measured."""
    cells = {(r["views"], r["patch"]) for r in records if r["kind"] == "certified"}
    counts = [v for v, _ in cells]
    return max(sorted(set(counts)), key=counts.count)


def _percent(record: Record, names: tuple[str, ...]) -> list[float | str | None]:
    """Means in percent; the bound that everything is about comes with its interval."""
    out: list[float | str | None] = []
    for name in names:
        value = record["summary"].get(name)
        if value is None:
            out.append("none")
        elif name in ("CertASR", "AP"):
            mean, low, high = (100 * v for v in value)
            out.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
        else:
            out.append(100 * value[0])
    return out


def _size(records: list[Record]) -> str:
    r = next((r for r in records if r["kind"] == "uncertified"), None)
    if r is None:
        return ""
    f = r["facts"]
    return f"{f['photos']} photos, {len(r['each']['P'])} queries, {f['carriers']} carriers."
