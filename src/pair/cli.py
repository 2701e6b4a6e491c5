"""The command ``pair``. Each subcommand lives in a module of its own under ``pair.commands``."""

from __future__ import annotations

import os
import sys

import typer

from pair import __version__
from pair.commands import (
    attack,
    audit,
    bench,
    certified,
    certify,
    data,
    demo,
    index,
    lab,
    models,
    purify,
    search,
    serve,
    train,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keep image retrieval honest under adversarial patches.",
)
app.command("demo")(demo.demo)
app.add_typer(attack.app, name="attack")
app.command("audit")(audit.audit)
app.add_typer(bench.app, name="bench")
app.command("bench-certified")(certified.bench)
app.command("certify")(certify.certify)
app.add_typer(data.app, name="data")
app.add_typer(index.app, name="index")
app.command("lab")(lab.lab)
app.add_typer(models.app, name="models")
app.command("purify")(purify.purify)
app.command("search")(search.search)
app.command("serve")(serve.serve)
app.command("train")(train.train)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"pair {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def _sentence(error: ValueError | OSError) -> str:
    """What an error says, in one line; of the system's own "file: reason", without its number."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if _named(n)]
        text = ": ".join([*names[-1:], error.strerror])
    return " ".join(text.split()) or type(error).__name__


def _named(name: object) -> bool:
    return isinstance(name, (str, bytes, os.PathLike)) and bool(name)


def main() -> None:
    """Entry point: bad input is one sentence on stderr and exit code 2, never a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"pair: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
