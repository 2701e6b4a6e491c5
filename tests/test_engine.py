"""The OpenVINO backend: the same function as torch in fp32, close in int8, and its cache."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from pair import engine
from pair.generator import GeneratorConfig, MaskedAutoencoder, patchify, unpatchify
from pair.graph import Passes, inputs
from pair.masks import Bernoulli, ExactCount
from pair.purifier import Purifier

CONFIG = GeneratorConfig(32, 8, 32, 1, 2, 32, 2, 2)  # 16 tokens
RULES = [ExactCount(0.5), ExactCount(0.3), Bernoulli(0.5)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generator(seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    model = MaskedAutoencoder(CONFIG)
    for name, p in model.named_parameters():
        if "decoder_pred" not in name:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval().requires_grad_(False)


def photos(batch: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=seeded(seed))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """One cache for the module, so that each graph is converted once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("PAIR_CACHE", str(folder))
        yield folder


# --- the graph, in torch ---


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("output", ["decoder", "paste"])
@pytest.mark.parametrize("poison", [False, True])
@torch.no_grad()
def test_the_graph_is_the_purifier(rule, output, poison):
    purifier, images = Purifier(generator(), rule, output=output), photos()
    mask = purifier.draw_mask(5, seeded(0))
    tokens = patchify(images, 8)
    if poison:  # what is hidden is gone, also where short rows are filled up
        tokens = torch.where(mask[..., None], tokens, torch.nan)
    given = inputs(tokens, mask)
    assert ("visible_bias" in given) == isinstance(rule, Bernoulli)
    got = unpatchify(Passes(generator(), output == "paste")(**given), 8).clamp(0, 1)
    torch.testing.assert_close(got, purifier(images, mask=mask), rtol=0, atol=1e-5)


def test_inputs_name_every_token_once():
    mask = Bernoulli(0.5)(4, 4, generator=seeded(3))
    given = inputs(torch.zeros(4, 16, 3), mask)
    longest = given["visible"].shape[1]
    for i in range(4):
        shown = mask[i].nonzero()[:, 0].tolist()
        gone = (~mask[i]).nonzero()[:, 0].tolist()
        assert given["visible"][i, : len(shown)].tolist() == shown
        assert given["hidden"][i, : len(gone)].tolist() == gone
        assert set(given["visible"][i, len(shown) :].tolist()) <= set(shown)  # never a hidden one
        places = given["place"][i].tolist()
        assert [places[t] for t in shown] == list(range(len(shown)))
        assert [places[t] for t in gone] == list(range(longest, longest + len(gone)))
        bias = given["visible_bias"][i, 0, 0]
        assert (bias == 0).tolist() == [k <= len(shown) for k in range(1 + longest)]


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tpu"}, "backend must be one of auto, torch, openvino"),
        ({"precision": "int4"}, "precision must be one of fp32, bf16, fp16, int8"),
        ({"backend": "torch", "precision": "int8"}, "int8 needs the backend 'openvino'"),
        ({"backend": "openvino", "precision": "fp16"}, "fp16 needs the backend 'torch'"),
        ({"backend": "openvino", "passes": 1}, "two passes and encoder='drop'"),
        ({"precision": "int8", "encoder": "zero"}, "two passes and encoder='drop'"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        Purifier(generator(), **settings)


def test_auto_is_torch_unless_int8_is_wanted():
    assert engine.choose("auto", "fp32") == engine.choose("torch", "fp32") == "torch"
    assert engine.choose("auto", "bf16") == engine.choose("auto", "fp16") == "torch"
    assert engine.choose("auto", "int8") == engine.choose("openvino", "fp32") == "openvino"
    assert engine.choose("openvino", "bf16") == "openvino"


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    purifier = Purifier(generator(), backend="openvino")
    with pytest.raises(ValueError, match=r"pip install 'pair-retrieval\[openvino\]'"):
        purifier(photos(1))
    with pytest.raises(ValueError, match="int8 needs nncf"):
        monkeypatch.setitem(sys.modules, "nncf", None)
        engine.calibrate(None, generator(), ExactCount(0.5))


# --- OpenVINO ---


@pytest.mark.parametrize(
    ("rule", "output"),
    [(RULES[0], "decoder"), (RULES[1], "decoder"), (RULES[2], "decoder"), (RULES[0], "paste")],
)
@torch.no_grad()
def test_openvino_computes_what_torch_computes(rule, output):
    pytest.importorskip("openvino")
    plain = Purifier(generator(), rule, output=output)
    fast = Purifier(generator(), rule, output=output, backend="openvino")
    for batch in (1, 3, 6):  # one graph for all sizes and masks
        images = photos(batch)
        mask = plain.draw_mask(batch, seeded(batch))
        got = fast(images, mask=mask)
        torch.testing.assert_close(got, plain(images, mask=mask), rtol=0, atol=1e-5)
        for i in range(batch):
            alone = fast(images[i : i + 1], mask=mask[i : i + 1])
            torch.testing.assert_close(alone[0], got[i], rtol=0, atol=1e-5)
    assert fast(torch.zeros(0, 3, 32, 32)).shape == (0, 3, 32, 32)


@torch.no_grad()
def test_hidden_pixels_do_not_reach_openvinos_result():
    pytest.importorskip("openvino")
    fast, images = Purifier(generator(), backend="openvino"), photos(2)
    mask = fast.draw_mask(2, seeded(0))
    shown = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(
        fast(images, mask=mask), fast(torch.where(shown, images, 1 - images), mask=mask)
    )


def test_gradients_come_from_torch():
    pytest.importorskip("openvino")
    fast = Purifier(generator(), backend="openvino")
    images = photos(2).requires_grad_()
    fast(images, generator=seeded(0)).sum().backward()
    other = photos(2).requires_grad_()
    Purifier(generator())(other, generator=seeded(0)).sum().backward()
    assert torch.equal(images.grad, other.grad)
    assert float(images.grad.abs().sum()) > 0


@torch.no_grad()
def test_new_weights_are_noticed_and_copies_are_independent(cache):
    pytest.importorskip("openvino")
    fast, images = Purifier(generator(), backend="openvino"), photos(2)
    mask = fast.draw_mask(2, seeded(0))
    before = fast(images, mask=mask)
    twin = copy.deepcopy(fast)
    fast.autoencoder.load_state_dict(generator(seed=5).state_dict())
    now = fast(images, mask=mask)
    wanted = Purifier(generator(seed=5))(images, mask=mask)
    torch.testing.assert_close(now, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(now, before, atol=1e-3)
    assert torch.equal(twin(images, mask=mask), before)


@torch.no_grad()
def test_graphs_are_cached_and_damaged_ones_made_again(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setenv("PAIR_CACHE", str(tmp_path / "deep" / "cache"))
    made = []
    real = engine.convert
    monkeypatch.setattr(engine, "convert", lambda *a: made.append(a) or real(*a))
    images = photos(2)
    first = Purifier(generator(), backend="openvino")(images, generator=seeded(0))
    again = Purifier(generator(), backend="openvino")(images, generator=seeded(0))
    assert torch.equal(first, again)
    assert len(made) == 1
    (graph,) = (tmp_path / "deep" / "cache").glob("openvino-*/graph.xml")
    assert not list(graph.parent.parent.glob(".making-*"))
    graph.write_text("no graph")
    third = Purifier(generator(), backend="openvino")(images, generator=seeded(0))
    assert torch.equal(first, third)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("backend", "precision"), [("torch", "bf16"), ("torch", "fp16"), ("openvino", "bf16")]
)
@torch.no_grad()
def test_half_precision_is_close_and_hides_as_much(backend, precision):
    if backend == "openvino":
        pytest.importorskip("openvino")
    plain = Purifier(generator())
    half = Purifier(generator(), backend=backend, precision=precision)
    assert precision in half.extra_repr()  # a collection tells it from fp32
    images = photos(4)
    mask = plain.draw_mask(4, seeded(0))
    wanted, got = plain(images, mask=mask), half(images, mask=mask)
    assert got.dtype == torch.float32
    error = float((got - wanted).abs().mean())
    assert error < 0.02 * float(wanted.std())
    if backend == "torch":
        assert error > 0
    # What no pass sees has no influence, as in fp32: pixels of the second half in the first pass.
    shown = mask[:1]
    tokens = patchify(images[:1], 8)
    tokens[~shown] = 7.0
    other = unpatchify(tokens, 8).clamp(0, 1)
    assert torch.equal(half(other, mask=shown), half(images[:1], mask=shown))


def test_half_precision_by_torch_has_gradients():
    half = Purifier(generator(), precision="bf16")
    images = photos(2).requires_grad_()
    mask = half.draw_mask(2, seeded(0))
    half(images, mask=mask).square().sum().backward()
    slope = images.grad
    images.grad = None
    Purifier(generator())(images, mask=mask).square().sum().backward()
    cosine = torch.nn.functional.cosine_similarity(slope.flatten(), images.grad.flatten(), dim=0)
    assert float(cosine) > 0.99


@pytest.mark.slow
@torch.no_grad()
def test_int8_is_close():
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    purifier = Purifier(generator(), precision="int8")
    plain = Purifier(generator())
    images = photos(8)
    mask = plain.draw_mask(8, seeded(0))
    got, wanted = purifier(images, mask=mask), plain(images, mask=mask)
    assert not torch.equal(got, wanted)
    error = float((got - wanted).square().mean().sqrt())
    assert error < 0.25 * float(wanted.std())
    with pytest.raises(ValueError, match="int8 has no gradients"), torch.enable_grad():
        purifier(images.requires_grad_(), mask=mask)


def test_nothing_reports_home():
    """In a fresh interpreter: the toolkit's telemetry stays without consent."""
    pytest.importorskip("openvino")
    script = """
from pair.engine import _openvino
_openvino()
import openvino.tools.ovc
import openvino_telemetry
sender = openvino_telemetry.Telemetry()
assert sender.consent is False, sender.consent
"""
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "NNCF_CI")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=clean
    )
    assert done.returncode == 0, done.stderr
