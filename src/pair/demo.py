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
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pair.attacks.advhash import AdvHashConfig, advhash, advhash_patch
from pair.attacks.tth import TTHConfig, tth
from pair.certified import (
    CertifiedPurifier,
    Cover,
    DeltaCap,
    PatchFamily,
    certified_out,
    upper_bound,
    window_cover,
    with_plain,
)
from pair.certified.soundness import measure_slack
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.images import load_batch, quantise
from pair.pictures import Tile, sheet
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.hashing import HashNet, binarise
from pair.retrieval.metrics import mean_average_precision, recall_at_k

SIZE = 112
TEXT_PATCH, VIEWS, DELTA = 0.35, 9, 0.1  # of the side; the certified mode: windows, trust
KEYWORDS = ("laptop", "sunflower", "umbrella", "revolver")
# What the patch turns into what: of the classes that it reaches, those that the network knows best.
SOURCES, TARGET = ("trilobite", "minaret", "leopard"), "stop sign"
HASH_PATCH = 0.22
ADS = 10
DRAWS = 4  # purifications of a picture whose features are averaged; the paper has one
ADVHASH = AdvHashConfig.preset("strong", size=HASH_PATCH, eot=1, lr=0.03, batch=8, budget=400)
Progress = Callable[[str], None]


@dataclass
class Row:
    """One line of the table, in percent: without attack and under attack, each system."""

    name: str
    clean: float | None = None
    attacked: float | None = None
    clean_pair: float | None = None
    attacked_pair: float | None = None
    clean_certified: float | None = None
    attacked_certified: float | None = None


@dataclass
class Hit:
    """One search result: its picture (3, S, S), its class name, and what it is."""

    image: Tensor
    label: str
    kind: str  # "relevant", "other", "advertisement" or "target"


@dataclass
class Panel:
    """A query and its first results in each system (Figure 2 of the paper)."""

    title: str
    query: Tensor | None
    results: dict[str, list[Hit]]  # by system


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


@dataclass(frozen=True)
class _Defended:
    """PAIR before an encoder: features averaged over ``draws`` purifications of each picture."""

    purifier: Purifier
    draws: int
    generator: torch.Generator

    def purify(self, images: Tensor) -> Tensor:
        """(B, 3, S, S): one purification of each, to look at."""
        return _batched(lambda x: self.purifier(x, generator=self.generator), images)

    @torch.no_grad()
    def features(self, encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """(B, D)"""

        def mean(chunk: Tensor) -> Tensor:
            views = self.purifier.draws(chunk, self.draws, generator=self.generator)
            return encode(views.flatten(0, 1)).unflatten(0, (self.draws, -1)).mean(0)

        return _batched(mean, images)


def _percent(value: float) -> float:
    return 100 * float(value)


def run(
    seed: int | None = None,
    model: str = "pair-small",
    tth_config: TTHConfig | None = None,
    advhash_config: AdvHashConfig | None = None,
    say: Progress = lambda text: None,
    draws: int = DRAWS,
) -> Outcome:
    """Both halves of the demonstration. ``seed`` fixes patches and masks; default: fresh.

    ``model`` names the generator (shipped name, folder or hub repository). PAIR averages the
    features of ``draws`` purifications of every picture.
    """
    started = time.time()
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    purifier = Purifier.from_pretrained(model).requires_grad_(False)
    pair = _Defended(purifier, draws, generator)
    parts = [
        text_part(pair, tth_config or TTHConfig(), say),
        hash_part(pair, advhash_config or ADVHASH, say),
    ]
    facts = {
        "seed": str(seed),
        "model": model,
        "draws": str(draws),
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
        for name, hits in case.panel.results.items():
            tiles = [Tile(hit.image, hit.label, hit.kind) for hit in hits]
            rows.append((f"{name}: top 10 for {case.panel.title}", tiles))
    return sheet(rows)


# --- text to image ---------------------------------------------------------------------------


def text_part(pair: _Defended, config: TTHConfig, say: Progress) -> Part:
    """TTH patches promote advertisements for keywords; the gallery is purified."""
    clip = SmallClip.from_pretrained("clip-small")
    files = embedded.gallery()
    labels = [label for _, label in files]
    names = embedded.labels()
    say(f"text search: purifying {len(files)} photos of {len(names)} classes")
    photos = load_batch([path for path, _ in files], SIZE)
    ads = load_batch([path for path, _ in embedded.ads()[:ADS]], SIZE)
    with torch.no_grad():
        queries = F.normalize(clip.encode_text(sentences(names, HELD_OUT_TEMPLATES)), dim=1)
    per = len(HELD_OUT_TEMPLATES)
    wanted = [name for name in names for _ in range(per)]
    relevant = torch.tensor([[label == want for label in labels] for want in wanted])

    systems = _systems(pair, clip, queries)
    say(f"text search: certifying them with {len(systems['certified'].cover)} views each")
    base = {name: system.scores(photos) for name, system in systems.items()}
    rows = [
        _clean_row("R@10, all queries", recall_at_k, base, relevant, 10),
        _clean_row("P@10, all queries", _precision, base, relevant, 10),
        _clean_row("mAP, all queries", mean_average_precision, base, relevant),
    ]
    cases, figures = [], []
    unpatched = {name: system.scores(ads) for name, system in systems.items()}
    for keyword in KEYWORDS:
        say(f"text search: optimising a TTH patch for the keyword “{keyword}”")
        with torch.no_grad():
            target = clip.encode_text(sentences([keyword], TRAIN_TEMPLATES)).mean(0)
        result = tth(clip.encode_image, ads, target, config=config, generator=pair.generator)
        patched = quantise(result.patch.apply(ads))
        mine = slice(names.index(keyword) * per, (names.index(keyword) + 1) * per)
        found: dict[str, Tensor] = {}
        for name, system in systems.items():
            found[name] = torch.cat([base[name], system.scores(patched)], 1)[mine]
            for which, scores in (
                (name, torch.cat([base[name], unpatched[name]], 1)[mine]),
                (f"{name}, attacked", found[name]),
            ):
                figures.append((which, _keyword_figures(scores, relevant[mine])))
        purified = pair.purify(patched[:1])[0]
        panel = _text_panel(keyword, found, patched, photos, labels)
        content = result.patch.content.detach()
        cases.append(Case(keyword, content, ads[0], patched[0], purified, panel))
    rows += [
        _keyword_row("advertisement in top 10 (irrelevant R@10)", figures, "any"),
        _keyword_row("share of the 10 advertisements in top 10", figures, "share"),
        _keyword_row("relevant P@10, keyword queries", figures, "precision"),
    ]
    proof = systems["certified"].possible(ads, base["certified"])
    keyword_rows = [i for i, want in enumerate(wanted) if want in KEYWORDS]
    share = _percent(proof[keyword_rows].float().mean())
    bound = "proved bound on that share, for every patch of that size"
    rows.append(Row(bound, attacked_certified=share))
    return Part("Text-to-image search (CLIP), TTH patch 0.35 of the side", rows, cases)


@dataclass
class _System:
    """A search: ``scores(images)`` (B, 3, S, S) -> (Q, B) for all queries."""

    scores: Callable[[Tensor], Tensor]


@dataclass
class _Certified(_System):
    cover: Cover
    possible: Callable[[Tensor, Tensor], Tensor]


def _systems(pair: _Defended, clip: SmallClip, queries: Tensor) -> dict[str, Any]:
    """The same encoder three times: bare, behind PAIR, behind covering masks."""
    certified = CertifiedPurifier(pair.purifier.autoencoder, _cover(pair.purifier))
    pool = DeltaCap(DELTA)

    @torch.no_grad()
    def bare(images: Tensor) -> Tensor:
        return queries @ F.normalize(_batched(clip.encode_image, images), dim=1).T

    def purified(images: Tensor) -> Tensor:
        return queries @ F.normalize(pair.features(clip.encode_image, images), dim=1).T

    @torch.no_grad()
    def views(images: Tensor) -> Tensor:
        parts = [certified.embed(clip, chunk).scores(queries) for chunk in images.split(16)]
        return torch.cat(parts, 1)  # (Q, B, R + 1)

    def possible(images: Tensor, benign: Tensor) -> Tensor:
        """(Q, B): could some patch lift the image into the top 10? (Theorems 1 and 2)"""
        slack = measure_slack(certified, clip, images[:9])
        patterns = with_plain(certified.cover.minimal)
        upper = upper_bound(pool, views(images), patterns, slack=slack)
        return ~certified_out(upper, benign, 10, slack)

    return {
        "undefended": _System(bare),
        "PAIR": _System(purified),
        "certified": _Certified(lambda images: pool(views(images)), certified.cover, possible),
    }


def _cover(purifier: Purifier) -> Cover:
    c = purifier.autoencoder.config
    family = PatchFamily.share(TEXT_PATCH, c.image_size)
    return window_cover(family, c.image_size, c.patch_size, VIEWS)


def _clean_row(name: str, metric, base: dict[str, Tensor], relevant: Tensor, *args) -> Row:
    values = {key: _percent(metric(scores, relevant, *args)) for key, scores in base.items()}
    return _row(name, values)


def _row(name: str, values: dict[str, float]) -> Row:
    order = (
        "undefended",
        "undefended, attacked",
        "PAIR",
        "PAIR, attacked",
        "certified",
        "certified, attacked",
    )
    return Row(name, *(values.get(key) for key in order))


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


def _keyword_row(name: str, figures: list[tuple[str, dict[str, float]]], key: str) -> Row:
    """Mean over the keywords, for every system with and without attack."""
    groups: dict[str, list[float]] = {}
    for which, values in figures:
        groups.setdefault(which, []).append(values[key])
    return _row(name, {k: _percent(sum(v) / len(v)) for k, v in groups.items()})


def _text_panel(keyword: str, found: dict[str, Tensor], patched, photos, labels) -> Panel:
    def hits(scores: Tensor) -> list[Hit]:
        results = []
        for i in scores[0].topk(10).indices.tolist():
            if i >= len(photos):
                results.append(Hit(patched[i - len(photos)], "advertisement", "advertisement"))
            else:
                kind = "relevant" if labels[i] == keyword else "other"
                results.append(Hit(photos[i], labels[i], kind))
        return results

    title = f"“{HELD_OUT_TEMPLATES[0].format(keyword)}”"
    return Panel(title, None, {name: hits(scores) for name, scores in found.items()})


# --- image to image --------------------------------------------------------------------------


def hash_part(pair: _Defended, config: AdvHashConfig, say: Progress) -> Part:
    """One AdvHash patch (its goal and place, optimised with Adam) turns the queries into another
    class; queries are purified."""
    net = HashNet.from_pretrained("csq-small")
    gallery_files, query_files = embedded.gallery(), embedded.queries()
    labels = [label for _, label in gallery_files]
    say(f"image search: {len(query_files)} queries against {len(labels)} photos")
    photos = load_batch([path for path, _ in gallery_files], SIZE)
    queries = load_batch([path for path, _ in query_files], SIZE)
    with torch.no_grad():
        codes = binarise(_batched(net.encode_image, photos))

    @torch.no_grad()
    def bare(images: Tensor) -> Tensor:
        return binarise(_batched(net.encode_image, images)) @ codes.T

    def purified(images: Tensor) -> Tensor:
        return binarise(pair.features(net.encode_image, images)) @ codes.T

    def same(wanted: list[str]) -> Tensor:
        return torch.tensor([[label == want for label in labels] for want in wanted])

    relevant = same([label for _, label in query_files])
    without = _percent(mean_average_precision(bare(queries), relevant))
    behind = _percent(mean_average_precision(purified(queries), relevant))
    rows = [Row("mAP, all queries", clean=without, clean_pair=behind)]

    say(f"image search: optimising one AdvHash patch that turns photos into a “{TARGET}”")
    # The attacker crawls the index: photos of all other classes. Queries stay unseen.
    others = torch.tensor([label != TARGET for label in labels])
    anchor = net.centres[net.config.classes.index(TARGET)]
    # Starts from a small photo of the target: from grey, some seeds get stuck.
    place = advhash_patch(SIZE, config)
    model = photos[labels.index(TARGET)][None]
    small = F.interpolate(model, place.size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    start = place.with_content(small)
    extra: dict[str, Any] = {"config": config, "patch": start, "generator": pair.generator}
    result = advhash(net.encode_image, photos[others], anchor, **extra)
    cases, figures = [], []
    for source in SOURCES:
        test = load_batch([path for path, _ in embedded.queries([source])], SIZE)
        patched = quantise(result.patch.apply(test))
        scores = {
            "clean": bare(test),
            "attacked": bare(patched),
            "clean_pair": purified(test),
            "attacked_pair": purified(patched),
        }
        own, other = same([source] * len(test)), same([TARGET] * len(test))
        figures.append(
            {
                name: (mean_average_precision(s, other), mean_average_precision(s, own))
                for name, s in scores.items()
            }
        )
        panel = Panel(
            f"a patched photo of class “{source}”",
            patched[0],
            {
                "undefended": _hash_hits(scores["attacked"][0], photos, labels, source),
                "PAIR": _hash_hits(scores["attacked_pair"][0], photos, labels, source),
            },
        )
        content = result.patch.content.detach()
        seen = pair.purify(patched[:1])[0]
        cases.append(Case(f"{source} → {TARGET}", content, test[0], patched[0], seen, panel))

    for i, name in enumerate(("targeted mAP (irrelevant)", "mAP of the true class (relevant)")):
        means = {
            key: _percent(sum(f[key][i] for f in figures) / len(figures)) for key in figures[0]
        }
        rows.append(Row(f"{name}, attacked classes", **means))
    return Part(
        "Image-to-image search (CSQ hash codes), AdvHash patch 0.22 of the side, in the centre",
        rows,
        cases,
    )


def _hash_hits(scores: Tensor, photos, labels, source: str) -> list[Hit]:
    kinds = {source: "relevant", TARGET: "target"}
    return [
        Hit(photos[i], labels[i], kinds.get(labels[i], "other"))
        for i in scores.topk(10).indices.tolist()
    ]
