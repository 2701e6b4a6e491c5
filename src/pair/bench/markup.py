"""Tables as Markdown, LaTeX and plain data; ours beside the paper's."""

from __future__ import annotations

from typing import Any

from pair.bench.tables import Table, Value

LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "†": r"$\dagger$",
         "–": "--", "<": r"$<$", ">": r"$>$", "~": r"\textasciitilde{}"}  # fmt: skip


def flat(table: Table) -> tuple[list[str], list[list[tuple[str, Value | None]]]]:
    """Headings and cells; a column that the paper has is followed by the paper's values."""
    columns = [""]
    for title, printed in zip(table.columns, table.with_paper, strict=True):
        columns += [title, "paper"] if printed else [title]
    rows = []
    for label, values in table.rows:
        row: list[tuple[str, Value | None]] = [(label, None)]
        for value, printed in zip(values, table.with_paper, strict=True):
            row.append((str(value), value))
            if printed:
                row.append((value.paper, None))
        rows.append(row)
    return columns, rows


def brief(table: Table) -> tuple[list[str], list[list[tuple[str, Value | None]]]]:
    """:func:`flat` for a narrow screen: clean, irrelevant and (adaptive) relevant, means alone."""
    kept = [
        i
        for i, title in enumerate(table.columns)
        if title.split()[-1] in ("clean", "irrelevant")
        or (title.split()[-1] == "relevant" and "non-adaptive" not in title)
    ]
    if not kept:
        return flat(table)
    rows: list[list[tuple[str, Value | None]]] = [
        [(label, None), *((values[i].shown(interval=False), values[i]) for i in kept)]
        for label, values in table.rows
    ]
    return ["", *(table.columns[i] for i in kept)], rows


def data(table: Table) -> dict[str, Any]:
    """What ``scripts/readme.py`` renders: columns, rows of strings, a note; and the numbers."""
    columns, rows = flat(table)
    columns[0] = "defense" if table.name != "ladder" else "attack"
    numbers: dict[str, list[dict[str, float]]] = {}
    for label, values in table.rows:
        numbers.setdefault(label, []).append(
            {c: round(v.mean, 3) for c, v in zip(table.columns, values, strict=True)
             if v.mean is not None}
        )  # fmt: skip
    return {
        "scenario": table.name,
        "scale": table.facts["scale"],
        "title": table.title,
        "columns": columns,
        "rows": [[text for text, _ in row] for row in rows],
        "note": "\n\n".join(table.notes),
        "numbers": numbers,
    }


def markdown(table: Table) -> str:
    columns, rows = flat(table)
    lines = [f"## {table.title}", "", f"| {' | '.join(columns)} |",
             "|---" + "|--:" * (len(columns) - 1) + "|"]  # fmt: skip
    lines += [f"| {' | '.join(text for text, _ in row)} |" for row in rows]
    for note in table.notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A ``tabular`` without packages but ``xcolor`` (grey values)."""
    columns, rows = flat(table)
    head = " & ".join(escape(c) for c in columns)
    lines = [
        f"% {table.title}",
        rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
        r"\hline",
        rf"{head} \\",
        r"\hline",
    ]
    for row in rows:
        cells = []
        for text, value in row:
            plain = escape(text)
            cells.append(rf"\textcolor{{gray}}{{{plain}}}" if value and value.grey else plain)
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\hline", r"\end{tabular}"]
    lines += [f"% {line}" for note in table.notes for line in note.splitlines()]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)
