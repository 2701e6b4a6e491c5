"""Cells that are pictures: search results without and with a defense, and a map of the features."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.bench import codes, text
from pair.bench.grid import Bench, Cell, seed_of
from pair.bench.photos import title
from pair.bench.scenario import Row
from pair.files import write_atomic
from pair.images import quantise
from pair.pictures import Tile, sheet

BARE = Row("undefended", "none")
SHOWN = 10
Result = tuple[dict[str, Any], dict[str, Any]]


def panel(bench: Bench, cell: Cell) -> Result:
    """Figure 2: the patch, a patched picture, it purified, and the first hits of both systems."""
    make = _hash_panel if bench.hashing(cell.row) else _text_panel
    steps, lanes = make(bench, cell)
    rows = [(f"{cell.unit}: non-adaptive attack", steps)]
    rows += [(f"{name}: first results", tiles) for name, tiles in lanes]
    buffer = io.BytesIO()
    sheet(rows).save(buffer, "PNG")
    file = bench.store.folder("pictures") / f"{bench.key(cell)}.png"
    write_atomic(file, buffer.getvalue())
    hits = {name: [[t.kind, t.caption] for t in tiles] for name, tiles in lanes}
    return {"hits": hits, "picture": file.name}, {}


def _text_panel(bench: Bench, cell: Cell):
    unit, world = cell.unit, bench.text
    patch, _ = text.static_patch(bench, BARE, unit)
    patched = quantise(patch.apply(world.ads))
    at = world.rows(unit)[0]
    lanes = []
    for row in (BARE, cell.row):
        search = bench.search(row)
        query = search.text([world.queries[at]])
        known = search.scores(query, bench.gallery(row, 0))[0]
        rows = search.rows(patched, seed_of("evaluate", bench.settings.seed, unit))
        planted = search.scores(query, rows)[0]
        order = torch.cat([planted, known]).argsort(descending=True, stable=True)[:SHOWN]
        tiles = []
        for i in order.tolist():
            if i < len(planted):
                tiles.append(Tile(patched[i], "advertisement", "advertisement"))
            else:
                own = bool(world.relevant[at, i - len(planted)])
                name = title(world.files[i - len(planted)])
                tiles.append(
                    Tile(world.photos[i - len(planted)], name, "relevant" if own else "other")
                )
        lanes.append((row.label, tiles))
    return _steps(bench, cell.row, patch.content, world.ads[:1], patched[:1], unit), lanes


def _hash_panel(bench: Bench, cell: Cell):
    unit, world = cell.unit, bench.hash
    source, target = codes.ends(unit)
    patch, _ = codes.static_patch(bench, BARE, unit)
    photo = world.queries[world.of(source)[:1]]
    patched = quantise(patch.apply(photo))
    kinds, lanes = {source: "relevant", target: "target"}, []
    for row in (BARE, cell.row):
        search = bench.hash_search(row)
        code = search.codes(patched, seed_of("evaluate", bench.settings.seed, unit))
        scores = (code @ bench.codes(row).T)[0]
        order = scores.argsort(descending=True, stable=True)[:SHOWN]
        tiles = [
            Tile(world.photos[i], world.labels[i], kinds.get(world.labels[i], "other"))
            for i in order.tolist()
        ]
        lanes.append((row.label, tiles))
    return _steps(bench, cell.row, patch.content, photo, patched, unit), lanes


def _steps(bench: Bench, row: Row, content: Tensor, before: Tensor, after: Tensor, unit: str):
    defense = bench.models.defense(row, bench.hashing(row))
    seed = seed_of("evaluate", bench.settings.seed, unit)
    with torch.no_grad():
        rebuilt = defense(
            after.to(bench.settings.device), generator=torch.Generator().manual_seed(seed)
        ).cpu()
    return [
        Tile(content, "the patch"),
        Tile(before[0], "original"),
        Tile(after[0], "with the patch"),
        Tile(rebuilt[0], "purified"),
    ]


def feature_map(bench: Bench, cell: Cell) -> Result:
    """Figure 5: t-SNE of texts, photos and attacked pictures, before and after the defense.

    The attack on the defended search is adaptive, as in the paper.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ValueError(
            f"a t-SNE map needs scikit-learn ({error}): pip install 'pair-retrieval[figures]'"
        ) from error
    unit, world = cell.unit, bench.text
    at = world.rows(unit)
    every = max(1, len(world.files) // 200)
    maps = {}
    for row in (BARE, cell.row):
        search = bench.search(row)
        if row is BARE:
            patch, _ = text.static_patch(bench, row, unit)
        else:
            patch, _, _ = text.adaptive_patch(bench, row, unit)
        patched = quantise(patch.apply(world.ads))
        rows = search.rows(patched, seed_of("evaluate", bench.settings.seed, unit))
        groups = {
            "texts with the keyword": search.text([world.queries[i] for i in at]),
            "photos": bench.gallery(row, 0)[::every, 0],
            "attacked pictures": rows[:, 0],
        }
        points = F.normalize(torch.cat(list(groups.values())), dim=1)
        perplexity = min(30.0, (len(points) - 1) / 3)
        places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(
            points.numpy()
        )
        start, found = 0, {}
        for name, part in groups.items():
            found[name] = [[round(float(v), 3) for v in p] for p in places[start:][: len(part)]]
            start += len(part)
        distance = 1 - float((groups["texts with the keyword"] @ rows[:, 0].T).mean())
        maps[row.label] = {"points": found, "distance": round(distance, 5)}
    return {"maps": maps}, {}
