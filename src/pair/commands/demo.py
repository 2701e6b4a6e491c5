"""``pair demo``: hijack a real image search and rescue it, live."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json.")] = Path(
        "demo"
    ),
    seed: Annotated[int | None, typer.Option(help="Fix patches and masks; default: fresh.")] = None,
    model: Annotated[str, typer.Option(help="Generator: shipped name or folder.")] = "pair-small",
    draws: Annotated[
        int, typer.Option(min=1, help="Purifications per picture, averaged; the paper has 1.")
    ] = 4,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = all cores.")] = 0,
) -> None:
    """Attack a text search and an image search on real photos, without and with PAIR."""
    import io
    import json
    from dataclasses import asdict, astuple

    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from pair import demo as demonstration
    from pair.files import write_atomic
    from pair.pages import figure, render

    if threads:
        torch.set_num_threads(threads)
    console = Console()

    def say(text: str) -> None:
        console.print(f"[dim]{text}[/dim]")

    out.mkdir(parents=True, exist_ok=True)  # fails now, not after minutes
    outcome = demonstration.run(seed, model, say=say, draws=draws)
    columns = ("undefended", "attacked", "PAIR", "attacked", "certified", "attacked")
    for part in outcome.parts:
        table = Table(
            title=part.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.add_column("percent", min_width=19)
        for name in columns:
            table.add_column(name, justify="right")
        for row in part.rows:
            table.add_row(row.name, *(figure(v) for v in astuple(row)[1:]))
        console.print(table)
    report = out / "report.html"
    write_atomic(report, render("demo", parts=outcome.parts, facts=outcome.facts).encode())
    picture = out / "figure.png"
    buffer = io.BytesIO()
    demonstration.figure(outcome).save(buffer, "PNG")
    write_atomic(picture, buffer.getvalue())
    parts = [{"title": p.title, "rows": [asdict(r) for r in p.rows]} for p in outcome.parts]
    results = {"facts": outcome.facts, "parts": parts}
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_atomic(out / "results.json", text.encode())
    console.print(f"{outcome.facts['seconds']} s, seed {outcome.facts['seed']}")
    console.print(f"open [bold]{report}[/bold] in a browser ({picture} is its short form)")
