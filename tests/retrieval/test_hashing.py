"""CSQ: hash centres, the loss, multi-label centres, heads, preprocessing, save and load."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pair.images import resize, resize_crop
from pair.retrieval.encoders import HashEncoder
from pair.retrieval.hashing import (
    HashConfig,
    HashNet,
    binarise,
    csq_loss,
    hadamard,
    hash_centres,
    hash_head,
    multilabel_centres,
)
from pair.retrieval.resnet import ResNetConfig

TINY = ResNetConfig((1, 1, 1, 1), 4)


def tiny(**options) -> HashNet:
    torch.manual_seed(0)
    return HashNet(HashConfig(32, 16, TINY, ("cat", "cow"), **options)).eval()


def distances(codes):
    return (codes.shape[1] - codes @ codes.T) / 2


@pytest.mark.parametrize("order", [1, 2, 16, 32, 64, 128])
def test_hadamard_rows_are_orthogonal(order):
    h = hadamard(order)
    assert torch.equal(h @ h.T, order * torch.eye(order))
    assert set(h.unique().tolist()) <= {-1.0, 1.0}
    # Sylvester by hand: entry (i, j) is the parity of the bits that i and j share.
    parity = [[(-1) ** bin(i & j).count("1") for j in range(order)] for i in range(order)]
    assert h.tolist() == parity


@pytest.mark.parametrize("order", [0, 3, 48, -2])
def test_hadamard_refuses_other_orders(order):
    with pytest.raises(ValueError, match="power of two"):
        hadamard(order)


@pytest.mark.parametrize("classes", [80, 100])  # COCO and ImageNet-100 with 64 bits
def test_centres_of_the_paper(classes):
    centres = hash_centres(classes, 64)
    assert torch.equal(centres[:64], hadamard(64))
    assert torch.equal(centres[64:], -hadamard(64)[: classes - 64])
    d = distances(centres)
    for i in range(classes):
        for j in range(i):
            assert d[i, j] == (64 if i - j == 64 else 32)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([16, 32, 48, 64, 128]), st.integers(1, 12), st.integers(0, 1000))
def test_few_classes_keep_their_distance(bits, classes, seed):
    g = torch.Generator().manual_seed(seed)
    centres = hash_centres(classes, bits, g)
    assert centres.shape == (classes, bits)
    assert bool((centres.abs() == 1).all())
    if classes > 1:
        off = distances(centres)[~torch.eye(classes, dtype=torch.bool)]
        assert float(off.min()) > bits / 4


@pytest.mark.parametrize(("classes", "bits"), [(20, 48), (40, 16), (300, 64)])
def test_fallback_is_balanced_random_and_seeded(classes, bits):
    first, again, other = (
        hash_centres(classes, bits, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert bool((first.sum(1) == 0).all())  # as many +1 as -1
    # No draw beats the one that was kept by more than the rule allows: it is the best of 20.
    off = ~torch.eye(classes, dtype=torch.bool)
    g = torch.Generator().manual_seed(0)
    lows = []
    for _ in range(20):
        codes = torch.ones(classes, bits)
        codes.scatter_(1, torch.rand(classes, bits, generator=g).argsort(1)[:, : bits // 2], -1.0)
        d = distances(codes)[off]
        lows.append(float(d.min()))
        if d.min() > bits / 4 and d.mean() >= bits / 2:
            break
    assert float(distances(first)[off].min()) == max(lows)


def test_multi_label_centre_is_the_majority_of_the_label_centres():
    centres = hadamard(8)
    labels = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]])
    padded = torch.cat([labels, torch.zeros(4, 4, dtype=torch.long)], 1)
    got = multilabel_centres(padded, centres, torch.Generator().manual_seed(0))
    assert bool((got.abs() == 1).all())
    assert torch.equal(got[0], centres[0])
    assert torch.equal(got[1], centres[:3].sum(0).sign())  # three labels: never a tie
    # Two labels tie where they differ; every image gets the same fixed code there.
    for row, pair in ((2, [0, 1]), (3, [1, 2])):
        agree = centres[pair[0]] == centres[pair[1]]
        assert torch.equal(got[row][agree], centres[pair[0]][agree])
    tied = [centres[0] != centres[1], centres[1] != centres[2]]
    both = tied[0] & tied[1]
    assert torch.equal(got[2][both], got[3][both])
    assert torch.equal(got, multilabel_centres(padded, centres, torch.Generator().manual_seed(0)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_loss_equals_the_formula(seed, weight):
    g = torch.Generator().manual_seed(seed)
    u = 2 * torch.randn(3, 8, generator=g, dtype=torch.float64)
    c = binarise(torch.randn(3, 8, generator=g, dtype=torch.float64)).double()
    total = 0.0
    for i in range(3):
        for j in range(8):
            h, t = u[i, j].tanh(), (c[i, j] + 1) / 2
            p = (h + 1) / 2
            total -= float(t * p.log() + (1 - t) * (1 - p).log())
            total += weight * float((h.abs() - 1) ** 2)
    assert float(csq_loss(u, c, weight)) == pytest.approx(total / 24)


def test_loss_falls_towards_the_centre_and_has_a_gradient():
    centres = hadamard(16)[:4]
    near, far = csq_loss(3 * centres, centres), csq_loss(-3 * centres, centres)
    assert near < 0.01 < far
    u = torch.zeros(4, 16, requires_grad=True)
    csq_loss(u, centres).backward()
    assert torch.equal((-u.grad).sign(), centres)


def test_binarise_maps_zero_to_minus_one():
    assert binarise(torch.tensor([-2.0, -0.0, 0.0, 1e-9])).tolist() == [-1, -1, -1, 1]


def test_heads():
    linear = hash_head("linear", 10, 64)
    assert linear.weight.shape == (64, 10) and not linear.bias.any()
    assert 0.005 < float(linear.weight.detach().std()) < 0.015
    mlp = hash_head("mlp", 10, 64)
    shapes = [tuple(m.weight.shape) for m in mlp if hasattr(m, "weight")]
    assert shapes == [(2048, 10), (2048, 2048), (64, 2048)]
    assert [type(m).__name__ for m in mlp][2] == "Dropout" and mlp[2].p == 0.5
    with pytest.raises(ValueError, match="head"):
        HashConfig(head="deep")


def test_preprocessing_follows_the_config():
    images = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    ready = torch.rand(2, 3, 32, 32)
    for rule in ("squash", "short", "square"):
        assert torch.equal(tiny(resize=rule).prepare(ready), ready)  # the right size stays as is
    assert torch.equal(tiny().prepare(images), resize(images, 32))
    short = resize_crop(images, 36)[..., 2:34, 2:34]
    assert torch.equal(tiny(resize="short").prepare(images), short)
    assert torch.equal(tiny(resize="square").prepare(images), resize(images, 36)[..., 2:34, 2:34])
    with pytest.raises(ValueError, match="resize"):
        HashConfig(resize="crop")
    big = HashConfig(224, 16, TINY, ("a",), resize="square")
    tall = torch.rand(1, 3, 300, 200)
    # AdvHash: squash to 255, crop 224 at offset 15.
    wanted = resize(tall, 255)[..., 15:239, 15:239]
    assert torch.equal(HashNet(big).prepare(tall), wanted)


def test_an_image_does_not_depend_on_its_batch():
    net, images = tiny(), torch.rand(8, 3, 32, 32)
    whole = net.encode_image(images)
    alone = torch.cat([net.encode_image(i[None]) for i in images])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-6)
    assert isinstance(net, HashEncoder) and net.codes(images).shape == (8, 16)


@pytest.mark.parametrize("options", [{}, {"head": "mlp", "resize": "short"}])
def test_save_and_load(tmp_path, options):
    net, images = tiny(**options), torch.rand(2, 3, 40, 60)
    net.save_pretrained(tmp_path / "net")
    again = HashNet.from_pretrained(tmp_path / "net")
    assert again.config == net.config
    assert torch.equal(again.encode_image(images), net.encode_image(images))
    assert not any(p.requires_grad for p in again.parameters())


def test_named_backbone_is_rebuilt_on_load(tmp_path):
    torch.manual_seed(0)
    net = HashNet(HashConfig(32, 16, "resnet18", ("a", "b"))).eval()
    net.save_pretrained(tmp_path / "net")
    again = HashNet.from_pretrained(tmp_path / "net")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.encode_image(images), net.encode_image(images))


def test_configs_from_before_heads_still_load():
    old = {"image_size": 32, "bits": 16, "classes": ["a"], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = HashConfig.from_dict({**old, "backbone": {"layers": [1, 1, 1, 1], "width": 4}})
    assert config.head == "linear" and config.resize == "squash"
    assert config.backbone == TINY
