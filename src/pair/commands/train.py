"""``pair train``: train a model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    kind: Annotated[
        str,
        typer.Argument(
            help="What to train: generator, clip, clip-paper, csq, csq-paper, sac, patchzero, at, "
            "hm, arn or cafd."
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="Pack of photos made by 'pair data pack', folder of pictures, or data set as "
            "NAME:FOLDER; repeat for several data sets."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run continues.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="TOML recipe with the tables loop and task; without one, all defaults."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Start from this model (overrules the recipe).")
    ] = None,
    discriminator: Annotated[
        str | None,
        typer.Option(
            help="Generator: frozen encoder of the semantic loss, a model or "
            "open_clip:ARCHITECTURE/WEIGHTS (overrules the recipe)."
        ),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Overrule a setting: loop.steps=100, task.lr=1e-4; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    workers: Annotated[
        int, typer.Option(min=0, help="Decoding processes, for photos that are not in a pack.")
    ] = 0,
    track: Annotated[
        str, typer.Option(help="Curves also to tensorboard or wandb, where installed.")
    ] = "none",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train a model. Stop it at any time; the same command resumes where it was."""
    from pair.training.run import run

    changes = [f"task.{k}={v}" for k, v in (("init", init), ("discriminator", discriminator)) if v]
    try:
        best = run(
            kind, recipe, data, out, threads, typer.echo, changes=[*changes, *(change or ())],
            workers=workers, device=device, track=track,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("pair: stopped; run the same command again to continue", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"best model: {best}")
