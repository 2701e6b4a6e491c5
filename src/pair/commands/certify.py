"""``pair certify``: say what a search hit depends on, with a proof."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SWEEP = ("0.12", "0.22", "0.35", "0.5")


def certify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    query: Annotated[str, typer.Option(help="The text that found them.")],
    patch: Annotated[
        str | None,
        typer.Option(
            help="Patches to certify against: 0.35 (of the side), 39 (px), 16x40,40x16, 0.14*2 "
            "(two at once); default: try several sizes."
        ),
    ] = None,
    views: Annotated[int, typer.Option(min=4, help="Windows per patch size, at most.")] = 9,
    delta: Annotated[
        float, typer.Option(min=0, help="How much of the score may hang on one window.")
    ] = 0.2,
    threshold: Annotated[
        float | None, typer.Option(help="Score that a hit needs; replaces --delta.")
    ] = None,
    fill: Annotated[
        str, typer.Option(help="What replaces a window: window, whole, mean, blur or drop.")
    ] = "window",
    generator: Annotated[str, typer.Option(help="Generator: shipped name or folder.")] = (
        "pair-small"
    ),
    encoder: Annotated[str, typer.Option(help="Text-image encoder: name or folder.")] = (
        "clip-small"
    ),
    json: Annotated[bool, typer.Option("--json", help="One JSON line per image.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the certificates to this .png or .jpg.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = all cores.")] = 1,
) -> None:
    """Prove of each image that no single patch is responsible for the hit, or name the window.

    The proof holds for all patches up to the size that it states, whatever
    they show and wherever they are.
    """
    import json as js
    import math

    import torch
    import torch.nn.functional as F
    from rich.console import Console
    from rich.table import Table

    from pair.certified import CertifiedPurifier, report
    from pair.certified.covering import parse_family
    from pair.commands import _pictures, _words
    from pair.images import load_image
    from pair.purifier import Purifier
    from pair.retrieval.clip import SmallClip

    for option, value in (("--delta", delta), ("--threshold", threshold)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{option}: {value} is no number to compare a score with")
    if picture is not None:
        _pictures.check("--picture", picture, images)
    if threads:
        torch.set_num_threads(threads)
    autoencoder = Purifier.from_pretrained(generator).autoencoder
    families = [
        parse_family(text, autoencoder.config.image_size)
        for text in ((patch,) if patch is not None else SWEEP)
    ]
    purifiers = [
        CertifiedPurifier.covering(autoencoder, family, views, fill=fill) for family in families
    ]
    model = SmallClip.from_pretrained(encoder)
    _words.check([query], model, encoder)
    words = F.normalize(model.encode_text([query]), dim=-1)[0]
    table = Table("image", "score", "lowest", "patch in file", "certificate", title=query)
    sheets = []
    for path in images:
        image = load_image(path)
        found = report.certify(purifiers, model, image, words, delta=delta, threshold=threshold)
        best = report.summary(found)
        if json:
            record = {"image": str(path), "query": query, **best.record()}
            record["sizes"] = [c.record() for c in found]
            typer.echo(js.dumps(record))
        else:
            numbers = (f"{best.plain:.3f}", f"{best.lowest:.3f}")
            side = f"{best.patch_in_file} px" if best.clear else "-"
            table.add_row(path.name, *numbers, side, best.sentence())
        if picture is not None:
            sheets.append(report.picture(image, best, purifiers[found.index(best)]))
    if not json:
        Console().print(table)
    if picture is not None:
        _pictures.write(report.stack(sheets), picture)
