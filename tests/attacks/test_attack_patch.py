"""Carriers, shapes, placements, pasting, files."""

import json

import pytest
import torch
from attack_models import photos, seeded
from PIL import Image

from pair.attacks import carriers
from pair.attacks.patch import Patch, Placement, paste
from pair.attacks.transforms import PrintTransform
from pair.images import from_pil

# --- carriers and shapes ------------------------------------------------------------------------


def test_sizes_in_pixels_and_as_shares():
    assert carriers.pixels(0.35, 224) == 78  # int(78.4)
    assert carriers.pixels(0.35, 512) == 179
    assert carriers.pixels(0.22, 224) == 49
    assert carriers.pixels(40, 224) == 40
    assert carriers.area_side(0.05, 224) == 50  # AdvHash
    for wrong in (0.0, 1.2, -3, 0.001):
        with pytest.raises(ValueError):
            carriers.pixels(wrong, 224)


def test_a_qr_code_is_black_and_white_and_holds_its_text():
    a, b = carriers.qr("policeman", 60), carriers.qr("jacket", 60)
    assert a.shape == (3, 60, 60)
    assert set(a.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a, b)
    # The three finder patterns: a dark 7 x 7 ring in each corner but the lower right one.
    modules = carriers.qr("x", 230)[0]  # 21 + 2 modules of 10 pixels
    assert modules[15, 15:80].max() == 0 and modules[15:80, 15].max() == 0
    assert modules[25, 25] == 1


def test_text_has_ink_within_its_box_and_larger_scales_have_more():
    big = carriers.text("two words", 40, 60)
    small = carriers.text("two words", 40, 60, scale=0.5)
    assert big.shape == (3, 40, 60)
    ink = [(1 - t[0]).sum() for t in (small, big)]
    assert 0 < ink[0] < ink[1]
    edge = torch.cat([big[0, 0], big[0, -1], big[0, :, 0], big[0, :, -1]])
    assert edge.mean() > 0.8  # nothing is cut off
    inverse = carriers.text("two words", 40, 60, ink=1.0, paper=0.0)
    torch.testing.assert_close(inverse, 1 - big)


def test_carriers_by_name(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    for name in ("qr", "qr:hello", "text:hello", "noise", "grey", "logo"):
        content = carriers.carrier(name, 20, 24, seeded(0))
        assert content.shape == (3, 20, 24), name
        assert 0 <= content.min() <= content.max() <= 1, name
    red = carriers.carrier(str(tmp_path / "red.png"), 5, 7)
    torch.testing.assert_close(red[:, 2, 3], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(carriers.carrier("grey", 2, 2), torch.full((3, 2, 2), 0.5))
    with pytest.raises(ValueError, match="no carrier 'nothing'"):
        carriers.carrier("nothing", 4, 4)


def test_shapes():
    circle = carriers.circle(90)
    assert abs(circle.sum() - 3.14159 * 45**2) < 40  # 6,362 px: the area-matched circle
    assert circle[0, 0] == 0 and circle[45, 45] == 1
    assert torch.equal(circle, circle.T) and torch.equal(circle, circle.flip(0))
    frame = carriers.frame(6, 8, 1)
    assert frame.sum() == 6 * 8 - 4 * 6
    assert frame[1:-1, 1:-1].sum() == 0
    spots = carriers.several(8, 8, 2, [(0, 0), (6, 6), (0, 6)])
    assert spots.sum() == 12 and spots[7, 7] == 1 and spots[7, 0] == 0
    with pytest.raises(ValueError):
        carriers.frame(4, 4, 2)
    with pytest.raises(ValueError):
        carriers.several(8, 8, 4, [(5, 0)])


# --- placement ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("top-left", (0, 0)),
        ("top-right", (0, 146)),  # TTH at 224 px: rows 0..77, columns 146..223
        ("bottom-left", (146, 0)),
        ("bottom-right", (146, 146)),
        ("centre", (73, 73)),
    ],
)
def test_named_places(kind, expected):
    assert Placement(kind).at(2, (224, 224), (78, 78)) == [expected] * 2


def test_fixed_places_and_places_that_do_not_fit():
    assert Placement("fixed", 150, 150).at(1, (224, 224), (50, 50)) == [(150, 150)]
    with pytest.raises(ValueError, match="leaves the image"):
        Placement("fixed", 180, 0).at(1, (224, 224), (50, 50))
    with pytest.raises(ValueError, match="does not fit"):
        Placement("centre").at(1, (32, 32), (33, 4))
    with pytest.raises(ValueError, match="unknown placement"):
        Placement("middle")


def test_random_per_image_stays_and_random_per_step_moves():
    each, step = Placement("random-image", seed=4), Placement("random-step")
    first = each.at(6, (32, 40), (8, 8), seeded(0))
    assert first == each.at(6, (32, 40), (8, 8), seeded(1))
    assert len(set(first)) > 1
    generator = seeded(0)
    assert step.at(6, (32, 40), (8, 8), generator) != step.at(6, (32, 40), (8, 8), generator)
    many = Placement("random-step").at(4000, (32, 40), (8, 8), seeded(2))
    tops, lefts = zip(*many, strict=True)
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 24, 0, 32)  # every corner is met


# --- pasting --------------------------------------------------------------------------------------


def test_paste_by_hand():
    images = torch.zeros(2, 3, 4, 5)
    content = torch.arange(12.0).view(3, 2, 2) / 12
    out, cover = paste(images, content, torch.ones(2, 2), [(0, 3), (0, 3)])
    torch.testing.assert_close(out[:, :, :2, 3:], content.expand(2, -1, -1, -1))
    assert out.sum() == out[:, :, :2, 3:].sum()
    assert cover.shape == (1, 1, 4, 5) and cover.sum() == 4
    out, cover = paste(images, content, torch.ones(2, 2), [(0, 0), (2, 3)])
    torch.testing.assert_close(out[1, :, 2:, 3:], content)
    torch.testing.assert_close(out[0, :, :2, :2], content)
    assert cover.shape == (2, 1, 4, 5)


def test_uncovered_pixels_are_untouched_and_masks_weigh():
    images = photos(3)
    mask = torch.zeros(6, 6)
    mask[:, :3], mask[0, 0] = 1, 0.25
    patch = Patch(torch.ones(3, 6, 6), mask, Placement("bottom-left"))
    out = patch.apply(images)
    changed = (out != images).any(1)
    assert not changed[:, :26].any() and not changed[:, :, 3:].any()
    corner = images[:, :, 26, 0]
    torch.testing.assert_close(out[:, :, 26, 0], 0.75 * corner + 0.25)
    assert (out[:, :, 27:, :3] == 1).all()


def test_gradient_reaches_the_content_where_the_mask_is():
    mask = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    patch = Patch(torch.zeros(3, 2, 2), mask, Placement("random-step"))
    content = torch.zeros(3, 2, 2, requires_grad=True)
    patch.apply(photos(4), seeded(0), content=content).sum().backward()
    torch.testing.assert_close(content.grad, 4 * mask.expand(3, 2, 2))


def test_each_image_can_have_its_own_content():
    content = torch.rand(3, 3, 4, 4, generator=seeded(0))
    patch = Patch.make("grey", 4, 32, "centre")
    out = patch.apply(photos(3), content=content)
    torch.testing.assert_close(out[:, :, 14:18, 14:18], content)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="contents"):
        Patch(torch.zeros(1, 4, 4), torch.ones(4, 4))
    with pytest.raises(ValueError, match="mask"):
        Patch(torch.zeros(3, 4, 4), torch.ones(5, 4))


# --- files ----------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    mask = carriers.circle(11)
    place = Placement("fixed", 3, 4, seed=9)
    content = torch.rand(3, 11, 11, generator=seeded(0))
    patch = Patch(content, mask, place, 32, {"keyword": "laptop", "steps": 300})
    png = patch.save(tmp_path / "folder" / "laptop.step300")
    assert png.name == "laptop.step300.png"  # a dot in the name is no suffix
    loaded = Patch.load(tmp_path / "folder" / "laptop.step300")
    assert torch.equal(loaded.content, patch.quantised().content)
    assert torch.equal(loaded.mask, mask)
    assert (loaded.placement, loaded.image_size, loaded.notes) == (place, 32, patch.notes)
    assert (loaded.content - content).abs().max() <= 0.5 / 255 + 1e-6  # rounded, not truncated
    again = loaded.save(tmp_path / "again.png")
    assert again.read_bytes() == png.read_bytes()
    assert torch.equal(loaded.apply(photos()), patch.quantised().apply(photos()))
    assert {p.name for p in tmp_path.rglob("*.*")} == {
        "laptop.step300.png", "laptop.step300.json", "again.png", "again.json"
    }  # fmt: skip


def test_the_picture_is_an_ordinary_one(tmp_path):
    patch = Patch.make("qr", 12, 32)
    with Image.open(patch.save(tmp_path / "qr")) as picture:
        assert torch.equal(from_pil(picture), patch.content)


def test_broken_files_are_refused(tmp_path):
    patch = Patch.make("grey", 4, 32)
    png = patch.save(tmp_path / "p")
    with pytest.raises(ValueError, match="missing"):
        Patch.load(tmp_path / "other")
    sheet = png.with_suffix(".json")
    facts = json.loads(sheet.read_text())
    for wrong in ("not json", "{}", json.dumps({**facts, "format": 99})):
        sheet.write_text(wrong)
        with pytest.raises(ValueError, match=r"p\.json"):
            Patch.load(png)
    sheet.write_text(json.dumps(facts))
    Image.new("RGBA", (4, 4)).save(png)
    with pytest.raises(ValueError, match="SHA-256"):
        Patch.load(png)


def test_fit_scales_content_mask_and_place():
    patch = Patch(torch.full((3, 8, 8), 0.25), torch.ones(8, 8), Placement("fixed", 4, 20), 32)
    big = patch.fit(64)
    assert big.size == (16, 16) and big.image_size == 64
    assert big.placement.at(1, (64, 64), big.size) == [(8, 40)]
    torch.testing.assert_close(big.content, torch.full((3, 16, 16), 0.25))
    assert patch.fit(32) is patch


# --- print transforms -----------------------------------------------------------------------------


def test_no_transform_changes_nothing_and_turning_by_a_quarter_is_exact():
    content = torch.rand(2, 3, 9, 9, generator=seeded(0))
    mask = torch.ones(2, 9, 9)
    still = PrintTransform(0, (1, 1), 0, (1, 1), 0)
    a, b = still(content, mask, seeded(0))
    torch.testing.assert_close(a, content)
    assert torch.equal(b, mask)
    turned, cover = still._turn(content, mask, torch.full((2,), 1.5707963), torch.ones(2))
    assert torch.equal(turned, content)  # nothing to turn: ranges are empty
    turn = PrintTransform(90, (1, 1), 0, (1, 1), 0)
    turned, cover = turn._turn(content, mask, torch.full((2,), 1.5707963), torch.ones(2))
    either = [content.rot90(k, (2, 3)) for k in (1, 3)]
    assert min((turned - e).abs().max() for e in either) < 1e-4
    assert cover.min() > 0.99


def test_prints_differ_per_image_stay_in_range_and_pass_gradients():
    content = torch.rand(3, 12, 12, generator=seeded(0), requires_grad=True)
    patch = Patch.make(content.detach(), placement="centre")
    prints = PrintTransform(jpeg=80)
    images = torch.full((3, 3, 32, 32), 0.5)
    out = patch.apply(images, seeded(1), content=content, transform=prints)
    assert out.min() >= 0 and out.max() <= 1
    assert not torch.allclose(out[0], out[1], atol=0.02)
    assert torch.equal(out[:, :, :10], images[:, :, :10])
    again = patch.apply(images, seeded(1), content=content, transform=prints)
    assert torch.equal(out, again)
    (gradient,) = torch.autograd.grad(out.square().sum(), content)
    assert gradient.abs().max() > 0 and gradient.isfinite().all()


def test_smaller_prints_show_the_image_around_them():
    patch = Patch.make(torch.ones(3, 16, 16), placement="centre")
    half = PrintTransform(0, (0.5, 0.5), 0, (1, 1), 0)
    out = patch.apply(torch.zeros(1, 3, 32, 32), seeded(0), transform=half)
    assert abs(float(out[0, 0].sum()) - 64) < 20  # a quarter of 256 pixels, soft edge
    with pytest.raises(ValueError, match="scale"):
        PrintTransform(scale=(0.5, 1.5))
