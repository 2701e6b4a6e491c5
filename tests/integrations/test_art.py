"""Defenses as ART preprocessors, against the same defenses called directly."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from pair.defenses import make
from pair.integrations.art import preprocessor


@pytest.fixture(scope="module")
def classifier_class():
    return pytest.importorskip("art.estimators.classification").PyTorchClassifier


@pytest.fixture
def _art():
    pytest.importorskip("art.defences.preprocessor.preprocessor")


needs_art = pytest.mark.usefixtures("_art")


def batch(shape=(2, 3, 32, 32)):
    return np.random.default_rng(0).uniform(0.1, 0.9, shape).astype(np.float32)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))


@needs_art
@pytest.mark.parametrize("name", ["jpeg", "lgs", "blur"])
def test_equal_to_the_defense_in_every_layout(name):
    x, defense = batch(), make(name)
    expected = defense(torch.from_numpy(x)).numpy()
    labels = np.array([1, 2])
    out, same = preprocessor(defense)(x, labels)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert out.dtype == np.float32 and np.array_equal(same, labels)
    out, _ = preprocessor(defense, scale=255.0)(x * 255)
    np.testing.assert_allclose(out, expected * 255, atol=1e-3)
    out, _ = preprocessor(defense, channels_first=False)(x.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(out, expected.transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("name", ["jpeg", "blur"])
def test_gradients_of_art_are_those_of_the_defense(name, classifier_class):
    x, y, defense, model = batch(), np.array([0, 3]), make(name), network()
    classifier = classifier_class(
        model,
        nn.CrossEntropyLoss(),
        (3, 32, 32),
        4,
        clip_values=(0, 1),
        preprocessing_defences=[preprocessor(defense)],
        device_type="cpu",
    )
    ours = torch.from_numpy(x).requires_grad_()
    nn.functional.cross_entropy(model(defense(ours)), torch.from_numpy(y)).backward()
    np.testing.assert_allclose(
        classifier.loss_gradient(x, np.eye(4)[y]), ours.grad.numpy(), atol=1e-6
    )
    assert np.abs(ours.grad.numpy()).max() > 0
    expected = model(defense(torch.from_numpy(x))).detach().numpy()
    np.testing.assert_allclose(classifier.predict(x), expected, atol=1e-5)


def test_an_attack_of_art_goes_through_the_defense(classifier_class):
    from art.attacks.evasion import FastGradientMethod

    model = network()
    classifier = classifier_class(
        model,
        nn.CrossEntropyLoss(),
        (3, 32, 32),
        4,
        clip_values=(0, 1),
        preprocessing_defences=[preprocessor(make("jpeg"))],
        device_type="cpu",
    )
    x = batch((6, 3, 32, 32))
    before = classifier.predict(x).argmax(1)
    made = FastGradientMethod(classifier, eps=0.1).generate(x)
    assert np.abs(made - x).max() <= 0.1 + 1e-6
    assert (classifier.predict(made).argmax(1) != before).mean() > 0.5


@needs_art
def test_seeds_repeat_and_fresh_draws_differ():
    x, defense = batch(), make("mean-block")
    first, again = (preprocessor(defense, seed=3)(x)[0] for _ in range(2))
    assert np.array_equal(first, again)
    fresh = preprocessor(defense)
    assert any(not np.array_equal(fresh(x)[0], first) for _ in range(3))


@needs_art
def test_only_prediction_is_defended_unless_asked():
    assert not preprocessor(make("blur")).apply_fit and preprocessor(make("blur")).apply_predict
    assert preprocessor(make("blur"), apply_fit=True).apply_fit


@needs_art
def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="expected a defense"):
        preprocessor(nn.Identity())
    with pytest.raises(ValueError, match="clip_values"):
        preprocessor(make("blur"), scale=0)


def test_without_art_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n == "art" or n.startswith("art.")] + ["art"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pair-retrieval\[art\]"):
        preprocessor(make("blur"))
