"""WebDataset: tar files in which the members of one sample share a name up to the first dot.

Pictures are read by their place in the tar file, without unpacking; the tar files are walked once,
by ``pair data prepare``, which writes an index.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from pair.data.sets.base import SUFFIXES, Dataset, Record, Source, seeded_split, verify
from pair.data.sets.folder import TEXT_KEYS, texts_of

TEXTS = (".txt", ".caption", ".text")
SPLITS = ("train", "val", "test")


def _shard(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(key, {"at": (offset, size), "captions": [...], "label": str}) of each sample."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                place, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                kind = f".{kind.lower()}"
                sample = samples.setdefault(f"{place}/{stem}".lstrip("/"), {})
                if kind in SUFFIXES:
                    if "at" in sample:
                        raise ValueError(f"{path} holds two pictures of {member.name}")
                    sample["at"] = (member.offset_data, member.size)
                elif kind in (*TEXTS, ".json", ".cls"):
                    handle = tar.extractfile(member)
                    text = handle.read().decode("utf-8") if handle else ""
                    _describe(sample, kind, text, f"{path}: {member.name}")
            if tar.offset > path.stat().st_size:
                raise ValueError(f"{path} is cut off: fetch it again")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged or compressed, not a plain tar: {error}") from error
    return [(key, sample) for key, sample in samples.items()]


def _describe(sample: dict[str, Any], kind: str, text: str, where: str) -> None:
    if kind == ".cls":
        sample["label"] = text.strip()
    elif kind == ".json":
        try:
            facts = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        found = next((facts[k] for k in TEXT_KEYS if facts.get(k)), None)
        if found and "captions" not in sample:
            sample["captions"] = texts_of(found)
        if facts.get("label") is not None:
            sample.setdefault("label", str(facts["label"]))
    else:
        sample["captions"] = [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def read(root: Path, protocol: str, seed: int) -> Dataset:
    shards = sorted(root.rglob("*.tar")) if root.is_dir() else [root]
    if not shards:
        raise ValueError(f"{root} holds no .tar files")
    found: list[tuple[str, Path, dict[str, Any], str]] = []
    for path in shards:
        # LAION-like folders name their shards by number, others by split: train-000000.tar.
        own = next((s for s in SPLITS if path.name.startswith(s) or path.parent.name == s), "")
        for key, sample in _shard(path):
            if "at" not in sample:
                raise ValueError(f"{path}: the sample {key} has no picture")
            found.append((f"{path.stem}/{key}", path, sample, own))
    if not found:
        raise ValueError(f"the tar files of {root} hold no samples")
    splits: dict[str, str] = {}
    if len(found) > 1 and not all(own for *_, own in found):
        splits = seeded_split([i for i, *_ in found], {"train": 95, "val": 5}, seed, "webdataset")
    records = []
    for name, path, sample, own in found:
        labels = (sample["label"],) if "label" in sample else ()
        offset, size = sample["at"]
        split = splits.get(name, own or "test")
        captions = tuple(sample.get("captions", ()))
        records.append(Record(name, path, captions, labels, split, offset, size))
    base = root if root.is_dir() else root.parent
    return verify(Dataset("webdataset", protocol, base, seed, tuple(records)))


SOURCE = Source(
    "webdataset",
    "WebDataset shards",
    "as its maker says",
    {"plain": "splits from the names of the shards (train-*, val-*, test-*), else 95 / 5 %"},
    read,
    search={"text": ("plain",)},
)
