"""``pair audit``: find pictures that may have been tampered with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pair.commands._running import stopping


def audit(
    sources: Annotated[
        list[str], typer.Argument(help="One collection, or pictures, folders, lists, shards.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report; also keeps unfinished work.")],
    clean: Annotated[
        list[str] | None,
        typer.Option(help="Pictures known to be untouched, of the same kind: for the thresholds."),
    ] = None,
    bank: Annotated[
        Path | None,
        typer.Option(help="Frequent queries, one per line; default: the embedded classes."),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Largest share of clean pictures that may raise an alarm.")
    ] = 0.01,
    draws: Annotated[int, typer.Option(min=2, help="Purifications per picture.")] = 4,
    patch: Annotated[float, typer.Option(help="Largest patch, as a share of the side.")] = 0.35,
    views: Annotated[int, typer.Option(min=4, help="Windows, at most.")] = 9,
    delta: Annotated[
        float, typer.Option(min=0, help="How much score a hit may lose with one window.")
    ] = 0.2,
    top: Annotated[int, typer.Option(min=1, help="What counts as a hit: the top K.")] = 10,
    shown: Annotated[int, typer.Option(min=0, help="Pictures on the page.")] = 50,
    encoder: Annotated[str, typer.Option(help="Text-image encoder, for files.")] = "clip-small",
    purifier: Annotated[str, typer.Option(help="Generator, for files.")] = "pair-small",
    seed: Annotated[
        int | None, typer.Option(help="Repeatable draws; default: secret, fresh ones.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where a collection's files are now.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures computed at a time.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
) -> None:
    """Rank pictures by what purification does to them, with thresholds from clean ones.

    Writes audit.html (with heat maps), audit.json and audit.csv.
    Stop it at any time; the same command continues where it was.
    These are heuristics: a patch made with knowledge of them can evade them.

    Exit code: 0 nothing found, 3 alarms, 4 no alarm but hits that hang on one
    window, 1 nothing found but some files could not be read, 2 wrong usage,
    130/143 stopped by SIGINT/SIGTERM.
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from pair.data import embedded
    from pair.data.prompts import HELD_OUT_TEMPLATES, sentences
    from pair.guard import audit_report, audit_run
    from pair.guard.audit import Auditor
    from pair.guard.collection import Collection
    from pair.guard.models import Models

    if threads is not None:
        torch.set_num_threads(threads)
    if bank is None:
        queries = sentences(embedded.labels(), HELD_OUT_TEMPLATES[1:2])
    else:
        queries = [q.strip() for q in bank.read_text("utf-8").splitlines() if q.strip()]
    for text in sources if len(sources) > 1 else ():
        if _is_collection(text):
            raise ValueError(f"{text} is a collection: audit it alone")
    for text in clean or ():
        if _is_collection(text):
            raise ValueError(f"--clean: {text} is a collection: name files, folders, lists, shards")
    source: Collection | list[str] = sources
    if len(sources) == 1 and _is_collection(sources[0]):
        source = Collection.open(sources[0], root=root, device=device)
        models = source.models
    else:
        models = Models.load(encoder, None, purifier, device=device)
    auditor = Auditor(models, queries, draws=draws, patch=patch, views=views, delta=delta, top=top)
    console = Console(stderr=True)
    shape = SpinnerColumn(), TextColumn("{task.description}")
    with (
        stopping() as (stop, caught),
        Progress(*shape, console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("examining", total=None)
        result = audit_run.audit(
            source,
            auditor,
            out,
            clean=clean or (),
            budget=budget,
            seed=seed,
            batch_size=batch_size,
            progress=lambda n: bar.update(task, description=f"examined {n:,}"),
            stop=stop.is_set,
        )
    if result.stopped:
        typer.echo("pair: stopped; run the same command again to continue", err=True)
        raise typer.Exit(128 + caught[0])
    page = audit_report.write(result, auditor.settings, out, shown=shown)[-1]
    failed = f", {result.failed} could not be read (see {out / 'failures.jsonl'})"
    failed = failed if result.failed else ""
    if not result.clean:
        failed = f", no alarms without --clean{failed}"
    typer.echo(f"{result.said} in {len(result.findings)} pictures{failed}: {page}")
    if result.clean and result.powerless:
        typer.echo(
            f"pair: no alarm is possible with {len(result.clean)} clean pictures at a budget of "
            f"{budget}: {result.powerless} are needed",
            err=True,
        )
    found = 3 if result.alarms else 4 if result.one_window else 0
    raise typer.Exit(found or (1 if result.failed else 0))


def _is_collection(text: str) -> bool:
    """A place without pictures of its own: a database, or a folder that LanceDB wrote."""
    from pair.guard.stores import is_milvus, split

    if any(text.endswith(s) for s in (".tar", ".txt", ".csv", ".jsonl")):
        return False
    try:
        place, name = split(text)
    except ValueError:
        return False
    return is_milvus(place) or "://" in place or (Path(place) / f"{name}.lance").is_dir()
