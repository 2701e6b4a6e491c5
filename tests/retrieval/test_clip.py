"""The small CLIP: words, vocabulary, tokens, towers, save and load."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pair.hub import CONFIG, ModelError
from pair.retrieval.clip import (
    PAD,
    UNKNOWN,
    ClipConfig,
    SmallClip,
    build_vocabulary,
    words,
)
from pair.retrieval.encoders import HashEncoder, TextImageEncoder
from pair.retrieval.resnet import ResNetConfig

TEXTS = ["A photo of a cat.", "two dogs, running", "a blue-green bus"]


@pytest.fixture(scope="module")
def clip() -> SmallClip:
    torch.manual_seed(0)
    config = ClipConfig(
        32, 16, ResNetConfig((1, 1, 1, 1), 4), text_width=16, text_depth=1, text_heads=2,
        context=6, vocabulary=tuple(build_vocabulary(TEXTS)),
    )  # fmt: skip
    return SmallClip(config).eval().requires_grad_(False)


def test_words_are_lower_case_letters_and_digits():
    assert words("It's a T-shirt, No. 7!\n") == ["it", "s", "a", "t", "shirt", "no", "7"]
    assert words("...") == []


def test_vocabulary_is_sorted_unique_and_starts_with_the_special_tokens():
    vocabulary = build_vocabulary(TEXTS)
    assert vocabulary[:2] == [PAD, UNKNOWN]
    assert vocabulary[2:] == sorted({w for t in TEXTS for w in words(t)})
    assert vocabulary == build_vocabulary(reversed(TEXTS))


def test_tokens(clip):
    ids = clip.tokenize(["a cat", "", "a zebra", "a a a a a a a a a"])
    index = {w: i for i, w in enumerate(clip.config.vocabulary)}
    assert ids.shape == (4, 6)
    assert ids[0].tolist() == [index["a"], index["cat"], 0, 0, 0, 0]
    assert ids[1].tolist() == [1, 0, 0, 0, 0, 0]  # nothing: one unknown word
    assert ids[2].tolist() == [index["a"], 1, 0, 0, 0, 0]
    assert ids[3].tolist() == [index["a"]] * 6  # cut at the context


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_a_finite_embedding(clip, text):
    z = clip.encode_text([text])
    assert z.shape == (1, 16) and bool(z.isfinite().all())


def test_unknown_words_are_named_once_in_order(clip):
    known = clip.config.vocabulary[-1]
    assert clip.unknown([known, f"{known.upper()}!"]) == []
    assert clip.unknown([f"Zebra, {known} qwertz", "zebra <pad>"]) == ["zebra", "qwertz", "pad"]
    assert clip.unknown(["猫 "]) == ["猫"]


def test_case_and_punctuation_do_not_matter(clip):
    first, second = clip.encode_text(["A photo, of a CAT.", "a photo of a cat"])
    assert torch.equal(first, second)


def test_a_text_does_not_depend_on_its_neighbours(clip):
    texts = [*TEXTS, "cat", "a photo of two dogs on a blue bus"]
    together = clip.encode_text(texts)
    alone = torch.cat([clip.encode_text([t]) for t in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip.encode_text("cat"), clip.encode_text(["cat"]))


def test_words_and_their_order_matter(clip):
    z = clip.encode_text(["a cat", "cat a", "a bus"])
    assert float((z[0] - z[1]).abs().max()) > 1e-4
    assert float((z[0] - z[2]).abs().max()) > 1e-4


def test_an_image_does_not_depend_on_its_neighbours(clip):
    images = torch.rand(5, 3, 40, 56)
    together = clip.encode_image(images)
    alone = torch.cat([clip.encode_image(i[None]) for i in images])
    assert together.shape == (5, clip.dim)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_the_pixels(clip):
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    clip.encode_image(images).sum().backward()
    assert float(images.grad.abs().amax((1, 2)).mean()) > 0
    assert (images.grad != 0).float().mean() > 0.9


def test_protocols(clip):
    assert isinstance(clip, TextImageEncoder)
    assert not isinstance(clip, HashEncoder)


def test_save_and_load(tmp_path, clip):
    clip.save_pretrained(tmp_path / "clip")
    again = SmallClip.from_pretrained(tmp_path / "clip")
    assert again.config == dataclasses.replace(clip.config)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.encode_image(images), clip.encode_image(images))
    assert torch.equal(again.encode_text(TEXTS), clip.encode_text(TEXTS))
    config = json.loads((tmp_path / "clip" / CONFIG).read_text())
    del config["model"]["backbone"]
    (tmp_path / "clip" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no backbone in its model settings"):
        SmallClip.from_pretrained(tmp_path / "clip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("text_heads"), "no text_heads in its model settings"),
        (lambda m: m.update(colour=1), "unknown model setting 'colour'"),
        (lambda m: m["backbone"].pop("width"), "no width in its backbone settings"),
        (lambda m: m["backbone"].update(depth=3), "unknown backbone setting 'depth'"),
    ],
)
def test_settings_are_neither_guessed_nor_ignored(change, message, tmp_path):
    config = ClipConfig(24, 8, ResNetConfig((1, 1, 1, 1), 4), vocabulary=("<pad>", "<unknown>"))
    SmallClip(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    change(stored["model"])
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match=message):
        SmallClip.from_pretrained(tmp_path)
