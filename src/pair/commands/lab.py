"""``pair lab``: the page for people."""

from __future__ import annotations

from typing import Annotated

import typer


def lab(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 7860,
    purifier: Annotated[str, typer.Option(help="Shipped name or folder.")] = "pair-small",
    encoder: Annotated[str, typer.Option(help="Shipped name or folder.")] = "clip-small",
    per_class: Annotated[int, typer.Option(min=1, help="Photos of each class to search.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in your browser.")] = False,
) -> None:
    """Place a patch on a picture, run the attack live, and search with and without PAIR.

    A page for this machine, without internet. For others, put it behind keys: pair serve --lab.
    """
    import torch

    from pair.serve.lab import _library, launch
    from pair.serve.scene import Scene

    if threads is not None:
        torch.set_num_threads(threads)
    _library()  # says at once if it is missing
    scene = Scene.load(purifier, encoder, per_class)
    where = f"[{host}]" if ":" in host else host
    typer.echo(f"pair: the lab is at http://{where}:{port}", err=True)
    launch(scene, host, port, open_browser=browser)
