"""Backbones: this package's residual networks, torchvision's weights files, and the adapters."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pair.hub import ModelError
from pair.retrieval.backbones import RESNETS, build_backbone, load_resnet, normalisation
from pair.retrieval.hashing import HashConfig, HashNet
from pair.retrieval.resnet import BOTTLENECK50, ResNet, ResNetConfig

TINY = ResNetConfig((1, 1, 1, 1), 4, True)


def library(name: str):
    try:
        return __import__(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported beside this build of torch: {error}")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = {k: v.contiguous() for k, v in ResNet(TINY).state_dict().items()}
    return {**state, "fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}


def test_resnet50_has_torchvisions_shape():
    network, features = build_backbone("resnet50")
    state = network.state_dict()
    assert features == BOTTLENECK50.features == 2048
    assert sum(p.numel() for p in network.parameters()) == 25_557_032 - 2_049_000  # without fc
    assert state["layer3.0.downsample.0.weight"].shape == (1024, 512, 1, 1)
    assert network.layer3[0].conv2.stride == (2, 2)  # torchvision strides here, in the 3x3


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_file_is_read_and_its_classifier_dropped(tmp_path, suffix):
    path, state = tmp_path / f"weights{suffix}", tensors()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    network = load_resnet(path, TINY).eval()
    torch.manual_seed(0)
    wanted = ResNet(TINY).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(network(x), wanted(x))
    built, features = build_backbone(TINY, path)
    assert features == 128 and torch.equal(built.eval()(x), wanted(x))


def test_only_the_batch_counters_may_be_missing(tmp_path):
    path, state = tmp_path / "old.pth", tensors()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path)
    load_resnet(path, TINY)
    del state["layer2.0.conv1.weight"]
    torch.save(state, path)
    with pytest.raises(ModelError, match=r"1 weights missing \(layer2\.0\.conv1\.weight\)"):
        load_resnet(path, TINY)
    torch.save({**tensors(), "layer5.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="1 unknown"):
        load_resnet(path, TINY)
    with pytest.raises(ModelError, match="missing"):
        load_resnet(path, ResNetConfig((1, 2, 1, 1), 4, True))


def test_files_that_are_not_weights_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(ModelError, match="no weights file"):
        load_resnet(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="read safely"):
        load_resnet(path)
    torch.save(nn.Linear(2, 2), path)  # a whole module: unpickling it could run code
    with pytest.raises(ModelError, match="read safely"):
        load_resnet(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ModelError, match="state dict"):
        load_resnet(path)
    broken = tmp_path / "weights.safetensors"
    broken.write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="read safely"):
        load_resnet(broken)


def test_unknown_names_and_missing_libraries_are_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown backbone 'vgg'.*resnet50"):
        build_backbone("vgg")
    with pytest.raises(ValueError, match="name the weights file"):
        build_backbone("resnet50", True)
    with pytest.raises(ValueError, match="not a file"):
        build_backbone("timm:resnet18", "weights.pth")
    for name in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        with pytest.raises(ValueError, match=r"pair-retrieval\[timm\]"):
            build_backbone(f"{name}:resnet18")


@pytest.mark.parametrize("bits", [16, 32, 48, 64, 128])
def test_hash_network_of_every_length(bits):
    torch.manual_seed(0)
    net = HashNet(HashConfig(32, bits, ResNetConfig((1, 1, 1, 1), 4), tuple("abc"))).eval()
    assert net.codes(torch.rand(2, 3, 32, 32)).shape == (2, bits)
    assert net.centres.shape == (3, bits)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_torchvision_on_its_own_weights(tmp_path, name):
    library("torchvision")
    from torchvision import models

    torch.manual_seed(0)
    theirs = models.get_model(name, weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that are not 0 and 1
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = load_resnet(tmp_path / "weights.pth", RESNETS[name]).eval()
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "features"), [("resnet18", 512), ("mobilenet_v3_small", 1024), ("alexnet", 4096)]
)
def test_torchvision_backbones(tmp_path, name, features):
    library("torchvision")
    network, size = build_backbone(f"torchvision:{name}")
    assert size == features and network.eval()(torch.rand(2, 3, 64, 64)).shape == (2, features)
    net = HashNet(HashConfig(64, 32, f"torchvision:{name}", ("a", "b"), head="mlp")).eval()
    net.save_pretrained(tmp_path / "net")
    again, images = HashNet.from_pretrained(tmp_path / "net"), torch.rand(1, 3, 64, 64)
    assert torch.equal(net.encode_image(images), again.encode_image(images))
    with pytest.raises(ValueError, match="cannot make"):
        build_backbone("torchvision:resnet5000")


@pytest.mark.integration
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_timm_backbones(tmp_path, name):
    library("timm")
    network, features = build_backbone(f"timm:{name}")
    assert network.eval()(torch.rand(2, 3, 64, 64)).shape == (2, features)
    mean, std = normalisation(f"timm:{name}")
    net = HashNet(HashConfig(64, 32, f"timm:{name}", ("a", "b"), mean, std)).eval()
    net.save_pretrained(tmp_path / "net")
    again = HashNet.from_pretrained(tmp_path / "net")
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    assert torch.equal(net.encode_image(images), again.encode_image(images))
    again.encode_image(images).sum().backward()
    assert float(images.grad.abs().sum()) > 0
    with pytest.raises(ValueError, match="cannot make"):
        build_backbone("timm:resnet5000")
    assert normalisation("resnet50") is None
