"""The report of an audit: a ranked page with heat maps, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pair.files import write_atomic
from pair.guard.audit import HEURISTIC, PROVED, STATISTICS, Finding
from pair.guard.audit_run import Audit
from pair.images import ImageError, from_pil, load_image, resize, to_pil
from pair.pages import render

SIDE = 240  # of the pictures on the page
COLUMNS = ("rank", "uri", "alarm", "p", "one_window", *STATISTICS, "focus", "query", "score",
           "lowest", "left", "top", "right", "bottom")  # fmt: skip


def write(audit: Audit, settings: dict[str, Any], out: Path, *, shown: int = 50) -> list[Path]:
    """Write ``audit.json``, ``audit.csv`` and ``audit.html`` to ``out``."""
    record = {
        "pictures": len(audit.findings),
        "failed": audit.failed,
        "clean": len(audit.clean),
        "budget": audit.budget,
        "alarms": audit.alarms,
        "one_window": audit.one_window,
        "thresholds": {k: _number(v) for k, v in audit.thresholds.items()},
        "settings": settings,
        "note": f"{HEURISTIC} {PROVED}",
        "findings": [f.record() for f in audit.findings],
    }
    cards = [_card(audit, f, rank) for rank, f in enumerate(audit.findings[:shown], 1)]
    page = render(
        "audit",
        cards=cards,
        facts=record,
        thresholds=audit.thresholds,
        said=audit.said,
        powerless=audit.powerless,
        delta=settings["delta"],
        patch=settings["patch"],
        bank=len(settings["bank"]),
    )
    contents = {
        "audit.json": (json.dumps(record, indent=1) + "\n").encode(),
        "audit.csv": _csv(audit.findings).encode(),
        "audit.html": page.encode(),
    }
    for name, data in contents.items():
        write_atomic(out / name, data)
    return [out / name for name in contents]


def _csv(findings: list[Finding]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer)
    table.writerow(COLUMNS)
    for rank, f in enumerate(findings, 1):
        numbers = [f"{f.statistics[s]:.6f}" for s in (*STATISTICS, "focus")]
        ends = [f"{v:.4f}" for v in (f.score, f.lowest, *f.window)]
        yes = [int(f.alarm), f"{f.p:.6f}", int(f.one_window)]
        # A leading sign would be a formula to spreadsheet programs.
        uri = f"'{f.uri}" if f.uri[:1] in "=+-@" else f.uri
        table.writerow([rank, uri, *yes, *numbers, f.query, *ends])
    return buffer.getvalue()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _card(audit: Audit, finding: Finding, rank: int) -> dict[str, Any]:
    try:
        image = resize(load_image(audit.read(finding.uri))[None], SIDE)[0].clamp(0, 1)
    except (OSError, ImageError):
        image = torch.full((3, SIDE, SIDE), 0.85)
    strongest = min(finding.p_values, key=finding.p_values.__getitem__, default="")
    return {
        "rank": rank,
        "finding": finding,
        "name": "/".join(finding.uri.split("/")[-2:]),
        "image": image,
        "heat": draw_heat(image, finding),
        "strongest": strongest if finding.alarm else "",
    }


def draw_heat(image: Tensor, finding: Finding) -> Tensor:
    """The picture (3, S, S) in grey, redder where hiding costs more, the worst window outlined."""
    side = image.shape[-1]
    heat = torch.from_numpy(np.array(finding.heat, np.float32)).clamp(min=0)
    heat = heat / heat.max().clamp(min=1e-12)
    weight = resize(heat[None, None], side)[0].clamp(0, 1) * 0.75  # (1, S, S)
    grey = image.mean(0, keepdim=True).expand(3, -1, -1) * 0.8 + 0.1
    red = torch.tensor([0.90, 0.16, 0.10]).view(3, 1, 1)
    picture = to_pil(grey * (1 - weight) + red * weight)
    box = [v * (side - 1) for v in finding.window]
    drawing = ImageDraw.Draw(picture)
    drawing.rectangle(tuple(box), outline="white", width=4)
    drawing.rectangle(tuple(box), outline="#c2352b", width=2)
    return from_pil(picture)


def heat_png(image: Tensor, finding: Finding) -> bytes:
    """:func:`draw_heat` as a PNG file."""
    buffer = io.BytesIO()
    picture: Image.Image = to_pil(draw_heat(image, finding))
    picture.save(buffer, "PNG")
    return buffer.getvalue()
