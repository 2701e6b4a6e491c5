"""``pair train KIND``: read a TOML recipe, build the task, run the loop."""

from __future__ import annotations

import dataclasses
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import torch

from pair.data.pack import INDEX, Collection, Pack
from pair.data.photos import Photos
from pair.data.sets import SOURCES, load, named
from pair.data.sets.base import read_index
from pair.generator import GeneratorConfig
from pair.training.adversarial import AdversarialTraining, AtTask, HardnessTraining, HmTask
from pair.training.clip_paper import ClipPaperTask, ClipRecipe
from pair.training.csq_paper import CsqPaperTask, CsqRecipe
from pair.training.denoiser import ArnTask, CafdTask, DenoiserTraining
from pair.training.detector import DetectorTraining, PatchZeroTask, SacTask
from pair.training.generator import GeneratorTask, GeneratorTraining
from pair.training.loop import LoopConfig, Task, train
from pair.training.parallel import join, leave
from pair.training.start import NOTICE
from pair.training.targets import ClipTask, CsqTask, TargetTraining

T = TypeVar("T")

KINDS: dict[str, tuple[type, type]] = {
    "generator": (GeneratorTraining, GeneratorTask),
    "clip": (TargetTraining, ClipTask),
    "csq": (TargetTraining, CsqTask),
    "csq-paper": (CsqRecipe, CsqPaperTask),
    "clip-paper": (ClipRecipe, ClipPaperTask),
    "sac": (DetectorTraining, SacTask),
    "patchzero": (DetectorTraining, PatchZeroTask),
    "at": (AdversarialTraining, AtTask),
    "hm": (HardnessTraining, HmTask),
    "arn": (DenoiserTraining, ArnTask),
    "cafd": (DenoiserTraining, CafdTask),
}


def typed(cls: type[T], data: dict[str, Any], where: str) -> T:
    """A dataclass from a TOML table: unknown keys and wrong types are refused by name."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a table, got {data!r}")
    hints = get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, given in data.items():
        value = given
        if key not in fields:
            raise ValueError(
                f"{where}: unknown setting {key!r}; known: {', '.join(sorted(fields))}"
            )
        hint = hints[key]
        if hint is GeneratorConfig:
            values[key] = typed(GeneratorConfig, value, f"{where}.{key}")
            continue
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        plain = get_origin(hint) or hint  # dict[str, Any] -> dict; TOML has lists for tuples
        plain = list if plain is tuple else plain
        if plain in (int, float, str, bool, dict, list) and type(value) is not plain:
            raise ValueError(
                f"{where}: {key} must be {plain.__name__}, got {value!r} ({type(value).__name__})"
            )
        values[key] = value
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_recipe(
    path: Path | None, kind: str, changes: Sequence[str] = ()
) -> tuple[LoopConfig, Any]:
    """The tables ``[loop]`` and ``[task]`` of a recipe; without one, all defaults.

    ``changes`` such as ``loop.accumulate=4`` or ``task.init="mine"`` overrule the recipe.
    """
    data: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise ValueError(
                f"no recipe {path}: name a TOML file such as configs/small/{kind}.toml"
            )
        try:
            data = tomllib.loads(path.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from error
    for change in changes:
        _change(data, change)
    place = "--set" if path is None else str(path)
    if extra := data.keys() - {"loop", "task"}:
        raise ValueError(f"{place}: unknown table [{sorted(extra)[0]}]; known: [loop], [task]")
    if isinstance(data.get("loop"), dict) and "lr" in data["loop"]:
        raise ValueError(f"{place} [loop]: the learning rate belongs in [task]")
    loop = typed(LoopConfig, data.get("loop", {}), f"{place} [loop]")
    settings = data.get("task", {})
    if isinstance(settings, dict) and "steps" in {
        f.name for f in dataclasses.fields(KINDS[kind][0])
    }:
        settings = {"steps": loop.steps, **settings}
    return loop, typed(KINDS[kind][0], settings, f"{place} [task]")


def _change(data: dict[str, Any], change: str) -> None:
    """Put ``table.key=value`` into a recipe; the value as in TOML, or a bare word."""
    name, equals, text = change.partition("=")
    table, _, key = name.strip().partition(".")
    if not equals or table not in ("loop", "task") or not key:
        raise ValueError(f"--set {change}: write loop.KEY=VALUE or task.KEY=VALUE")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    where = data.setdefault(table, {})
    if not isinstance(where, dict):
        raise ValueError(f"[{table}] must be a table, got {where!r}")
    *groups, last = key.split(".")
    for group in groups:
        where = where.setdefault(group, {})
    where[last] = value


def open_photos(
    names: Sequence[str | Path], side: int | None = None, workers: int = 0
) -> Collection:
    """What ``--data`` names: one pack, or data sets to be decoded on the way.

    A data set is ``NAME:ROOT`` or ``NAME/PROTOCOL:ROOT`` (see ``pair data``), an index file, or
    simply a folder of pictures.
    """
    if len(names) == 1 and (Path(names[0]) / INDEX).is_file():
        return Pack.open(names[0])
    found = []
    for name in map(str, names):
        if (known := named(name)) is not None:
            source, protocol, root = known
            found.append(load(source, root, protocol))
        elif name.endswith(".jsonl"):
            found.append(read_index(Path(name)))
        elif (Path(name) / INDEX).is_file():
            raise ValueError(f"{name} is a pack: packs cannot be mixed with other photos")
        elif not Path(name).is_dir() or side is None:
            raise ValueError(
                f"{name} holds no finished pack: run 'pair data pack' first, or name a data set "
                f"as NAME:FOLDER with NAME one of {', '.join(SOURCES)}"
            )
        else:
            found.append(load("folder", name))
    if side is None:
        raise ValueError("this training reads a pack: make one with 'pair data pack'")
    return Photos(found, side, workers)


def run(
    kind: str,
    recipe: Path | None,
    data: Path | Sequence[str | Path],
    out: Path,
    threads: int = 1,
    echo=print,
    *,
    changes: Sequence[str] = (),
    workers: int = 0,
    device: str = "cpu",
    track: str = "none",
) -> Path:
    """Train ``kind`` by ``recipe`` on ``data``; resumes what ``out`` holds.

    Under ``torchrun`` all processes work on one batch; see :mod:`pair.training.parallel`.
    """
    if kind not in KINDS:
        raise ValueError(f"cannot train {kind!r}: use one of {', '.join(KINDS)}")
    torch.set_num_threads(threads)
    loop, settings = read_recipe(recipe, kind, changes)
    names = [data] if isinstance(data, str | Path) else list(data)
    photos = open_photos(names, getattr(settings, "photo_side", None), workers)
    torch.manual_seed(loop.seed)  # initial weights
    task: Task = KINDS[kind][1](settings, photos)
    world = join(device)
    try:
        if world.device.type != "cpu":
            if not hasattr(task, "to"):
                raise ValueError(f"{kind} trains on the CPU only: leave --device out")
            task.to(world.device)
        if getattr(task, "licence", "").startswith("CC BY-NC") and world.first:
            echo(f"note: {NOTICE}")
        inputs = {"photos": photos.fingerprint(), **getattr(task, "inputs", dict)()}
        facts = {"recipe": recipe.name if recipe else "", "photos": dict(Counter(photos.datasets))}
        return train(task, loop, out, facts, echo, world=world, inputs=inputs, track=track)
    finally:
        photos.close()
        leave(world)
