"""The figures: trade-off, curves over area, gradients, uploads and mask ratio, the feature map."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from pair.bench.scenario import Scenario
from pair.bench.tables import Line, Table

BLUE, RED, GREEN, GREY = "#2b6cb0", "#c2352b", "#1b7f4b", "#8a929a"
COLOURS = (BLUE, RED, GREEN, "#b26a00", "#6b46c1", "#0f766e", "#9d174d", "#4d7c0f")


def _library() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError(
            f"figures need matplotlib ({error}): pip install 'pair-retrieval[figures]'"
        ) from error
    return plt


def _png(plt: Any, figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    # No date inside: the same numbers give the same file.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _column(table: Table, key: str, scenario: Scenario) -> list[tuple[str, Any]]:
    at = [c.key for c in scenario.columns].index(key)
    return [(label, values[at]) for label, values in table.rows]


def trade_off(table: Table, scenario: Scenario) -> bytes:
    """Figure 1: clean quality against the success of the adaptive attack, ours and the paper's."""
    plt = _library()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    named: list[dict[str, tuple[float, float]]] = [{}, {}]
    clean = dict(_column(table, "clean", scenario))
    attack = dict(_column(table, "adaptive.irrelevant", scenario))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(clean)}
    for label, colour in colours.items():
        x, y = clean[label], attack[label]
        if x.mean is not None and y.mean is not None:
            face = "none" if y.grey else colour
            panels[0].errorbar(x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]],
                               yerr=[[y.mean - y.low], [y.high - y.mean]], fmt="o",
                               color=colour, mfc=face, lw=0.8)  # fmt: skip
            named[0][label] = x.mean, y.mean
        if x.printed and x.printed[-1] is not None and y.printed[-1] is not None:
            panels[1].plot(x.printed[-1], y.printed[-1], "s", color=colour)
            named[1][label] = x.printed[-1], y.printed[-1]
    titles = (f"measured here ({table.facts['scale']})", "the paper, MSCOCO")
    metrics = ("clean P@10 or R@10, %", "clean R@10, %")
    for panel, title, metric in zip(panels, titles, metrics, strict=True):
        panel.set(title=title, xlabel=f"{metric}  (right is better)")
        panel.set_ylim(-5, 105)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("irrelevant R@10, adaptive, %  (lower is better)")
    figure.tight_layout()  # labels are placed by their size
    for panel, points in zip(panels, named, strict=True):
        for label, text in _labels(panel, points).items():
            text.set_color(colours[label])
    return _png(plt, figure)


def _labels(panel: Any, points: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """A name beside each point, where it hides no other name or point and stays in the panel."""
    places = [(x, y, side) for y in (4, -11, 14, -21, 24, -31, 34, -41)
              for x, side in ((5, "left"), (-5, "right"))]  # fmt: skip
    inside = panel.get_window_extent()
    spots = panel.transData.transform(list(points.values())) if points else []
    made: dict[str, Any] = {}
    taken: list[Any] = []
    for label, point in points.items():
        text = panel.annotate(label, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
        for x, y, side in places:
            text.set(position=(x, y), ha=side)
            box = text.get_window_extent()
            covers = box.count_overlaps(taken) or box.count_contains(spots)
            if not covers and inside.x0 <= box.x0 and box.x1 <= inside.x1:
                break
        taken.append(text.get_window_extent())
        made[label] = text
    return made


def _over(rows: list[tuple[float, dict[str, Any]]], label: str, scale: str = "linear") -> bytes:
    plt = _library()
    figure, axis = plt.subplots(figsize=(6, 4))
    names = list(dict.fromkeys(n for _, values in rows for n in values))
    for i, name in enumerate(names):
        points = [(x, v[name]) for x, v in rows if name in v and v[name].mean is not None]
        if not points:
            continue
        xs, ys = [x for x, _ in points], [v.mean for _, v in points]
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(xs, ys, "o-", color=colour, label=name, ms=4)
        axis.fill_between(xs, [v.low for _, v in points], [v.high for _, v in points],
                          color=colour, alpha=0.12)  # fmt: skip
    axis.set_xscale(scale)
    axis.set(xlabel=label, ylabel="%", ylim=(-5, 105))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return _png(plt, figure)


def by_area(table: Table, scenario: Scenario) -> bytes:
    """Table 4's squares as curves over the area of the patch."""
    sizes = {r.label: float(r.attack["size"]) for r in scenario.rows
             if "size" in r.attack and r.label.startswith("square")}  # fmt: skip
    titles = [c.title for c in scenario.columns]
    rows = [
        (100 * sizes[label] ** 2, dict(zip(titles, values, strict=False)))
        for label, values in table.rows
        if label in sizes
    ]
    return _over(rows, "area of the patch, % of the picture")


def by_ratio(table: Table, scenario: Scenario) -> bytes:
    """The mask-ratio sweep."""
    ratios = {r.label: float(r.options["rule"]["ratio"]) for r in scenario.rows}
    titles = [c.title for c in scenario.columns]
    rows = [
        (ratios[label], dict(zip(titles, values, strict=False))) for label, values in table.rows
    ]
    return _over(rows, "share of the tokens hidden in the first pass")


def by_gradients(table: Table, scenario: Scenario) -> bytes:
    """The ladder: success over the number of gradients, one line per rung."""
    plt = _library()
    figure, axis = plt.subplots(figsize=(8, 4.6))
    curves: dict[str, list[tuple[int, float]]] = {}
    floors: dict[str, float] = {}
    for label, values in table.rows:
        count, share = values[2].text.replace(",", ""), values[3].mean
        if share is None or not count.isdigit():
            continue
        if label.endswith("no gradient"):
            floors[label] = share
        else:
            curves.setdefault(label, []).append((max(int(count), 1), share))
    for i, (label, points) in enumerate(curves.items()):
        style = "o-" if len(points) > 1 else "D"
        axis.plot(*zip(*points, strict=True), style, color=COLOURS[i % len(COLOURS)], ms=4,
                  label=label)  # fmt: skip
    if floors:
        best = max(floors, key=lambda n: floors[n])
        axis.axhline(floors[best], color=GREY, ls="--", lw=1, label=f"floor: {best}")
    axis.set_xscale("log")
    axis.set(xlabel="gradients spent on the patch", ylim=(-5, 105),
             ylabel="share of pictures in the top 10, %")  # fmt: skip
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, loc="upper left")
    return _png(plt, figure)


def by_uploads(lines: list[Line]) -> bytes | None:
    """Best of n uploads, one line per keyword."""
    found = [x for x in lines if x["status"] == "done" and "curve" in x["result"]]
    if not found:
        return None
    plt = _library()
    figure, axis = plt.subplots(figsize=(6, 4))
    for i, line in enumerate(found):
        curve = {int(n): 100 * v for n, v in line["result"]["curve"].items()}
        axis.plot(list(curve), list(curve.values()), "o-", label=line["unit"],
                  color=COLOURS[i % len(COLOURS)])  # fmt: skip
    axis.set_xscale("log")
    axis.set(xlabel="uploads of one picture", ylabel="in the top 10 at least once, %",
             ylim=(-5, 105))  # fmt: skip
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return _png(plt, figure)


def maps(lines: list[Line]) -> bytes | None:
    """Figure 5: the map before and after."""
    found = [x for x in lines if x["status"] == "done" and "maps" in x["result"]]
    if not found:
        return None
    plt = _library()
    both = found[0]["result"]["maps"]
    figure, panels = plt.subplots(1, len(both), figsize=(5 * len(both), 4.4))
    colours = {"photos": "#c9cdd2", "texts with the keyword": "#6b46c1",
               "attacked pictures": "#d69e2e"}  # fmt: skip
    for panel, (name, entry) in zip(panels, both.items(), strict=True):
        for group in ("photos", "texts with the keyword", "attacked pictures"):
            points = entry["points"][group]
            panel.scatter(*zip(*points, strict=True), s=14, color=colours[group], label=group)
        panel.set(title=f"{name}: distance {entry['distance']:.2f}", xticks=[], yticks=[])
    panels[0].legend(fontsize=8)
    figure.suptitle(f"keyword {found[0]['unit']!r}", fontsize=10)
    return _png(plt, figure)


def drawn(scenario: Scenario, table: Table | None, lines: list[Line]) -> dict[str, bytes]:
    """Every figure that these results allow: name -> PNG."""
    made: dict[str, Callable[[], bytes | None]] = {}
    if scenario.kind == "map":
        made["map"] = lambda: maps(lines)
    if table is not None and table.rows:
        if scenario.name == "table1":
            made["trade-off"] = lambda: trade_off(table, scenario)
        elif scenario.name == "table4":
            made["area"] = lambda: by_area(table, scenario)
        elif scenario.name == "alpha":
            made["ratio"] = lambda: by_ratio(table, scenario)
        elif scenario.kind == "ladder":
            made["gradients"] = lambda: by_gradients(table, scenario)
            made["uploads"] = lambda: by_uploads(lines)
    out = {}
    for name, draw in made.items():
        if (picture := draw()) is not None:
            out[f"{scenario.name}-{name}"] = picture
    return out
