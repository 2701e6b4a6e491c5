"""``pair train KIND``: read a TOML recipe, build the task, run the loop."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import torch

from pair.data.pack import Pack
from pair.generator import GeneratorConfig
from pair.training.adversarial import AdversarialTraining, AtTask, HardnessTraining, HmTask
from pair.training.csq_paper import CsqPaperTask, CsqRecipe
from pair.training.denoiser import ArnTask, CafdTask, DenoiserTraining
from pair.training.detector import DetectorTraining, PatchZeroTask, SacTask
from pair.training.generator import GeneratorTask, GeneratorTraining
from pair.training.loop import LoopConfig, Task, train
from pair.training.targets import ClipTask, CsqTask, TargetTraining

T = TypeVar("T")

KINDS: dict[str, tuple[type, type]] = {
    "generator": (GeneratorTraining, GeneratorTask),
    "clip": (TargetTraining, ClipTask),
    "csq": (TargetTraining, CsqTask),
    "csq-paper": (CsqRecipe, CsqPaperTask),
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


def read_recipe(path: Path, kind: str) -> tuple[LoopConfig, Any]:
    """The tables ``[loop]`` and ``[task]`` of a recipe."""
    if not path.is_file():
        raise ValueError(f"no recipe {path}: name a TOML file such as configs/small/{kind}.toml")
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    if extra := data.keys() - {"loop", "task"}:
        raise ValueError(f"{path}: unknown table [{sorted(extra)[0]}]; known: [loop], [task]")
    if isinstance(data.get("loop"), dict) and "lr" in data["loop"]:
        raise ValueError(f"{path} [loop]: the learning rate belongs in [task]")
    loop = typed(LoopConfig, data.get("loop", {}), f"{path} [loop]")
    settings = data.get("task", {})
    if isinstance(settings, dict) and "steps" in {
        f.name for f in dataclasses.fields(KINDS[kind][0])
    }:
        settings = {"steps": loop.steps, **settings}
    return loop, typed(KINDS[kind][0], settings, f"{path} [task]")


def run(kind: str, recipe: Path, data: Path, out: Path, threads: int = 1, echo=print) -> Path:
    """Train ``kind`` by ``recipe`` on the pack ``data``; resumes what ``out`` holds."""
    if kind not in KINDS:
        raise ValueError(f"cannot train {kind!r}: use one of {', '.join(KINDS)}")
    torch.set_num_threads(threads)
    loop, settings = read_recipe(recipe, kind)
    torch.manual_seed(loop.seed)  # initial weights
    task: Task = KINDS[kind][1](settings, Pack.open(data))
    return train(task, loop, out, {"recipe": recipe.name}, echo)
