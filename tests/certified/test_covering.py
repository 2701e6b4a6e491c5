"""Covering sets: the table of window counts, and coverage by brute force over pixels."""

import pytest
import torch
import torch.nn.functional as F

from pair.certified.covering import (
    Cover,
    PatchFamily,
    axis_windows,
    checked,
    pair_masks,
    patch_after_resize,
    patch_before_resize,
    span,
    verify_covering,
    visible_blocks,
    window_cover,
)

# side: (tokens, (views, hidden %) for k = 2, 3, 4, 6 windows per axis), 224 px, 16 px tokens
SQUARES = {
    32: (3, [(4, 33), (9, 18), (16, 13), (36, 8)]),
    49: (4, [(4, 41), (9, 25), (16, 18), (36, 13)]),
    64: (5, [(4, 41), (9, 33), (16, 25), (25, 18)]),
    80: (6, [(4, 51), (9, 33), (9, 33), (25, 25)]),
    90: (7, [(4, 51), (9, 41), (16, 33), (16, 33)]),
    112: (8, [(4, 62), (9, 51), (16, 41), (16, 41)]),
}
TABLE = [
    (side, k, *cell)
    for side, (_, row) in SQUARES.items()
    for k, cell in zip((2, 3, 4, 6), row, strict=True)
]


def placements(cover: Cover) -> list[torch.Tensor]:
    """Per shape (R, places): does the mask hide all pixels? Not by the summed-area table."""
    g, t = cover.grid, cover.token
    shown = cover.visible.view(-1, g, g).repeat_interleave(t, 1).repeat_interleave(t, 2).float()
    found = []
    for h, w in cover.family.shapes:
        any_visible = F.max_pool2d(F.max_pool2d(shown, (h, 1), 1), (1, w), 1)
        found.append(any_visible.flatten(1) == 0)
    return found


def covered_everywhere(cover: Cover) -> bool:
    return all(bool(p.any(0).all()) for p in placements(cover))


def brute_force(cover: Cover) -> set[tuple[bool, ...]]:
    return {tuple(row) for p in placements(cover) for row in p.T.tolist()}


@pytest.mark.parametrize(("side", "k", "views", "hidden"), TABLE)
def test_table_of_squares(side, k, views, hidden):
    cover = window_cover(PatchFamily.square(side), 224, 16, k=k)
    assert len(cover) == views
    assert round(100 * cover.hidden_share) == hidden
    assert covered_everywhere(cover)


@pytest.mark.parametrize(
    ("k", "views", "hidden"), [((2, 2), 4, 55), ((3, 2), 6, 43), ((4, 2), 8, 37)]
)
def test_table_of_bars(k, views, hidden):
    cover = window_cover(PatchFamily(((40, 160),)), 224, 16, k=k)
    assert (len(cover), round(100 * cover.hidden_share)) == (views, hidden)
    assert covered_everywhere(cover)


@pytest.mark.parametrize(
    ("side", "k", "hidden"), [(32, 3, 37), (32, 4, 26), (49, 3, 50), (49, 4, 37), (80, 3, 63),
                              (80, 6, 50), (80, 2, 84), (112, 4, 74)]
)  # fmt: skip
def test_two_windows_together(side, k, hidden):
    cover = window_cover(PatchFamily.square(side), 224, 16, k=k)
    assert round(100 * (1 - float(pair_masks(cover.visible).float().mean(-1).min()))) == hidden


def test_span_counts_tokens_at_the_worst_offset():
    for pixels in range(1, 60):
        worst = max((o + pixels - 1) // 8 - o // 8 + 1 for o in range(8))
        assert span(pixels, 8) == worst
    assert [span(p, 16) for p in SQUARES] == [t for t, _ in SQUARES.values()]


@pytest.mark.parametrize(("grid", "tokens", "k"), [(g, t, k) for g in (6, 14) for t in range(1, g)
                                                   for k in (2, 3, 5)])  # fmt: skip
def test_axis_windows_hold_every_run(grid, tokens, k):
    starts, length = axis_windows(grid, tokens, k)
    assert len(starts) <= k
    assert starts[-1] + length == grid
    for first in range(grid - tokens + 1):
        assert any(s <= first and first + tokens <= s + length for s in starts)


@pytest.mark.parametrize(
    "family",
    [
        PatchFamily.square(7),
        PatchFamily(((5, 5),)),
        PatchFamily(((9, 9), (4, 16), (16, 4))),
        PatchFamily(((1, 1),)),
    ],
)
def test_patterns_equal_brute_force(family):
    cover = window_cover(family, 32, 4, views=9)
    assert {tuple(p) for p in cover.patterns.tolist()} == brute_force(cover)
    assert verify_covering(cover)


def test_border_placements_have_a_single_cover():
    # The regions in the corners lie in one window only, however much windows overlap inside.
    cover = window_cover(PatchFamily.square(7), 32, 4, k=3)
    assert cover.multiplicity == 1


def test_minimal_patterns_contain_no_other():
    cover = window_cover(PatchFamily.square(7), 32, 4, views=9)
    minimal = [set(p.nonzero()[:, 0].tolist()) for p in cover.minimal]
    every = [set(p.nonzero()[:, 0].tolist()) for p in cover.patterns]
    assert not any(a < b for a in minimal for b in minimal)
    assert all(any(m <= e for m in minimal) for e in every)


def test_unions_of_shapes_drop_windows_that_are_not_needed():
    shapes = ((8, 8), (4, 20))
    cover = window_cover(PatchFamily(shapes), 32, 4, views=9)
    apart = sum(len(window_cover(PatchFamily((s,)), 32, 4, views=9)) for s in shapes)
    assert len(cover) < apart
    assert covered_everywhere(cover)


def test_two_patches_are_covered_in_every_pair_of_places():
    cover = window_cover(PatchFamily.square(4, patches=2), 32, 4, views=9)
    g, t = cover.grid, cover.token
    hidden = ~cover.visible.view(-1, g, g).repeat_interleave(t, 1).repeat_interleave(t, 2)
    places = hidden.float().unfold(1, 4, 1).unfold(2, 4, 1).amin((3, 4)).flatten(1).T  # (L, R)
    assert bool(((places @ places.T) > 0).all())
    assert bool(cover.visible.any(1).all())


def test_a_missing_window_is_noticed():
    cover = window_cover(PatchFamily.square(7), 32, 4, views=9)
    holed = Cover(cover.grid, cover.token, cover.family, cover.visible[1:])
    assert not verify_covering(holed)
    with pytest.raises(ValueError, match="do not cover"):
        checked(holed)


def test_views_are_spent_where_they_hide_least():
    family = PatchFamily.square(39)
    shares = [window_cover(family, 112, 8, r).hidden_share for r in (4, 9, 16, 36)]
    assert shares == sorted(shares, reverse=True)
    for r in (4, 9, 16, 36):
        assert len(window_cover(family, 112, 8, r)) <= r


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: window_cover(PatchFamily.square(40), 32, 4), "leaves nothing visible"),
        (lambda: window_cover(PatchFamily.square(30), 32, 4), "leaves nothing visible"),
        (lambda: window_cover(PatchFamily.square(7), 30, 4), "not a multiple"),
        (lambda: window_cover(PatchFamily.square(7), 32, 4, views=3), "at least 4 views"),
        (lambda: window_cover(PatchFamily.square(7), 32, 4, k=1), "at least 2 windows"),
        (lambda: PatchFamily(()), "shapes"),
        (lambda: PatchFamily.share(1.5, 32), "between 0 and 1"),
    ],
)
def test_bad_families_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_visible_blocks_wrap_around_and_show_a_minority():
    cover = visible_blocks(PatchFamily.square(8), 3, 32, 4)
    assert len(cover) == 64
    assert bool((cover.visible.sum(1) == 9).all())
    touched = (~cover.patterns).sum(1).max()
    assert int(touched) == (3 + 3 - 1) ** 2  # ((t + v - 1) / g)^2 of the views


@pytest.mark.parametrize("scale", [0.1, 0.35, 0.5, 0.9])
def test_resize_halo_bounds_what_a_patch_can_touch(scale):
    from pair.images import resize

    old, new, side = 80, round(80 * scale), 13
    seeded = torch.Generator().manual_seed(0)
    for top, left in ((0, 0), (17, 40), (31, 5), (67, 67)):
        x = torch.rand(1, 3, old, old, generator=seeded)
        y = x.clone()
        y[..., top : top + side, left : left + side] = torch.rand(3, side, side, generator=seeded)
        changed = (resize(x, new) != resize(y, new)).any(1)[0]
        reach = patch_after_resize(side, new / old)
        assert int(changed.any(1).sum()) <= reach
        assert int(changed.any(0).sum()) <= reach


def test_patch_before_resize_inverts_the_halo():
    for scale in (0.2, 0.7, 1.5):
        side = patch_before_resize(39, scale)
        assert patch_after_resize(side, scale) <= 39 < patch_after_resize(side + 1, scale)
