"""The contract that every registered defense keeps. A new defense adds one row to OPTIONS."""

import pytest
import torch

from pair.defenses import DEFENSES, Compose, Ensemble, NoDefense, make
from pair.defenses.lgs import LGS

# Name -> options; "@kind" stands for the folder of the tiny model of that kind.
OPTIONS = {
    "none": {},
    "halve": {},
    "blur": {},
    "mean-block": {},
    "single-pass": {"name": "@pair"},
    "jpeg": {},
    "lgs": {"block": 7, "overlap": 2},
    "maedefense": {"name": "@pair"},
    "sac": {"name": "@sac"},
    "patchzero": {"name": "@patchzero", "grow": 1},
    "at": {"clip": "@clip", "csq": "@csq"},
    "hm": {"clip": "@clip", "csq": "@csq"},
    "arn": {"name": "@arn"},
    "cafd": {"name": "@cafd"},
    "pair": {"name": "@pair"},
    "pair-reconstruction": {"name": "@pair"},
    "pair-fixed-mask": {"name": "@pair"},
    "pair-random-mask": {"name": "@pair"},
}
RANDOM = {"mean-block", "single-pass", "maedefense", "pair", "pair-random-mask"}
BRIDGED = {"jpeg", "sac", "patchzero"}


def test_every_registered_defense_has_a_row():
    assert OPTIONS.keys() == DEFENSES.keys()


@pytest.fixture(params=[*OPTIONS, "lgs-bridged", "maedefense-grid", "compose", "ensemble"])
def defense(request, models):
    def build(name, **extra):
        options = {**OPTIONS[name], **extra}
        return make(
            name,
            **{k: str(models / v[1:]) if str(v).startswith("@") else v for k, v in options.items()},
        )

    match request.param:
        case "lgs-bridged":
            return LGS(7, 2, bridge=True)
        case "maedefense-grid":
            return build("maedefense", mask="grid")
        case "compose":
            return Compose([build("jpeg"), build("mean-block"), build("sac")]).eval()
        case "ensemble":
            return Ensemble(build("pair"), 3).eval()
    return build(request.param)


def images(b=3, h=32, w=32, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (0.15 + 0.7 * torch.rand(b, 3, h, w, generator=generator)).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(32, 32), (40, 28), (17, 17)])
def test_shape_type_and_range(defense, size):
    x = images(2, *size)
    for picture in (x, torch.zeros_like(x), torch.ones_like(x)):
        y = defense(picture, generator=seeded()).detach()
        assert y.shape == picture.shape and y.dtype == torch.float32
        assert float(y.min()) >= -1e-6 and float(y.max()) <= 1 + 1e-6


def test_a_generator_decides_everything(defense):
    x = images()
    first, again = (defense(x, generator=seeded(1)) for _ in range(2))
    assert torch.equal(first, again)
    other = defense(x, generator=seeded(2))
    assert torch.equal(first, other) is not defense.random


@pytest.mark.parametrize("name", OPTIONS)
def test_declarations(name, models):
    options = {
        k: str(models / v[1:]) if str(v).startswith("@") else v for k, v in OPTIONS[name].items()
    }
    d = make(name, **options)
    assert d.random == (name in RANDOM)
    kind = "bpda" if name in BRIDGED else "eot" if name in RANDOM else "exact"
    assert d.gradient.kind == kind
    assert d.gradient.samples == (7 if name in RANDOM else 1)


def test_neighbours_do_not_matter(defense):
    x = images(4)
    mixed = torch.cat([x[:1], images(3, seed=9) ** 4])
    alone, beside = (defense(v, generator=seeded(3))[0] for v in (x, mixed))
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=0)
    if not defense.random:
        torch.testing.assert_close(defense(x[:1])[0], alone, atol=1e-5, rtol=0)


def test_gradient_is_the_declared_one(defense):
    """Autograd against central differences of the function that the defense claims to follow."""
    defense = defense.double()
    x = images(2, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=seeded(5), dtype=torch.float64)
    smooth = defense.smooth_at(x, seed=4)
    torch.testing.assert_close(smooth(x), defense(x, generator=seeded(4)))

    leaf = x.clone().requires_grad_()
    (defense(leaf, generator=seeded(4)) * weight).sum().backward()
    assert float(leaf.grad.abs().max()) > 0
    step = 1e-8  # so small that hardly any ReLU changes sides
    for seed in range(3):
        direction = torch.randn(x.shape, generator=seeded(seed + 10), dtype=torch.float64)
        ahead, behind = ((smooth(x + s * direction) * weight).sum() for s in (step, -step))
        expected = float(ahead - behind) / (2 * step)
        assert float((leaf.grad * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_hard_steps_keep_their_values(defense):
    """What an attacker differentiates is bit for bit what the retriever sees."""
    x = images()
    with torch.no_grad():
        quiet = defense(x, generator=seeded())
    assert torch.equal(quiet, defense(x.requires_grad_(), generator=seeded()).detach())


def test_exact_gradients_are_not_bridged(defense):
    if defense.gradient.kind != "bpda":
        assert defense.gradient.surrogate is None and not defense.bridged
    else:
        soft = defense.gradient.surrogate(images())
        assert soft.shape == (3, 3, 32, 32) and bool(torch.isfinite(soft).all())


def test_flat_images_have_finite_gradients(defense):
    x = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    defense(x, generator=seeded()).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


BAD = {
    "no batch": lambda: torch.rand(3, 32, 32),
    "grey": lambda: torch.rand(2, 1, 32, 32),
    "bytes": lambda: torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    "too bright": lambda: torch.full((2, 3, 32, 32), 1.5),
    "negative": lambda: torch.full((2, 3, 32, 32), -0.1),
    "not a number": lambda: torch.full((2, 3, 32, 32), float("nan")),
    "empty": lambda: torch.rand(0, 3, 32, 32),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_in_one_sentence(defense, bad):
    with pytest.raises(ValueError) as caught:
        defense(BAD[bad]())
    text = str(caught.value)
    assert 10 < len(text) < 160 and "\n" not in text


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="unknown defense 'jepg': use one of none, "):
        make("jepg")
    with pytest.raises(ValueError, match="its options: quality"):
        make("jpeg", qualty=50)


@pytest.mark.parametrize(
    "name, options",
    [
        ("jpeg", {"quality": 0}),
        ("jpeg", {"quality": 75.0}),
        ("lgs", {"overlap": 15}),
        ("halve", {"scale": 0.0}),
        ("blur", {"sigma": 0.0}),
        ("mean-block", {"side": 1.0}),
    ],
)
def test_settings_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError):
        make(name, **options)


def test_ensemble_averages_images_or_features(models):
    pair = make("pair", name=str(models / "pair"))
    ensemble, x = Ensemble(pair, 4), images()
    views = ensemble.views(x, generator=seeded())
    assert views.shape == (4, *x.shape) and not torch.equal(views[0], views[1])
    torch.testing.assert_close(ensemble(x, generator=seeded()), views.mean(0))
    feature = ensemble.encode(lambda v: v.flatten(1) ** 2, x, generator=seeded())
    torch.testing.assert_close(feature, (views.flatten(2) ** 2).mean(0))


def test_compose_runs_in_order():
    x = images()
    both = Compose([make("jpeg", quality=30), make("blur")])
    assert torch.equal(both(x), make("blur")(make("jpeg", quality=30)(x)))
    assert both.gradient.kind == "bpda" and NoDefense()(x) is x
    with pytest.raises(ValueError, match="at least one"):
        Compose([])
