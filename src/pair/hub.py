"""Model folders: ``config.json`` + ``model.safetensors``, loaded strictly.

A model is named by (a) the name of one that ships with the package, (b) a local folder, or
(c) a repository of the Hugging Face hub (``org/name`` or ``hub:org/name@revision``). A path or a
shipped name never touches the network. Pickle files are never read.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pair.files import explained

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
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
    """Write a model folder, whole or not at all: the old model stays until the new one is there.

    A folder that holds nothing but a model changes places with the new one in a single step where
    the system can do that (Linux), else within two renames. In any other folder the files are
    replaced one by one, weights before config, so that a kill in between shows in the checksum.
    """
    tensors = {}
    for key, value in module.state_dict().items():
        stored = value.to(dtype) if value.is_floating_point() else value
        if not torch.equal(value.isfinite(), stored.isfinite()):
            raise ModelError(f"{key} has values that {dtype} cannot hold: save in another type")
        tensors[key] = stored.detach().cpu().contiguous()
    out = Path(folder).resolve()
    fresh = out.with_name(f".{out.name}.writing-{secrets.token_hex(6)}")
    try:
        fresh.mkdir(parents=True)
        save_file(tensors, fresh / WEIGHTS)
        record = {**config, "format": FORMAT, "sha256": sha256(fresh / WEIGHTS)}
        (fresh / CONFIG).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        if card is not None:
            (fresh / CARD).write_text(card, "utf-8")
        _put(fresh, out)
    except OSError as error:
        raise explained(error, out) from error
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Path(folder)


def _put(fresh: Path, out: Path) -> None:
    """Put the folder ``fresh`` in the place of ``out``."""
    there = set(os.listdir(out)) if out.is_dir() else set()
    if not out.exists():
        os.replace(fresh, out)
    elif there - {CONFIG, WEIGHTS, CARD} or os.path.ismount(out):
        for name in (WEIGHTS, CARD, CONFIG):
            if (fresh / name).is_file():
                os.replace(fresh / name, out / name)
    else:
        if CARD in there and not (fresh / CARD).is_file():
            shutil.copyfile(out / CARD, fresh / CARD)
        shutil.copymode(out, fresh)
        if not _exchange(fresh, out):
            old = fresh.with_name(fresh.name + "-old")
            os.replace(out, old)
            os.replace(fresh, out)
            shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, bytes(a), here, bytes(b), exchange) == 0


def sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
