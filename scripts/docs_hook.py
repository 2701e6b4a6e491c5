"""mkdocs hook: command reference, model cards and presets come from where they are true.

Pages only mark the place.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent.parent / "src" / "pair" / "assets" / "models"


def commands() -> str:
    """Every subcommand with its arguments, options and defaults."""
    import typer.main
    from typer.cli import get_docs_for_click

    from pair.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="pair")
    return text[text.index("## `pair ") :]


def cards() -> str:
    """The card of every shipped model, its headings two levels down (the lower ones are too
    many for the table of contents)."""
    texts = [path.read_text() for path in sorted(MODELS.glob("*/README.md"))]
    return "\n".join(re.sub(r"^#", "###", text, flags=re.M) for text in texts)


def presets() -> str:
    """What each preset of the two patch attacks changes."""
    from pair.attacks.advhash import PRESETS as ADVHASH
    from pair.attacks.tth import PRESETS as TTH

    def settings(values: dict[str, Any]) -> str:
        return ", ".join(f"`{key}={value!r}`" for key, value in values.items())

    lines = ["| preset | TTH | AdvHash |", "|---|---|---|"]
    for name in TTH:
        lines.append(f"| `{name}` | {settings(TTH[name])} | {settings(ADVHASH[name])} |")
    return "\n".join(lines)


MARKS = {
    "<!-- commands -->": commands,
    "<!-- model cards -->": cards,
    "<!-- attack presets -->": presets,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    for mark, render in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, render())
    return markdown
