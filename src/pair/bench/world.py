"""What is searched: photos, queries, what is relevant to what, advertisements, target texts."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pair.attacks.keywords import KEYWORDS, caption_matches, select_captions
from pair.bench.photos import Item, Photos, decoded, identity
from pair.bench.scenario import Settings
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.data.sets import searchable
from pair.retrieval.scores import SameLabel

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass
class TextWorld:
    """A text-to-image search. ``queries`` are texts, ``relevant`` (Q, N) marks their photos."""

    files: Sequence[Item]
    ad_files: Sequence[Item]
    queries: list[str]
    relevant: Tensor
    members: dict[str, list[int]]  # keyword -> its queries
    targets: dict[str, list[str]]  # keyword -> texts of e_t, none of them a query
    concepts: dict[str, list[Item]]  # keyword -> photos of it outside the gallery
    size: int
    name: str
    workers: int = 0

    @cached_property
    def photos(self) -> Photos:
        return Photos(self.files, self.size, workers=self.workers)

    @cached_property
    def ads(self) -> Tensor:
        return decoded(self.ad_files, self.size)

    @property
    def keywords(self) -> list[str]:
        return list(self.members)

    @cached_property
    def digest(self) -> str:
        return _digest(self.name, self.files, self.queries)

    def rows(self, keyword: str) -> list[int]:
        if not self.members.get(keyword):
            raise ValueError(f"no query of {self.name} has the keyword {keyword!r}")
        return self.members[keyword]


@dataclass
class HashWorld:
    """A search by photo: labelled gallery and queries, and photos to optimise patches on.

    Several labels of one photo are joined by ";". ``pairs`` are attacked where none are named.
    """

    files: Sequence[Item]
    labels: list[str]
    query_files: Sequence[Item]
    query_labels: list[str]
    pool: dict[str, list[Item]]
    size: int
    name: str
    framed: bool = False
    workers: int = 0
    pairs: tuple[str, ...] = ()

    @cached_property
    def photos(self) -> Photos:
        return Photos(self.files, self.size, self.framed, self.workers)

    @cached_property
    def queries(self) -> Photos:
        return Photos(self.query_files, self.size, self.framed, self.workers)

    def drawn(self, items: Sequence[Item]) -> Tensor:
        """Photos of the pool (B, 3, S, S)."""
        return decoded(items, self.size, self.framed)

    @cached_property
    def digest(self) -> str:
        return _digest(self.name, self.files, self.query_labels)

    def of(self, label: str) -> list[int]:
        """Queries of a class."""
        rows = [i for i, names in enumerate(self.query_labels) if label in names.split(";")]
        if not rows:
            raise ValueError(f"no query photo of {self.name} has the class {label!r}")
        return rows

    def having(self, label: str) -> list[int]:
        """Photos of the gallery with a label."""
        return [i for i, names in enumerate(self.labels) if label in names.split(";")]

    def same(self, labels: list[str]) -> SameLabel:
        """(Q, N): does the photo have one of these labels? Computed a few rows at a time."""
        names = sorted({n for joined in {*self.labels, *labels} for n in joined.split(";")})
        number = {name: i for i, name in enumerate(names)}
        if not any(";" in joined for joined in [*self.labels, *labels]):
            wanted, own = ([number[n] for n in given] for given in (labels, self.labels))
            return SameLabel(torch.tensor(wanted), torch.tensor(own))
        return SameLabel(_hot(labels, number), _hot(self.labels, number))


def _hot(labels: list[str], number: dict[str, int]) -> Tensor:
    """Multi-hot (N, C)."""
    out = torch.zeros(len(labels), len(number), dtype=torch.bool)
    for row, joined in enumerate(labels):
        for name in joined.split(";"):
            out[row, number[name]] = True
    return out


def _digest(name: str, files: Sequence[Item], texts: list[str]) -> str:
    lines = [name, *map(identity, files), *texts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def chosen_classes(settings: Settings) -> list[str]:
    """The classes of the gallery: those that are attacked, then others spread over the list."""
    names = embedded.labels()
    wanted = [*settings.keywords]
    wanted += [c.strip() for pair in settings.pairs for c in pair.split(">")]
    for name in wanted:
        if name not in names:
            raise ValueError(f"there is no class {name!r} among the embedded photos")
    if not settings.classes or settings.classes >= len(names):
        return names
    kept = list(dict.fromkeys(wanted))
    rest = [n for n in names if n not in kept]
    more = max(0, settings.classes - len(kept))
    spread = [rest[i * len(rest) // more] for i in range(more)] if more else []
    return sorted({*kept, *spread})


def text_world(settings: Settings) -> TextWorld:
    if settings.source == "embedded":
        return _embedded_text(settings)
    if settings.source == "captions":
        return _captions(settings)
    raise ValueError(f"a text search cannot come from source {settings.source!r}: use 'captions'")


def hash_world(settings: Settings) -> HashWorld:
    if settings.source == "embedded":
        return _embedded_hash(settings)
    if settings.source == "classes":
        return _classes(settings)
    raise ValueError(f"a hash search cannot come from source {settings.source!r}: use 'classes'")


def _per_class(rows: list[tuple[Path, str]], names: list[str], most: int):
    kept = []
    for name in names:
        kept += [r for r in rows if r[1] == name][:most]
    return kept


def _embedded_text(settings: Settings) -> TextWorld:
    names = chosen_classes(settings)
    gallery = _per_class(embedded.gallery(), names, settings.per_class)
    labels = [label for _, label in gallery]
    wanted = [name for name in names for _ in HELD_OUT_TEMPLATES]
    per = len(HELD_OUT_TEMPLATES)
    return TextWorld(
        [path for path, _ in gallery],
        [path for path, _ in embedded.ads()[: settings.ads]],
        sentences(names, HELD_OUT_TEMPLATES),
        torch.tensor([[label == want for label in labels] for want in wanted]),
        {name: list(range(i * per, (i + 1) * per)) for i, name in enumerate(names)},
        {name: sentences([name], TRAIN_TEMPLATES) for name in names},
        {name: [path for path, _ in embedded.queries([name])] for name in names},
        settings.image_size,
        "embedded photos",
    )


def _embedded_hash(settings: Settings) -> HashWorld:
    names = chosen_classes(settings)
    gallery = _per_class(embedded.gallery(), names, settings.per_class)
    queries = embedded.queries(names)
    pool: dict[str, list[Item]] = {}
    for path, label in embedded.pool():
        pool.setdefault(label, []).append(path)
    return HashWorld(
        [path for path, _ in gallery],
        [label for _, label in gallery],
        [path for path, _ in queries],
        [label for _, label in queries],
        pool,
        settings.image_size,
        "embedded photos",
    )


def _folder(settings: Settings, needed: tuple[str, ...], what: str) -> Path:
    if not settings.data:
        kind = "text" if settings.source == "captions" else "photo"
        raise ValueError(
            f"this scale needs data of your own: --data NAME:FOLDER with NAME one of "
            f"{', '.join(searchable(kind))}; or --data FOLDER with {what}"
        )
    root = Path(settings.data[0])
    missing = [name for name in needed if not (root / name).exists()]
    if missing:
        raise ValueError(f"{root} has no {missing[0]}: give a folder with {what}")
    return root


def _captions(settings: Settings) -> TextWorld:
    """``images/``, ``test.csv`` and ``train.csv`` (columns image, caption), ``ads/``.

    A caption is a query, its own image is what is relevant to it; keywords match by TTH's rule
    and the target texts come from ``train.csv``.
    """
    what = "images/, ads/, test.csv and train.csv (columns image, caption)"
    root = _folder(settings, ("images", "ads", "test.csv", "train.csv"), what)
    test, train = _table(root / "test.csv"), _table(root / "train.csv")
    names = list(dict.fromkeys(name for name, _ in test))
    place = {name: i for i, name in enumerate(names)}
    relevant = torch.zeros(len(test), len(names), dtype=torch.bool)
    for row, (name, _) in enumerate(test):
        relevant[row, place[name]] = True
    queries = [caption for _, caption in test]
    keywords = settings.keywords or KEYWORDS
    members = {
        w: [i for i, text in enumerate(queries) if caption_matches(text, w)] for w in keywords
    }
    lines = [caption for _, caption in train]
    return TextWorld(
        [root / "images" / name for name in names],
        _photos(root / "ads")[: settings.ads],
        queries,
        relevant,
        members,
        {w: select_captions(lines, w) for w in keywords},
        {w: [] for w in keywords},
        settings.image_size,
        root.name,
    )


def _table(path: Path) -> list[tuple[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    if not rows or not {"image", "caption"} <= rows[0].keys():
        raise ValueError(f"{path} needs a line per caption, with the columns image and caption")
    return [(row["image"], row["caption"]) for row in rows]


def _photos(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"there is no photo in {folder}")
    return found


def _classes(settings: Settings) -> HashWorld:
    """``database/<class>/``, ``query/<class>/`` and ``train/<class>/`` with photos."""
    what = "database/CLASS, query/CLASS and train/CLASS"
    root = _folder(settings, ("database", "query", "train"), what)

    def labelled(part: str) -> list[tuple[Path, str]]:
        return [(p, p.parent.name) for p in _photos(root / part)]

    gallery, queries = labelled("database"), labelled("query")
    pool: dict[str, list[Item]] = {}
    for path, label in labelled("train"):
        pool.setdefault(label, []).append(path)
    return HashWorld(
        [path for path, _ in gallery],
        [label for _, label in gallery],
        [path for path, _ in queries],
        [label for _, label in queries],
        pool,
        settings.image_size,
        root.name,
    )
