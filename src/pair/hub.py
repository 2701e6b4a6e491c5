"""Model folders: ``config.json`` + ``model.safetensors``, loaded strictly.

A model is named by (a) the name of one that ships with the package, (b) a local folder, or
(c) a repository of the Hugging Face hub (``org/name`` or ``hub:org/name@revision``). A path or a
shipped name never touches the network. Pickle files are never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1


class ModelError(ValueError):
    """A model folder that is missing, incomplete or does not fit; the message says what to do."""


def shipped_root() -> Path:
    return Path(str(resources.files("pair"))) / "assets" / "models"


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    root = shipped_root()
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if (p / CONFIG).is_file())


def resolve(name: str | os.PathLike[str], files: Sequence[str] = (CONFIG, WEIGHTS)) -> Path:
    """The local folder of a model; downloads (``files`` only) when ``name`` names a repository."""
    text = os.fspath(name)
    if (shipped_root() / text / CONFIG).is_file() and os.sep not in text and text:
        return shipped_root() / text
    path = Path(text)
    if text and path.is_dir():
        return path
    if text and path.is_file():
        raise ModelError(f"{text} is a file: name the folder that holds it")
    if text.startswith("hub:") or (text.count("/") == 1 and text[0] not in "./~"):
        return _download(text.removeprefix("hub:"), files)
    known = ", ".join(shipped_models()) or "none"
    raise ModelError(
        f"no model {text!r}: it is neither a folder nor one of the shipped models ({known}) "
        "nor a hub repository (org/name)"
    )


def _download(name: str, files: Sequence[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:  # pragma: no cover - depends on the installation
        raise ModelError(
            f"loading {name!r} from the hub needs huggingface_hub: "
            "pip install 'pair-retrieval[hub]'"
        ) from error
    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(files)
        )
    except Exception as error:  # the client raises a dozen unrelated kinds
        why = " ".join(str(error).split())
        raise ModelError(
            f"no folder {name!r}, and fetching it from the hub failed: {why}"
        ) from error
    return Path(folder)


def kind_of(folder: Path) -> str:
    """The kind that a model folder declares (such as "clip"); "" when that cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("kind", "")) if isinstance(config, dict) else ""


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} has no {CONFIG}: it is not a model folder of this project")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("kind") != kind:
        found = config.get("kind") if isinstance(config, dict) else type(config).__name__
        raise ModelError(f"{folder} holds a model of kind {found!r}, expected {kind!r}")
    if config.get("format") != FORMAT:
        raise ModelError(f"{path} has format {config.get('format')!r}, this version reads {FORMAT}")
    return config


def section(
    config: dict[str, Any], name: str, known: Sequence[str], folder: Path
) -> dict[str, Any]:
    """A copy of one table of a config: every known setting present, no other (no guessing)."""
    table = config.get(name)
    if not isinstance(table, dict):
        raise ModelError(f"{folder / CONFIG} has no {name} settings")
    if missing := [key for key in known if key not in table]:
        raise ModelError(f"{folder / CONFIG} has no {missing[0]} in its {name} settings")
    if unknown := sorted(table.keys() - set(known)):
        raise ModelError(
            f"{folder / CONFIG} has an unknown {name} setting {unknown[0]!r}: "
            "it was written by another version"
        )
    return dict(table)


def read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of a model folder in float32, checked against the recorded SHA-256."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}")
    expected = config.get("sha256")
    if expected and sha256(path) != expected:
        raise ModelError(f"{path} does not match the SHA-256 in its config: fetch it again")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a safetensors file ({error}); pickles are refused"
        ) from error
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def load_into(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Strict load: every key present, none extra, every shape equal."""
    own = module.state_dict()
    missing, extra = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    if missing or extra:
        raise ModelError(
            f"{where}: {len(missing)} weights missing ({', '.join(sorted(missing)[:3])}), "
            f"{len(extra)} unknown ({', '.join(sorted(extra)[:3])})"
        )
    for key, value in own.items():
        if tensors[key].shape != value.shape:
            raise ModelError(
                f"{where}: {key} has shape {tuple(tensors[key].shape)}, "
                f"the config asks for {tuple(value.shape)}"
            )
    module.load_state_dict(tensors)


def save(
    folder: str | os.PathLike[str],
    module: nn.Module,
    config: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    card: str | None = None,
) -> Path:
    """Write a model folder; every file appears whole or not at all."""
    tensors = {}
    for key, value in module.state_dict().items():
        stored = value.to(dtype) if value.is_floating_point() else value
        if not torch.equal(value.isfinite(), stored.isfinite()):
            raise ModelError(f"{key} has values that {dtype} cannot hold: save in another type")
        tensors[key] = stored.detach().cpu().contiguous()
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".writing-") as scratch:
        weights = Path(scratch) / WEIGHTS
        save_file(tensors, weights)
        record = {**config, "format": FORMAT, "sha256": sha256(weights)}
        (Path(scratch) / CONFIG).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        if card is not None:
            (Path(scratch) / "README.md").write_text(card, "utf-8")
        for name in sorted(os.listdir(scratch), key=lambda n: n == CONFIG):  # config last
            os.replace(Path(scratch) / name, out / name)
    return out


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
