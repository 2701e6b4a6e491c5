"""``pair train``: train a model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    kind: Annotated[
        str,
        typer.Argument(
            help="What to train: generator, clip, csq, csq-paper, sac, patchzero, at, hm, arn "
            "or cafd."
        ),
    ],
    recipe: Annotated[Path, typer.Option(help="TOML recipe with the tables [loop] and [task].")],
    data: Annotated[Path, typer.Option(help="Pack of photos made by 'pair data pack'.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run continues.")],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train a model. Stop it at any time; the same command resumes where it was."""
    from pair.training.run import run

    try:
        best = run(kind, recipe, data, out, threads, typer.echo)
    except KeyboardInterrupt:
        typer.echo("pair: stopped; run the same command again to continue", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"best model: {best}")
