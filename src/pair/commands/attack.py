"""``pair attack``: optimise adversarial patches against a target, and paste them onto photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pair.commands import _attack as common
from pair.commands import _attack_other as other
from pair.commands._attack import (
    Captions,
    Defended,
    DryRun,
    Eot,
    Keyword,
    Limit,
    MicroBatch,
    Out,
    Photos,
    Place,
    Plateau,
    Precision,
    Preset,
    Pretrained,
    Printed,
    Rate,
    Searches,
    Seed,
    Shape,
    Size,
    Start,
    TextModel,
    Threads,
    Warm,
)

app = typer.Typer(no_args_is_help=True, help="Make adversarial patches; for tests of your own.")


@app.command()
def tth(
    photos: Photos,
    out: Out,
    keyword: Keyword = None,
    captions: Captions = None,
    searches: Searches = None,
    gallery: Annotated[
        Path | None,
        typer.Option(help="Aim at the tenth place among these photos, not at the mean of texts."),
    ] = None,
    model: TextModel = "clip-small",
    pretrained: Pretrained = None,
    defense: Defended = None,
    preset: Preset = "paper",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Updates; default: the preset's.")
    ] = None,
    eot: Eot = None,
    lr: Rate = None,
    distortion: Annotated[
        float | None, typer.Option(help="Weight of staying like --start.")
    ] = None,
    size: Size = None,
    placement: Place = "top-right",
    start: Start = None,
    shape: Shape = "square",
    parameters: Annotated[
        str, typer.Option(help="What is optimised: pixels, tiles:<side> or dct:<k>.")
    ] = "pixels",
    restarts: Annotated[
        str | None,
        typer.Option(
            help="Starts that compete, the better half going on: carriers, dct, tiles; by commas."
        ),
    ] = None,
    locate: Annotated[
        int | None,
        typer.Option(min=2, help="Search the place too: of so many times so many to begin with."),
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="A patch of its own for every photo: OUT-<photo>.png.")
    ] = False,
    printed: Printed = False,
    warm: Warm = None,
    carriers: Annotated[
        int | None, typer.Option(min=1, help="Photos per step, drawn anew; default: all.")
    ] = None,
    plateau: Plateau = None,
    limit: Limit = 20,
    seed: Seed = 0,
    micro_batch: MicroBatch = 64,
    precision: Precision = "fp32",
    threads: Threads = 1,
    dry_run: DryRun = False,
) -> None:
    """TTH: one patch that makes photos appear in searches for a keyword.

    Stop it at any time; the same command continues where it was (except with --locate).
    """
    import torch

    from pair.attacks.objectives import RankHinge
    from pair.attacks.patch import Patch
    from pair.attacks.search import location_search
    from pair.attacks.transforms import PrintTransform
    from pair.attacks.tth import TTHConfig
    from pair.attacks.tth import tth as optimise

    torch.set_num_threads(threads)
    if restarts is not None and (each or locate is not None):
        raise ValueError("--restarts compare whole patches: leave out --each and --locate")
    if locate is not None and each:
        raise ValueError("--locate looks for one place: leave out --each")
    encoder = common.text_model(model, pretrained)
    changes: dict[str, Any] = {
        "steps": steps, "eot": eot, "lr": lr, "distortion": distortion, "size": size,
        "placement": placement, "start": start, "micro_batch": micro_batch,
        "precision": precision, "carriers": carriers, "plateau": common.plateau(plateau),
        "parameters": parameters,
    }  # fmt: skip
    one = start is not None or warm is not None or shape != "square" or each or locate is not None
    if restarts is not None:
        changes["restarts"] = tuple(name.strip() for name in restarts.split(","))
    elif one:
        changes["restarts"] = ()
    if each:
        changes["scope"] = "per-image"
    config = TTHConfig.preset(preset, **{k: v for k, v in changes.items() if v is not None})
    victim, config = common.victim(encoder, defense, config, eot)
    goal, lines, facts = common.goal(encoder, model, keyword, captions, searches)
    if gallery is not None:
        goal = RankHinge(*common.bars(encoder, victim, lines, gallery, seed))
    files = common.files(photos)[:limit]
    images = common.load(files, encoder.image_size, limit)
    names = common.names(files) if each else None
    common.check_outs(out, names)
    if not common.announce(config, victim, images, dry_run, locate):
        return
    patch = None
    if warm is not None:
        patch = Patch.load(warm).fit(encoder.image_size)
    elif shape != "square" or locate is not None:
        patch = common.shaped(shape, config.start, config.size, placement, encoder.image_size, seed)
    options: dict[str, Any] = {
        "config": config,
        "generator": torch.Generator().manual_seed(seed),
        "penalty": victim.penalty,
        "transform": PrintTransform() if printed else None,
    }
    with common.bar() as progress:
        options["progress"] = progress
        if locate is not None and patch is not None:
            result = location_search(victim.features, images, goal, patch, grid=locate, **options)
        else:
            saved = common.checkpoint(out)
            result = optimise(
                victim.features, images, goal, patch=patch, checkpoint=saved, **options
            )
    common.store(
        result, out, {"model": model, "defense": defense, "preset": preset, **facts}, names
    )


@app.command()
def advhash(
    photos: Photos,
    target: Annotated[Path, typer.Option(help="Folder with photos of the class to imitate.")],
    out: Out,
    model: Annotated[
        str, typer.Option(help="Hash model: shipped name, folder or hub repository.")
    ] = "csq-small",
    defense: Defended = None,
    preset: Preset = "paper",
    budget: Annotated[int | None, typer.Option(min=1, help="Updates in all, at most.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Photos per update; default: the preset's.")
    ] = None,
    eot: Eot = None,
    lr: Rate = None,
    size: Size = None,
    shrink: Annotated[
        float | None,
        typer.Option(help="Begin with this share of the side and cut down to --size; 0: do not."),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            help="advhash (lower right corner at 200/224), top-left, ..., centre, random-image or "
            "random-step; default: the preset's."
        ),
    ] = None,
    start: Start = None,
    shape: Shape = "square",
    printed: Printed = False,
    warm: Warm = None,
    plateau: Plateau = None,
    limit: Limit = 50,
    seed: Seed = 0,
    micro_batch: MicroBatch = 64,
    precision: Precision = "fp32",
    threads: Threads = 1,
    dry_run: DryRun = False,
) -> None:
    """AdvHash: one patch that gives photos the hash code of another class.

    Stop it at any time; the same command continues where it was.
    """
    from dataclasses import replace

    import torch

    from pair.attacks.advhash import AdvHashConfig
    from pair.attacks.advhash import advhash as optimise
    from pair.attacks.objectives import anchor_code
    from pair.attacks.transforms import PrintTransform
    from pair.retrieval.hashing import HashNet

    torch.set_num_threads(threads)
    common.check_outs(out)
    encoder = HashNet.from_pretrained(model)
    changes: dict[str, Any] = {
        "budget": budget, "batch": batch, "eot": eot, "lr": lr, "size": size, "shrink": shrink,
        "placement": placement, "micro_batch": micro_batch, "precision": precision,
        "plateau": common.plateau(plateau), "restarts": () if start or warm else None,
    }  # fmt: skip
    config = AdvHashConfig.preset(preset, **{k: v for k, v in changes.items() if v is not None})
    if not config.shrink or (warm is not None and shrink is None):
        config = replace(config, shrink=None)  # a finished patch is not blown up again
    if config.shrink and config.placement.startswith("random"):
        raise ValueError("a patch that is cut down to its size needs one place: add --shrink 0")
    if config.optimiser == "sign":
        for name, given in (("plateau", plateau), ("lr", lr), ("shrink", shrink)):
            if given is not None:
                raise ValueError(
                    f"--{name} is for the presets std, strong and max: AdvHash as published moves "
                    "by 1/255, ends by itself and keeps its size"
                )
    patch = common.hash_start(config, shape, start, warm, encoder.image_size, seed)
    if config.compat and defense is not None:
        raise ValueError(
            f"preset {preset!r} leaves the range [0, 1], which a defense refuses: use another"
        )
    with torch.no_grad():
        code = anchor_code(encoder.codes(common.load([target], encoder.image_size, 256)))
    victim, config = common.victim(encoder, defense, config, eot)
    features = encoder.image_features if config.compat else victim.features
    images = common.load(photos, encoder.image_size, limit)
    if not common.announce(config, victim, images, dry_run):
        return
    with common.bar() as progress:
        result = optimise(
            features,
            images,
            code,
            config=config,
            patch=patch,
            generator=torch.Generator().manual_seed(seed),
            progress=progress,
            checkpoint=common.checkpoint(out),
            penalty=victim.penalty,
            transform=PrintTransform() if printed else None,
        )
    facts = {"target": target.name, "agreement": result.curves.get("agreement", [])[-1:]}
    common.store(result, out, {"model": model, "defense": defense, "preset": preset, **facts}, None)


for command in (other.perturb, other.blackbox, other.floor, other.score):
    app.command()(command)


@app.command()
def apply(
    patch: Annotated[Path, typer.Argument(help="The patch, with or without .png.")],
    photos: Photos,
    out: Annotated[Path, typer.Option(help="Folder for the patched photos (PNG).")],
    seed: Seed = 0,
) -> None:
    """Paste a patch onto photos, scaled to the short side of each."""
    import torch

    from pair.attacks.patch import Patch
    from pair.images import load_image, save_image

    loaded = Patch.load(patch)
    generator = torch.Generator().manual_seed(seed)
    files = common.files(photos)
    targets = common.targets(photos, files, out)
    out.mkdir(parents=True, exist_ok=True)
    for file, target in zip(files, targets, strict=True):
        image = load_image(file)[None]
        fitted = loaded.fit(min(image.shape[-2:]))
        save_image(target, fitted.apply(image, generator)[0])
    typer.echo(f"{len(files)} photos with the patch in {out}")
