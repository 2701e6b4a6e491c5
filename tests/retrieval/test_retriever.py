"""Retrievers over real (tiny) encoders, a user's own encoder, and defenses in front of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.images import resize
from pair.masks import ExactCount
from pair.purifier import Purifier
from pair.retrieval import scores
from pair.retrieval.clip import ClipConfig, SmallClip, build_vocabulary
from pair.retrieval.encoders import TextImageEncoder
from pair.retrieval.hashing import HashConfig, HashNet
from pair.retrieval.resnet import ResNetConfig
from pair.retrieval.retriever import DefendedRetriever, HashRetriever, Retriever, TextRetriever

TINY = ResNetConfig((1, 1, 1, 1), 4)


class Mine:
    """A user's own encoder: colours against the names of colours. Ten lines, nothing inherited."""

    image_size, dim = 8, 3
    names = ("red", "green", "blue")

    def encode_image(self, images):
        return resize(images, self.image_size).mean((2, 3))

    def encode_text(self, texts):
        return torch.tensor([[float(n in t) for n in self.names] for t in texts])


@pytest.fixture(scope="module")
def colours():
    return torch.eye(3).view(3, 3, 1, 1).expand(-1, -1, 16, 16) * 0.8 + 0.1


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    words = tuple(build_vocabulary(["a red cat", "the blue sea"]))
    return SmallClip(ClipConfig(32, 16, TINY, 16, 1, 2, 6, vocabulary=words)).eval()


@pytest.fixture(scope="module")
def csq():
    torch.manual_seed(0)
    return HashNet(HashConfig(32, 16, TINY, ("a", "b"))).eval()


@pytest.fixture(scope="module")
def purifier():
    torch.manual_seed(0)
    config = GeneratorConfig(
        image_size=32, patch_size=8, width=32, depth=1, heads=2, decoder_width=32,
        decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    return Purifier(MaskedAutoencoder(config), ExactCount(0.5)).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_users_own_encoder_finds_the_colours(colours):
    assert isinstance(Mine(), TextImageEncoder)
    retriever = TextRetriever(Mine())
    gallery = retriever.gallery(colours)
    hits = retriever.search(retriever.query(["a blue car", "something red"]), gallery, k=2)
    assert hits.indices[:, 0].tolist() == [2, 0]
    assert bool((hits.scores[:, 0] > hits.scores[:, 1]).all())
    found = retriever.search(retriever.query(colours), gallery, k=1)  # image to image
    assert found.indices[:, 0].tolist() == [0, 1, 2]
    torch.testing.assert_close(found.scores, torch.ones(3, 1))


def test_a_users_own_encoder_can_be_defended_and_attacked(colours):
    def brighter(images):  # a defense is any function
        return images * 0.5 + 0.5

    defended = DefendedRetriever(TextRetriever(Mine()), brighter)
    target = defended.text("red")
    patch = colours[1:2].clone().requires_grad_()
    score = (defended.finish(defended.features(patch)) * target).sum()
    score.backward()
    assert float(patch.grad[0, 0].sum()) > 0 > float(patch.grad[0, 1].sum())


def test_scores_are_cosines_and_search_is_exact(clip, monkeypatch):
    retriever = TextRetriever(clip, batch_size=7)
    images = torch.rand(30, 3, 32, 32, generator=seeded())
    gallery = retriever.gallery(images)
    query = retriever.query(["a red cat", "the blue sea", "a cat"])
    cosine = nn.functional.cosine_similarity(query[:, None], gallery[None], dim=-1)
    torch.testing.assert_close(retriever.scores(query, gallery), cosine)
    whole = retriever.search(query, gallery, k=5)
    wanted = retriever.scores(query, gallery).topk(5)
    torch.testing.assert_close(whole.scores, wanted.values)
    monkeypatch.setattr(scores, "CELLS", 40)
    chunked = retriever.search(query, gallery, k=5)
    assert torch.equal(chunked.indices, whole.indices)


def test_gallery_does_not_depend_on_batches(clip):
    images = torch.rand(9, 3, 40, 50, generator=seeded())
    small, large = (TextRetriever(clip, batch_size=b).gallery(images) for b in (2, 64))
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-6)
    stream = TextRetriever(clip).gallery(iter(images.split(4)))  # any iterable of batches
    torch.testing.assert_close(stream, large, rtol=1e-4, atol=1e-6)


def test_hash_rows_are_codes_ranked_by_hamming_distance(csq):
    retriever = HashRetriever(csq)
    images = torch.rand(20, 3, 32, 32, generator=seeded())
    gallery, query = retriever.gallery(images), retriever.query(images[:4])
    assert set(gallery.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(gallery[:4], query)
    hits = retriever.search(query, gallery, k=20)
    distance = (query[:, None] != gallery[None]).sum(-1)
    assert torch.equal((16 - hits.scores) / 2, distance.sort(dim=1, stable=True).values.float())
    assert torch.equal(hits.indices, distance.argsort(dim=1, stable=True))  # ties: gallery order
    with pytest.raises(ValueError, match="cannot encode text"):
        retriever.query("a cat")


def test_raw_retriever_stays_raw(csq, purifier):
    raw = HashRetriever(csq)
    images = torch.rand(4, 3, 32, 32, generator=seeded())
    before = raw.gallery(images)
    defended = DefendedRetriever(raw, purifier)
    changed = defended.features(images, generator=seeded())
    assert torch.equal(changed, csq.encode_image(purifier(images, generator=seeded())))
    assert not torch.equal(changed, raw.features(images))
    assert torch.equal(raw.gallery(images), before)
    assert defended.compare(before, before).shape == (4, 4)


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("query", [False, True])
def test_each_side_is_purified_only_where_asked(clip, gallery, query):
    raw = TextRetriever(clip)
    blank = DefendedRetriever(raw, torch.zeros_like, gallery=gallery, query=query)
    images = torch.rand(3, 3, 32, 32, generator=seeded())
    black, seen = raw.gallery(torch.zeros_like(images)), raw.gallery(images)
    assert torch.equal(blank.gallery(images), black if gallery else seen)
    assert torch.equal(blank.query(images), black if query else seen)
    assert torch.equal(blank.query(["a cat"]), raw.query(["a cat"]))  # texts never


def test_randomness_comes_from_the_generator(clip, purifier):
    defended = DefendedRetriever(TextRetriever(clip), purifier)
    images = torch.rand(4, 3, 32, 32, generator=seeded())
    first, again, other = (defended.gallery(images, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_outer_defense_comes_first(colours):
    def halve(images):
        return images / 2

    def lift(images):
        return images + 0.1

    inner = DefendedRetriever(TextRetriever(Mine()), lift)
    outer = DefendedRetriever(inner, halve)
    torch.testing.assert_close(outer.features(colours), Mine().encode_image(colours / 2 + 0.1))


def test_gradient_flows_through_defense_and_encoder(clip, purifier):
    defended = DefendedRetriever(TextRetriever(clip), purifier)
    images = torch.rand(2, 3, 32, 32, generator=seeded()).requires_grad_()
    defended.features(images, generator=seeded()).sum().backward()
    assert float(images.grad.abs().sum()) > 0


def test_training_mode_is_refused(clip, purifier):
    raw = HashNet(HashConfig(32, 16, TINY))  # as constructed: batch norm in training mode
    with pytest.raises(ValueError, match="eval"):
        HashRetriever(raw)
    noisy = nn.Sequential(nn.Dropout())
    with pytest.raises(ValueError, match="eval"):
        DefendedRetriever(TextRetriever(clip), noisy)


def test_empty_input_is_refused(clip):
    retriever = TextRetriever(clip)
    with pytest.raises(ValueError, match="no images"):
        retriever.gallery([])
    with pytest.raises(ValueError, match="cannot search"):
        retriever.search(torch.rand(1, 16), torch.rand(0, 16))
    with pytest.raises(ValueError, match="cannot search"):
        retriever.search(torch.rand(1, 16), torch.rand(3, 16), k=0)
    with pytest.raises(NotImplementedError):
        Retriever(clip).gallery(torch.rand(1, 3, 32, 32))
