"""What the subcommands of ``pair attack`` share: victims, photos, targets, costs, records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from pair.attacks.advhash import AdvHashConfig
    from pair.attacks.objectives import Goal
    from pair.attacks.optimise import AttackResult, Progress
    from pair.attacks.patch import Patch
    from pair.attacks.wrappers import Adaptive

Photos = Annotated[list[Path], typer.Argument(help="Photos, and folders with all below.")]
Out = Annotated[Path, typer.Option(help="The patch: writes OUT.png and OUT.json.")]
Keyword = Annotated[str | None, typer.Option(help="Word whose searches shall find the photos.")]
Searches = Annotated[
    Path | None,
    typer.Option(help="Instead of --keyword: a file, a search per line, all to be met (a hub)."),
]
Captions = Annotated[
    Path | None,
    typer.Option(help="Text file, a caption per line: those with the word set the target."),
]
TextModel = Annotated[
    str,
    typer.Option(
        "--model",
        help="Text-image model: shipped name, folder, hub repository or "
        "open_clip:ARCHITECTURE/WEIGHTS.",
    ),
]
Pretrained = Annotated[
    str | None,
    typer.Option(help="Tag or file of open_clip, if --model is no more than an architecture."),
]
Place = Annotated[
    str,
    typer.Option(help="top-left, top-right, ..., centre, random-image or random-step."),
]
Shape = Annotated[
    str,
    typer.Option(
        help="square, circle, rectangle:<height>x<width> (shares of the side), frame:<border as a "
        "share of the patch>, several:<n> (squares of together the same area) or mask:<picture>."
    ),
]
Start = Annotated[
    str | None, typer.Option(help="qr[:text], text:<words>, noise, grey, logo or a picture.")
]
Rate = Annotated[float | None, typer.Option(help="Learning rate.")]
Warm = Annotated[Path | None, typer.Option(help="Continue from this finished patch.")]
Printed = Annotated[
    bool, typer.Option("--printed", help="Turn, scale, dim and blur it in every step.")
]
Preset = Annotated[
    str, typer.Option(help="paper, released, std, strong or max (see the documentation).")
]
Defended = Annotated[
    str | None, typer.Option(help="Attack through this defense, for example 'pair'.")
]
Eot = Annotated[int | None, typer.Option(min=1, help="Draws of a random defense per step.")]
Size = Annotated[float | None, typer.Option(help="Side of the patch as a share of the image's.")]
Limit = Annotated[int, typer.Option(min=1, help="Use at most so many photos.")]
Seed = Annotated[int, typer.Option(help="Seed of whatever is drawn at random.")]
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


def files(paths: list[Path]) -> list[Path]:
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


def names(files: list[Path]) -> list[str]:
    """File names without suffix, which must differ, for what is written."""
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems):
        double = next(s for s in stems if stems.count(s) > 1)
        raise ValueError(f"two photos would become {double}.png: give their folders one by one")
    return stems


def targets(given: list[Path], files: list[Path], out: Path) -> list[Path]:
    """The PNG in ``out`` for each photo; none may lie among what was given."""
    from pair.commands._pictures import apart

    found = [out / f"{name}.png" for name in names(files)]
    for target in found:
        apart(target, given, "choose an --out beside them")
    return found


def check_outs(out: Path, names: list[str] | None = None) -> None:
    """Refuse to replace files that are no patch: OUT.png and OUT.json without our record."""
    import json

    from pair.attacks.patch import _png

    for path in outs(out, names):
        png = _png(path)
        sheet = png.with_suffix(".json")
        try:
            ours = json.loads(sheet.read_text("utf-8"))["kind"] == "patch"
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        for file in (png, sheet):
            if not ours and (file.exists() or file.is_symlink()):
                raise ValueError(f"{file} is no patch of this program: use another --out")


def outs(out: Path, names: list[str] | None) -> list[Path]:
    """OUT, or with ``names`` one for each photo."""
    return [out] if names is None else [Path(f"{out}-{name}") for name in names]


def load(paths: list[Path], size: int, limit: int) -> Tensor:
    from pair.images import load_batch

    return load_batch(files(paths)[:limit], size)


def text_model(name: str, pretrained: str | None) -> Any:
    if pretrained is not None or name.startswith("open_clip:"):
        from pair.retrieval.openclip import OpenClip

        if pretrained is not None:
            return OpenClip.from_pretrained(name.removeprefix("open_clip:"), pretrained)
        return OpenClip.from_spec(name.removeprefix("open_clip:"))
    from pair.retrieval.clip import SmallClip

    return SmallClip.from_pretrained(name)


def adaptive_victim(encoder: Any, defense: str | None) -> Adaptive:
    """The encoder behind a defense, as its strongest attacker sees it."""
    from pair.attacks.wrappers import Adaptive, adaptive, as_features
    from pair.defenses import make

    if defense is None:
        return Adaptive(as_features(encoder), 1, None, "exact")
    return adaptive(encoder, make(defense))


def victim(encoder: Any, defense: str | None, config: Any, eot: int | None) -> tuple[Adaptive, Any]:
    """The same; without a random defense one draw per step is enough."""
    from dataclasses import replace

    found = adaptive_victim(encoder, defense)
    if found.samples == 1 and eot is None:
        config = replace(config, eot=1)
    return found, config


def stored(features: Any, images: Tensor, seed: int) -> Tensor:
    """Features (N, D) of a gallery as an index stores them: one draw each."""
    import torch

    from pair.attacks.evaluate import draw_outputs

    generator = torch.Generator().manual_seed(seed + 1)
    return draw_outputs(features, images, None, 1, generator)[0]


def bars(
    encoder: Any, seen: Adaptive, lines: list[str], gallery: Path, seed: int, top: int = 10
) -> tuple[Tensor, Tensor]:
    """The searches (Q, D), and the score that place ``top`` of each has among these photos."""
    import torch

    from pair.attacks.objectives import rank_thresholds

    with torch.no_grad():
        texts = encoder.encode_text(lines)
    others = load([gallery], encoder.image_size, 10**6)
    return texts, rank_thresholds(texts, stored(seen.features, others, seed), top)


def plateau(window: int | None) -> tuple[int, float] | None:
    return None if window is None else (window, 0.01)


def shaped(shape: str, start: str, size: float, place: str, image_size: int, seed: int) -> Any:
    """A start of a size (share of the side) and place in any of the shapes."""
    import torch

    from pair.attacks import carriers
    from pair.attacks.patch import Patch
    from pair.images import load_image, resize

    generator = torch.Generator().manual_seed(seed)
    side = carriers.pixels(size, image_size)
    kind, _, rest = shape.partition(":")
    try:
        if kind == "several" and rest.isdigit():
            return _several(int(rest), start, size, image_size, generator)
        if shape == "square":
            mask = carriers.rectangle(side, side)
        elif shape == "circle":
            mask = carriers.circle(side)
        elif kind == "rectangle" and rest.count("x") == 1:
            height, width = (carriers.pixels(float(v), image_size) for v in rest.split("x"))
            mask = carriers.rectangle(height, width)
        elif kind == "frame" and rest:
            mask = carriers.frame(side, side, max(1, int(float(rest) * side)))
        elif kind == "mask" and rest:
            mask = (resize(load_image(rest)[None], side)[0].mean(0) > 0.5).float()
            if not mask.any():
                raise ValueError(f"{rest} has no bright pixel")
        else:
            raise ValueError
    except ValueError as error:
        why = f" ({error})" if str(error) else ""
        raise ValueError(
            f"no shape {shape!r}: use square, circle, rectangle:0.2x0.7, frame:0.2, several:4 or "
            f"mask:<picture>{why}"
        ) from None
    return Patch.make(start, side, image_size, place, mask=mask, generator=generator)


def hash_start(
    config: AdvHashConfig, shape: str, start: str | None, warm: Path | None, size: int, seed: int
) -> Patch | None:
    """The patch that AdvHash begins with; None for its own, a square of noise."""
    from dataclasses import replace

    from pair.attacks.advhash import advhash_place
    from pair.attacks.patch import Patch

    if warm is not None:
        if shape != "square" or start is not None:
            raise ValueError("--warm continues a patch as it is: leave out --shape and --start")
        return Patch.load(warm).fit(size)
    if shape == "square" and start is None:
        return None
    side = config.size if config.size is not None else config.area**0.5
    patch = shaped(shape, start or "noise", side, "centre", size, seed)
    if shape.startswith("several"):
        return patch  # its places are its shape
    return replace(patch, placement=advhash_place(config.placement, patch.size, size))


def _several(n: int, start: str, size: float, image_size: int, generator: Any) -> Any:
    """``n`` squares, spread evenly over the image, of together the area of one of ``size``."""
    import torch

    from pair.attacks import carriers
    from pair.attacks.patch import Patch, Placement

    side = carriers.pixels(size / max(1, n) ** 0.5, image_size)
    across = next(g for g in range(1, n + 2) if g * g >= n)
    if n < 1 or across * side > image_size:
        raise ValueError(f"{n} squares of {side} pixels do not fit into {image_size}")
    step = (image_size - side) / max(1, across - 1)
    corners = [(round(k // across * step), round(k % across * step)) for k in range(n)]
    mask = carriers.several(image_size, image_size, side, corners)
    content = torch.zeros(3, image_size, image_size)
    for top, left in corners:
        one = carriers.carrier(start, side, side, generator)
        content[:, top : top + side, left : left + side] = one
    return Patch(content, mask, Placement("top-left"), image_size)


def goal(
    encoder: Any, name: str, keyword: str | None, captions: Path | None, searches: Path | None
) -> tuple[Goal, list[str], dict[str, Any]]:
    """The target as a goal, the texts it came from, and facts for the record."""
    import torch

    from pair.attacks.keywords import select_captions, target_embedding
    from pair.attacks.objectives import HubGoal, TextGoal
    from pair.commands import _words
    from pair.data.prompts import TRAIN_TEMPLATES, sentences

    if (keyword is None) == (searches is None):
        raise ValueError("name either --keyword or a file of --searches")
    if searches is not None:
        lines = [line.strip() for line in searches.read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{searches} has no search in it")
        _words.check(lines, encoder, name)
        with torch.no_grad():
            return HubGoal(encoder.encode_text(lines)), lines, {"searches": len(lines)}
    _words.check([str(keyword)], encoder, name, "--keyword")
    if captions is None:
        lines = sentences([str(keyword)], TRAIN_TEMPLATES)
    else:
        lines = select_captions(captions.read_text().splitlines(), str(keyword))
        if not lines:
            raise ValueError(f"no caption in {captions} matches the keyword {keyword!r}")
    facts = {"keyword": keyword, "captions": len(lines)}
    return TextGoal(target_embedding(encoder, lines)), lines, facts


def announce(
    config: Any, victim: Adaptive, images: Tensor, dry_run: bool, grid: int | None = None
) -> bool:
    """Print what it will cost; False if that was all that was asked for."""
    from pair.attacks.cost import counted, estimate, measure, with_places

    pace = measure(
        victim.features,
        images,
        config.eot,
        micro_batch=config.micro_batch,
        precision=config.precision,
    )
    cost = estimate(config, len(images), pace)
    if grid is not None:
        cost = with_places(cost, grid)
    typer.echo(f"{counted(len(images), 'photo')}; {cost}", err=True)
    return not dry_run


def checkpoint(out: Path) -> Path:
    return Path(f"{out}.checkpoint")


def store(result: AttackResult, out: Path, facts: dict[str, Any], names: list[str] | None) -> None:
    """Write the patch, or with ``names`` one for each photo, and say how it went."""
    from pair.attacks.cost import counted

    record = {**result.record(), "losses": [round(v, 6) for v in result.losses]}
    places = outs(out, names)
    patches = [result.patch] if names is None else result.patches
    for patch, path in zip(patches, places, strict=True):
        png = patch.with_content(patch.content, **facts, **record).save(path)
    for file in out.parent.glob(f"{checkpoint(out).name}*"):
        file.unlink()
    if result.gradients_used or not result.forwards:
        spent = counted(result.gradients_used, "sample gradient")
    else:  # an attack without gradients
        spent = f"{result.forwards:,} forward passes"
    typer.echo(
        f"{png if names is None else f'{len(places)} patches {out}-*.png'}: "
        f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f} "
        f"in {spent} ({result.stopped})"
    )
    if result.late_gain() >= 0.01:
        typer.echo("the loss was still falling at the end: more steps give a stronger patch")


@contextmanager
def bar() -> Iterator[Progress]:
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
