"""Contact sheets: rows of labelled pictures as one image, drawn with Pillow."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pair.images import to_pil

INK, SOFT, PAPER = "#1c1f23", "#626a73", "#ffffff"
COLOURS = {"relevant": "#1b7f4b", "advertisement": "#c2352b", "target": "#b26a00"}


@dataclass
class Tile:
    """One picture (3, H, W) in [0, 1] with a caption; ``kind`` picks the frame's colour."""

    image: Tensor
    caption: str = ""
    kind: str = ""


def sheet(rows: list[tuple[str, list[Tile]]], side: int = 112, gap: int = 10) -> Image.Image:
    """Rows of tiles under their titles, ``side`` pixels each, on white."""
    title, small = ImageFont.load_default(17), ImageFont.load_default(12)
    columns = max(len(tiles) for _, tiles in rows)
    frame, caption, head = 3, 18, 30
    cell = side + 2 * frame
    width = gap + columns * (cell + gap)
    height = gap + len(rows) * (head + cell + caption + gap)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    y = gap
    for text, tiles in rows:
        draw.text((gap, y), text, INK, title)
        y += head
        for i, tile in enumerate(tiles):
            x = gap + i * (cell + gap)
            colour = COLOURS.get(tile.kind)
            if colour:
                draw.rectangle((x, y, x + cell - 1, y + cell - 1), colour)
            picture = to_pil(tile.image).resize((side, side), Image.Resampling.LANCZOS)
            canvas.paste(picture, (x + frame, y + frame))
            line = _fit(draw, tile.caption, small, cell)
            draw.text((x + frame, y + cell + 2), line, colour or SOFT, small)
        y += cell + caption + gap
    return canvas


def _fit(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
