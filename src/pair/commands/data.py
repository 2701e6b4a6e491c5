"""``pair data``: prepare photos for training and for the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Prepare photos.")


@app.command()
def pack(
    out: Annotated[Path, typer.Option(help="Folder of the pack.")],
    caltech101: Annotated[Path | None, typer.Option(help="Caltech-101: <class>/*.jpg.")] = None,
    imagenette: Annotated[
        Path | None, typer.Option(help="Imagenette: {train,val}/<wnid>/*.")
    ] = None,
    flickr8k: Annotated[Path | None, typer.Option(help="Flickr8k: photos anywhere below.")] = None,
    size: Annotated[int, typer.Option(min=8, help="Side of the stored photos in pixels.")] = 128,
) -> None:
    """Decode photos once into an array that training reads without decoding."""
    from rich.progress import track

    from pair.data import splits
    from pair.data.pack import write_pack

    roots = {"caltech101": caltech101, "imagenette": imagenette, "flickr8k": flickr8k}
    photos = []
    for name, root in roots.items():
        if root is None:
            continue
        if not root.is_dir():
            raise ValueError(f"--{name}: {root} is not a folder")
        photos += list(splits.DATASETS[name](root))
    if not photos:
        raise ValueError("no photos: give at least one of --caltech101, --imagenette, --flickr8k")
    anchor = next(r for r in roots.values() if r is not None).parent
    write_pack(
        photos, anchor, out, size, progress=lambda x: track(x, "decoding", total=len(photos))
    )
    typer.echo(f"{len(photos)} photos in {out}")


@app.command()
def embed(
    caltech101: Annotated[Path, typer.Option(help="Caltech-101: <class>/*.jpg.")],
    out: Annotated[Path, typer.Option(help="Folder to write, such as src/pair/assets/photos.")],
) -> None:
    """Choose the photos that travel with the package (how src/pair/assets/photos was made)."""
    from pair.data import embedded

    if not caltech101.is_dir():
        raise ValueError(f"--caltech101: {caltech101} is not a folder")
    for split, count in embedded.build(caltech101, out).items():
        typer.echo(f"{split}: {count} photos")
