"""The counts of work against torch's own counter and against what the layers really touch."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pair import cli, kernels, work
from pair.generator import BASE, LARGE, GeneratorConfig, MaskedAutoencoder, patchify
from pair.masks import ExactCount
from pair.purifier import Purifier
from pair.tokens import Selection

CONFIGS = [
    GeneratorConfig(48, 8, 32, 2, 4, 16, 2, 2),
    GeneratorConfig(32, 4, 16, 1, 2, 32, 1, 4, mlp_ratio=2.0),
]


@pytest.fixture(autouse=True)
def plain():
    before = kernels.set_fused(False)  # torch's counter does not know the fused kernels
    yield
    kernels.set_fused(before)


def counted(run) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", CONFIGS, ids=["wide", "deep"])
@pytest.mark.parametrize("encoder", ["drop", "zero"])
@pytest.mark.parametrize("output", ["decoder", "paste"])
@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_multiply_adds_are_those_of_torchs_counter(config, encoder, output, ratio):
    purifier = Purifier(
        MaskedAutoencoder(config), ExactCount(ratio), encoder=encoder, output=output
    ).eval()
    images = torch.rand(3, 3, config.image_size, config.image_size)
    mask = purifier.draw_mask(3)
    visible = int(mask[0].sum())
    first, second = work.both_passes(config, visible, encoder, output)
    total = 2 * 3 * (first + second).multiply_adds
    assert counted(lambda: purifier(images, mask=mask)) == total


class Traffic(TorchDispatchMode):
    """Numbers that linear layers and attention read and write; weights apart."""

    def __init__(self):
        super().__init__()
        self.weights = self.activations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if "addmm" in name:
            bias, x, weight = args[:3]
            self.weights += bias.numel() + weight.numel()
            self.activations += x.numel() + out.numel()
        elif "scaled_dot_product" in name:
            self.activations += sum(a.numel() for a in args[:3]) + out[0].numel()
        return out


@pytest.mark.parametrize("config", CONFIGS, ids=["wide", "deep"])
@pytest.mark.parametrize("wanted", [True, False])
@torch.no_grad()
def test_bytes_are_what_the_layers_touch(config, wanted):
    generator = MaskedAutoencoder(config).eval()
    tokens = patchify(torch.rand(2, 3, config.image_size, config.image_size), config.patch_size)
    mask = ExactCount(0.25)(2, config.grid)
    seen, rest = Selection.of(mask), Selection.of(~mask)
    with Traffic() as traffic:
        states = generator.states(seen.take(tokens), seen)
        generator.predict(states, rest if wanted else None)
    visible = int(mask[0].sum())
    got = work.one_pass(config, visible, config.grid**2 - visible if wanted else None)
    assert traffic.weights * 4 == got.weight_bytes
    assert traffic.activations * 4 == 2 * got.activation_bytes
    held = sum(p.numel() for n, p in generator.named_parameters() if "token" not in n)
    norms = sum(p.numel() for n, p in generator.named_parameters() if "norm" in n)
    assert got.weight_bytes == 4 * (held - norms)


def test_known_sizes():
    """One pass of ViT-B/16 at 98 visible tokens: 28.2 GFLOP by hand; work grows with the model."""
    full = work.one_pass(BASE, 98)
    by_hand = 98 * 768 * 768 + 99 * 768 * 512 + 196 * 512 * 768
    by_hand += 12 * (99 * 12 * 768**2 + 2 * 99**2 * 768)
    by_hand += 8 * (197 * 12 * 512**2 + 2 * 197**2 * 512)
    assert full.multiply_adds == by_hand
    assert 28.0 < 2 * full.multiply_adds / 1e9 < 28.5
    assert work.one_pass(LARGE, 98).multiply_adds > 2 * full.multiply_adds
    lean, zero = (sum(w.multiply_adds for w in work.both_passes(BASE, encoder=e))
                  for e in ("drop", "zero"))  # fmt: skip
    assert zero > 1.5 * lean
    assert full.intensity(32) > full.intensity(1)
    with pytest.raises(ValueError, match="1 to 195 can be visible"):
        work.both_passes(BASE, 196)


def test_models_show_prints_the_work_of_a_generator(tmp_path, capsys, monkeypatch):
    config = CONFIGS[0]
    Purifier(MaskedAutoencoder(config), output="paste").save_pretrained(tmp_path / "m")
    monkeypatch.setattr("sys.argv", ["pair", "models", "show", str(tmp_path / "m")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    shown = json.loads(capsys.readouterr().out)
    assert shown["work"] == work.summary(config, output="paste")
