"""The lab: its steps as functions, and the page in a real browser where there is one."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from browser import PROGRAM, Browser
from service_tiny import WORDS, png, serving, tiny_models

from pair.images import quantise, resize
from pair.serve.app import Service
from pair.serve.engine import Engine
from pair.serve.lab import mount, run
from pair.serve.scene import Scene


@pytest.fixture(scope="module")
def scene() -> Scene:
    models = tiny_models()
    photos = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    labels = [WORDS[i % 3] for i in range(10)]
    return Scene(models.encoder, models.purifier, photos, labels)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(9))


def test_patches_of_all_kinds_lie_where_they_shall(scene, image):
    own = torch.rand(3, 50, 20)
    for kind in ("QR code", "text", "own picture", "grey"):
        patch = scene.patch(kind, "x", own, 0.5, "bottom-left")
        changed = (patch.apply(image[None])[0] != image).any(0)
        assert not changed[:16].any() and not changed[:, 16:].any() and changed[16:, :16].any()
    shown = scene.patch("own picture", own=own, size=0.5).content
    assert torch.allclose(shown, resize(own[None], 16)[0].clamp(0, 1))
    for kind, words in (("own picture", "choose"), ("text", "write"), ("logo", "unknown patch")):
        with pytest.raises(ValueError, match=words):
            scene.patch(kind)


@pytest.mark.parametrize("knows", [False, True])
def test_an_attack_brings_the_picture_nearer_to_the_words(scene, image, knows):
    patch = scene.patch("grey", size=0.5)
    frames = list(scene.attack(image, patch, "red", steps=25, knows=knows, seed=0))
    last = frames[-1]
    assert [f.step for f in frames] == sorted(f.step for f in frames)
    assert torch.equal(last.picture, quantise(last.picture[None])[0])
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[:16, 16:] = False  # top right
    assert (last.picture - image)[:, outside].abs().max() <= 0.5 / 255 + 1e-6
    target = scene.text("red").mean(0)

    def cosine(picture: torch.Tensor) -> float:
        images = picture[None]
        if knows:  # the same masks for both pictures
            draws = torch.Generator().manual_seed(1)
            images = scene.purifier(images.expand(50, -1, -1, -1), generator=draws)
        features = scene.encoder.encode_image(images).mean(0)
        return float(F.cosine_similarity(features, target, dim=0))

    with torch.no_grad():
        assert cosine(last.picture) > cosine(patch.apply(image[None])[0])


def test_leaving_an_attack_stops_it(scene, image):
    before = threading.active_count()
    frames = scene.attack(image, scene.patch("grey"), "red", steps=10_000)
    next(frames)
    frames.close()
    assert threading.active_count() == before


def test_a_fault_in_an_attack_comes_out(scene, image):
    with pytest.raises(ValueError, match="does not fit"):
        list(scene.attack(image[:, :8, :8], scene.patch("grey"), "red", steps=2))


def test_passes_show_what_the_purifier_sees(scene, image):
    passes = scene.passes(image)
    grey = torch.full((3, 8, 8), 0.5)
    hidden = 0
    for y in range(0, 32, 8):
        for x in range(0, 32, 8):
            first = passes.seen_first[:, y : y + 8, x : x + 8]
            second = passes.seen_second[:, y : y + 8, x : x + 8]
            covered = torch.equal(first, grey)
            hidden += covered
            # Hidden in the first pass, shown in the second, and the other way round.
            made = passes.first[:, y : y + 8, x : x + 8]
            assert torch.equal(second, made if covered else grey)
            assert covered or torch.equal(first, image[:, y : y + 8, x : x + 8])
    assert hidden == 8  # half of 16
    assert passes.second.shape == (3, 32, 32)


def test_searches_rank_as_cosines_do(scene, image):
    query = scene.text("red")[0]
    with torch.no_grad():
        rows = scene.encoder.encode_image(torch.cat([scene.photos, image[None]]))
    scores = F.cosine_similarity(rows, query[None])
    found = scene.search(image, "red", defended=False)
    order = scores.argsort(dim=0, descending=True).tolist()
    assert found.rank == order.index(10) + 1 and found.score == pytest.approx(float(scores[10]))
    for hit, i in zip(found.hits, order, strict=False):
        assert hit.own == (i == 10) and hit.relevant == (i != 10 and scene.labels[i] == "red")
        assert hit.score == pytest.approx(float(scores[i]), abs=1e-5)
    with pytest.raises(ValueError, match="looks for"):
        scene.search(image, " ", defended=False)


def test_a_whole_turn_without_a_page(scene, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(png(3))
    settings = ("QR code", "", None, 0.4, "centre", "green", 10, False)
    pages = list(run(scene, str(path), *settings, True))
    assert "step" in pages[2] and "data:image/jpeg" in pages[-1]
    for words in ("pass 2: purified", "Search without defense", "Search with PAIR", "of 11"):
        assert words in pages[-1]
    assert "attack: step" not in "".join(run(scene, str(path), *settings, False))
    script = "<script>alert(1)</script>"
    assert script not in list(run(scene, str(path), *settings[:5], script, 10, False, False))[-1]
    for photo, words in ((None, "picture first"), (str(tmp_path), "irectory")):
        with pytest.raises((ValueError, OSError), match=words):
            list(run(scene, photo, *settings, True))


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_the_page_in_a_browser(scene, tmp_path):
    pytest.importorskip("gradio", minversion="6")
    pytest.importorskip("websockets")
    from pair.serve.settings import Keys

    (tmp_path / "photo.png").write_bytes(png(3, 200, 150))
    service = Service(Engine(tiny_models()), threads=2)
    mount(service, Keys(), scene)
    with serving(service) as (url, _), Browser() as browser:
        browser.look(1100, 900, dark=False)
        browser.open(f"{url}/lab/")
        browser.wait("document.querySelector('#attack')")
        browser.run("document.querySelector('#attack').click()")
        browser.wait("document.body.innerText.includes('choose a picture first')")
        # Tab leaves a list and closes it.
        browser.click("#words input")
        browser.wait("document.querySelector('ul[role=listbox]')")
        browser.press("Tab", 9)
        browser.wait("!document.querySelector('ul[role=listbox]')")
        browser.upload("#photo input[type=file]", tmp_path / "photo.png")
        browser.wait("document.querySelector('#photo img')")
        # By keyboard: from the button on, Enter.
        browser.run("document.querySelector('#attack').focus()")
        browser.press("Enter", 13)
        browser.wait("document.querySelectorAll('.pair-lab .hits').length == 2")
        text = browser.run("document.querySelector('.pair-lab').innerText")
        assert "Search with PAIR" in text and "pass 2: purified" in text
        images = "[...document.querySelectorAll('.pair-lab img')]"
        assert browser.run(f"{images}.every(i => i.alt && i.naturalWidth)")
        assert browser.run("document.querySelector('#attack').tabIndex") == 0
        for width, dark in ((1100, True), (390, False), (390, True)):
            browser.look(width, 900, dark)
            assert not browser.overflows()
            browser.screenshot(tmp_path / f"{width}-{dark}.png")
            assert (tmp_path / f"{width}-{dark}.png").stat().st_size > 10_000
        assert browser.outside == [], "the page asks nobody outside"


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
def test_the_reference_page_in_a_browser(url):
    pytest.importorskip("websockets")
    with Browser() as browser:
        for width, dark in ((1100, False), (390, True)):
            browser.look(width, 900, dark)
            browser.open(f"{url}/docs")
            assert not browser.overflows()
            assert browser.run("document.querySelectorAll('section').length") >= 8
        assert browser.outside == [] and browser.errors == []
