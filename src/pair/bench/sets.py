"""The searches of the paper over data sets in their genuine layouts (scale ``paper``)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from pair.attacks.keywords import KEYWORDS, caption_matches, select_captions
from pair.bench.photos import Item
from pair.bench.scenario import Settings
from pair.bench.world import HashWorld, TextWorld
from pair.data import embedded
from pair.data.sets import Dataset, Record, load, named, searchable, source

PAIRS = 10  # of classes, drawn where none are named
CONCEPTS = 24  # photos of a keyword that a collage may use
SEARCHES = {"text": "a text search", "photo": "a search by photo"}


def opened(settings: Settings, kind: str) -> Dataset | None:
    """The first data set among ``data`` that can serve a "text" or "photo" search.

    None where the photos of this package are searched, or no entry names a data set;
    ``ValueError`` where all are of the other kind.
    """
    if settings.source == "embedded":
        return None
    specs = [(spec, known) for spec in settings.data if (known := named(spec)) is not None]
    if not specs:
        return None
    for _, (name, protocol, root) in specs:
        fit = source(name).search.get(kind, ())
        if fit and protocol in (None, *fit):
            return load(name, root, protocol or fit[0])
    raise ValueError(
        f"{' and '.join(spec for spec, _ in specs)} cannot serve {SEARCHES[kind]}: "
        f"add --data NAME:FOLDER with NAME one of {', '.join(searchable(kind))}"
    )


def _part(found: Dataset, *names: str) -> list[Record]:
    """Records of the first part that there is."""
    known = {r.split for r in found.records} | found.views.keys()
    return found.part(next((n for n in names if n in known), names[0]))


def text_world(found: Dataset, settings: Settings) -> TextWorld:
    """Every caption of a held-out photo is a query for that photo, as in the paper.

    A keyword's target texts are captions of training photos; advertisements are pictures of
    ``ads/`` below the root, or the background photos of this package.
    """
    gallery = [r for r in _part(found, "test", "val") if r.captions]
    if not gallery:
        raise ValueError(f"{found.name} ({found.protocol}) has no captions to search with")
    queries = [text for r in gallery for text in r.captions]
    relevant = torch.zeros(len(queries), len(gallery), dtype=torch.bool)
    owners = [n for n, r in enumerate(gallery) for _ in r.captions]
    relevant[torch.arange(len(queries)), torch.tensor(owners)] = True
    keywords = settings.keywords or KEYWORDS
    train = [r for r in _part(found, "train") if r.captions]
    lines = [text for r in train for text in r.captions]
    targets = {w: select_captions(lines, w) for w in keywords}
    members = {
        w: [i for i, text in enumerate(queries) if caption_matches(text, w)] if targets[w] else []
        for w in keywords
    }
    folder = found.root / "ads"
    ads: Sequence[Item] = [path for path, _ in embedded.ads()]
    if folder.is_dir():
        ads = [r for r in load("folder", folder).records]
    if len(ads) < settings.ads:
        raise ValueError(f"{folder} holds {len(ads)} advertisements, {settings.ads} are asked for")
    return TextWorld(
        gallery,
        list(ads[: settings.ads]),
        queries,
        relevant,
        members,
        targets,
        {w: _shown(train, w) for w in keywords},
        settings.image_size,
        f"{found.name} ({found.protocol})",
        settings.workers,
    )


def _shown(records: list[Record], keyword: str) -> list[Item]:
    """Training photos whose captions name the keyword."""
    found: list[Item] = []
    for r in records:
        if any(caption_matches(text, keyword) for text in r.captions):
            found.append(r)
            if len(found) == CONCEPTS:
                break
    return found


def hash_world(found: Dataset, settings: Settings) -> HashWorld:
    """Labelled photos of the database and queries; patches are optimised on training photos."""
    gallery, queries = _part(found, "database", "gallery"), found.part("query")
    pool: dict[str, list[Item]] = {}
    for r in found.part("train"):
        for label in r.labels:
            pool.setdefault(label, []).append(r)
    return HashWorld(
        gallery,
        [";".join(r.labels) for r in gallery],
        queries,
        [";".join(r.labels) for r in queries],
        pool,
        settings.image_size,
        f"{found.name} ({found.protocol})",
        True,
        settings.workers,
        _pairs(queries, pool, settings.seed),
    )


def _pairs(queries: list[Record], pool: dict[str, list[Item]], seed: int) -> tuple[str, ...]:
    """Seeded source and target classes: the paper says "some categories"."""
    usable = sorted({label for r in queries for label in r.labels} & pool.keys())
    drawn = random.Random(f"pairs/{seed}")
    drawn.shuffle(usable)
    count = min(PAIRS, len(usable) - 1) if len(usable) > 1 else 0
    turned = usable[1:] + usable[:1]
    return tuple(f"{a} > {b}" for a, b in list(zip(usable, turned, strict=True))[:count])
