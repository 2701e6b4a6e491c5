"""Hugging Face ``datasets``: folders of ``save_to_disk``, or of parquet files as on the hub."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pair.data.sets.base import Dataset, Record, Source, verify
from pair.data.sets.folder import TEXT_KEYS, texts_of

IMAGES, LABELS = ("image", "img", "jpg", "picture"), ("label", "labels", "class")


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"this needs the library datasets ({error}): pip install datasets"
        ) from error
    return datasets


@cache
def opened(path: Path) -> Any:
    """One split, its pictures undecoded; opened once per process."""
    library = _library()
    library.disable_progress_bars()
    try:
        if path.suffix == ".parquet":
            table = library.Dataset.from_parquet(str(path))
        else:
            table = library.load_from_disk(str(path))
    except Exception as error:  # the library raises a dozen unrelated kinds
        why = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read by the library datasets: {why}") from error
    column = next((c for c in IMAGES if c in table.column_names), None)
    if column is None:
        raise ValueError(f"{path} has no column {' or '.join(IMAGES)}: {table.column_names}")
    table = table.cast_column(column, library.Image(decode=False))
    return table if column == "image" else table.rename_column(column, "image")


def read_row(path: Path, row: int) -> bytes:
    """Bytes of the picture in a row."""
    picture = opened(path)[row]["image"]
    return picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()


def _places(root: Path) -> list[tuple[str, Path]]:
    """(split, folder or parquet file)."""
    if (root / "dataset_dict.json").is_file():
        return [(p.name, p) for p in sorted(root.iterdir()) if (p / "state.json").is_file()]
    if (root / "state.json").is_file():
        return [("", root)]
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else []
    if not files:
        raise ValueError(
            f"{root} holds neither a data set of save_to_disk (dataset_dict.json or state.json) "
            "nor .parquet files"
        )
    return [(p.stem.split("-")[0], p) for p in files]


def read(root: Path, protocol: str, seed: int) -> Dataset:
    records = []
    for name, place in _places(root):
        table = opened(place)
        text = next((c for c in TEXT_KEYS if c in table.column_names), None)
        label = next((c for c in LABELS if c in table.column_names), None)
        names = getattr(table.features[label], "names", None) if label else None
        split = {"validation": "val", "valid": "val", "": "train"}.get(name, name)
        facts = table.select_columns([c for c in (text, label) if c]) if text or label else None
        for i in range(len(table)):
            row = facts[i] if facts is not None else {}
            captions = tuple(texts_of(row[text])) if text else ()
            said = row[label] if label else None
            values = said if isinstance(said, list) else [] if said is None else [said]
            labels = tuple(str(names[v] if names else v) for v in values)
            where = f"{place.relative_to(root).as_posix()}/{i}".removeprefix("./")
            records.append(Record(where, place, captions, labels, split, i))
    return verify(Dataset("huggingface", protocol, root, seed, tuple(records)))


SOURCE = Source(
    "huggingface",
    "Hugging Face datasets",
    "as its maker says",
    {"plain": "the splits that it has"},
    read,
    search={"text": ("plain",)},
)
