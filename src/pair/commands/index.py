"""``pair index``: collections of pictures, purified on the way in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pair.commands._running import stopping

if TYPE_CHECKING:
    from pair.guard.collection import Info
    from pair.guard.ingest import AddReport

app = typer.Typer(
    no_args_is_help=True,
    help="Collections of pictures: make, fill, look into, clean.\n\nURI is a folder or "
    "s3://bucket/prefix (LanceDB), or http://host:19530 or file.db (Milvus); #name at its end "
    "chooses one of several.",
)
URI = Annotated[str, typer.Argument(help="Folder, s3://..., http://host:19530 or file.db.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


@app.command()
def create(
    uri: URI,
    encoder: Annotated[
        str,
        typer.Option(
            help="Text-image encoder: name, folder, open_clip:ARCHITECTURE/WEIGHTS, none."
        ),
    ] = "clip-small",
    hasher: Annotated[str, typer.Option(help="Hash network: name, folder, or none.")] = "none",
    purifier: Annotated[str, typer.Option(help="Generator: name, folder, or none.")] = "pair-small",
    draws: Annotated[
        int, typer.Option(min=1, help="Purifications per picture, averaged; the paper has 1.")
    ] = 1,
    field: Annotated[
        list[str] | None,
        typer.Option(help="Metadata that filters may use, as name:type (str, int, float, bool)."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Repeatable masks, for experiments; default: secret, fresh ones."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Store uris of files below this folder relative to it.")
    ] = None,
    approximate_from: Annotated[
        int, typer.Option(min=256, help="Rows from which on an approximate index is built.")
    ] = 50_000,
) -> None:
    """Make an empty collection for certain models."""
    from pair.guard.collection import Collection
    from pair.guard.models import Models

    fields = {}
    for text in field or []:
        name, _, kind = text.partition(":")
        fields[name] = kind or "str"
    names = {"encoder": encoder, "hasher": hasher, "purifier": purifier}
    asked = [None if name == "none" else name for name in names.values()]
    models = Models.load(*asked, draws=draws)
    made = Collection.create(
        uri, models, fields=fields, seed=seed, root=root, approximate_from=approximate_from
    )
    typer.echo(f"created {made.uri} for {', '.join(n for n in names.values() if n != 'none')}")


@app.command()
def add(
    uri: URI,
    paths: Annotated[
        list[str],
        typer.Argument(help="Pictures, folders, lists (.txt, .csv, .jsonl), shards (.tar)."),
    ],
    part: Annotated[
        str, typer.Option(help="2/4 takes the second of four equal parts, for four machines.")
    ] = "1/1",
    engine: Annotated[str, typer.Option(help="local, or ray for many machines.")] = "local",
    failures: Annotated[
        Path | None, typer.Option(help="Where to list what could not be read.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures computed at a time.")] = 32,
    commit_rows: Annotated[int, typer.Option(min=1, help="Rows stored at a time.")] = 256,
    index: Annotated[
        bool, typer.Option("--index/--no-index", help="Tidy up and build the index at the end.")
    ] = True,
    json: Json = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
) -> None:
    """Add pictures. Stop it at any time; the same command continues where it was.

    The same content twice is one row. Several processes may add at a time.
    Broken files are listed (failures.jsonl) and do not stop the rest.
    With --json, each line names rows that are safely stored; the last line
    holds the counts.

    Exit code: 0 all added, 1 some files failed, 2 wrong usage or no place to
    write, 130/143 stopped by SIGINT/SIGTERM.
    """
    import json as js

    import torch

    from pair.guard.collection import Collection

    if threads is not None:
        torch.set_num_threads(threads)
    if engine not in ("local", "ray"):
        raise ValueError(f"--engine: {engine!r} is neither local nor ray")
    collection = Collection.open(uri, device=device)
    options: dict[str, Any] = {"failures": failures, "batch_size": batch_size}
    options |= {"commit_rows": commit_rows, "index": index}
    if json:
        options["committed"] = lambda rows: print(
            js.dumps({"committed": [{"id": r.id, "uri": r.uri} for r in rows]}), flush=True
        )
    with stopping() as (stop, caught), _line("adding") as progress:
        if engine == "ray":
            from pair.guard.cluster import add_with_ray

            report = add_with_ray(collection, paths, **options, progress=progress, stop=stop.is_set)
        else:
            report = collection.add(
                *paths, **options, part=_part(part), progress=progress, stop=stop.is_set
            )
    if not report.seen and not report.stopped and part == "1/1":
        raise ValueError(f"no image found in {', '.join(paths)}")
    counts = {k: getattr(report, k) for k in ("seen", "added", "present", "repeated", "failed")}
    if json:
        typer.echo(js.dumps({**counts, "stopped": report.stopped, "uri": collection.uri}))
    else:
        failed = f" (see {report.failures})" if report.failed else ""
        typer.echo(
            f"{report.added} added, {report.present} there already, "
            f"{report.repeated} repeated, {report.failed} failed{failed}"
        )
    if report.stopped:
        typer.echo("pair: stopped; run the same command again to continue", err=True)
        raise typer.Exit(128 + caught[0])
    raise typer.Exit(1 if report.failed else 0)


@app.command()
def remove(
    uri: URI,
    id: Annotated[list[str] | None, typer.Option(help="Rows by id.")] = None,
    path: Annotated[list[str] | None, typer.Option(help="Rows by their uri.")] = None,
    where: Annotated[str | None, typer.Option(help="Rows by a filter: \"label = 'cat'\".")] = None,
) -> None:
    """Remove rows (not the files that they came from)."""
    from pair.guard.collection import Collection

    removed = Collection.open(uri).remove(ids=id or (), uris=path or (), where=where)
    typer.echo(f"{removed} removed")


@app.command()
def optimise(uri: URI) -> None:
    """Merge small pieces, build or extend the approximate index."""
    from pair.guard.collection import Collection

    collection = Collection.open(uri)
    collection.optimise()
    facts = _facts(collection.info(recall=0))
    told = [f"{k}: {text}" for k, text in facts if k.startswith(("rows", "search", "index of"))]
    typer.echo(f"tidied up {collection.uri}; {'; '.join(told)}")


@app.command()
def info(
    uri: URI,
    recall: Annotated[
        int, typer.Option(min=0, help="Searches to measure the recall with; 0: do not.")
    ] = 50,
    json: Json = False,
) -> None:
    """What is in a collection, and how well its approximate index finds it."""
    import json as js

    from pair.guard.collection import Collection

    facts = Collection.open(uri).info(recall=recall)
    if json:
        typer.echo(js.dumps(facts.record()))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(facts):
        table.add_row(name, value)
    Console().print(table)


def _facts(facts: Info) -> Iterator[tuple[str, str]]:
    from datetime import UTC, datetime

    yield "collection", f"{facts.uri} ({facts.kind})"
    size = "" if facts.bytes is None else f", {facts.bytes / 2**20:.1f} MB"
    yield "rows", f"{facts.rows:,}{size}"
    for role, model in facts.models.items():
        yield role, f"{model['name'] or 'unnamed'} ({model['fingerprint']})"
    yield (
        "columns",
        ", ".join(
            text
            for text, on in (
                (f"embedding of {facts.dim}", facts.dim),
                (f"code of {facts.bits} bits", facts.bits),
            )
            if on
        )
        + (", raw and purified" if "purifier" in facts.models else ", raw"),
    )
    masks = "secret" if facts.seed == "secret" else f"derived from seed {facts.seed}"
    draws = facts.models.get("purifier", {}).get("draws", "1")
    yield "masks", masks if draws == "1" else f"{masks}; features of {draws} draws are averaged"
    if facts.fields:
        yield "fields", ", ".join(f"{name} ({kind})" for name, kind in facts.fields.items())
    if facts.root:
        yield "root", facts.root
    yield "created", f"{datetime.fromtimestamp(facts.created / 1e6, UTC):%Y-%m-%d %H:%M} UTC"
    if not facts.indexes:
        yield "search", f"exact (approximate from {facts.approximate_from:,} rows on)"
    for column, index in facts.indexes.items():
        text = f"{index['type']}, {index['rows']:,} rows, {index['waiting']:,} not in it yet"
        if column in facts.recall:
            share = 100 * facts.recall[column]
            text += f", recall@10 {share:.1f} % of exact ({facts.sampled} searches)"
        yield f"index of {column}", text


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        raise ValueError(f"--part: {text!r} is not like 2/4")
    return int(number), int(of)


@contextmanager
def _line(verb: str) -> Iterator:
    """One line of counts and pace on stderr; how much is to come is not known beforehand."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, start = bar.add_task(verb, total=None), time.monotonic()

        def show(report: AddReport) -> None:
            rate = report.seen / max(time.monotonic() - start, 1e-9)
            bar.update(
                task,
                description=f"{verb}: {report.seen:,} seen, {report.added:,} added, "
                f"{report.failed:,} failed, {rate:.1f} a second",
            )

        yield show
