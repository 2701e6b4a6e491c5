"""The strongest attack stays below its certificate, and is strong."""

import pytest
import torch
import torch.nn.functional as F

from pair.certified import CertifiedPurifier, DeltaCap, PatchFamily, upper_bound, with_plain
from pair.certified.challenge import challenge, pasted, places, worst_place
from pair.certified.covering import window_cover

from .tiny import SIZE, TOKEN, Encoder, cover, generator, images


def text(encoder):
    return F.normalize(encoder.encode_text(["accordion"]), dim=-1)[0]


@pytest.mark.parametrize("shape", [(7, 7), (5, 11)])
def test_places_agree_with_the_patterns(shape):
    found = window_cover(PatchFamily((shape,)), SIZE, TOKEN, 9)
    table = places(found, shape)
    assert table.shape == (SIZE - shape[0] + 1, SIZE - shape[1] + 1, len(found))
    rows = {tuple(r) for r in table.flatten(0, 1).tolist()}
    assert rows == {tuple(r) for r in found.patterns.tolist()}
    pixels = found.visible.view(-1, found.grid, found.grid)
    pixels = pixels.repeat_interleave(TOKEN, 1).repeat_interleave(TOKEN, 2)
    for top, left in ((0, 0), (9, 4), (SIZE - shape[0], SIZE - shape[1])):
        hidden = ~pixels[:, top : top + shape[0], left : left + shape[1]].flatten(1).any(1)
        assert torch.equal(table[top, left], hidden)


def test_the_worst_place_has_the_highest_bound():
    c = cover()
    scores = torch.rand(len(c) + 1, generator=torch.Generator().manual_seed(3))
    top, left, *_ = worst_place(c, scores)
    here = places(c, (7, 7))[top, left]
    bound = upper_bound(DeltaCap(0.0), scores, with_plain(c.minimal))
    assert float(scores[:-1][here].min()) == pytest.approx(float(bound))


def test_a_patch_changes_only_its_box():
    x = images(2)
    out = pasted(x, torch.full((3, 5, 6), 0.25), (3, 4, 5, 6))
    changed = (out != x).any(1).any(0).nonzero()
    assert changed.min(0).values.tolist() == [3, 4] and changed.max(0).values.tolist() == [7, 9]
    assert bool((out[..., 3:8, 4:10] == 0.25).all())


@pytest.mark.parametrize("delta", [0.0, 0.1])
@pytest.mark.parametrize("fill", ["window", "mean"])
def test_no_certificate_is_beaten(delta, fill):
    model, encoder = CertifiedPurifier(generator(), cover(9, 4), fill=fill), Encoder()
    x = images(3, seed=5)
    found = challenge(model, encoder, x, text(encoder), delta=delta, steps=12)
    assert found.violations == 0
    assert bool((found.reached >= found.start - 1e-6).all())  # the first contents are a candidate
    # Strong: at least half of what the bound leaves open is reached on some carrier.
    share = (found.reached - found.clean) / (found.ceiling - found.clean)
    assert float(share.max()) > 0.5
    # Only the box differs, and there the values are those of a file.
    for i, box in enumerate(found.boxes):
        top, left, h, w = box
        inside = found.images[i, :, top : top + h, left : left + w]
        assert torch.allclose(inside * 255, (inside * 255).round(), atol=1e-3)
        rest = torch.ones(SIZE, SIZE, dtype=torch.bool)
        rest[top : top + h, left : left + w] = False
        assert torch.equal(found.images[i][:, rest], x[i][:, rest])


def test_a_patch_beyond_the_family_is_not_bound():
    """Control: the same attack with windows that are too small for its patch does pass."""
    honest, encoder = CertifiedPurifier(generator(), cover(5, 16), fill="mean"), Encoder()
    x, query = images(1, seed=5), text(Encoder())
    with torch.no_grad():
        scores = honest.embed(encoder, x).scores(query[None])[0]
    ceiling = float(upper_bound(DeltaCap(0.0), scores, with_plain(honest.cover.minimal)))
    larger = CertifiedPurifier(generator(), cover(20, 4), fill="mean")
    found = challenge(larger, encoder, x, query, steps=15)
    with torch.no_grad():
        now = DeltaCap(0.0)(honest.embed(encoder, found.images).scores(query[None])[0])
    assert float(now) > ceiling
