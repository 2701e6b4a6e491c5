"""``pair serve``: purify, embed and search over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    collection: Annotated[
        str | None, typer.Option(help="Collection to search; its models are used.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    encoder: Annotated[
        str, typer.Option(help="Without a collection: text-image encoder; '' for none.")
    ] = "clip-small",
    hasher: Annotated[
        str, typer.Option(help="Without a collection: hash network; '' for none.")
    ] = "csq-small",
    purifier: Annotated[
        str, typer.Option(help="Without a collection: generator; '' for none.")
    ] = "pair-small",
    bank: Annotated[
        Path | None, typer.Option(help="Frequent queries, one a line: turns /audit on.")
    ] = None,
    clean: Annotated[
        Path | None, typer.Option(help="Folder of untouched photos: /audit can raise alarms.")
    ] = None,
    budget: Annotated[float, typer.Option(help="False alarms of /audit, as a share.")] = 0.01,
    keys: Annotated[
        Path | None, typer.Option(help="API keys, a line each: name key. See PAIR_API_KEYS too.")
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Listen to other machines without keys.")
    ] = False,
    lab: Annotated[bool, typer.Option("--lab", help="The page of `pair lab` under /lab.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures computed together.")] = 16,
    wait_ms: Annotated[float, typer.Option(min=0, help="Longest wait for a fuller batch.")] = 4,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request, MB.")] = 32,
    max_image_mb: Annotated[int, typer.Option(min=1, help="Largest picture, MB.")] = 16,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of a picture.")] = 40_000_000,
    max_frames: Annotated[int, typer.Option(min=1, help="Most frames of a picture.")] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="Most pictures in a request.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Pictures that may wait.")] = 128,
    requests: Annotated[int, typer.Option(min=1, help="Requests worked on at a time.")] = 96,
    per_key: Annotated[int, typer.Option(min=1, help="Of these, for one key.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 30,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds 'not ready' but working, before stopping.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the models.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve purification, embeddings and search over HTTP; reference at /docs.

    SIGTERM stops it in good order: what was accepted is finished first.
    """
    import torch

    try:
        from pair.serve.app import Service
        from pair.serve.server import listen, server
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed: pip install 'pair-retrieval[serve]'"
        ) from error
    from pair.serve import logs
    from pair.serve.engine import Engine
    from pair.serve.settings import Keys, Limits

    known = Keys.read(keys)
    if not known and not open_ and host not in LOOPBACK:
        raise ValueError(
            f"listening on {host} without API keys lets anybody in: set PAIR_API_KEYS or --keys, "
            "or say --open"
        )
    limits = Limits(
        body=max_body_mb * 2**20,
        image=max_image_mb * 2**20,
        pixels=max_pixels,
        frames=max_frames,
        batch=max_batch,
        timeout=timeout,
        queue=queue,
        requests=requests,
        per_key=per_key,
    )
    logs.set_up(log_level)
    if threads is not None:
        torch.set_num_threads(threads)
    engine = Engine.load(collection, encoder or None, hasher or None, purifier or None, device)
    if bank is not None:
        queries = [line.strip() for line in bank.read_text("utf-8").splitlines() if line.strip()]
        photos = [] if clean is None else sorted(p for p in clean.rglob("*") if p.is_file())
        engine.audit_with(queries, photos, budget)
    service = Service(engine, limits=limits, keys=known, batch=batch, wait=wait_ms / 1000)
    if lab:
        from pair.serve.lab import mount

        mount(service, known)
    try:
        socket = listen(host, port)
    except OSError:
        service.close()
        raise
    where = f"[{host}]" if ":" in host else host
    typer.echo(f"pair: serving on http://{where}:{socket.getsockname()[1]}", err=True)
    server(service, grace).run(sockets=[socket])
