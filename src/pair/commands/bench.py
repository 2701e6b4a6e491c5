"""``pair bench``: the tables and figures of the paper, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Measure defenses against attacks: the benchmark.")

Names = Annotated[
    list[str] | None,
    typer.Argument(help="Scenarios: table1 ... table5, alpha, ladder, fig1, fig2, fig5, a .toml."),
]
Scale = Annotated[str, typer.Option(help="smoke, small or paper.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME:FOLDER or NAME/PROTOCOL:FOLDER as of 'pair data list'; may be repeated."
    ),
]
Clip = Annotated[
    str | None,
    typer.Option(
        help="Text-image model: a folder, open_clip:ARCHITECTURE/TAG, open_clip:ARCHITECTURE/FILE "
        "or open_clip:local-dir:FOLDER."
    ),
]
Csq = Annotated[str | None, typer.Option(help="Hash network: a folder.")]
Generator = Annotated[
    str | None,
    typer.Option(
        help="Generator of PAIR: a folder of ours or of transformers' ViTMAE, or Meta's .pth."
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any other setting, KEY=VALUE as in a scenario, such as static_steps=100 or "
        "models.sac-small=FOLDER; may be repeated.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/bench/SCALE.")]


@app.command("list")
def show() -> None:
    """The scenarios, what they measure, and their settings at each scale."""
    from rich.console import Console
    from rich.table import Table

    from pair.bench import scenario

    table = Table(show_edge=False, pad_edge=False)
    for name in ("scenario", "measures", "rows", "small: keywords x pictures x steps"):
        table.add_column(name)
    for name in scenario.NAMES:
        found = scenario.load(name)
        s = scenario.settings(found, "small")
        units = s.units or len(s.keywords)
        size = "" if not found.rows else f"{units} x {s.ads} x {s.steps}"
        table.add_row(name, found.title, str(len(found.rows) or "–"), size)
    Console().print(table)


@app.command()
def run(
    names: Names = None,
    scale: Scale = "small",
    out: Out = None,
    keywords: Annotated[
        int | None, typer.Option(min=1, help="Attack so many keywords or pairs of classes.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the adaptive attack.")] = None,
    ads: Annotated[int | None, typer.Option(min=1, help="Inserted advertisements.")] = None,
    eot: Annotated[
        int | None, typer.Option(min=1, help="Draws of a random defense per step.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Purifications per picture in the evaluation.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Base of all seeds.")] = None,
    data: Data = None,
    clip: Clip = None,
    csq: Csq = None,
    generator: Generator = None,
    changes: Changes = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode photos.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    only: Annotated[str, typer.Option(help="Only rows whose label contains this.")] = "",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure recorded failures again.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost and stop.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Measure scenarios (default: all), cell by cell.

    Stop it at any time; the same command continues where it was. Several
    processes may run it at once on the same folder: each takes the cells that
    no other has.
    """
    import torch
    from rich.console import Console

    from pair.bench import runner, scenario

    torch.set_num_threads(threads)
    console = Console(stderr=True)
    given = {
        "units": keywords, "steps": steps, "ads": ads, "eot": eot, "seeds": seeds, "seed": seed,
        "data": data, "clip": clip, "csq": csq, "generator": generator, "device": device,
        "workers": workers, **scenario.changes(changes or []),
    }  # fmt: skip
    benches = _benches(names, scale, out, given)
    total = 0.0
    for bench in benches:
        cost = runner.estimate(bench, only)
        total += cost.minutes or 0.0
        console.print(f"{bench.scenario.name}: {cost}", highlight=False)
    console.print(f"in all about {total:.0f} minutes", highlight=False)
    if dry_run:
        return
    failed = []
    for bench in benches:
        try:
            with _status(console, bench) as say:
                outcome = runner.run(bench, say, only=only, retry=retry_failed)
        except KeyboardInterrupt:
            console.print("pair: stopped; run the same command again to continue")
            raise typer.Exit(130) from None
        failed += outcome.failed or []
        console.print(
            f"{bench.scenario.name}: {outcome.done} cells measured, {outcome.found} found",
            highlight=False,
        )
    for message in dict.fromkeys(why for _, why in failed):
        first, *more = [title for title, why in failed if why == message]
        rest = f" and {len(more)} more" if more else ""
        console.print(f"failed: {first}{rest}: {message}", highlight=False, markup=False)
    console.print(f"results: {benches[0].store.root}; 'pair bench report' makes the tables")


@app.command()
def report(
    names: Names = None,
    scale: Scale = "small",
    results: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: runs/bench/SCALE.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: RESULTS/report.")] = None,
    keywords: Annotated[
        int | None, typer.Option(min=1, help="As given to 'pair bench run'.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="As given to 'pair bench run'.")] = None,
    ads: Annotated[int | None, typer.Option(min=1, help="As given to 'pair bench run'.")] = None,
    eot: Annotated[int | None, typer.Option(min=1, help="As given to 'pair bench run'.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="As given to 'pair bench run'.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="As given to 'pair bench run'.")] = None,
    data: Data = None,
    clip: Clip = None,
    csq: Csq = None,
    generator: Generator = None,
    changes: Changes = None,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="From the published files in OUT alone, without the run."),
    ] = False,
    figures: Annotated[bool, typer.Option(help="Draw figures (extra 'figures').")] = True,
) -> None:
    """Tables (Markdown, LaTeX, HTML), figures and the leaderboard from finished cells."""
    from rich.console import Console

    from pair.bench import report as pages
    from pair.bench import scenario
    from pair.bench.scenario import load
    from pair.bench.tables import published

    console = Console()
    root = results or Path("runs") / "bench" / scale
    target = out or root / "report"
    if rebuild:
        for path in sorted(target.glob("*.jsonl")):
            pages.write(target, load(path.stem), published(path), None, figures)
    else:
        given = {
            "units": keywords, "steps": steps, "ads": ads, "eot": eot, "seeds": seeds,
            "seed": seed, "data": data, "clip": clip, "csq": csq, "generator": generator,
            **scenario.changes(changes or []),
        }  # fmt: skip
        for bench in _benches(names, scale, root, given):
            lines = pages.stamped(bench, scale)
            if lines:
                pages.write(target, bench.scenario, lines, bench.store.root, figures)
    if not list(target.glob("*.jsonl")):
        raise ValueError(f"{root} holds no finished cell of these settings: 'pair bench run' first")
    pages.write_leaderboard(target)
    path = pages.page(target)
    tables = [section.table for section in pages.sections(target) if section.table is not None]
    whole = [_print(console, table) for table in tables]
    more = "" if all(whole) else "with intervals and all columns: "
    console.print(f"{more}open [bold]{path}[/bold] in a browser")


def _benches(names: list[str] | None, scale: str, out: Path | None, given: dict[str, Any]):
    """The scenarios asked for and those they need, each once."""
    from pair.bench import scenario
    from pair.bench.grid import Bench
    from pair.bench.store import Store

    store = Store(out or Path("runs") / "bench" / scale)
    made: dict[str, Bench] = {}

    def add(name: str) -> None:
        found = scenario.load(name)
        for other in found.needs:
            add(other)
        if found.name not in made and found.rows:
            settings = scenario.settings(found, scale, **given)
            if settings.data and settings.source == "embedded":
                raise ValueError(
                    f"--data: {found.name} at the scale {scale!r} measures on the photos of this "
                    "package; on yours with --scale paper"
                )
            made[found.name] = Bench(scenario.at_scale(found, scale), settings, store)

    for name in names or scenario.NAMES:
        add(name)
    for bench in made.values():
        bench.cells()  # says at once what is missing
    return list(made.values())


def _status(console: Any, bench: Any):
    """A line with the present cell and the progress of its optimisation."""
    from contextlib import contextmanager

    from rich.markup import escape

    @contextmanager
    def shown():
        with console.status("", spinner="dots") as status:
            now = ""

            def say(text: str) -> None:
                nonlocal now
                now = text
                console.print(text, style="dim", highlight=False, markup=False)
                status.update(escape(text))

            def step(done: int, total: int, loss: float) -> None:
                status.update(escape(f"{now}: step {done} of {total}, loss {loss:.3f}"))

            bench.progress = step
            yield say

    return shown()


def _print(console: Any, table: Any) -> bool:
    """False if the console is too narrow for all columns: then the main ones, without intervals."""
    from rich.table import Table

    from pair.bench.markup import brief, flat

    columns, rows = flat(table)
    width = 1
    for i, name in enumerate(columns):  # headings and labels may wrap between words
        cells = [row[i][0] for row in rows]
        words = " ".join([name, *cells] if i == 0 else [name]).split()
        width += 3 + max(map(len, words if i == 0 else [*words, *cells]), default=0)
    whole = width <= console.width
    if not whole:
        columns, rows = brief(table)
    shown = Table(title=table.title, title_justify="left")
    for i, name in enumerate(columns):
        shown.add_column(name, justify="right" if i else "left")
    for row in rows:
        shown.add_row(
            *(f"[dim]{t}[/dim]" if v and v.grey else t.replace("[", "\\[") for t, v in row)
        )
    console.print(shown)
    return whole
