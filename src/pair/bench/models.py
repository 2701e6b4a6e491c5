"""The models and defenses of a run, each loaded once, with the SHA-256 that a result names."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pair import hub
from pair.bench import tiny
from pair.bench.scenario import Row, Settings
from pair.defenses import DEFENSES, Defense, make
from pair.masks import rule_from_config
from pair.retrieval.clip import SmallClip
from pair.retrieval.encoders import HashEncoder, TextImageEncoder
from pair.retrieval.hashing import HashNet

CERTIFIED = "certified"
# How the weights that a defense needs are trained, should they be missing.
RECIPES = {
    "sac-small": "sac",
    "patchzero-small": "patchzero",
    "arn-small": "arn",
    "cafd-small": "cafd",
    "clip-small-at": "at-clip",
    "csq-small-at": "at-csq",
    "clip-small-hm": "hm-clip",
    "csq-small-hm": "hm-csq",
}


class Models:
    """Looks models up: shipped ones, folders, or (``tiny``) random ones made in ``root``."""

    def __init__(self, settings: Settings, root: Path):
        self.settings, self.root = settings, root
        self._loaded: dict[str, Any] = {}

    def where(self, name: str) -> str:
        """The folder or name under which a model is loaded."""
        if self.settings.tiny and not name.startswith("open_clip:"):
            return str(tiny.folder(name, self.root, self.settings.image_size))
        return name

    def sha(self, name: str) -> str:
        """SHA-256 of the weights; "missing" where there are none."""
        if name.startswith("open_clip:"):
            return name
        try:
            folder = hub.resolve(self.where(name))
        except ValueError:
            return "missing"
        config = json.loads((folder / hub.CONFIG).read_text("utf-8"))
        return str(config.get("sha256") or hub.sha256(folder / hub.WEIGHTS))

    def _load(self, name: str, load: Callable[[str], Any]) -> Any:
        if name not in self._loaded:
            self.need(name)
            self._loaded[name] = load(self.where(name)).to(self.settings.device)
        return self._loaded[name]

    def need(self, name: str) -> None:
        """Say how to get a model that is not there."""
        if self.sha(name) != "missing":
            return
        kind = RECIPES.get(name)
        if kind is None:
            raise ValueError(f"model {name!r} is not shipped: name a folder that holds it")
        command = kind.partition("-")[0]
        raise ValueError(
            f"model {name} is not shipped: train it with 'pair train {command} --recipe "
            f"configs/small/{kind}.toml --data PACK --out RUN'"
        )

    def clip(self) -> TextImageEncoder:
        name = self.settings.clip
        if name.startswith("open_clip:"):
            from pair.retrieval.openclip import OpenClip

            architecture, _, weights = name.removeprefix("open_clip:").partition(":")
            return self._load(name, lambda _: OpenClip.from_pretrained(architecture, weights))
        return self._load(name, SmallClip.from_pretrained)

    def csq(self) -> HashEncoder:
        return self._load(self.settings.csq, HashNet.from_pretrained)

    def defense(self, row: Row) -> Defense:
        """The defense of a row; options that are mask rules or models are made of their names."""
        options = dict(row.options)
        if isinstance(options.get("rule"), dict):
            options["rule"] = rule_from_config(options["rule"])
        for option, name in self.named(row).items():
            self.need(name)
            options[option] = self.where(name)
        if row.defense in DEFENSES:
            made = make(row.defense, **options)
        else:
            made = _factory(row.defense)(**options).eval().requires_grad_(False)
        return made.to(self.settings.device)

    def named(self, row: Row) -> dict[str, str]:
        """Option -> model that the defense of a row loads."""
        if row.defense == CERTIFIED:
            return {"name": row.options.get("name", self.settings.generator)}
        factory = DEFENSES.get(row.defense) or _factory(row.defense)
        found = {}
        for parameter in inspect.signature(factory).parameters.values():
            if parameter.name in ("name", "clip", "csq") and isinstance(parameter.default, str):
                name = row.options.get(parameter.name, parameter.default)
                found[parameter.name] = self.settings.generator if name == "pair-small" else name
        return found

    def facts(self, row: Row, hashing: bool) -> dict[str, str]:
        """Name -> SHA-256 of everything that a cell of this row computes with."""
        named = self.named(row)
        # A hardened target of the other kind plays no part.
        named.pop("clip" if hashing else "csq", None)
        names = {*named.values(), self.settings.csq if hashing else self.settings.clip}
        return {name: self.sha(name) for name in sorted(names)}


def _factory(path: str) -> Callable[..., Defense]:
    """``package.module:name``: a defense from outside this package."""
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(
            f"unknown defense {path!r}: use one of {', '.join(DEFENSES)}, 'certified', or "
            "'package.module:factory'"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"defense {path!r} cannot be imported: {error}") from error
    return found
