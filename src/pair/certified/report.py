"""What a certificate says about one image and one query, in words, numbers and a picture.

Corollary 2b, the run-time meaning: no clean image is needed. If the lowest view score of a
received image is at least tau, then for *every* window of the declared size there is a
reconstruction made only from pixels outside it that scores at least tau: no single patch of
that size is responsible for the hit. Otherwise the lowest view names the window it hangs on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pair.certified.covering import Cover, patch_before_resize
from pair.certified.purifier import CertifiedPurifier
from pair.images import resize, resize_crop, to_pil
from pair.retrieval.encoders import ImageEncoder

HEAD = 24  # pixels of a title's line
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Certificate:
    """One image, one query, one patch family.

    ``patch`` is the largest side that is certified, in pixels of the image as the model sees it
    (``size`` x ``size``); ``patch_in_file`` the side in the original file after allowing for
    the resize (A4). ``window`` is the window whose removal costs most, in pixels of the file.
    ``clear``: no single patch is responsible (with ``patches`` > 1: no so many together; the
    window is then the smallest box around the windows of that view).
    """

    patch: int
    patch_in_file: int
    size: int
    views: int
    plain: float
    lowest: float
    threshold: float
    hit: bool
    clear: bool
    window: Box
    view: int
    patches: int = 1

    @property
    def drop(self) -> float:
        """Evidence that hangs on one window, s_plain - s_min."""
        return self.plain - self.lowest

    def sentence(self) -> str:
        """The certificate in words."""
        px = f"{self.patch} px (of {self.size})"
        single = "single patch" if self.patches == 1 else f"{self.patches} patches"
        are = "is" if self.patches == 1 else "are"
        scores = f"score {self.plain:.3f}, without any one window at least {self.lowest:.3f}"
        left, top, right, bottom = self.window
        where = f"columns {left}-{right}, rows {top}-{bottom}"
        if not self.hit:
            return f"no hit: score {self.plain:.3f} is below the threshold {self.threshold:.3f}"
        if self.clear:
            return f"no {single} up to {px} {are} responsible for this hit ({scores})"
        return (
            f"the hit depends on one window ({where}): without it the score falls from "
            f"{self.plain:.3f} to {self.lowest:.3f}, below {self.threshold:.3f}"
        )

    def record(self) -> dict:
        """Plain numbers for JSON."""
        return {**asdict(self), "drop": self.drop, "certificate": self.sentence()}


@torch.no_grad()
def certify(
    purifiers: Sequence[CertifiedPurifier],
    encoder: ImageEncoder,
    image: Tensor,
    query: Tensor,
    *,
    delta: float = 0.2,
    threshold: float | None = None,
    slack: float = 1e-5,
) -> list[Certificate]:
    """Certificates of an image (3, H, W) for a unit query (d,), one per purifier (patch size).

    The centre crop that the purifier sees is what is certified. With ``threshold`` the hit must
    keep that score without any one window; otherwise it may lose at most ``delta``, the alarm
    rule of Theorem 10 (a score below ``delta`` is then no hit). ``slack`` is the numerical
    allowance (A3).
    """
    out = []
    for purifier in purifiers:
        x = resize_crop(image[None], purifier.image_size).clamp(0, 1)
        scores = purifier.embed(encoder, x).scores(query[None])[0, 0]  # (R + 1,)
        height, width = image.shape[-2:]
        out.append(
            judge(scores, purifier.cover, (height, width), delta, threshold=threshold, slack=slack)
        )
    return out


def judge(
    scores: Tensor,
    cover: Cover,
    shape: tuple[int, int],
    delta: float = 0.2,
    *,
    threshold: float | None = None,
    slack: float = 1e-5,
    whole: bool = False,
) -> Certificate:
    """The certificate that view scores (R + 1,), the plain view last, give to a hit.

    ``shape`` is (height, width) of the file; ``delta``, ``threshold`` and ``slack`` as in
    :func:`certify`. ``whole``: the picture was squeezed into the square, not cut to it.
    """
    size = cover.image_size
    lowest, view = scores[:-1].min(0)
    plain = float(scores[-1])
    bar = threshold
    if bar is None:  # a score that one window may carry alone is no hit worth a certificate
        bar = plain - delta if plain > delta else delta
    scale = size / min(shape)  # the larger of the two where the picture is squeezed
    # Every square up to the short side of some shape fits inside that shape.
    patch = max(min(sides) for sides in cover.family.shapes)
    return Certificate(
        patch=patch,
        patch_in_file=patch if scale == 1 else patch_before_resize(patch, scale),
        size=size,
        views=len(cover),
        plain=plain,
        lowest=float(lowest),
        threshold=bar,
        hit=plain >= bar,
        clear=float(lowest) - slack >= bar,
        window=_in_file(cover.boxes()[int(view)], shape, size, whole),
        view=int(view),
        patches=cover.family.patches,
    )


def summary(certificates: Sequence[Certificate]) -> Certificate:
    """The most telling one: the largest clear patch, or the smallest window it depends on."""
    ordered = sorted(certificates, key=lambda c: c.patch)
    clear = 0
    while clear < len(ordered) and ordered[clear].clear:
        clear += 1
    return ordered[clear - 1] if clear else ordered[0]


@torch.no_grad()
def picture(
    image: Tensor,
    certificate: Certificate,
    purifier: CertifiedPurifier,
    side: int = 224,
    whole: bool = False,
    title: str = "",
) -> Image.Image:
    """The image with the decisive window outlined, beside the view without that window.

    ``title`` stands above: which picture this is.
    """
    size = purifier.image_size
    seen = (resize if whole else resize_crop)(image[None], size).clamp(0, 1)
    view = purifier.render(seen, purifier.cover.visible[certificate.view][None])
    tiles = [to_pil(resize(t, side).clamp(0, 1)[0]) for t in (seen, view)]
    colour = (24, 140, 64) if certificate.clear else (200, 30, 30)
    y = 8 + HEAD * bool(title)
    sheet = Image.new("RGB", (2 * side + 24, y + side + 36), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (8 + i * (side + 8), y))
    draw = ImageDraw.Draw(sheet)
    _write(draw, title, 15, sheet.width)
    left, top, right, bottom = (v * side / size for v in purifier.cover.boxes()[certificate.view])
    ends = (8 + left, y + top, 7 + right, y - 1 + bottom)
    draw.rectangle(ends, outline=colour, width=3)
    what = "single patch" if certificate.patches == 1 else f"{certificate.patches} patches"
    verdict = (
        f"no {what} up to {certificate.patch}/{certificate.size} px responsible"
        if certificate.clear
        else "the hit depends on the outlined window"
        if certificate.hit
        else "no hit"
    )
    small = ImageFont.load_default(12)
    draw.text((8, y + side + 2), verdict, colour, small)
    line = f"score {certificate.plain:.3f}, without the window {certificate.lowest:.3f}"
    draw.text((8, y + side + 17), line, "black", small)
    return sheet


def stack(sheets: Sequence[Image.Image], title: str = "") -> Image.Image:
    """Sheets below each other, and below a ``title``."""
    width = max(s.width for s in sheets)
    y = HEAD * bool(title)
    out = Image.new("RGB", (width, y + sum(s.height for s in sheets)), "white")
    _write(ImageDraw.Draw(out), title, 17, width)
    for sheet in sheets:
        out.paste(sheet, (0, y))
        y += sheet.height
    return out


def _write(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> None:
    """A line at the top left, cut at its end where it is too long."""
    font = ImageFont.load_default(size)
    whole = text = "".join(c if c.isprintable() else "?" for c in text)
    while text and draw.textlength(whole, font) > width - 16:
        text = text[:-1]
        whole = text + "…"
    draw.text((8, 6), whole, "black", font)


def _in_file(box: Box, shape: tuple[int, int], size: int, whole: bool = False) -> Box:
    """A box of the resized centre crop in pixels of the original, ``shape`` (height, width)."""
    h, w = shape
    scale = size / min(h, w)
    new_h, new_w = max(size, round(h * scale)), max(size, round(w * scale))
    if whole:
        new_h = new_w = size
    top, left = (new_h - size) // 2, (new_w - size) // 2
    x0, y0, x1, y1 = box
    sx, sy = w / new_w, h / new_h
    ends = ((x0 + left) * sx, (y0 + top) * sy, (x1 + left) * sx, (y1 + top) * sy)
    return (int(ends[0]), int(ends[1]), min(w, -int(-ends[2] // 1)), min(h, -int(-ends[3] // 1)))
