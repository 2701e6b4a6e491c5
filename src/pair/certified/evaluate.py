"""What the guarantee costs: certified and clean retrieval on photos, per patch size and fill.

Every cell is one JSON line: configuration, per-query values and their intervals (clusters are
the keywords). Cells that a results file already holds are not measured again, so a run can be
stopped and continued.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair import __version__
from pair.certified import database, metrics
from pair.certified.attacked import attack_record, hardest
from pair.certified.cost import cost_record
from pair.certified.covering import PatchFamily, largest_block, visible_blocks, window_cover
from pair.certified.pooling import (
    DeltaCap,
    LowestMean,
    Maximum,
    Minimum,
    Pool,
    lower_bound,
    upper_bound,
    with_plain,
)
from pair.certified.purifier import CertifiedPurifier, Views
from pair.certified.query_side import measure, measure_votes
from pair.certified.soundness import interference, measure_slack
from pair.certified.variants import variants
from pair.data.prompts import HELD_OUT_TEMPLATES
from pair.files import write_atomic
from pair.images import load_batch
from pair.purifier import Purifier
from pair.retrieval.encoders import ImageEncoder, TextImageEncoder
from pair.retrieval.metrics import average_precision, precision_at_k, recall
from pair.retrieval.mirror import Mirrored
from pair.retrieval.statistics import summarise

Photos = Sequence[tuple[Path, str]]
DELTAS = (0.0, 0.1, 0.2, float("inf"))
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What is measured: patch sizes x views x fills, the most telling cells first.

    ``fill_views``: only with these numbers of views are the further fills measured (default: with
    all). ``curve``: further patch sizes, with ``curve_views`` windows and the first fill alone.
    ``votes``: patch size for hashing by bit votes, 0 for none. ``attacked``: so many keywords are
    attacked with ``curve_views`` windows and the first fill, on the ``attack_carriers`` carriers
    that are hardest to certify, and the cost is measured.
    """

    patches: tuple[float, ...] = (0.22, 0.35)
    views: tuple[int, ...] = (4, 9, 16)
    fills: tuple[str, ...] = ("window", "whole", "mean", "blur", "drop")
    deltas: tuple[float, ...] = DELTAS
    k: int = 10
    batch: int = 16
    resamples: int = 500
    fill_views: tuple[int, ...] | None = None
    curve: tuple[float, ...] = ()
    curve_views: int = 9
    votes: float = 0.0
    attacked: int = 0
    attack_carriers: int = 3
    attack_steps: int = 16

    def cells(self) -> Iterator[tuple[float, int, str]]:
        first, *others = self.fills
        views = sorted(self.views, key=lambda v: (v != self.curve_views, v))
        middle, rest = views[:1], views[1:]
        compared = [v for v in views if self.fill_views is None or v in self.fill_views]
        yield from ((p, v, first) for v in middle for p in self.patches)
        yield from ((p, v, f) for f in others for v in compared[:1] for p in self.patches)
        yield from ((p, v, first) for v in rest[:1] for p in self.patches)
        yield from ((p, self.curve_views, first) for p in self.curve if p not in self.patches)
        yield from ((p, v, first) for v in rest[1:] for p in self.patches)
        yield from ((p, v, f) for v in compared[1:] for f in others for p in self.patches)


@dataclass
class Bench:
    """Photos, carriers and queries; ``relevant`` (Q, N), ``keywords`` (Q,), text (Q, d).

    ``starts``: other photos of the classes, from which an attack may begin.
    """

    gallery: Photos
    carriers: Photos
    encoder: TextImageEncoder
    templates: tuple[str, ...] = HELD_OUT_TEMPLATES
    starts: Photos = ()
    keywords: list[str] = field(init=False)
    text: Tensor = field(init=False)
    relevant: Tensor = field(init=False)

    def __post_init__(self) -> None:
        labels = [label for _, label in self.gallery]
        names = sorted(set(labels))
        self.keywords = [n for n in names for _ in self.templates]
        sentences = [t.format(n.replace("_", " ")) for n in names for t in self.templates]
        with torch.no_grad():
            self.text = F.normalize(self.encoder.encode_text(sentences), dim=-1)
        self.relevant = torch.tensor(
            [[label == word for label in labels] for word in self.keywords]
        )


def run(
    bench: Bench,
    purifier: Purifier,
    out: Path,
    setting: Setting | None = None,
    facts: dict[str, Any] | None = None,
    say: Say = lambda text: None,
) -> list[dict[str, Any]]:
    """Measure all cells and append them to ``out`` (JSON lines); returns every record."""
    setting = setting or Setting()
    facts = {**(facts or {}), "photos": len(bench.gallery), "carriers": len(bench.carriers)}
    records = read(out)
    if out.is_file() and not out.read_bytes().endswith(b"\n"):  # cut off while writing
        write_atomic(out, "".join(json.dumps(r) + "\n" for r in records).encode())
    known = {_key(r) for r in records if r["facts"] == facts}
    records = [r for r in records if r["facts"] == facts]

    def keep(record: dict[str, Any]) -> None:
        record = {"facts": facts, "environment": _environment(), **record}
        with open(out, "a") as handle:
            handle.write(json.dumps(record) + "\n")
        records.append(record)

    if ("baseline", None, None, None) not in known:
        say("undefended and plain PAIR")
        for record in _baselines(bench, purifier, setting):
            keep(record)
        keep({"kind": "baseline"})
    for patch, views, fill in setting.cells():
        if ("cell", patch, views, fill) in known:
            continue
        c = purifier.autoencoder.config
        family = PatchFamily.share(patch, c.image_size)
        cover = window_cover(family, c.image_size, c.patch_size, views)
        model = CertifiedPurifier(purifier.autoencoder.eval(), cover, fill=fill)
        say(f"patch {patch}, {len(cover)} views, fill {fill}")
        main = fill == setting.fills[0] and views == setting.curve_views
        extras = main and patch in setting.patches and setting.attacked
        for record in _cell(bench, model, setting, purifier if extras else None):
            keep({"patch": patch, "views": views, "fill": fill, **record})
        keep({"kind": "cell", "patch": patch, "views": views, "fill": fill})
    return records


@torch.no_grad()
def run_queries(
    bench: Bench,
    purifier: Purifier,
    photos: Photos,
    targets: Sequence[tuple[str, ImageEncoder, bool]],
    out: Path,
    setting: Setting | None = None,
    facts: dict[str, Any] | None = None,
    say: Say = lambda text: None,
) -> list[dict[str, Any]]:
    """Certificates of patched query photos; ``targets`` are (name, encoder, binary codes?).

    The generator fills the windows; the gallery is not purified. One record per patch size,
    number of views and target is appended to ``out``, and one for bit votes per binary target.
    """
    setting, c = setting or Setting(), purifier.autoencoder.config
    facts = {**(facts or {}), "photos": len(bench.gallery), "queries": len(photos)}
    records = [r for r in read(out) if r["kind"] in ("query", "votes") and r["facts"] == facts]
    known = {(r["kind"], r["patch"], r["views"], r["target"]) for r in records}

    def keep(kind: str, name: str, patch: float, views: int, made: int, figures: Any) -> None:
        record = {
            "facts": facts,
            "environment": _environment(),
            "kind": kind,
            "target": name,
            "patch": patch,
            "views": views,
            "made_views": made,
            "means": figures.means(),
            "each": {k: [round(float(x), 6) for x in v] for k, v in vars(figures).items()},
        }
        with open(out, "a") as handle:
            handle.write(json.dumps(record) + "\n")
        records.append(record)

    images = load_batch([p for p, _ in photos], c.image_size)
    labels = [label for _, label in bench.gallery]
    relevant = torch.tensor([[label == own for label in labels] for _, own in photos])
    for name, encoder, binary in targets:
        gallery = _features(encoder, bench.gallery, c.image_size, setting.batch)
        for patch, views in product(setting.patches, setting.views):
            if ("query", patch, views, name) in known:
                continue
            family = PatchFamily.share(patch, c.image_size)
            cover = window_cover(family, c.image_size, c.patch_size, views)
            model = CertifiedPurifier(purifier.autoencoder.eval(), cover)
            say(f"patched queries, {name}: patch {patch}, {len(cover)} views")
            figures = measure(model, encoder, images, gallery, relevant, binary=binary, k=setting.k)
            keep("query", name, patch, views, len(cover), figures)
        if binary and setting.votes and ("votes", setting.votes, 0, name) not in known:
            family = PatchFamily.share(setting.votes, c.image_size)
            block = largest_block(family, c.image_size, c.patch_size)
            cover = visible_blocks(family, block, c.image_size, c.patch_size, stride=2)
            model = CertifiedPurifier(purifier.autoencoder.eval(), cover)
            say(f"bit votes, {name}: patch {setting.votes}, {len(cover)} blocks of {block} tokens")
            voted = measure_votes(model, encoder, images, gallery, relevant, k=setting.k)
            keep("votes", name, setting.votes, 0, len(cover), voted)
    return records


def _features(encoder: ImageEncoder, photos: Photos, size: int, batch: int) -> Tensor:
    paths = [path for path, _ in photos]
    starts = range(0, len(paths), batch)
    return torch.cat([encoder.encode_image(load_batch(paths[i : i + batch], size)) for i in starts])


@torch.no_grad()
def embed(
    model: CertifiedPurifier, encoder: TextImageEncoder, photos: Photos, batch: int = 16
) -> Views:
    """Views of all photos (short side resized, centre cropped)."""
    parts = []
    for start in range(0, len(photos), batch):
        images = load_batch([p for p, _ in photos[start : start + batch]], model.image_size)
        parts.append(model.embed(encoder, images))
    return Views(torch.cat([p.plain for p in parts]), torch.cat([p.masked for p in parts]))


def _cell(
    bench: Bench,
    model: CertifiedPurifier,
    setting: Setting,
    purifier: Purifier | None = None,
) -> Iterator[dict[str, Any]]:
    """Records of one cell; with a plain ``purifier`` also the attacks and the cost."""
    sample = load_batch([p for p, _ in bench.gallery[:8]], model.image_size)
    if bad := interference(model, sample[:2], torch.Generator().manual_seed(0)):
        raise ValueError(f"views {bad} read pixels that they should hide: no certificate holds")
    slack = measure_slack(model, bench.encoder, sample, (1, 3, 8))
    began = time.process_time()
    encoder = bench.encoder if purifier is None else Mirrored(bench.encoder)
    photos, carriers = (
        embed(model, encoder, p, setting.batch) for p in (bench.gallery, bench.carriers)
    )
    seconds = time.process_time() - began
    made = (len(bench.gallery) + len(bench.carriers)) * (len(model.cover) + 1)
    shared = {
        "hidden": model.cover.hidden_share,
        "made_views": len(model.cover),
        "slack": slack,
        "views_per_second": made / seconds,
    }
    patterns = model.cover.minimal
    if purifier is not None:
        measured = partial(_metrics, bench, setting, slack=slack)
        for record in variants(photos, carriers, bench.text, patterns, measured, slack):
            yield {"kind": "variant", **shared, **record}
        photos, carriers = (
            Views(Mirrored.upright(v.plain), Mirrored.upright(v.masked)) for v in (photos, carriers)
        )
    items, ads = photos.scores(bench.text), carriers.scores(bench.text)
    pools: list[tuple[str, Pool, slice, Tensor]] = [("min", Minimum(), slice(-1), patterns)]
    if (count := model.cover.multiplicity) > 1:
        pools.append((f"lowest {count}", LowestMean(count), slice(-1), patterns))
    for delta in setting.deltas:
        pools.append((f"delta {delta:g}", DeltaCap(delta), slice(None), with_plain(patterns)))
    for name, pool, columns, cover in pools:
        benign, plain = pool(items[..., columns]), pool(ads[..., columns])
        upper = upper_bound(pool, ads[..., columns], cover, slack=slack)
        yield {
            "kind": "certified",
            "pool": name,
            **shared,
            **_metrics(bench, setting, benign, plain, upper, slack),
        }
    yield {"kind": "demotion", **shared, **_demotion(bench, items, with_plain(patterns), setting)}
    yield {"kind": "evidence", **shared, **_evidence(bench, items, setting)}
    if purifier is not None:
        yield from _attacks(bench, model, setting, photos, carriers, slack)
        rows = bench.text[:: len(bench.templates)]
        yield {"kind": "cost", **cost_record(model, purifier, bench.encoder, sample, photos, rows)}


def _attacks(
    bench: Bench,
    model: CertifiedPurifier,
    setting: Setting,
    photos: Views,
    carriers: Views,
    slack: float,
) -> Iterator[dict[str, Any]]:
    names = sorted(set(bench.keywords))
    for i in range(min(setting.attacked, len(names))):
        word = names[(2 * i + 1) * len(names) // (2 * setting.attacked)]  # spread over the list
        texts = bench.text[[k == word for k in bench.keywords]]
        chosen = hardest(model.cover, carriers, texts, setting.attack_carriers)
        images = load_batch([bench.carriers[c][0] for c in chosen], model.image_size)
        # A genuine picture of the concept if there is one, else the carrier itself.
        starts = [p for p, label in bench.starts if label == word][:1]
        start = load_batch(starts, model.image_size)[0] if starts else None
        record = attack_record(
            model, bench.encoder, photos, images, texts, start,
            steps=setting.attack_steps, k=setting.k, slack=slack,
        )  # fmt: skip
        yield {"kind": "attack", "keyword": word, "carriers_attacked": len(chosen), **record}


def _metrics(bench, setting, benign, plain=None, upper=None, slack=0.0) -> dict[str, Any]:
    """Clean and, where there are bounds, certified figures of one score table."""
    k, relevant = setting.k, bench.relevant
    each = {
        "P": precision_at_k(benign, relevant, k),
        "AP": average_precision(benign, relevant),
        "R": recall(benign, relevant, k),
    }
    if plain is not None:
        each["no_attack"] = metrics.cert_asr(plain, benign, k)
    if upper is not None:
        each["CertASR"] = metrics.cert_asr(upper, benign, k, slack)
        each["CertASR_any"] = metrics.cert_asr_any(upper, benign, k, slack)
        each["CertR"] = metrics.cert_recall(upper, benign, relevant, k, slack)
        each["CertAP"] = metrics.cert_average_precision(upper, benign, relevant, slack)
    each = {name: values.clamp(0, 1) for name, values in each.items()}  # rounding of an AP
    summary = {}
    for name, values in each.items():
        interval = summarise(values, bench.keywords, resamples=setting.resamples).micro
        summary[name] = [interval.mean, interval.low, interval.high]
    return {
        "summary": summary,
        "each": {n: [round(float(x), 6) for x in v] for n, v in each.items()},
    }


def _demotion(bench: Bench, items: Tensor, patterns: Tensor, setting: Setting) -> dict[str, Any]:
    """Maximum pooling: what a patch on a relevant item itself cannot push out of the top K."""
    pool, k = Maximum(), setting.k
    scores = pool(items)
    lower = lower_bound(pool, items, patterns, slack=1e-5)
    figures = _metrics(bench, setting, scores)
    kept = metrics.cert_kept(lower, scores, bench.relevant, k)
    interval = summarise(kept, bench.keywords, resamples=setting.resamples).micro
    figures["summary"]["CertKept"] = [interval.mean, interval.low, interval.high]
    figures["each"]["CertKept"] = [round(float(x), 6) for x in kept]
    return figures


def _evidence(bench: Bench, items: Tensor, setting: Setting) -> dict[str, Any]:
    """Share of a score that hangs on one window, on the true matches in the plain top K."""
    top = items[..., -1].topk(setting.k, dim=1).indices
    hits = torch.zeros_like(bench.relevant).scatter(1, top, True) & bench.relevant
    drops = database.evidence(items)[hits].clamp(min=-2)
    at = torch.tensor([0.5, 0.95, 0.99])
    quantiles = drops.quantile(at).tolist() if len(drops) else [0.0] * 3
    rates = {f"{d:g}": float((drops > d).double().mean()) for d in setting.deltas}
    return {
        "drop_quantiles": dict(zip(("50", "95", "99"), quantiles, strict=True)),
        "alarms": rates,
    }


@torch.no_grad()
def _baselines(bench: Bench, purifier: Purifier, setting: Setting) -> Iterator[dict[str, Any]]:
    seeded = torch.Generator().manual_seed(0)
    for name, model in (("undefended", None), ("PAIR", purifier)):
        parts = []
        for photos in (bench.gallery, bench.carriers):
            features = []
            for start in range(0, len(photos), setting.batch):
                paths = [p for p, _ in photos[start : start + setting.batch]]
                images = load_batch(paths, purifier.image_size)
                if model is not None:
                    images = model(images, generator=seeded)
                features.append(F.normalize(bench.encoder.encode_image(images), dim=-1))
            parts.append(bench.text @ torch.cat(features).T)
        yield {"kind": "uncertified", "pool": name, **_metrics(bench, setting, *parts)}


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a results file; an unfinished last line is ignored."""
    if not path.is_file():
        return []
    out = []
    for line in path.read_text().splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record.get(k) for k in ("kind", "patch", "views", "fill"))


def _environment() -> dict[str, str]:
    return {
        "pair": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
