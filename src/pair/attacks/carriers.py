"""What a patch looks like before it is optimised: carriers (contents) and shapes (masks).

A content is (3, h, w) in [0, 1]; a shape is a (h, w) mask, 1 where the patch covers the image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pair.images import from_pil, load_image, resize

ADVERTISEMENT = "https://example.org/advertisement"


def pixels(size: int | float, image_side: int) -> int:
    """A length in pixels: an int is pixels, a float in (0, 1] a share, ``int(share * side)``."""
    if isinstance(size, int):
        length = size
    elif 0.0 < size <= 1.0:
        length = int(size * image_side)
    else:
        raise ValueError(
            f"sizes (--size) are shares of the image's side, above 0 and at most 1: got {size}"
        )
    if length < 1:
        raise ValueError(
            f"a patch of size {size} (--size) has no pixel on an image of side {image_side}"
        )
    return length


def area_side(share: float, image_side: int) -> int:
    """Side of the square that covers ``share`` of the image (AdvHash: 5 % of 224 px is 50 px)."""
    return pixels(int((share * image_side**2) ** 0.5), image_side)


def grey(height: int, width: int, level: float = 0.5) -> Tensor:
    """One level of grey (3, h, w)."""
    return torch.full((3, height, width), float(level))


def noise(height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform noise (3, h, w) in [0, 1)."""
    return torch.rand(3, height, width, generator=generator)


def qr(content: str, side: int) -> Tensor:
    """A QR code (3, side, side), resized and binarised at 0.5 as TTH does (reference [14])."""
    import qrcode

    code = qrcode.QRCode(border=1, box_size=8)
    code.add_data(content)
    code.make(fit=True)
    picture = from_pil(code.make_image().get_image())
    return (resize(picture[None], side)[0] > 0.5).float()


def text(
    words: str,
    height: int,
    width: int,
    *,
    ink: float | tuple[float, float, float] = 0.0,
    paper: float | tuple[float, float, float] = 1.0,
    scale: float = 1.0,
    stroke: int = 0,
) -> Tensor:
    """``words`` drawn as large as fits, times ``scale`` (0-1], one line per word (3, h, w)."""
    from PIL import Image, ImageDraw, ImageFont

    lines = words.split() or [""]
    body = "\n".join(lines)

    def box(size: float) -> tuple[float, float, float, float]:
        draw = ImageDraw.Draw(Image.new("L", (1, 1)))
        font = ImageFont.load_default(size)
        return draw.multiline_textbbox((0, 0), body, font, stroke_width=stroke, align="center")

    low, high = 1.0, float(height + width)
    for _ in range(12):  # bisection for the largest fitting font
        size = (low + high) / 2
        left, top, right, bottom = box(size)
        fits = right - left <= width and bottom - top <= height
        low, high = (size, high) if fits else (low, size)
    size = max(1.0, low * scale)
    left, top, right, bottom = box(size)
    picture = Image.new("L", (width, height), 0)
    at = ((width - right - left) / 2, (height - bottom - top) / 2)
    ImageDraw.Draw(picture).multiline_text(
        at, body, 255, ImageFont.load_default(size), stroke_width=stroke, align="center"
    )
    cover = from_pil(picture)  # 1 where there is ink
    return cover * _colour(ink) + (1 - cover) * _colour(paper)


def logo(side: int) -> Tensor:
    """A made-up trade mark: a ring with a bar on a coloured ground (3, side, side)."""
    from PIL import Image, ImageDraw

    big = 4 * side  # drawn large, then reduced, for smooth edges
    picture = Image.new("RGB", (big, big), (250, 200, 30))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((big * 0.1, big * 0.1, big * 0.9, big * 0.9), (200, 30, 40))
    draw.ellipse((big * 0.28, big * 0.28, big * 0.72, big * 0.72), (250, 250, 250))
    draw.rectangle((big * 0.05, big * 0.43, big * 0.95, big * 0.57), (25, 40, 120))
    return resize(from_pil(picture)[None], side)[0].clamp(0, 1)


def photo(source: str | os.PathLike[str] | Tensor, height: int, width: int) -> Tensor:
    """A picture file, or an image (3, H, W), squeezed into (3, height, width)."""
    image = source if isinstance(source, Tensor) else load_image(source)
    return resize(image[None], (height, width))[0].clamp(0, 1)


def carrier(name: str, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """A content by name: qr[:text], text:<words>, noise, grey, logo, or a picture file."""
    kind, _, rest = name.partition(":")
    if kind == "qr":
        return photo(qr(rest or ADVERTISEMENT, max(height, width)), height, width)
    if kind == "text" and rest:
        return text(rest, height, width)
    if name == "noise":
        return noise(height, width, generator)
    if name == "grey":
        return grey(height, width)
    if name == "logo":
        return photo(logo(max(height, width)), height, width)
    if os.path.isfile(name):
        return photo(name, height, width)
    raise ValueError(
        f"no carrier {name!r}: use qr[:text], text:<words>, noise, grey, logo or a picture file"
    )


def rectangle(height: int, width: int) -> Tensor:
    """Everything covered: (h, w) of ones."""
    return torch.ones(height, width)


def circle(diameter: int) -> Tensor:
    """A disc (d, d): pixels whose centre lies within the radius."""
    at = torch.arange(diameter) + 0.5 - diameter / 2
    return ((at[:, None] ** 2 + at[None, :] ** 2) <= (diameter / 2) ** 2).float()


def frame(height: int, width: int, border: int) -> Tensor:
    """A border of ``border`` pixels around a free middle (h, w)."""
    if not 0 < 2 * border < min(height, width):
        raise ValueError(f"a border of {border} leaves no middle in {height} x {width}")
    mask = torch.ones(height, width)
    mask[border : height - border, border : width - border] = 0
    return mask


def several(height: int, width: int, side: int, corners: Sequence[tuple[int, int]]) -> Tensor:
    """Squares of ``side`` with their top-left pixels at ``corners`` in one (h, w) mask."""
    mask = torch.zeros(height, width)
    for top, left in corners:
        if not (0 <= top <= height - side and 0 <= left <= width - side):
            raise ValueError(
                f"a square of side {side} at ({top}, {left}) leaves {height} x {width}"
            )
        mask[top : top + side, left : left + side] = 1
    return mask


def _colour(value: float | tuple[float, float, float]) -> Tensor:
    return torch.tensor(value if isinstance(value, tuple) else (value,) * 3).view(3, 1, 1)
