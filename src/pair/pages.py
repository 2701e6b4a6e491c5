"""Self-contained HTML pages: Jinja2 templates from ``assets/pages`` with embedded pictures."""

from __future__ import annotations

import base64
import io
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from pair import __version__
from pair.images import to_pil


def data_uri(image: Tensor, kind: str = "PNG") -> str:
    """(3, H, W) in [0, 1] -> ``data:`` address for an ``<img>``."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {}))
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{kind.lower()};base64,{text}"


def figure(value: float | None) -> str:
    """A percentage for a table cell; an en dash where there is none."""
    return "–" if value is None else f"{value:.1f}"


def render(template: str, **values: Any) -> str:
    """Fill ``assets/pages/<template>.html``; undefined names are errors."""
    loader = PackageLoader("pair", "assets/pages")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, loader=loader
    )
    environment.filters.update(
        png=lambda image: data_uri(image, "PNG"),
        jpeg=lambda image: data_uri(image, "JPEG"),
        figure=figure,
    )
    return environment.get_template(f"{template}.html").render(version=__version__, **values)
