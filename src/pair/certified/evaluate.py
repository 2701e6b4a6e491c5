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
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair import __version__
from pair.certified import database, metrics
from pair.certified.covering import PatchFamily, window_cover
from pair.certified.pooling import DeltaCap, LowestMean, Minimum, Pool, upper_bound, with_plain
from pair.certified.purifier import CertifiedPurifier, Views
from pair.certified.query_side import measure
from pair.certified.soundness import interference, measure_slack
from pair.data.prompts import HELD_OUT_TEMPLATES
from pair.files import write_atomic
from pair.images import load_batch
from pair.purifier import Purifier
from pair.retrieval.encoders import ImageEncoder, TextImageEncoder
from pair.retrieval.metrics import average_precision, precision_at_k, recall
from pair.retrieval.statistics import summarise

Photos = Sequence[tuple[Path, str]]
DELTAS = (0.0, 0.1, 0.2, float("inf"))
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What is measured: all combinations of patch size, views and fill."""

    patches: tuple[float, ...] = (0.22, 0.35)
    views: tuple[int, ...] = (4, 9, 16)
    fills: tuple[str, ...] = ("window", "whole", "mean", "blur", "drop")
    deltas: tuple[float, ...] = DELTAS
    k: int = 10
    batch: int = 16
    resamples: int = 1000

    def cells(self) -> Iterator[tuple[float, int, str]]:
        for patch in self.patches:
            for views in self.views:
                for fill in self.fills:
                    yield patch, views, fill


@dataclass
class Bench:
    """Photos, carriers and queries; ``relevant`` (Q, N), ``keywords`` (Q,), text (Q, d)."""

    gallery: Photos
    carriers: Photos
    encoder: TextImageEncoder
    templates: tuple[str, ...] = HELD_OUT_TEMPLATES
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
        for record in _cell(bench, model, setting):
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
    number of views and target is appended to ``out``.
    """
    setting, c = setting or Setting(), purifier.autoencoder.config
    facts = {**(facts or {}), "photos": len(bench.gallery), "queries": len(photos)}
    records = [r for r in read(out) if r["kind"] == "query" and r["facts"] == facts]
    known = {(r["patch"], r["views"], r["target"]) for r in records}
    images = load_batch([p for p, _ in photos], c.image_size)
    labels = [label for _, label in bench.gallery]
    relevant = torch.tensor([[label == own for label in labels] for _, own in photos])
    for name, encoder, binary in targets:
        gallery = _features(encoder, bench.gallery, c.image_size, setting.batch)
        for patch, views in product(setting.patches, setting.views):
            if (patch, views, name) in known:
                continue
            family = PatchFamily.share(patch, c.image_size)
            cover = window_cover(family, c.image_size, c.patch_size, views)
            model = CertifiedPurifier(purifier.autoencoder.eval(), cover)
            say(f"patched queries, {name}: patch {patch}, {len(cover)} views")
            figures = measure(model, encoder, images, gallery, relevant, binary=binary, k=setting.k)
            record = {
                "facts": facts,
                "environment": _environment(),
                "kind": "query",
                "target": name,
                "patch": patch,
                "views": views,
                "made_views": len(cover),
                "means": figures.means(),
                "each": {k: [round(float(x), 6) for x in v] for k, v in vars(figures).items()},
            }
            with open(out, "a") as handle:
                handle.write(json.dumps(record) + "\n")
            records.append(record)
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


def _cell(bench: Bench, model: CertifiedPurifier, setting: Setting) -> Iterator[dict[str, Any]]:
    sample = load_batch([p for p, _ in bench.gallery[:33]], model.image_size)
    if bad := interference(model, sample[:2], torch.Generator().manual_seed(0)):
        raise ValueError(f"views {bad} read pixels that they should hide: no certificate holds")
    slack = measure_slack(model, bench.encoder, sample)
    began = time.perf_counter()
    photos = embed(model, bench.encoder, bench.gallery, setting.batch)
    carriers = embed(model, bench.encoder, bench.carriers, setting.batch)
    seconds = time.perf_counter() - began
    made = (len(bench.gallery) + len(bench.carriers)) * (len(model.cover) + 1)
    shared = {
        "hidden": model.cover.hidden_share,
        "made_views": len(model.cover),
        "slack": slack,
        "views_per_second": made / seconds,
    }
    items, ads = photos.scores(bench.text), carriers.scores(bench.text)
    patterns = model.cover.minimal
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
    yield {"kind": "evidence", **shared, **_evidence(bench, items, setting)}


def _metrics(bench, setting, benign, plain, upper=None, slack=0.0) -> dict[str, Any]:
    """Clean and, where there are bounds, certified figures of one score table."""
    k, relevant = setting.k, bench.relevant
    each = {
        "P": precision_at_k(benign, relevant, k),
        "AP": average_precision(benign, relevant),
        "R": recall(benign, relevant, k),
        "no_attack": metrics.cert_asr(plain, benign, k),
    }
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
