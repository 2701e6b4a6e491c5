"""Weights of others: fetched with a record of what they are, and turned into model folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pair import hub
from pair.checkpoints import PICKLED, from_hf_vitmae, from_meta_mae
from pair.files import write_atomic
from pair.masks import ExactCount
from pair.purifier import Purifier
from pair.training.cards import parts

RECORD = "source.json"
USEFUL = (
    hub.CONFIG, hub.WEIGHTS, PICKLED, "open_clip_config.json", "open_clip_model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "LICENSE", "LICENSE.txt",
)  # fmt: skip
# Known terms; of everything else we say that we do not know.
LICENCES = {
    "facebook/vit-mae": "CC BY-NC 4.0, no commercial use (the licence of Meta's MAE)",
    "openai/clip": "MIT",
    "laion/": "MIT",
}
UNKNOWN = "not known here: read the page of the repository before you use it"


def licence_of(name: str) -> str:
    """The licence of a repository, where it is known."""
    name = name.removeprefix("hub:").lower()
    return next((v for k, v in LICENCES.items() if name.startswith(k)), UNKNOWN)


def fetch(name: str, out: Path) -> dict[str, Any]:
    """Copy the weights of a hub repository to the folder ``out``; returns what is written down.

    ``name`` is ``org/name`` or ``hub:org/name@revision``. ``source.json`` records name, licence
    and the SHA-256 of every file; a later fetch of other content into the folder is refused.
    """
    if Path(name).exists():
        raise ValueError(f"{name} is here already: folders and files need no fetching")
    folder = hub.resolve(name, USEFUL)
    files = sorted(p for p in folder.iterdir() if p.name in USEFUL and p.is_file())
    if not any(p.suffix in (".safetensors", ".bin") for p in files):
        raise hub.ModelError(f"{name} holds no weights of a kind that can be read")
    record: dict[str, Any] = {
        "source": name,
        "licence": licence_of(name),
        "sha256": {p.name: hub.sha256(p) for p in files},
    }
    known = out / RECORD
    if known.is_file() and json.loads(known.read_text("utf-8")) != record:
        raise ValueError(f"{out} holds other content than {name} has now: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        partial = out / f".{path.name}.partial"
        shutil.copyfile(path, partial)
        os.replace(partial, out / path.name)
    write_atomic(known, (json.dumps(record, indent=2) + "\n").encode())
    return record


def upload(folder: Path, repository: str) -> str:
    """Copy a published model folder to the hub repository ``org/name``; returns its address.

    The repository is made (private) where it does not exist. The hub's own login is used.
    """
    if repository.count("/") != 1 or repository[0] in "./~":
        raise ValueError(f"a hub repository is written org/name, got {repository!r}")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ValueError(
            f"uploading needs huggingface_hub ({error}): pip install 'pair-retrieval[hub]'"
        ) from error
    files = [*parts(folder), hub.CARD]
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files)
    except Exception as error:  # the client raises a dozen unrelated kinds
        why = " ".join(str(error).split())
        raise ValueError(f"uploading {folder} to {repository} failed: {why}") from error
    return str(done.commit_url)


def convert(source: str, out: Path) -> dict[str, Any]:
    """A masked autoencoder of transformers or Meta as a generator folder of this package."""
    path = Path(source)
    if path.suffix in (".pth", ".pt", ".bin") and path.is_file():
        model, origin = from_meta_mae(path), hub.sha256(path)
    else:
        folder = hub.resolve(source, (hub.CONFIG, hub.WEIGHTS, PICKLED))
        if hub.kind_of(folder):
            raise hub.ModelError(f"{source} is a model folder of this package already")
        model = from_hf_vitmae(folder)
        weights = folder / hub.WEIGHTS
        origin = hub.sha256(weights if weights.is_file() else folder / PICKLED)
    facts: dict[str, Any] = {
        "source": source,
        "source_sha256": origin,
        "licence": "CC BY-NC 4.0 (the weights of MAE, Meta); no commercial use",
    }
    # Never trained on visible tokens: only what was hidden is worth showing.
    Purifier(model, ExactCount(0.5), output="paste").save_pretrained(out, **facts)
    return facts
