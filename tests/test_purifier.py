"""The purifier: two complementary passes (equations 5-13), its options and its guarantees."""

import copy
import json

import pytest
import torch

from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.images import resize
from pair.masks import Bernoulli, ExactCount, FixedPattern, NoMask, rule_to_config
from pair.purifier import PRESETS, Purifier

SIZE, PATCH, GRID = 32, 8, 4
CONFIG = GeneratorConfig(
    image_size=SIZE,
    patch_size=PATCH,
    width=32,
    depth=1,
    heads=2,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=2,
)
BOTH = [
    pytest.param({"encoder": e, "output": o}, id=f"{e}-{o}")
    for e in ("drop", "zero")
    for o in ("decoder", "paste")
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(rule=None, seed: int = 0, dtype=torch.float32, **options) -> Purifier:
    torch.manual_seed(seed)
    model = MaskedAutoencoder(CONFIG)
    # Biases and norms that matter, outputs that stay near the middle of [0, 1].
    for name, p in model.named_parameters():
        if "decoder_pred" not in name:
            torch.nn.init.normal_(p, std=0.2)
    return Purifier(model, rule, **options).to(dtype).eval()


def photos(batch: int = 3, size=SIZE, seed: int = 1, dtype=torch.float32) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(batch, 3, height, width, generator=seeded(seed), dtype=dtype)


def token(image: torch.Tensor, i: int) -> torch.Tensor:
    row, column = divmod(i, GRID)
    return image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


@pytest.mark.parametrize("options", BOTH)
@torch.no_grad()
def test_two_passes_are_equation_13(options):
    purifier, images = tiny(**options), photos()
    mask = purifier.draw_mask(3, seeded(0))
    got = purifier(images, mask=mask)
    for k in range(3):
        m = mask[k : k + 1]
        inverse = torch.tensor([[not v for v in m[0].tolist()]])
        first = purifier.autoencoder(images[k : k + 1], m, encoder=options["encoder"])
        second = purifier.autoencoder(first, inverse, encoder=options["encoder"])
        wanted = torch.zeros(3, SIZE, SIZE)
        for i in range(GRID * GRID):
            if options["output"] == "decoder":
                source = second  # equations 11-12: the decoder's word for every token
            else:
                source = second if m[0, i] else first  # from the pass in which it was hidden
            token(wanted, i).copy_(token(source[0], i).clamp(0, 1))
        torch.testing.assert_close(got[k], wanted, rtol=1e-5, atol=1e-6)
    assert float(got.std()) > 0.02


@torch.no_grad()
def test_one_pass_decoder_and_paste():
    mask = tiny().draw_mask(2, seeded(0))
    images = photos(2)
    rebuilt = tiny(passes=1)(images, mask=mask)
    assert torch.equal(rebuilt, tiny().steps(images, mask=mask)[0])
    pasted = tiny(passes=1, output="paste")(images, mask=mask)
    for k in range(2):
        for i in range(GRID * GRID):
            source = images if mask[k, i] else rebuilt
            assert torch.equal(token(pasted[k], i), token(source[k], i))


@pytest.mark.parametrize("options", BOTH)
@torch.no_grad()
def test_no_original_pixel_survives(options):
    """Output tokens hidden in pass 1 ignore their own pixels bit for bit; no token is a copy."""
    purifier, images = tiny(**options), photos()
    mask = purifier.draw_mask(3, seeded(0))
    before = purifier(images, mask=mask)
    changed = images.clone()
    for k in range(3):
        for i in range(GRID * GRID):
            if not mask[k, i]:
                token(changed[k], i).copy_(1 - token(changed[k], i))
            assert not bool((token(before[k], i) == token(images[k], i)).all())
    assert torch.equal(purifier(changed, mask=mask), before)


@torch.no_grad()
def test_steps_returns_the_first_reconstruction_too():
    purifier, images = tiny(), photos()
    first, last = purifier.steps(images, generator=seeded(0))
    assert torch.equal(last, purifier(images, generator=seeded(0)))
    assert torch.equal(first, tiny(passes=1)(images, generator=seeded(0)))
    assert len(tiny(passes=1).steps(images)) == 1


@pytest.mark.parametrize("options", BOTH)
@pytest.mark.parametrize("rule", [ExactCount(0.5), Bernoulli(0.5)], ids=repr)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(rule, options):
    purifier, images = tiny(rule, **options), photos(8)
    mask = purifier.draw_mask(8, seeded(0))
    together = purifier(images, mask=mask)
    for k in range(8):
        alone = purifier(images[k : k + 1], mask=mask[k : k + 1])
        torch.testing.assert_close(alone[0], together[k], rtol=1e-5, atol=1e-6)
    others = images.clone()
    others[1:] = photos(7, seed=5)
    assert torch.equal(purifier(others, mask=mask)[0], together[0])
    # With a seed, the first image of a batch is purified as if it were alone.
    alone = purifier(images[:1], generator=seeded(3))
    torch.testing.assert_close(alone[0], purifier(images, generator=seeded(3))[0])


@torch.no_grad()
def test_masks_are_fresh_per_image_and_call_and_fixed_by_a_seed():
    purifier = tiny()
    same = photos(1).expand(4, -1, -1, -1)
    out = purifier(same)
    assert not torch.equal(out[0], out[1])
    assert not torch.equal(out, purifier(same))
    assert torch.equal(purifier(same, generator=seeded(1)), purifier(same, generator=seeded(1)))
    assert not torch.equal(purifier(same, generator=seeded(1)), purifier(same, generator=seeded(2)))
    fixed = tiny(FixedPattern())(same)
    assert torch.equal(fixed[0], fixed[1])
    assert (tiny().random, tiny(FixedPattern()).random) == (True, False)


@torch.no_grad()
def test_one_mask_serves_the_whole_batch():
    purifier, images = tiny(), photos()
    mask = purifier.draw_mask(1, seeded(0))
    assert torch.equal(
        purifier(images, mask=mask[0]), purifier(images, mask=mask.expand(3, -1).clone())
    )


@pytest.mark.parametrize("options", BOTH)
def test_gradients_match_finite_differences(options):
    purifier = tiny(dtype=torch.float64, **options)
    images = (0.1 + 0.8 * photos(2, dtype=torch.float64)).requires_grad_()
    mask = purifier.draw_mask(2, seeded(0))
    assert torch.autograd.gradcheck(lambda x: purifier(x, mask=mask), images, fast_mode=True)


def test_gradients_reach_images_of_another_size():
    images = photos(1, (20, 45)).requires_grad_()
    tiny(restore_size=True)(images, generator=seeded(0)).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


@torch.no_grad()
def test_it_is_an_ordinary_module():
    purifier = tiny()
    stack = torch.nn.Sequential(copy.deepcopy(purifier), torch.nn.Flatten())
    assert stack(photos()).shape == (3, 3 * SIZE * SIZE)
    assert set(purifier.state_dict()) == {
        f"autoencoder.{k}" for k in purifier.autoencoder.state_dict()
    }
    assert "ExactCount(ratio=0.5" in repr(purifier)


@pytest.mark.parametrize("size", [(1, 1), (7, 90), (32, 32), (33, 32), (200, 120)])
@torch.no_grad()
def test_any_size_in(size):
    images, mask = photos(2, size), tiny().draw_mask(2, seeded(0))
    out = tiny()(images, mask=mask)
    assert out.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(out, tiny()(resize(images, SIZE), mask=mask))
    back = tiny(restore_size=True)(images, mask=mask)
    assert back.shape == images.shape
    assert torch.equal(back, resize(out, size))
    for o in (out, back):
        assert o.dtype == torch.float32
        assert float(o.min()) >= 0 and float(o.max()) <= 1


@torch.no_grad()
def test_an_empty_batch_comes_back_empty():
    for encoder in ("drop", "zero"):
        assert tiny(encoder=encoder)(torch.zeros(0, 3, 40, 40)).shape == (0, 3, SIZE, SIZE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_images_of_any_float_type(dtype):
    images = photos(2, 40).to(dtype)
    out = tiny()(images, generator=seeded(0))
    assert out.dtype == torch.float32  # that of the weights
    torch.testing.assert_close(out, tiny()(images.float(), generator=seeded(0)), atol=1e-5, rtol=0)


def test_straight_through_changes_gradients_only():
    purifier, images = tiny(), photos()
    with torch.no_grad():
        purifier.autoencoder.decoder_pred.bias.add_(torch.linspace(-4, 4, 3 * PATCH**2))
    mask = purifier.draw_mask(3, seeded(0))
    x = images.clone().requires_grad_()
    plain = purifier(x, mask=mask)
    assert bool((plain == 0).any()) and bool((plain == 1).any())  # the clamp is at work
    plain.sum().backward()
    y = images.clone().requires_grad_()
    attacked = purifier.differentiable()
    assert not purifier.straight_through and attacked.autoencoder is purifier.autoencoder
    through = attacked(y, mask=mask)
    assert torch.equal(plain, through)  # bit for bit
    through.sum().backward()
    assert not torch.allclose(x.grad, y.grad)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 32, 32), r"shape \(B, 3, H, W\)"),
        (torch.rand(1, 1, 32, 32), r"shape \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floats in"),
        (torch.rand(1, 3, 32, 32) * 255, "must lie in"),
        (torch.rand(1, 3, 32, 32) - 0.5, "must lie in"),
        (torch.full((1, 3, 32, 32), float("nan")), "must lie in"),
        (torch.zeros(1, 3, 0, 32), "at least one pixel"),
    ],
)
def test_bad_images_are_refused_in_one_sentence(images, message):
    with pytest.raises(ValueError, match=message) as caught:
        tiny()(images)
    assert "\n" not in str(caught.value)


def test_bad_masks_are_refused_in_one_sentence():
    purifier, images = tiny(), photos(2)
    n = GRID * GRID
    for mask in (torch.ones(2, 9, dtype=torch.bool), torch.ones(3, n, dtype=torch.bool)):
        with pytest.raises(ValueError, match=rf"boolean tensor of shape \(2, {n}\)"):
            purifier(images, mask=mask)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        purifier(images, mask=torch.ones(2, n))
    with pytest.raises(ValueError, match="first pass would see nothing"):
        purifier(images, mask=torch.zeros(n, dtype=torch.bool))
    everything = torch.ones(n, dtype=torch.bool)
    with pytest.raises(ValueError, match="second pass would see nothing"):
        purifier(images, mask=everything)
    assert tiny(NoMask(), passes=1)(images).shape == (2, 3, SIZE, SIZE)
    assert torch.equal(tiny(NoMask(), passes=1)(images), tiny(passes=1)(images, mask=everything))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 3}, "passes must be 1 or 2, got 3"),
        ({"encoder": "mean"}, "encoder must be 'drop' or 'zero', got 'mean'"),
        ({"output": "blend"}, "output must be 'decoder' or 'paste', got 'blend'"),
        ({"rule": NoMask()}, "use passes=1"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_presets_are_what_the_paper_and_the_released_code_do():
    assert {
        "paper": {"rule": Bernoulli(0.5), "encoder": "zero", "output": "decoder", "passes": 2},
        "released": {
            "rule": ExactCount(0.5, shared=True),
            "encoder": "drop",
            "output": "decoder",
            "passes": 2,
        },
    } == PRESETS


# --- saving and loading ---


@pytest.mark.parametrize(
    "rule", [ExactCount(0.4), Bernoulli(0.6), FixedPattern("seed:1")], ids=repr
)
def test_save_and_load(tmp_path, rule):
    purifier = tiny(rule, output="paste", encoder="zero")
    purifier.save_pretrained(tmp_path / "model", licence="Apache-2.0", card="# A card\n")
    loaded = Purifier.from_pretrained(tmp_path / "model")
    assert (loaded.rule, loaded.output, loaded.encoder, loaded.passes) == (rule, "paste", "zero", 2)
    assert loaded.autoencoder.config == CONFIG
    assert not loaded.training
    with torch.no_grad():
        a, b = (p(photos(), generator=seeded(0)) for p in (purifier, loaded))
    assert torch.equal(a, b)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["licence"] == "Apache-2.0"
    assert config["purifier"]["mask"] == rule_to_config(rule)
    assert (tmp_path / "model" / "README.md").read_text() == "# A card\n"


def test_half_precision_files_are_half_as_large_and_nearly_the_same(tmp_path):
    purifier = tiny()
    purifier.save_pretrained(tmp_path / "full")
    purifier.save_pretrained(tmp_path / "half", torch.float16)
    full, half = ((tmp_path / d / "model.safetensors").stat().st_size for d in ("full", "half"))
    assert half < 0.6 * full
    loaded = Purifier.from_pretrained(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    with torch.no_grad():
        a, b = (p(photos(), generator=seeded(0)) for p in (purifier, loaded))
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=5e-3, rtol=0)


def test_presets_and_options_override_what_is_stored(tmp_path):
    tiny(ExactCount(0.3), output="paste").save_pretrained(tmp_path)
    for name, preset in PRESETS.items():
        loaded = Purifier.from_pretrained(tmp_path, preset=name)
        assert {k: getattr(loaded, k) for k in preset} == preset
    mixed = Purifier.from_pretrained(tmp_path, preset="paper", encoder="drop", restore_size=True)
    assert (mixed.encoder, mixed.rule, mixed.restore_size) == ("drop", Bernoulli(0.5), True)
    with pytest.raises(ValueError, match="unknown preset 'papers': use one of paper, released"):
        Purifier.from_pretrained(tmp_path, preset="papers")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("model", "mean"), None, "no mean in its model settings"),
        (("model", "image_size"), None, "no image_size in its model settings"),
        (("model", "colour"), 3, "unknown model setting 'colour'"),
        (("model", "heads"), 5, "not a multiple of 5 heads"),
        (("purifier", "mask"), None, "no mask in its purifier settings"),
        (("purifier", "mask"), {"rule": "magic"}, "unknown mask rule 'magic'"),
        (("purifier", "speed"), 9, "unknown purifier setting 'speed'"),
        (("purifier", "passes"), 4, "passes must be 1 or 2"),
        (("purifier",), None, "no purifier settings"),
        (("model",), 7, "no model settings"),
        (("pixel_target",), "normalised", "pixel target 'normalised'"),
        (("pixel_target",), None, "pixel target None"),
    ],
)
def test_incomplete_or_unfit_configs_are_refused_in_one_sentence(tmp_path, where, value, message):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    part = config
    for key in where[:-1]:
        part = part[key]
    if value is None:
        del part[where[-1]]
    else:
        part[where[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        Purifier.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
