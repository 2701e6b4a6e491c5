"""The demonstration: a real image search, hijacked by a small patch and rescued by PAIR.

Everything is computed live on the embedded photos with the models that ship: patches are
optimised against the *undefended* search (the non-adaptive attack of the paper) and then met by
the defense. What an attacker who knows the defense achieves is the benchmark's business.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pair.attacks.advhash import AdvHashConfig, advhash
from pair.attacks.patch import Patch
from pair.attacks.tth import TTHConfig, tth
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.images import load_batch, quantise
from pair.pictures import Tile, sheet
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.hashing import HashNet, binarise
from pair.retrieval.metrics import mean_average_precision, recall_at_k

SIZE = 112
KEYWORDS = ("laptop", "sunflower", "umbrella", "revolver")
PAIRS = (("airplanes", "sunflower"), ("motorbikes", "leopard"))
ADS = 10
Progress = Callable[[str], None]


@dataclass
class Row:
    """One line of the table, in percent: without attack and under attack, both systems."""

    name: str
    clean: float | None = None
    attacked: float | None = None
    clean_pair: float | None = None
    attacked_pair: float | None = None


@dataclass
class Hit:
    """One search result: its picture (3, S, S), its class name, and what it is."""

    image: Tensor
    label: str
    kind: str  # "relevant", "other", "advertisement" or "target"


@dataclass
class Panel:
    """A query and its first results without and with PAIR (Figure 2 of the paper)."""

    title: str
    query: Tensor | None
    undefended: list[Hit]
    defended: list[Hit]


@dataclass
class Case:
    """One attack: the patch and a carrier before, with the patch, and purified."""

    title: str
    patch: Tensor
    original: Tensor
    attacked: Tensor
    purified: Tensor
    panel: Panel


@dataclass
class Part:
    title: str
    rows: list[Row]
    cases: list[Case] = field(default_factory=list)


@dataclass
class Outcome:
    parts: list[Part]
    facts: dict[str, str]


def _batched(function, images: Tensor, size: int = 32) -> Tensor:
    return torch.cat([function(chunk) for chunk in images.split(size)])


def _purify(purifier: Purifier, images: Tensor, generator: torch.Generator) -> Tensor:
    return _batched(lambda x: purifier(x, generator=generator), images)


def _percent(value: float) -> float:
    return 100 * float(value)


def run(
    seed: int | None = None,
    model: str = "pair-small",
    tth_config: TTHConfig | None = None,
    advhash_config: AdvHashConfig | None = None,
    say: Progress = lambda text: None,
) -> Outcome:
    """Both halves of the demonstration. ``seed`` fixes patches and masks; default: fresh.

    ``model`` names the generator (shipped name, folder or hub repository).
    """
    started = time.time()
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    purifier = Purifier.from_pretrained(model).requires_grad_(False)
    parts = [
        text_part(purifier, tth_config or TTHConfig(), generator, say),
        hash_part(purifier, advhash_config or AdvHashConfig(size=0.22, budget=400), generator, say),
    ]
    facts = {
        "seed": str(seed),
        "model": model,
        "threads": str(torch.get_num_threads()),
        "seconds": f"{time.time() - started:.0f}",
    }
    return Outcome(parts, facts)


def figure(outcome: Outcome) -> Image.Image:
    """The first attack of each part as one picture: steps, then results without and with PAIR."""
    rows = []
    for part in outcome.parts:
        case = part.cases[0]
        steps = [
            Tile(case.patch, "the patch"),
            Tile(case.original, "original"),
            Tile(case.attacked, "with the patch"),
            Tile(case.purified, "purified"),
        ]
        rows.append((part.title, steps))
        for name, hits in (("undefended", case.panel.undefended), ("PAIR", case.panel.defended)):
            tiles = [Tile(hit.image, hit.label, hit.kind) for hit in hits]
            rows.append((f"{name}: top 10 for {case.panel.title}", tiles))
    return sheet(rows)


# --- text to image ---------------------------------------------------------------------------


def text_part(
    purifier: Purifier, config: TTHConfig, generator: torch.Generator, say: Progress
) -> Part:
    """TTH patches promote advertisements for keywords; the gallery is purified."""
    clip = SmallClip.from_pretrained("clip-small")
    files = embedded.gallery()
    labels = [label for _, label in files]
    names = embedded.labels()
    say(f"text search: {len(files)} photos of {len(names)} classes")
    photos = load_batch([path for path, _ in files], SIZE)
    ads = load_batch([path for path, _ in embedded.ads()[:ADS]], SIZE)
    clean_photos = _purify(purifier, photos, generator)
    with torch.no_grad():
        z = F.normalize(_batched(clip.encode_image, photos), dim=1)
        z_pair = F.normalize(_batched(clip.encode_image, clean_photos), dim=1)
        queries = F.normalize(clip.encode_text(sentences(names, HELD_OUT_TEMPLATES)), dim=1)
    per = len(HELD_OUT_TEMPLATES)
    wanted = [name for name in names for _ in range(per)]
    relevant = torch.tensor([[label == want for label in labels] for want in wanted])

    rows = [
        _clean_row("R@10, all queries", recall_at_k, queries, z, z_pair, relevant, 10),
        _clean_row("P@10, all queries", _precision, queries, z, z_pair, relevant, 10),
        _clean_row("mAP, all queries", mean_average_precision, queries, z, z_pair, relevant),
    ]
    cases, scores = [], []
    for keyword in KEYWORDS:
        say(f"text search: optimising a TTH patch for the keyword “{keyword}”")
        with torch.no_grad():
            target = clip.encode_text(sentences([keyword], TRAIN_TEMPLATES)).mean(0)
        result = tth(clip.encode_image, ads, target, config=config, generator=generator)
        patched = quantise(result.patch.apply(ads))
        galleries = {
            "ads": (ads, z),
            "patched": (patched, z),
            "ads, PAIR": (_purify(purifier, ads, generator), z_pair),
            "patched, PAIR": (_purify(purifier, patched, generator), z_pair),
        }
        at = names.index(keyword)
        mine = slice(at * per, (at + 1) * per)
        figures = {}
        for name, (images, base) in galleries.items():
            with torch.no_grad():
                extra = F.normalize(clip.encode_image(images), dim=1)
            similarity = queries[mine] @ torch.cat([base, extra]).T
            figures[name] = _keyword_figures(similarity, relevant[mine])
            galleries[name] = (images, similarity)
        scores.append(figures)
        cases.append(_text_case(keyword, result.patch, ads, galleries, photos, labels))
    rows += [
        _keyword_row("advertisement in top 10 (irrelevant R@10)", scores, "any"),
        _keyword_row("share of the 10 advertisements in top 10", scores, "share"),
        _keyword_row("relevant P@10, keyword queries", scores, "precision"),
    ]
    return Part("Text-to-image search (CLIP), TTH patch 0.35 of the side", rows, cases)


def _clean_row(name, metric, queries, z, z_pair, relevant, *args) -> Row:
    plain, pair = (metric(queries @ g.T, relevant, *args) for g in (z, z_pair))
    return Row(name, clean=_percent(plain), clean_pair=_percent(pair))


def _precision(similarity: Tensor, relevant: Tensor, k: int) -> float:
    return float(relevant.gather(1, similarity.topk(k, 1).indices).float().mean())


def _keyword_figures(similarity: Tensor, relevant: Tensor) -> dict[str, float]:
    """Columns beyond those of ``relevant`` are the advertisements."""
    photos = relevant.shape[1]
    top = similarity.topk(10, 1).indices
    inserted = top >= photos
    hits = relevant.gather(1, top.clamp(max=photos - 1)) & ~inserted
    return {
        "any": float(inserted.any(1).float().mean()),
        "share": float(inserted.sum(1).float().mean()) / (similarity.shape[1] - photos),
        "precision": float(hits.float().mean()),
    }


def _keyword_row(name: str, scores: list[dict[str, dict[str, float]]], key: str) -> Row:
    def mean(which: str) -> float:
        return _percent(sum(s[which][key] for s in scores) / len(scores))

    return Row(name, mean("ads"), mean("patched"), mean("ads, PAIR"), mean("patched, PAIR"))


def _text_case(keyword: str, patch: Patch, ads, galleries, photos, labels) -> Case:
    patched, similarity = galleries["patched"]
    purified, similarity_pair = galleries["patched, PAIR"]

    def hits(scores: Tensor) -> list[Hit]:
        found = []
        for i in scores[0].topk(10).indices.tolist():
            if i >= len(photos):
                found.append(Hit(patched[i - len(photos)], "advertisement", "advertisement"))
            else:
                kind = "relevant" if labels[i] == keyword else "other"
                found.append(Hit(photos[i], labels[i], kind))
        return found

    title = f"“{HELD_OUT_TEMPLATES[0].format(keyword)}”"
    panel = Panel(title, None, hits(similarity), hits(similarity_pair))
    return Case(keyword, patch.content.detach(), ads[0], patched[0], purified[0], panel)


# --- image to image --------------------------------------------------------------------------


def hash_part(
    purifier: Purifier, config: AdvHashConfig, generator: torch.Generator, say: Progress
) -> Part:
    """AdvHash patches turn photos of one class into another; queries are purified."""
    net = HashNet.from_pretrained("csq-small")
    gallery_files, query_files = embedded.gallery(), embedded.queries()
    labels = [label for _, label in gallery_files]
    say(f"image search: {len(query_files)} queries against {len(labels)} photos")
    photos = load_batch([path for path, _ in gallery_files], SIZE)
    queries = load_batch([path for path, _ in query_files], SIZE)
    with torch.no_grad():
        codes = binarise(_batched(net.encode_image, photos))

    def similarity(images: Tensor) -> Tensor:
        with torch.no_grad():
            return binarise(_batched(net.encode_image, images)) @ codes.T

    def same(wanted: list[str]) -> Tensor:
        return torch.tensor([[label == want for label in labels] for want in wanted])

    relevant = same([label for _, label in query_files])
    plain = mean_average_precision(similarity(queries), relevant)
    pair = mean_average_precision(similarity(_purify(purifier, queries, generator)), relevant)
    rows = [Row("mAP, all queries", clean=_percent(plain), clean_pair=_percent(pair))]

    cases, figures = [], []
    for source, target in PAIRS:
        say(f"image search: optimising an AdvHash patch from “{source}” to “{target}”")
        train = load_batch([path for path, _ in embedded.pool([source])], SIZE)
        test = load_batch([path for path, _ in embedded.queries([source])], SIZE)
        anchor = net.centres[net.config.classes.index(target)]
        result = advhash(net.encode_image, train, anchor, config=config, generator=generator)
        patched = quantise(result.patch.apply(test))
        versions = {
            "clean": test,
            "attacked": patched,
            "clean_pair": _purify(purifier, test, generator),
            "attacked_pair": _purify(purifier, patched, generator),
        }
        scores = {name: similarity(images) for name, images in versions.items()}
        own, other = same([source] * len(test)), same([target] * len(test))
        figures.append(
            {
                name: (mean_average_precision(s, other), mean_average_precision(s, own))
                for name, s in scores.items()
            }
        )
        panel = Panel(
            f"a patched photo of class “{source}”",
            patched[0],
            _hash_hits(scores["attacked"][0], photos, labels, source, target),
            _hash_hits(scores["attacked_pair"][0], photos, labels, source, target),
        )
        content = result.patch.content.detach()
        purified = versions["attacked_pair"][0]
        cases.append(Case(f"{source} → {target}", content, test[0], patched[0], purified, panel))

    for i, name in enumerate(("targeted mAP (irrelevant)", "mAP of the true class (relevant)")):
        means = {
            key: _percent(sum(f[key][i] for f in figures) / len(figures)) for key in figures[0]
        }
        rows.append(Row(f"{name}, attacked classes", **means))
    return Part(
        "Image-to-image search (CSQ hash codes), AdvHash patch 0.22 of the side", rows, cases
    )


def _hash_hits(scores: Tensor, photos, labels, source: str, target: str) -> list[Hit]:
    kinds = {source: "relevant", target: "target"}
    return [
        Hit(photos[i], labels[i], kinds.get(labels[i], "other"))
        for i in scores.topk(10).indices.tolist()
    ]
