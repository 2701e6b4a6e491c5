"""``pair purify``: purify photos and folders of photos."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pair.commands._running import stopping

if TYPE_CHECKING:
    from pair.guard.folder import Summary


def purify(
    paths: Annotated[list[Path], typer.Argument(help="Photos, and folders with all below.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; it mirrors the tree.")],
    model: Annotated[
        str, typer.Option(help="Shipped name, folder, or hub repository.")
    ] = "pair-small",
    preset: Annotated[
        str | None, typer.Option(help="'paper' or 'released' instead of the model's own settings.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed at a time.")] = 16,
    restore_size: Annotated[
        bool, typer.Option("--restore-size", help="Scale results to the size of the originals.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Repeatable masks, for experiments; default: secret, fresh ones."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(help="keep, png, jpg or webp; keep makes PNG of what is none of these."),
    ] = "keep",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Do everything again, whatever is in --out.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    backend: Annotated[
        str, typer.Option(help="torch or openvino; auto is torch unless --precision int8.")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32; faster and nearly the same: bf16, fp16, int8 (openvino).")
    ] = "fp32",
) -> None:
    """Purify photos. Stop it at any time; the same command continues where it was.

    Broken files are listed in OUT/failures.jsonl and do not stop the rest.

    Exit code: 0 all purified, 1 some files failed, 2 wrong usage or no place
    to write, 130/143 stopped by SIGINT/SIGTERM.
    """
    import torch

    from pair.guard.folder import purify_folder
    from pair.guard.plan import FORMATS
    from pair.purifier import Purifier

    if format not in FORMATS:
        raise ValueError(f"--format: {format!r} is none of {', '.join(FORMATS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    options = {"restore_size": restore_size, "backend": backend, "precision": precision}
    options |= {"preset": preset} if preset else {}
    purifier = Purifier.from_pretrained(model, **options)
    try:
        purifier.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say "there is none"
        raise ValueError(f"--device: cannot compute on {device!r} here") from error
    with stopping() as (stop, caught), _bar() as progress:
        summary = purify_folder(
            paths,
            out,
            purifier,
            seed=seed,
            format=format,
            batch_size=batch_size,
            overwrite=overwrite,
            progress=progress,
            stop=stop.is_set,
        )
    typer.echo(_sentence(summary))
    if summary.stopped:
        typer.echo("pair: stopped; run the same command again to continue", err=True)
        raise typer.Exit(128 + caught[0])
    raise typer.Exit(1 if summary.failed else 0)


def _shares(summary: Summary) -> str:
    """Where the time went, such as "decode 3 %, purify 95 %, write 2 %"."""
    total = max(sum(summary.seconds.values()), 1e-9)
    return ", ".join(f"{stage} {100 * s / total:.0f} %" for stage, s in summary.seconds.items())


def _sentence(summary: Summary) -> str:
    parts = [f"{summary.purified} purified", f"{summary.skipped} already done"]
    if summary.ignored:
        parts.append(f"{summary.ignored} other files ignored")
    parts.append(f"{summary.failed} failed" + f" (see {summary.failures})" * bool(summary.failed))
    return ", ".join(parts)


@contextmanager
def _bar() -> Iterator:
    """A progress bar with images/s and time left, on stderr so that stdout stays a summary."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Pace(TextColumn):
        """What gives way on a narrow terminal: it is cut there, and never two lines."""

        def render(self, task: Task) -> Text:
            text = super().render(task)
            text.no_wrap, text.overflow = True, "ellipsis"
            return text

    columns = (
        TextColumn("purifying"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        Pace("{task.fields[pace]}", table_column=Column(no_wrap=False)),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("purify", total=None, pace="")
        start = time.monotonic()

        def show(summary: Summary) -> None:
            new = summary.finished - summary.skipped  # what was done before tells nothing of pace
            rate = new / max(time.monotonic() - start, 1e-9)
            pace = ""
            if new:
                left = round((summary.found - summary.finished) / rate)
                failed = f", {summary.failed} failed" if summary.failed else ""
                clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
                pace = f"{clock} left, {rate:.1f} images/s{failed} ({_shares(summary)})"
            bar.update(task, total=summary.found, completed=summary.finished, pace=pace)

        yield show
