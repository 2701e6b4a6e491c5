"""``pair attack`` beside the patch attacks: noise, black box, the floor, scores of a patch.

Registered in :mod:`pair.commands.attack`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pair.commands import _attack as common
from pair.commands._attack import (
    Captions,
    Defended,
    DryRun,
    Keyword,
    Limit,
    MicroBatch,
    Out,
    Photos,
    Place,
    Pretrained,
    Searches,
    Seed,
    Shape,
    TextModel,
    Threads,
)

Start = Annotated[
    str, typer.Option(help="qr[:text], text:<words>, noise, grey, logo or a picture.")
]
Share = Annotated[float, typer.Option(help="Side of the patch as a share of the image's.")]
Draws = Annotated[int, typer.Option(min=1, help="Draws of a random defense per evaluation.")]
Gallery = Annotated[Path | None, typer.Option(help="Photos that the searches look through.")]


def perturb(
    photos: Photos,
    out: Annotated[Path, typer.Option(help="Folder for the changed photos (PNG) and a record.")],
    keyword: Keyword = None,
    captions: Captions = None,
    searches: Searches = None,
    model: TextModel = "clip-small",
    pretrained: Pretrained = None,
    defense: Defended = None,
    epsilon: Annotated[
        int, typer.Option(min=1, max=255, help="Largest change of a value, in 255ths.")
    ] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Updates of every photo.")] = 100,
    momentum: Annotated[float, typer.Option(help="Of the gradients' directions, 0 to 1.")] = 0.0,
    eot: Annotated[
        int | None, typer.Option(min=1, help="Draws of a random defense per step.")
    ] = None,
    limit: Limit = 20,
    seed: Seed = 0,
    micro_batch: MicroBatch = 64,
    threads: Threads = 1,
    dry_run: DryRun = False,
) -> None:
    """Change every photo invisibly, each for itself; with --searches each becomes a hub.

    Stop it at any time; the same command continues with the photos that are missing.
    """
    import hashlib
    import json

    import torch

    from pair.attacks.cost import Cost, counted, measure
    from pair.attacks.perturbation import perturb as optimise
    from pair.files import write_atomic
    from pair.images import load_image, quantise, save_image

    torch.set_num_threads(threads)
    encoder = common.text_model(model, pretrained)
    victim = common.adaptive_victim(encoder, defense)
    draws = victim.samples if eot is None else eot
    goal, _, facts = common.goal(encoder, model, keyword, captions, searches)
    files = common.files(photos)[:limit]
    targets = common.targets(photos, files, out)
    images = quantise(common.load(files, encoder.image_size, limit))
    pace = measure(victim.features, images, draws, micro_batch=micro_batch)
    gradients = steps * len(images) * draws
    cost = Cost(steps * len(images), gradients, gradients * pace)
    typer.echo(f"{counted(len(images), 'photo')}; {cost}", err=True)
    if dry_run:
        return
    settings = {
        "model": model, "defense": defense, "epsilon": epsilon, "steps": steps,
        "momentum": momentum, "eot": draws, "seed": seed, **facts,
    }  # fmt: skip
    losses = []
    with common.bar() as progress:
        for number, (png, image) in enumerate(zip(targets, images, strict=True)):
            sheet = png.with_suffix(".json")
            pixels = hashlib.sha256(image.numpy().tobytes()).hexdigest()
            key = {"format": 1, "kind": "perturbation", "original": pixels, "settings": settings}
            found = json.loads(sheet.read_text()) if png.is_file() and sheet.is_file() else {}
            if {k: found.get(k) for k in key} != key:

                def tell(step: int, _: int, loss: float, done: int = number) -> None:
                    progress(done * steps + step, len(images) * steps, loss)

                result = optimise(
                    victim.features, image[None], goal, epsilon=epsilon / 255, steps=steps,
                    eot=draws, momentum=momentum, micro_batch=micro_batch, progress=tell,
                    generator=torch.Generator().manual_seed(seed + number),
                )  # fmt: skip
                out.mkdir(parents=True, exist_ok=True)
                save_image(png, result.images[0])
                stored = load_image(png)
                found = {
                    **key,
                    "largest change": round(float((stored - image).abs().max()) * 255),
                    "losses": [round(v, 6) for v in result.losses],
                }
                write_atomic(sheet, (json.dumps(found, indent=1) + "\n").encode())
            losses.append((found["losses"][0], found["losses"][-1]))
    first, last = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    typer.echo(f"{len(losses)} photos in {out}: mean loss {first:.4f} -> {last:.4f}")


def blackbox(
    photos: Photos,
    out: Out,
    keyword: Keyword = None,
    captions: Captions = None,
    searches: Searches = None,
    model: TextModel = "clip-small",
    pretrained: Pretrained = None,
    defense: Defended = None,
    method: Annotated[
        str, typer.Option(help="squares (random search) or nes (estimated gradients).")
    ] = "squares",
    queries: Annotated[int, typer.Option(min=2, help="Evaluations of the victim.")] = 1000,
    draws: Draws = 1,
    gallery: Annotated[
        Path | None,
        typer.Option(help="See lists only, not scores: who is in the top 10 among these photos."),
    ] = None,
    size: Share = 0.35,
    placement: Place = "top-right",
    start: Start = "grey",
    shape: Shape = "square",
    limit: Limit = 20,
    seed: Seed = 0,
    threads: Threads = 1,
    dry_run: DryRun = False,
) -> None:
    """Optimise a patch without gradients, by asking the victim again and again.

    Checks whether a defense only hides its gradients; rarely the strongest attack.
    """
    import torch

    from pair.attacks.blackbox import TopKOracle, nes, random_search
    from pair.attacks.cost import counted, duration, measure
    from pair.attacks.objectives import Goal

    torch.set_num_threads(threads)
    common.check_outs(out)
    directions = 10
    if method not in ("squares", "nes"):
        raise ValueError(f"no method {method!r}: use squares or nes")
    if method == "nes" and queries < 2 * directions + 2:
        raise ValueError(f"nes needs at least {2 * directions + 2} queries for its first step")
    encoder = common.text_model(model, pretrained)
    victim = common.adaptive_victim(encoder, defense)
    target, lines, facts = common.goal(encoder, model, keyword, captions, searches)
    goal: Goal = target
    if gallery is not None:
        goal = TopKOracle(*common.bars(encoder, victim, lines, gallery, seed))
    images = common.load(photos, encoder.image_size, limit)
    pace = measure(victim.features, images, draws, backward=False)
    forwards = queries * draws * len(images)
    photos_told, time = counted(len(images), "photo"), duration(forwards * pace)
    typer.echo(f"{photos_told}; {forwards:,} forward passes, {time} here", err=True)
    if dry_run:
        return
    patch = common.shaped(shape, start, size, placement, encoder.image_size, seed)
    options: dict[str, Any] = {"draws": draws, "generator": torch.Generator().manual_seed(seed)}
    with common.bar() as progress:
        options["progress"] = progress
        if method == "nes":
            steps = (queries - 1) // (2 * directions + 1)
            result = nes(victim.features, images, goal, patch, steps=steps, directions=directions,
                         **options)  # fmt: skip
        else:
            result = random_search(victim.features, images, goal, patch, queries=queries, **options)
    about = {"model": model, "defense": defense, "queries": queries, **facts}
    common.store(result, out, about, None)


def floor(
    photos: Photos,
    keyword: Annotated[str, typer.Option(help="Word whose searches shall find the photos.")],
    out: Annotated[
        Path | None, typer.Option(help="Keep the best one: writes OUT.png and OUT.json.")
    ] = None,
    concept: Annotated[
        Path | None, typer.Option(help="Photos of the thing itself, for collages.")
    ] = None,
    captions: Captions = None,
    model: TextModel = "clip-small",
    pretrained: Pretrained = None,
    defense: Defended = None,
    draws: Draws = 6,
    collages: Annotated[int, typer.Option(min=1, help="Crops of --concept to try.")] = 400,
    size: Share = 0.35,
    placement: Place = "top-right",
    shape: Shape = "square",
    limit: Limit = 20,
    seed: Seed = 3_000_003,
    threads: Threads = 1,
) -> None:
    """What patches reach that nobody optimised: grey, noise, a QR code, words, collages.

    An attack that does not get below the smallest loss printed here has failed.
    """
    import torch

    from pair.attacks.evaluate import score
    from pair.attacks.floor import floor as run

    torch.set_num_threads(threads)
    if out is not None:
        common.check_outs(out)
    encoder = common.text_model(model, pretrained)
    victim = common.adaptive_victim(encoder, defense)
    goal, _, facts = common.goal(encoder, model, keyword, captions, None)
    images = common.load(photos, encoder.image_size, limit)
    patch = common.shaped(shape, "grey", size, placement, encoder.image_size, seed)
    pool = [] if concept is None else list(common.load([concept], encoder.image_size, 10**6))
    entries = run(
        victim.features, images, goal, patch, words=keyword, photos=pool, collages=collages,
        draws=draws, seed=seed,
        prescreen=None if defense is None else encoder,
    )  # fmt: skip
    bare = score(victim.features, images, None, goal, draws, torch.Generator().manual_seed(seed))
    typer.echo(f"{'no patch':12} loss {bare:.4f}")
    for entry in entries:
        typer.echo(f"{entry.family:12} loss {entry.loss:.4f}, best of {entry.candidates}")
    if out is not None:
        losses = {e.family: round(e.loss, 6) for e in entries}
        best = entries[0].patch
        about = {"model": model, "defense": defense, "losses": losses, **facts}
        typer.echo(f"{best.with_content(best.content, **about).save(out)}: {entries[0].family}")


def score(
    patch: Annotated[Path, typer.Argument(help="The patch, with or without .png.")],
    photos: Photos,
    keyword: Keyword = None,
    captions: Captions = None,
    searches: Searches = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Text-image model, as elsewhere; several show how the patch transfers."),
    ] = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(help="Defense, or 'none'; give several to see how the patch transfers."),
    ] = None,
    gallery: Gallery = None,
    top: Annotated[int, typer.Option(min=1, help="Places of a result list.")] = 10,
    draws: Draws = 50,
    uploads: Annotated[
        str, typer.Option(help="Chances when a photo is uploaded so often; by commas.")
    ] = "1,10,100",
    out: Annotated[Path | None, typer.Option(help="The same as JSON.")] = None,
    limit: Limit = 20,
    seed: Seed = 9_000_001,
    threads: Threads = 1,
) -> None:
    """How good a finished patch is: on fresh draws, on other victims, after many uploads.

    With --gallery: in how many lists a patched photo is, and how likely at
    least one of n uploads of it gets in. A random defense draws anew for each
    upload.
    """
    import json

    import torch

    from pair.attacks.evaluate import best_of, draw_outputs, enters
    from pair.attacks.patch import Patch
    from pair.files import write_atomic

    torch.set_num_threads(threads)
    try:
        counts = sorted({int(n) for n in uploads.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise ValueError(f"--uploads takes numbers such as 1,10,100, got {uploads!r}")
    loaded = Patch.load(patch)
    rows = []
    for name in model or ["clip-small"]:
        encoder = common.text_model(name, None)
        goal, lines, facts = common.goal(encoder, name, keyword, captions, searches)
        images = common.load(photos, encoder.image_size, limit)
        fitted = loaded.fit(encoder.image_size)
        for which in defense or ["none"]:
            victim = common.adaptive_victim(encoder, None if which == "none" else which)
            row: dict[str, Any] = {"model": name, "defense": which, "draws": draws}
            times = draws if victim.samples > 1 else 1  # without randomness all are the same
            line = f"{name}, {which}:"
            for key, shown in (("without", None), ("with", fitted)):
                generator = torch.Generator().manual_seed(seed)
                outputs = draw_outputs(victim.features, images, shown, times, generator)
                row[key] = {"loss": float(goal(outputs).mean())}
                line += f" {key} loss {row[key]['loss']:.4f}"
                if gallery is None:
                    continue
                if shown is None:
                    texts, limits = common.bars(encoder, victim, lines, gallery, seed, top)
                inside = enters(outputs, texts, limits)  # (draws, B, Q)
                row[key]["share"] = float(inside.float().mean())
                row[key]["any"] = float(inside.any(1).float().mean())
                row[key]["uploads"] = best_of(inside, counts)
                line += f" in top {top} {100 * row[key]['share']:.1f} %"
            line = line.replace(" with loss", "; with loss")
            typer.echo(line)
            if gallery is not None:
                chances = (f"{n}: {100 * p:.1f} %" for n, p in row["with"]["uploads"].items())
                typer.echo(f"  any photo in the list {100 * row['with']['any']:.1f} %; "
                           f"a photo within n uploads {', '.join(chances)}")  # fmt: skip
            rows.append(row)
    if out is not None:
        record = {"patch": loaded.notes, "texts": facts, "seed": seed, "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, (json.dumps(record, indent=1) + "\n").encode())
