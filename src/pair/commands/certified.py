"""``pair bench-certified``: what the guarantee costs on real photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_FILLS = "window,whole,mean,blur,drop"


def bench(
    out: Annotated[
        Path, typer.Option(help="Folder for certified.json, .md, .jsonl and the curves.")
    ],
    generator: Annotated[str, typer.Option(help="Generator: name or folder.")] = "pair-small",
    encoder: Annotated[str, typer.Option(help="Text-image encoder.")] = "clip-small",
    patches: Annotated[str, typer.Option(help="Sides as shares, comma-separated.")] = "0.22,0.35",
    views: Annotated[str, typer.Option(help="Most views per cell, comma-separated.")] = "4,9,16",
    fills: Annotated[str, typer.Option(help="Fills, comma-separated.")] = _FILLS,
    fill_views: Annotated[
        str, typer.Option(help="Compare fills with so many views only; default: with all.")
    ] = "",
    curve: Annotated[
        str, typer.Option(help="Further patch sizes for the curves, 9 views.")
    ] = "0.12,0.5",
    attacks: Annotated[
        int, typer.Option(min=0, help="Keywords to attack beside the certificate; 0: none.")
    ] = 3,
    attack_steps: Annotated[int, typer.Option(min=1, help="Steps of an attack.")] = 16,
    classes: Annotated[int, typer.Option(min=2, help="Classes of the gallery.")] = 46,
    queries: Annotated[
        int, typer.Option(min=0, help="Also measure this many patched-query certificates.")
    ] = 0,
    query_views: Annotated[str, typer.Option(help="Most views per query, with --queries.")] = "9",
    votes: Annotated[
        float, typer.Option(min=0, help="Patch size for bit votes, with --queries; 0: none.")
    ] = 0.12,
    hasher: Annotated[str, typer.Option(help="Hash network for --queries.")] = "csq-small",
    figures: Annotated[Path | None, typer.Option(help="Folder for the curves; default: OUT.")] = (
        None
    ),
    draw: Annotated[bool, typer.Option("--draw/--no-draw", help="Draw the curves.")] = True,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = all cores.")] = 1,
) -> None:
    """Measure the certified mode on the embedded photos: accuracy, bounds, attack, cost.

    Stop it at any time; the same command continues where it was.
    """
    from dataclasses import replace

    import torch
    from rich.console import Console

    from pair import hub
    from pair.certified import evaluate, summary, tables
    from pair.data import embedded
    from pair.files import write_atomic
    from pair.purifier import Purifier
    from pair.retrieval.clip import SmallClip
    from pair.retrieval.hashing import HashNet

    if threads:
        torch.set_num_threads(threads)
    setting = evaluate.Setting(
        patches=tuple(_numbers(patches, "--patches", float)),
        views=tuple(_numbers(views, "--views", int)),
        fills=tuple(fills.split(",")),
        fill_views=tuple(_numbers(fill_views, "--fill-views", int)) if fill_views else None,
        curve=tuple(_numbers(curve, "--curve", float)) if curve else (),
        attacked=attacks,
        attack_steps=attack_steps,
        votes=votes,
    )
    every = embedded.labels()
    classes = min(classes, len(every))
    chosen = [every[i * len(every) // classes] for i in range(classes)]  # spread over the list
    world = evaluate.Bench(
        embedded.gallery(chosen),
        embedded.ads(),
        SmallClip.from_pretrained(encoder),
        starts=embedded.queries(chosen),
    )
    facts = {
        key: {"name": name, "sha256": hub.read_config(hub.resolve(name), kind)["sha256"]}
        for key, name, kind in (("generator", generator, "generator"), ("encoder", encoder, "clip"))
    }
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "certified.jsonl"
    console = Console(stderr=True)
    purifier = Purifier.from_pretrained(generator).eval().requires_grad_(False)
    records = evaluate.run(world, purifier, raw, setting, facts, console.log)
    sections = [
        "## Clean and certified retrieval\n",
        tables.main_table(records),
        "## Does the generator help? Window fill minus the other fills, points\n",
        tables.fill_table(records, world.keywords),
        "## Cost, evidence and alarms\n",
        tables.cost_table(records),
    ]
    if queries:
        photos = embedded.queries(chosen)
        photos = photos[:: max(1, len(photos) // queries)][:queries]
        targets = [(encoder, world.encoder, False), (hasher, HashNet.from_pretrained(hasher), True)]
        asked = replace(setting, views=tuple(_numbers(query_views, "--query-views", int)))
        rows = evaluate.run_queries(
            world, purifier, photos, targets, raw, asked, facts, console.log
        )
        sections += ["## Patched queries\n", tables.query_table(rows)]
        records = [*records, *rows]
    text = "\n".join(sections)
    write_atomic(out / "certified.md", text.encode())
    summary.save(out / "certified.json", summary.summarise(records, world.keywords))
    if draw:
        summary.figures(records, figures or out)
    typer.echo(text)


def _numbers(text: str, option: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be numbers separated by commas, got {text!r}") from error
