"""The models and defenses of a run, each loaded once, with the SHA-256 that a result names.

A model is one of this package, a folder, or public weights in their own format: CLIP by open_clip
(tag, file or folder), masked autoencoders by transformers or Meta.
"""

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
from pair.certified import CertifiedPurifier
from pair.checkpoints import PICKLED, from_hf_vitmae, from_meta_mae
from pair.defenses import DEFENSES, Defense, make
from pair.masks import ExactCount, rule_from_config
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.encoders import HashEncoder, TextImageEncoder
from pair.retrieval.hashing import HashNet
from pair.retrieval.openclip import OpenClip, split_spec

CERTIFIED = "certified"
OPEN_CLIP = "open_clip:"
OPEN_CLIP_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
PICKLES = (".pth", ".pt")
OPTIONS = {"pair-base": "--generator FOLDER", "csq-resnet50": "--csq FOLDER"}
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
    """Looks models up: shipped ones, folders, or (``tiny``) random ones; ``root`` keeps those that
    are made."""

    def __init__(self, settings: Settings, root: Path):
        self.settings, self.root = settings, root
        self._loaded: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        self._digests: dict[str, str] = {}

    def where(self, name: str) -> str:
        """The folder or name under which a model is loaded.

        ``settings.models`` may put another in its place. A masked autoencoder of transformers
        (folder) or Meta (file) is written as a generator folder first, once.
        """
        if self.settings.tiny and not name.startswith(OPEN_CLIP):
            return str(tiny.folder(name, self.root / "tiny", self.settings.image_size))
        name = self.settings.models.get(name, name)
        if name not in self._places:
            self._places[name] = self._made(name)
        return self._places[name]

    def _made(self, name: str) -> str:
        """``name``, or the generator folder that is made of the public weights it names."""
        path = Path(name)
        if (path / "open_clip_config.json").is_file():
            return f"{OPEN_CLIP}local-dir:{name}"
        if path.suffix in PICKLES and path.is_file():
            weights = path
        elif path.is_dir() and (path / hub.CONFIG).is_file() and not hub.kind_of(path):
            weights = path / (hub.WEIGHTS if (path / hub.WEIGHTS).is_file() else PICKLED)
        else:
            return name
        out = self.root / "models" / hub.sha256(weights)[:16]
        if not (out / hub.CONFIG).is_file():
            network = from_meta_mae(path) if weights == path else from_hf_vitmae(path)
            # Never trained on visible tokens: only what was hidden is worth showing.
            made = Purifier(network, ExactCount(0.5), output="paste")
            made.save_pretrained(out, source=path.name)
        return str(out)

    def sha(self, name: str) -> str:
        """SHA-256 of the weights; "missing" where there are none."""
        if (name := self.settings.models.get(name, name)).startswith(OPEN_CLIP):
            return self._sha_open_clip(name)
        if self._foreign(name):
            return "missing"
        try:
            if (place := self.where(name)).startswith(OPEN_CLIP):
                return self._sha_open_clip(place)
            folder = hub.resolve(place)
        except ValueError:
            return "missing"
        config = json.loads((folder / hub.CONFIG).read_text("utf-8"))
        return str(config.get("sha256") or hub.sha256(folder / hub.WEIGHTS))

    def _sha_open_clip(self, name: str) -> str:
        """Of a folder or file; a tag of the library stands for itself."""
        if name not in self._digests:
            spec = name.removeprefix(OPEN_CLIP)
            folder = Path(spec.removeprefix("local-dir:"))
            files = [folder / f for f in OPEN_CLIP_FILES] if folder.is_dir() else []
            weights = next((f for f in files if f.is_file()), Path(split_spec(spec)[1]))
            self._digests[name] = hub.sha256(weights) if weights.is_file() else name
        return self._digests[name]

    def _load(self, name: str, load: Callable[[str], Any]) -> Any:
        if name not in self._loaded:
            self.need(name)
            self._loaded[name] = load(self.where(name)).to(self.settings.device)
        return self._loaded[name]

    def _foreign(self, name: str) -> bool:
        """Whether a model of this package would stand in where the scale does not want it to."""
        s = self.settings
        allowed = s.shipped or s.tiny or name in s.models
        return not allowed and name in hub.shipped_models()

    def need(self, name: str) -> None:
        """Say how to get a model that is not there."""
        if self._foreign(name):
            raise ValueError(
                f"{name} was trained on the photos of this package, which is not this scale: name "
                f"weights of your own, --set models.{name}=FOLDER"
            )
        if self.sha(name) != "missing":
            return
        kind = RECIPES.get(name)
        if kind is None:
            option = OPTIONS.get(name, f"--set models.{name}=FOLDER")
            raise ValueError(
                f"model {name!r} is not shipped: name a folder that holds it, {option}"
            )
        command, s = kind.partition("-")[0], self.settings
        scale = "small" if s.shipped or s.tiny or kind == "hm-csq" else "paper"
        raise ValueError(
            f"model {name} is not shipped: train it with 'pair train {command} --recipe "
            f"configs/{scale}/{kind}.toml --data PACK --out RUN'"
        )

    def clip(self) -> TextImageEncoder:
        name = self.settings.clip
        if name.startswith(OPEN_CLIP):
            return self._load(name, lambda n: OpenClip.from_spec(n.removeprefix(OPEN_CLIP)))
        return self._load(name, SmallClip.from_pretrained)

    def csq(self) -> HashEncoder:
        return self._load(self.settings.csq, HashNet.from_pretrained)

    def defense(self, row: Row, hashing: bool = False) -> Defense:
        """The defense of a row; options that are mask rules or models are made of their names."""
        options = dict(row.options)
        if isinstance(options.get("rule"), dict):
            options["rule"] = rule_from_config(options["rule"])
        for option, name in self.named(row).items():
            if option == ("clip" if hashing else "csq"):  # a hardened target of the other kind
                continue
            self.need(name)
            options[option] = self.where(name)
        if row.defense in DEFENSES:
            made = make(row.defense, **options)
        else:
            made = _factory(row.defense)(**options).eval().requires_grad_(False)
        return made.to(self.settings.device)

    def certified(self, row: Row, patch: float) -> CertifiedPurifier:
        """The windows against patches of a side, in front of the generator that a row names."""
        name = self.named(row)["name"]
        self.need(name)
        made = CertifiedPurifier.from_pretrained(
            self.where(name), patch=patch, views=self.settings.views
        )
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
