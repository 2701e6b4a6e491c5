"""``pair search``: look for pictures in a collection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pair.guard.collection import Collection, Hit


def search(
    uri: Annotated[
        str | None, typer.Argument(help="The collection, see 'pair index'; none with --photos.")
    ] = None,
    text: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Look for pictures like this one instead.")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many.")] = 10,
    where: Annotated[
        str | None, typer.Option(help="Filter: \"label = 'cat' and year >= 2020\".")
    ] = None,
    defend: Annotated[
        str | None,
        typer.Option(
            help="What is purified: query, gallery, both or none; default: both, given a purifier."
        ),
    ] = None,
    using: Annotated[
        str | None, typer.Option(help="embedding or code; default: the embedding, if there is one.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Without the approximate index.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Repeatable mask of the query; default: secret, fresh.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Where relative uris are now, for --sheet.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON line per result.")] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw the results to this .png or .jpg.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    certified: Annotated[
        bool, typer.Option("--certified", help="Rank by certified score; a certificate per hit.")
    ] = False,
    photos: Annotated[
        list[Path] | None,
        typer.Option(help="With --certified: search files and folders, without a collection."),
    ] = None,
    patch: Annotated[
        str, typer.Option(help="Certified against: 0.35, 39 (px), 16x40,40x16, 0.14*2 (two).")
    ] = "0.35",
    views: Annotated[int, typer.Option(min=4, help="Windows per patch shape, at most.")] = 9,
    delta: Annotated[
        float, typer.Option(min=0, help="What one patch may add to a certified score.")
    ] = 0.0,
    alarm: Annotated[
        float, typer.Option(min=0, help="Alarm if a hit loses more than this with one window.")
    ] = 0.2,
    certificates: Annotated[
        Path | None, typer.Option(help="Folder that keeps the certified views.")
    ] = None,
) -> None:
    """Search a collection by words or by a picture."""
    import json as js

    import torch

    from pair.commands import _pictures, _words
    from pair.guard.collection import Collection

    if photos and not certified:
        raise ValueError(
            "--photos needs --certified; make a collection with 'pair index' otherwise"
        )
    if photos and uri is not None:  # the only word is what to look for
        if text is not None:
            raise ValueError("give either a collection or --photos")
        uri, text = None, uri
    if uri is None and not photos:
        raise ValueError("say what to search: a collection, or --certified --photos FOLDER")
    if (text is None) == (image is None):
        raise ValueError("give either words to look for, or --image")
    if sheet is not None:
        _pictures.check("--sheet", sheet, [*(photos or ()), *([] if image is None else [image])])
    if threads is not None:
        torch.set_num_threads(threads)
    if certified:
        from pair.commands._certified_search import run

        if defend or using or exact or seed is not None:
            raise ValueError("--certified goes without --defend, --using, --exact and --seed")
        run(
            image or str(text), photos=photos or None,
            collection=None if uri is None else Collection.open(uri, root=root, device=device),
            where=where, certificates=certificates, k=k, patch=patch, views=views, delta=delta,
            alarm=alarm, as_json=json, picture=sheet, threads=threads or 0,
        )  # fmt: skip
        return
    assert uri is not None
    collection = Collection.open(uri, root=root, device=device)
    if text is not None:
        if using == "code":
            raise ValueError("codes can only be searched with --image")
        hits = collection.search_text(text, k, defend=defend, where=where, exact=exact)
        models = collection.models
        _words.check([text], models.encoder, models.names.get("encoder", "the encoder"))
    else:
        assert image is not None
        hits = collection.search_image(
            image, k, defend=defend, where=where, exact=exact, using=using, seed=seed
        )
    if sheet is not None:
        _draw(collection, hits, text or f"pictures like {image}", sheet)
    if json:
        for hit in hits:
            typer.echo(js.dumps(hit.record()))
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table("rank", "score", Column("picture", overflow="fold"), "about")
    for hit in hits:
        about = ", ".join(f"{name} {value}" for name, value in hit.metadata.items())
        table.add_row(str(hit.rank), f"{hit.score:.3f}", hit.uri, about)
    Console().print(table)


def _draw(collection: Collection, hits: list[Hit], title: str, path: Path) -> None:
    """A contact sheet, five in a row; a picture that is gone leaves a grey tile."""
    import torch

    from pair.commands import _pictures
    from pair.images import ImageError, load_image, resize_crop
    from pair.pictures import Tile, sheet

    tiles = []
    for hit in hits:
        try:
            whole = load_image(collection.read(hit.uri))[None]
            image = resize_crop(whole, 224)[0].clamp(0, 1)
        except (OSError, ImageError):
            image = torch.full((3, 224, 224), 0.85)
        tiles.append(Tile(image, f"{hit.rank}. {hit.score:.3f} {Path(hit.uri).name}"))
    rows = [(title if i == 0 else "", tiles[i : i + 5]) for i in range(0, len(tiles), 5)]
    if not rows:
        raise ValueError("nothing was found: there is no sheet to draw")
    _pictures.write(sheet(rows, side=176), path)
