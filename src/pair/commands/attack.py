"""``pair attack``: optimise adversarial patches against a target, and paste them onto photos."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from pair.attacks.optimise import AttackResult, Progress
    from pair.attacks.wrappers import Adaptive

app = typer.Typer(no_args_is_help=True, help="Make adversarial patches; for tests of your own.")

Photos = Annotated[list[Path], typer.Argument(help="Photos, and folders with all below.")]
Out = Annotated[Path, typer.Option(help="The patch: writes OUT.png and OUT.json.")]
Preset = Annotated[
    str, typer.Option(help="paper, released, std, strong or max (see the documentation).")
]
Defended = Annotated[
    str | None, typer.Option(help="Attack through this defense, for example 'pair'.")
]
Eot = Annotated[int | None, typer.Option(min=1, help="Draws of a random defense per step.")]
Size = Annotated[float | None, typer.Option(help="Side of the patch as a share of the image's.")]
Limit = Annotated[int, typer.Option(min=1, help="Use at most so many photos.")]
Seed = Annotated[int, typer.Option(help="Seed of the optimisation.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the expected cost and stop.")]
Precision = Annotated[
    str, typer.Option(help="fp32, or bf16: faster on some machines, rougher gradients.")
]
Plateau = Annotated[
    int | None,
    typer.Option(min=2, help="Stop when so many steps brought less than 1 % of the gain so far."),
]
MicroBatch = Annotated[int, typer.Option(min=1, help="Images computed at a time.")]


@app.command()
def tth(
    photos: Photos,
    keyword: Annotated[str, typer.Option(help="Word whose searches shall find the photos.")],
    out: Out,
    captions: Annotated[
        Path | None,
        typer.Option(help="Text file, a caption per line: those with the word set the target."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Text-image model: shipped name, folder or hub repository.")
    ] = "clip-small",
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip tag or file; --model is then its architecture.")
    ] = None,
    defense: Defended = None,
    preset: Preset = "paper",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Updates; default: the preset's.")
    ] = None,
    eot: Eot = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    distortion: Annotated[
        float | None, typer.Option(help="Weight of staying like --start.")
    ] = None,
    size: Size = None,
    placement: Annotated[
        str, typer.Option(help="top-left, top-right, ..., centre, random-image or random-step.")
    ] = "top-right",
    start: Annotated[
        str | None, typer.Option(help="qr[:text], text:<words>, noise, grey, logo or a picture.")
    ] = None,
    shape: Annotated[
        str, typer.Option(help="square, circle, or frame:<border as a share of the patch>.")
    ] = "square",
    printed: Annotated[
        bool, typer.Option("--printed", help="Turn, scale, dim and blur it in every step.")
    ] = False,
    warm: Annotated[Path | None, typer.Option(help="Continue from this finished patch.")] = None,
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

    Stop it at any time; the same command continues where it was.
    """
    import torch

    from pair.attacks.keywords import select_captions, target_embedding
    from pair.attacks.patch import Patch
    from pair.attacks.transforms import PrintTransform
    from pair.attacks.tth import TTHConfig
    from pair.attacks.tth import tth as optimise
    from pair.data.prompts import TRAIN_TEMPLATES, sentences

    torch.set_num_threads(threads)
    encoder = _text_model(model, pretrained)
    changes: dict[str, Any] = {
        "steps": steps, "eot": eot, "lr": lr, "distortion": distortion, "size": size,
        "placement": placement, "start": start, "micro_batch": micro_batch,
        "precision": precision, "carriers": carriers, "plateau": _plateau(plateau),
    }  # fmt: skip
    if start is not None or warm is not None or shape != "square":
        changes["restarts"] = ()
    config = TTHConfig.preset(preset, **{k: v for k, v in changes.items() if v is not None})
    victim, config = _victim(encoder, defense, config, eot)
    if captions is None:
        lines = sentences([keyword], TRAIN_TEMPLATES)
    else:
        lines = select_captions(captions.read_text().splitlines(), keyword)
        if not lines:
            raise ValueError(f"no caption in {captions} matches the keyword {keyword!r}")
    target = target_embedding(encoder, lines)
    images = _load(photos, encoder.image_size, limit)
    if not _announce(config, victim, images, dry_run):
        return
    patch = None if warm is None else Patch.load(warm).fit(encoder.image_size)
    if warm is None and shape != "square":
        patch = _shaped(shape, config, encoder.image_size, seed)
    with _bar() as progress:
        result = optimise(
            victim.features,
            images,
            target,
            config=config,
            patch=patch,
            generator=torch.Generator().manual_seed(seed),
            progress=progress,
            checkpoint=_checkpoint(out),
            penalty=victim.penalty,
            transform=PrintTransform() if printed else None,
        )
    facts = {"keyword": keyword, "captions": len(lines)}
    _store(result, out, {"model": model, "defense": defense, "preset": preset, **facts})


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
    eot: Eot = None,
    size: Size = None,
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
    import torch

    from pair.attacks.advhash import AdvHashConfig
    from pair.attacks.advhash import advhash as optimise
    from pair.attacks.objectives import anchor_code
    from pair.retrieval.hashing import HashNet

    torch.set_num_threads(threads)
    encoder = HashNet.from_pretrained(model)
    changes = {
        "budget": budget,
        "eot": eot,
        "size": size,
        "micro_batch": micro_batch,
        "precision": precision,
        "plateau": _plateau(plateau),
    }
    config = AdvHashConfig.preset(preset, **{k: v for k, v in changes.items() if v is not None})
    if config.plateau is not None and config.optimiser == "sign":
        raise ValueError("--plateau is for the presets std, strong and max: AdvHash ends by itself")
    if config.compat and defense is not None:
        raise ValueError(
            f"preset {preset!r} leaves the range [0, 1], which a defense refuses: use another"
        )
    with torch.no_grad():
        code = anchor_code(encoder.codes(_load([target], encoder.image_size, 256)))
    victim, config = _victim(encoder, defense, config, eot)
    features = encoder.image_features if config.compat else victim.features
    images = _load(photos, encoder.image_size, limit)
    if not _announce(config, victim, images, dry_run):
        return
    with _bar() as progress:
        result = optimise(
            features,
            images,
            code,
            config=config,
            generator=torch.Generator().manual_seed(seed),
            progress=progress,
            checkpoint=_checkpoint(out),
            penalty=victim.penalty,
        )
    facts = {"target": target.name, "agreement": result.curves.get("agreement", [])[-1:]}
    _store(result, out, {"model": model, "defense": defense, "preset": preset, **facts})


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
    files = _files(photos)
    names = [f"{file.stem}.png" for file in files]
    if len(set(names)) < len(names):
        double = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"two photos would become {double}: give their folders one by one")
    out.mkdir(parents=True, exist_ok=True)
    for file, name in zip(files, names, strict=True):
        image = load_image(file)[None]
        fitted = loaded.fit(min(image.shape[-2:]))
        save_image(out / name, fitted.apply(image, generator)[0])
    typer.echo(f"{len(files)} photos with the patch in {out}")


def _files(paths: list[Path]) -> list[Path]:
    from pair.guard.plan import named_like_image

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.is_file() and named_like_image(str(p)))
            files += sorted(found)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"there is no photo or folder {path}")
    if not files:
        raise ValueError(f"no photos in {', '.join(map(str, paths))}")
    return files


def _load(paths: list[Path], size: int, limit: int) -> Tensor:
    from pair.images import load_batch

    return load_batch(_files(paths)[:limit], size)


def _text_model(name: str, pretrained: str | None) -> Any:
    if pretrained is not None:
        from pair.retrieval.openclip import OpenClip

        return OpenClip.from_pretrained(name, pretrained)
    from pair.retrieval.clip import SmallClip

    return SmallClip.from_pretrained(name)


def _victim(
    encoder: Any, defense: str | None, config: Any, eot: int | None
) -> tuple[Adaptive, Any]:
    """The encoder behind the defense; without a random defense one draw per step is enough."""
    from dataclasses import replace

    from pair.attacks.wrappers import Adaptive, adaptive, as_features
    from pair.defenses import make

    if defense is None:
        victim = Adaptive(as_features(encoder), 1, None, "exact")
    else:
        victim = adaptive(encoder, make(defense))
    if victim.samples == 1 and eot is None:
        config = replace(config, eot=1)
    return victim, config


def _plateau(window: int | None) -> tuple[int, float] | None:
    return None if window is None else (window, 0.01)


def _shaped(shape: str, config: Any, image_size: int, seed: int) -> Any:
    """A start of the configured size and place that is not a full square."""
    import torch

    from pair.attacks import carriers
    from pair.attacks.patch import Patch

    side = carriers.pixels(config.size, image_size)
    kind, _, border = shape.partition(":")
    try:
        if kind == "circle" and not border:
            mask = carriers.circle(side)
        elif kind == "frame" and border:
            mask = carriers.frame(side, side, max(1, int(float(border) * side)))
        else:
            raise ValueError("not known")
    except ValueError as error:
        raise ValueError(f"no shape {shape!r}: use square, circle or frame:0.2 ({error})") from None
    generator = torch.Generator().manual_seed(seed)
    return Patch.make(
        config.start, side, image_size, config.placement, mask=mask, generator=generator
    )


def _announce(config: Any, victim: Adaptive, images: Tensor, dry_run: bool) -> bool:
    from pair.attacks.cost import estimate, measure

    pace = measure(
        victim.features,
        images,
        config.eot,
        micro_batch=config.micro_batch,
        precision=config.precision,
    )
    typer.echo(f"{len(images)} photos; {estimate(config, len(images), pace)}", err=True)
    return not dry_run


def _checkpoint(out: Path) -> Path:
    return Path(f"{out}.checkpoint")


def _store(result: AttackResult, out: Path, facts: dict[str, Any]) -> None:
    record = {**result.record(), "losses": [round(v, 6) for v in result.losses]}
    png = result.patch.with_content(result.patch.content, **facts, **record).save(out)
    for file in out.parent.glob(f"{_checkpoint(out).name}*"):
        file.unlink()
    typer.echo(
        f"{png}: loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f} "
        f"in {result.gradients_used:,} sample gradients ({result.stopped})"
    )
    if result.late_gain() >= 0.01:
        typer.echo("the loss was still falling at the end: more steps give a stronger patch")


@contextmanager
def _bar() -> Iterator[Progress]:
    """Steps, loss and time left on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("optimising"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("attack", total=None, loss=0.0)
        yield lambda step, steps, loss: bar.update(task, total=steps, completed=step, loss=loss)
