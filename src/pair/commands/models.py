"""``pair models``: what ships, what a folder holds; fetch, convert and publish weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Model folders: list, show, fetch, convert, publish.")


@app.command("list")
def list_models() -> None:
    """List the models inside the package."""
    from pair import hub
    from pair.training.cards import describe

    for name in hub.shipped_models():
        folder = hub.shipped_root() / name
        size = (folder / hub.WEIGHTS).stat().st_size / 1e6
        typer.echo(f"{name}  {describe(folder)['kind']}  {size:.1f} MB")


@app.command()
def show(name: Annotated[str, typer.Argument(help="Shipped name or folder.")]) -> None:
    """Print the configuration of a model, with its training record; of a generator also its work.

    Work is given per image and pass: multiply-adds, bytes of weights and of activations.
    """
    import json

    from pair import hub
    from pair.training.cards import describe

    facts = describe(hub.resolve(name))
    if facts.get("kind") == "generator":
        from pair.generator import GeneratorConfig
        from pair.work import summary

        options = {key: facts["purifier"][key] for key in ("encoder", "output")}
        facts["work"] = summary(GeneratorConfig(**facts["model"]), **options)
    typer.echo(json.dumps(facts, indent=2))


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Repository: org/name or org/name@revision.")],
    out: Annotated[Path, typer.Option(help="Folder to copy the weights to.")],
) -> None:
    """Fetch weights from the Hugging Face hub, with their SHA-256 and licence written down.

    Everything else in this program then takes the folder, and needs no network.
    """
    from pair.training.weights import fetch as fetched

    record = fetched(name, out)
    typer.echo(f"{out}: licence {record['licence']}")


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or repository of transformers' ViTMAE, or Meta's mae_visualize_*.pth."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
) -> None:
    """Turn a public masked autoencoder into a generator folder for 'pair purify --model'."""
    from pair.training.weights import convert as converted

    facts = converted(source, out)
    typer.echo(f"{out}: generator from {source}, SHA-256 {facts['source_sha256']}")
    typer.echo(f"licence: {facts['licence']}")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Trained model, such as runs/clip/best.")],
    name: Annotated[str, typer.Option(help="Name of the model.")],
    out: Annotated[Path, typer.Option(help="Folder of models; NAME is made in it.")] = Path(
        "models"
    ),
    to_hub: Annotated[
        str, typer.Option("--hub", help="Upload it to this hub repository too: org/name.")
    ] = "",
) -> None:
    """Copy a trained model to OUT/NAME with a card made from its training record.

    A model that is there already is replaced; any other folder is left alone.
    """
    from pair.training.cards import publish as published

    target, kind = published(folder, name, out)
    typer.echo(f"{target}: {kind}")
    if to_hub:
        from pair.training.weights import upload

        typer.echo(f"{upload(target, to_hub)}")
