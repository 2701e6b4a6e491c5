"""Covering masks: a few windows such that every patch of a family lies wholly inside one.

A patch is a rectangle of ``h x w`` pixels at any pixel offset with any content. A mask hides
whole tokens; ``Cov(L)`` is the set of masks that hide every token which region L touches. A set of
masks *covers* a family if ``Cov(L)`` is never empty. Assumption (A2) of the guarantee is exactly
that, and it is checked here by enumerating every pixel offset of every shape, borders included.

Masks follow the convention of :mod:`pair.masks`: True = visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PatchFamily:
    """What an attacker may replace: ``patches`` rectangles, each of one of the ``shapes``.

    Shapes are (height, width) in pixels of the image *as the purifier sees it*. Anything that
    fits inside such a rectangle (a circle, text, a smaller patch) belongs to the family as well.
    """

    shapes: tuple[tuple[int, int], ...]
    patches: int = 1

    def __post_init__(self) -> None:
        if not self.shapes or min(min(s) for s in self.shapes) < 1 or self.patches < 1:
            raise ValueError("a patch family needs shapes of at least 1 pixel and one patch")

    @classmethod
    def square(cls, side: int, patches: int = 1) -> PatchFamily:
        return cls(((side, side),), patches)

    @classmethod
    def share(cls, share: float, image_size: int, patches: int = 1) -> PatchFamily:
        """Squares whose side is ``share`` of the image side, rounded to pixels."""
        if not 0 < share < 1:
            raise ValueError(f"the patch's share of the side must lie between 0 and 1, got {share}")
        return cls.square(max(1, round(share * image_size)), patches)

    def __str__(self) -> str:
        shapes = " or ".join(f"{h} x {w} px" for h, w in self.shapes)
        return shapes if self.patches == 1 else f"{self.patches} patches of {shapes}"


def parse_family(text: str, image_size: int) -> PatchFamily:
    """A family from words: ``0.35``, ``39``, ``16x40,40x16``, ``0.14*2``.

    Sides below 1 are shares of the image's side, others pixels; ``HxW`` is a rectangle, commas
    join shapes, and ``*2`` allows two patches at once. Raises ``ValueError`` for anything else.
    """
    shapes, _, count = text.partition("*")
    try:
        family = PatchFamily(
            tuple(_sides(shape, image_size) for shape in shapes.split(",")),
            int(count) if count else 1,
        )
    except ValueError as error:
        raise ValueError(
            f"no patch family: {text!r}; write a side as a share (0.35) or in pixels (39), a "
            "rectangle as 16x40, several shapes with commas, two patches as 0.14*2"
        ) from error
    if max(map(max, family.shapes)) >= image_size:
        raise ValueError(f"a patch of {text} leaves nothing of a {image_size} px image")
    return family


def _sides(shape: str, image_size: int) -> tuple[int, int]:
    sides = [float(side) for side in shape.split("x")]
    pixels = [round(s * image_size) if 0 < s < 1 else s for s in sides]
    if len(pixels) > 2 or any(p != int(p) or p < 0 for p in pixels):
        raise ValueError(shape)
    height, width = (max(1, int(p)) if p else 0 for p in (pixels[0], pixels[-1]))
    return height, width


@dataclass(frozen=True, eq=False)
class Cover:
    """R masks ``visible`` (R, N) on a ``grid x grid`` of ``token``-pixel tokens, for ``family``."""

    grid: int
    token: int
    family: PatchFamily
    visible: Tensor

    def __len__(self) -> int:
        return len(self.visible)

    @property
    def image_size(self) -> int:
        return self.grid * self.token

    @property
    def hidden_share(self) -> float:
        """Largest share of tokens that one mask hides."""
        return 1 - float(self.visible.float().mean(1).min())

    @cached_property
    def patterns(self) -> Tensor:
        """The distinct sets Cov(L), as rows of a (P, R) boolean tensor."""
        return coverage_patterns(self)

    @cached_property
    def minimal(self) -> Tensor:
        """Inclusion-minimal rows of ``patterns``: the regions that matter to a worst case.

        A region with a larger Cov(L) leaves the attacker fewer views, so it is never worse.
        """
        p = self.patterns
        contains = (p[:, None] | ~p[None]).all(2)  # [i, j]: pattern i is a superset of j
        strict = contains & ~contains.T
        return p[~strict.any(1)]

    @property
    def multiplicity(self) -> int:
        """Smallest number of masks that hide any one region."""
        return int(self.patterns.sum(1).min())

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """(left, top, right, bottom) in pixels of what each mask hides (its bounding box)."""
        out = []
        for mask in ~self.visible.view(-1, self.grid, self.grid):
            rows, cols = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            t = self.token
            left, top = int(cols[0]) * t, int(rows[0]) * t
            out.append((left, top, int(cols[-1] + 1) * t, int(rows[-1] + 1) * t))
        return out


def span(pixels: int, token: int) -> int:
    """Most tokens that ``pixels`` consecutive pixels can touch along one axis."""
    return (pixels + token - 2) // token + 1


def axis_windows(grid: int, tokens: int, k: int) -> tuple[list[int], int]:
    """At most ``k`` window starts on one axis, and the window length, both in tokens.

    Every run of ``tokens`` tokens lies inside one window; the last window is moved back to the
    border (PatchCleanser's formula, on the token grid).
    """
    places = grid - tokens + 1
    if places < 2 or k < 2:
        raise ValueError(
            f"no useful windows: a patch that touches {tokens} of {grid} tokens per side needs "
            f"at least 2 windows per axis (got {k}) and a patch smaller than the image"
        )
    stride = ceil(places / k)
    length = tokens + stride - 1
    return [min(i * stride, grid - length) for i in range(ceil(places / stride))], length


def windows(grid: int, tokens: tuple[int, int], k: tuple[int, int]) -> Tensor:
    """Rectangular windows, ``k[0] x k[1]`` at most: visible masks (R, grid * grid)."""
    rows, height = axis_windows(grid, tokens[0], k[0])
    cols, width = axis_windows(grid, tokens[1], k[1])
    out = torch.ones(len(rows) * len(cols), grid, grid, dtype=torch.bool)
    for mask, (top, left) in zip(out, product(rows, cols), strict=True):
        mask[top : top + height, left : left + width] = False
    return out.flatten(1)


def cheapest_axes(grid: int, tokens: tuple[int, int], views: int) -> tuple[int, int]:
    """Windows per axis, at most ``views`` in all, that hide the least (ties: fewer views)."""
    options = []
    for rows, cols in product(range(2, grid + 1), repeat=2):
        top, height = axis_windows(grid, tokens[0], rows)
        left, width = axis_windows(grid, tokens[1], cols)
        if (count := len(top) * len(left)) <= views:
            options.append((height * width, count, (rows, cols)))
    if not options:
        raise ValueError(f"a covering set needs at least 4 views, got {views}")
    return min(options)[2]


def window_cover(
    family: PatchFamily,
    image_size: int = 112,
    token: int = 8,
    views: int = 9,
    k: int | tuple[int, int] | None = None,
) -> Cover:
    """A verified covering set of windows for ``family``.

    Each shape gets at most ``views`` windows, arranged so that they hide the least; ``k`` fixes
    the windows per axis instead. Windows that the other shapes make superfluous are dropped. For
    several patches the masks are all unions of as many windows.

    Raises ``ValueError`` if a patch is too large for the grid or no covering set exists.
    """
    grid = _grid(image_size, token)
    bases = []
    for shape in family.shapes:
        tokens = (span(shape[0], token), span(shape[1], token))
        if max(shape) > image_size or max(tokens) >= grid:
            raise ValueError(
                f"a patch of {shape[0]} x {shape[1]} px leaves nothing visible on a "
                f"{image_size} px image with {token} px tokens"
            )
        axes = (k, k) if isinstance(k, int) else k or cheapest_axes(grid, tokens, views)
        bases.append(windows(grid, tokens, axes))
    single = _prune(torch.cat(bases).unique(dim=0), PatchFamily(family.shapes), grid, token)
    # Combinations suffice: two patches in the same window are hidden by any union with it.
    take = min(family.patches, len(single))
    masks = torch.stack([single[list(c)].all(0) for c in combinations(range(len(single)), take)])
    if not bool(masks.any(1).all()):
        raise ValueError(f"hiding {family} leaves a view with nothing visible: use more views")
    return checked(Cover(grid, token, family, masks.unique(dim=0)))


def visible_blocks(
    family: PatchFamily, block: int, image_size: int = 112, token: int = 8, stride: int = 1
) -> Cover:
    """Views that *show* one ``block x block`` square of tokens, at every cyclic position.

    For two-sided rules (bit votes, medians): a patch touches only a minority of the blocks.
    """
    grid = _grid(image_size, token)
    masks = []
    for top, left in product(range(0, grid, stride), repeat=2):
        rows = (torch.arange(block) + top) % grid
        cols = (torch.arange(block) + left) % grid
        mask = torch.zeros(grid, grid, dtype=torch.bool)
        mask[rows[:, None], cols] = True
        masks.append(mask.flatten())
    return Cover(grid, token, family, torch.stack(masks))


def largest_block(family: PatchFamily, image_size: int = 112, token: int = 8) -> int:
    """Side in tokens of the largest blocks of which a patch touches fewer than half."""
    grid = _grid(image_size, token)
    height, width = (max(span(s[a], token) for s in family.shapes) for a in (0, 1))
    fits = [b for b in range(1, grid) if 2 * (height + b - 1) * (width + b - 1) < grid**2]
    if family.patches > 1 or not fits:
        raise ValueError(f"{family} touches half of all views: bit votes prove nothing about it")
    return fits[-1]


def coverage_patterns(cover: Cover) -> Tensor:
    """Every distinct Cov(L), L over all pixel offsets and shapes (and pairs, ... of patches).

    (P, R) boolean. Done on pixels, not by token arithmetic: the number of *visible* pixels in
    every placement of every rectangle is counted with a summed-area table.
    """
    g, t = cover.grid, cover.token
    pixels = cover.visible.view(-1, g, g).repeat_interleave(t, 1).repeat_interleave(t, 2)
    table = F.pad(pixels.to(torch.int32).cumsum(1).cumsum(2), (1, 0, 1, 0))
    found = []
    for h, w in cover.family.shapes:
        counts = table[:, h:, w:] - table[:, :-h, w:] - table[:, h:, :-w] + table[:, :-h, :-w]
        found.append((counts == 0).flatten(1).T.unique(dim=0))  # (places, R)
    single = torch.cat(found).unique(dim=0)
    patterns = single
    for _ in range(cover.family.patches - 1):
        patterns = (patterns[:, None] & single[None]).flatten(0, 1).unique(dim=0)
    return patterns


def verify_covering(cover: Cover) -> bool:
    """True if every admissible region is hidden completely by at least one mask."""
    return bool(cover.patterns.any(1).all())


def checked(cover: Cover) -> Cover:
    """The cover itself, or ``ValueError`` if it does not cover its family."""
    if not verify_covering(cover):
        raise ValueError(f"these {len(cover)} masks do not cover {cover.family}")
    return cover


def pair_masks(visible: Tensor) -> Tensor:
    """Masks that hide m_r and m_r' together: (R, N) -> (R, R, N), for the second round."""
    return visible[:, None] & visible[None]


def patch_after_resize(pixels: int, scale: float, support: float = 1.0) -> int:
    """Side that a patch of ``pixels`` in the original file can reach after resizing (A4).

    ``scale`` = new side / old side; ``support`` of the filter in output pixels when shrinking
    (bilinear 1, bicubic 2, Lanczos 3). Re-encoding as JPEG afterwards can add up to 30 more.
    """
    halo = support * max(1.0, scale)
    return ceil(scale * pixels) + ceil(2 * halo) + 1


def patch_before_resize(pixels: int, scale: float, support: float = 1.0) -> int:
    """Largest side in the original file that is still covered by a ``pixels`` certificate."""
    side = 0
    while patch_after_resize(side + 1, scale, support) <= pixels:
        side += 1
    return side


def _grid(image_size: int, token: int) -> int:
    if image_size % token:
        raise ValueError(f"image size {image_size} is not a multiple of token size {token}")
    return image_size // token


def _prune(visible: Tensor, family: PatchFamily, grid: int, token: int) -> Tensor:
    """Drop masks, widest first, that no region needs."""
    keep: Sequence[int] = list(range(len(visible)))
    if len(family.shapes) == 1:
        return visible  # the formula wastes nothing, and multiplicity is worth keeping
    patterns = Cover(grid, token, family, visible).patterns
    for r in (~visible).sum(1).argsort(descending=True).tolist():
        rest = [i for i in keep if i != r]
        if bool(patterns[:, rest].any(1).all()):
            keep = rest
    return visible[list(keep)]
