"""``pair search --certified``: every hit with its certificate, from photos or a collection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pair.certified import PatchFamily
    from pair.guard.certified import Answer, CertifiedPhotos, Result
    from pair.guard.collection import Collection

FOLDER = ".pair-certified"  # beside the photos: vectors and views


def run(
    query: str | Path,
    *,
    photos: list[Path] | None = None,
    collection: Collection | None = None,
    where: str | None = None,
    certificates: Path | None = None,
    k: int = 10,
    patch: str = "0.35",
    views: int = 9,
    delta: float = 0.0,
    alarm: float = 0.2,
    fill: str = "window",
    generator: str | None = None,
    encoder: str | None = None,
    as_json: bool = False,
    picture: Path | None = None,
    threads: int = 1,
) -> None:
    """Search ``photos`` (files, folders), or the rows of a ``collection``, by certified score.

    ``query`` is a text, or the file of a picture as a ``Path``. ``patch`` as in
    :func:`pair.certified.covering.parse_family`. ``certificates`` is the folder that keeps vectors
    and views; default: ``.pair-certified`` in the first folder of photos, or the collection's own
    folder with that ending.
    """
    import torch
    from rich.console import Console

    from pair.certified import CertifiedPurifier
    from pair.certified.covering import parse_family
    from pair.commands import _words
    from pair.guard.certified import CertifiedPhotos, from_collection
    from pair.purifier import Purifier
    from pair.retrieval.clip import SmallClip

    if (photos is None) == (collection is None):
        raise ValueError("say what to search: --photos, or a collection")
    for path in photos or ():
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    target: Any
    if collection is not None:
        models = collection.models
        if models.encoder is None:
            raise ValueError(f"{collection.uri} has no embeddings: certified search needs them")
        if generator is None and models.purifier is not None:
            autoencoder = models.purifier.autoencoder
        else:
            autoencoder = Purifier.from_pretrained(generator or "pair-small").autoencoder
        target, name = models.encoder, models.names.get("encoder", "the encoder")
    else:
        autoencoder = Purifier.from_pretrained(generator or "pair-small").autoencoder
        name = encoder or "clip-small"
        target = SmallClip.from_pretrained(name)
    text = isinstance(query, str)
    if text:
        _words.check([str(query)], target, name)
    c = autoencoder.config
    family: PatchFamily = parse_family(patch, c.image_size)
    purifier = CertifiedPurifier.covering(autoencoder, family, views, fill=fill)
    if collection is not None:
        folder = certificates or _beside(collection.uri)
        found = from_collection(collection, folder, purifier, target, delta=delta, where=where)
    else:
        assert photos is not None
        folder = certificates or _home(photos) / FOLDER
        found = CertifiedPhotos(folder, purifier, target, delta=delta)
        _add(found, photos, console)
    with torch.no_grad():
        vector = target.encode_text([query]) if text else found.embed(Path(query).read_bytes())
    with console.status("searching, certifying what is about to be shown"):
        result = found.search(vector[0], k, alarm=alarm)
    title = query if isinstance(query, str) else str(query)
    if as_json:
        typer.echo(json.dumps(record(title, found, result, alarm)))
    else:
        show(title, found, result)
    if picture is not None:
        draw(title, found, result, picture)


def record(query: str, found: CertifiedPhotos, result: Result, alarm: float) -> dict[str, Any]:
    """The whole result as plain data."""
    cover = found.purifier.cover
    return {
        "query": query,
        "family": str(cover.family),
        "views": len(cover),
        "delta": found.index.pool.delta,
        "alarm_delta": alarm,
        "photos": len(found),
        "answers": [a.record() for a in result.answers],
        "kept_out": [a.record() for a in result.kept_out],
        "views_made": result.views_made,
        "lost": result.lost,
    }


def show(query: str, found: CertifiedPhotos, result: Result) -> None:
    """The result as tables for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    family = found.purifier.cover.family

    def table(title: str, answers: list[Answer]) -> None:
        columns = ("", "image", "score", "plain (rank)", "lowest", "certificate")
        sheet = Table(*columns, title=title)
        for a in answers:
            c = a.certificate
            numbers = (f"{a.score:.3f}", f"{c.plain:.3f} ({a.plain_rank})", f"{c.lowest:.3f}")
            place = "-" if a.rank is None else str(a.rank)
            sheet.add_row(place, Path(a.photo.path).name, *numbers, c.sentence())
        console.print(sheet)

    table(f"{query}: certified against {family}", result.answers)
    if result.kept_out:
        table("plain hits that were kept out", result.kept_out)
    if result.lost:
        console.print(f"{len(result.lost)} changed or missing since they were added; not shown")


def draw(query: str, found: CertifiedPhotos, result: Result, path: Path) -> None:
    """Certificates of all answers, and of those kept out, as one picture."""
    from pair.certified import report
    from pair.commands import _pictures
    from pair.images import load_image

    sheets = []
    for answer in (*result.answers, *result.kept_out):
        image = load_image(found.read(answer.photo.path))
        place = "kept out" if answer.rank is None else f"{answer.rank}."
        title = f"{place} {Path(answer.photo.path).name}"
        sheets.append(
            report.picture(
                image, answer.certificate, found.purifier, whole=found.whole, title=title
            )
        )
    if not sheets:
        raise ValueError("there is nothing to draw: the search found no photo")
    _pictures.write(report.stack(sheets, query), path)


def _add(found: CertifiedPhotos, photos: list[Path], console: Any) -> None:
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("embedding photos", total=None)

        def progress(done) -> None:
            at = done.embedded + done.known + done.failed
            bar.update(task, completed=at, total=done.found)

        found.add(
            photos,
            progress=progress,
            failed=lambda path, reason: console.print(f"{path}: {reason}", soft_wrap=True),
        )


def _home(photos: list[Path]) -> Path:
    for path in photos:
        if path.is_dir():
            return path
    raise ValueError("name a folder for the certificates with --certificates")


def _beside(uri: str) -> Path:
    place = uri.partition("#")[0]
    if "://" in place or place.startswith("unix:"):
        raise ValueError(f"{uri} is no local folder: name one with --certificates")
    return Path(place.rstrip("/") + FOLDER)
