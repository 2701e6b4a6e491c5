"""``pair data``: data sets, and photos for training and for the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Data sets: prepare, check, count, pack.")


Name = Annotated[
    str,
    typer.Argument(
        help="coco2014, flickr30k, imagenet100, caltech101, imagenette, folder, webdataset or "
        "huggingface."
    ),
]
Root = Annotated[Path, typer.Option(help="Folder of the data set.")]
Protocol = Annotated[
    str | None, typer.Option(help="How it is split; 'pair data list' names the ways.")
]


@app.command("list")
def list_sets() -> None:
    """List the data sets that can be read, their ways to be split, and their licences."""
    from pair.data.sets import SOURCES

    for source in SOURCES.values():
        typer.echo(f"{source.name}: {source.title} ({source.licence})")
        for name, meaning in source.protocols.items():
            typer.echo(f"  {name}: {meaning}")


@app.command()
def prepare(
    name: Name,
    root: Root,
    protocol: Protocol = None,
    seed: Annotated[int, typer.Option(help="Of the drawn splits.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for index and lists; default: ROOT/pair.")
    ] = None,
) -> None:
    """Verify a data set, write its split as an index file, and compare the counts."""
    from pair.data import sets

    found, written = sets.prepare(name, root, protocol, seed, out)
    _compare(found)
    for path in written:
        typer.echo(f"wrote {path}")


@app.command()
def check(
    name: Name,
    root: Root,
    protocol: Protocol = None,
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Do not decode the photos.")] = False,
) -> None:
    """Read a data set again, compare it with its index, and decode every photo.

    Exit code 2 where anything is missing, has changed or cannot be decoded.
    """
    from rich.progress import track

    from pair.data import sets
    from pair.data.photos import broken
    from pair.data.sets.base import index_path

    indexed = sets.load(name, root, protocol)
    now = sets.source(name).read(root, indexed.protocol, indexed.seed)
    if index_path(root, name, indexed.protocol).is_file():
        if now.fingerprint() != indexed.fingerprint():
            raise ValueError(
                f"{root} has changed since it was prepared: run 'pair data prepare' again, and "
                "do not mix results from before and after"
            )
        typer.echo("agrees with its index")
    if not quick:
        told = broken(now.records, workers, lambda x: track(x, "decoding", total=len(now.records)))
        for line in told[:20]:
            typer.echo(line, err=True)
        if told:
            raise ValueError(f"{len(told)} of {len(now):,} photos cannot be decoded")
        typer.echo(f"all {len(now):,} photos can be decoded")


@app.command()
def stats(name: Name, root: Root, protocol: Protocol = None) -> None:
    """Count photos, captions and classes, beside the published counts."""
    from pair.data import sets

    _compare(sets.load(name, root, protocol))


def _compare(found) -> None:
    from collections import Counter

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from pair.data.sets import source

    kind = source(found.name)
    published = kind.published.get(found.protocol, {})
    table = Table("", "found", "published", "", box=box.SIMPLE, title=kind.title)
    different = False
    for key, count in found.counts().items():
        wanted = published.get(key)
        different |= wanted not in (None, count)
        mark = "" if wanted is None else "same" if wanted == count else "differs"
        table.add_row(key, f"{count:,}", "" if wanted is None else f"{wanted:,}", mark)
    per_photo = Counter(len(r.captions) for r in found.records)
    if set(per_photo) - {0}:
        shares = ", ".join(f"{n}: {c:,}" for n, c in sorted(per_photo.items()))
        table.add_row("captions per photo", shares, "", "")
    Console(width=100).print(table)
    typer.echo(f"protocol {found.protocol}: {kind.protocols[found.protocol]}")
    typer.echo(f"seed {found.seed}, SHA-256 {found.fingerprint()}")
    typer.echo(f"licence: {kind.licence}")
    for note in found.notes:
        typer.echo(f"note: {note}")
    if different:
        typer.echo("note: not the published data set, so results compare with nobody else's")


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
    if not photos and any(roots.values()):
        raise ValueError(f"no photos in {', '.join(str(r) for r in roots.values() if r)}")
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
