"""Backbones of the hash networks: own residual networks, torchvision's and timm's.

The paper's CSQ-ResNet50 needs neither library: ``resnet50`` is written out in this package with
torchvision's parameter names, and :func:`load_resnet` reads torchvision's weights file.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pair import hub
from pair.retrieval.resnet import BOTTLENECK50, ResNet, ResNetConfig

RESNETS = {
    "resnet18": ResNetConfig((2, 2, 2, 2), 64, False),
    "resnet34": ResNetConfig((3, 4, 6, 3), 64, False),
    "resnet50": BOTTLENECK50,
    "resnet101": ResNetConfig((3, 4, 23, 3), 64, True),
    "resnet152": ResNetConfig((3, 8, 36, 3), 64, True),
}


def build_backbone(
    spec: ResNetConfig | str, pretrained: str | os.PathLike[str] | bool = False
) -> tuple[nn.Module, int]:
    """A network (B, 3, H, W), normalised -> pooled features (B, F), and F.

    ``spec``: a config, ``"resnet18"`` .. ``"resnet152"`` (this package's), ``"timm:NAME"`` or
    ``"torchvision:NAME"`` (extra ``timm``). ``pretrained``: False, for random weights; the path
    of a torchvision ResNet file, for this package's networks; or True, for the default ImageNet
    weights of the other two, which are downloaded.
    """
    if isinstance(spec, str) and spec.startswith("timm:"):
        return _timm(spec.removeprefix("timm:"), _flag(spec, pretrained))
    if isinstance(spec, str) and spec.startswith("torchvision:"):
        return _torchvision(spec.removeprefix("torchvision:"), _flag(spec, pretrained))
    if isinstance(spec, str):
        if spec not in RESNETS:
            raise ValueError(
                f"unknown backbone {spec!r}: use {', '.join(RESNETS)}, timm:NAME or "
                "torchvision:NAME"
            )
        spec = RESNETS[spec]
    if pretrained is True:
        raise ValueError(
            "name the weights file of this network, for example torchvision's "
            "resnet50-0676ba61.pth from https://download.pytorch.org/models/"
        )
    network = load_resnet(pretrained, spec) if pretrained else ResNet(spec)
    return network, spec.features


def normalisation(spec: ResNetConfig | str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std that a timm backbone's weights were trained with; None where not recorded."""
    if not (isinstance(spec, str) and spec.startswith("timm:")):
        return None
    network, _ = _timm(spec.removeprefix("timm:"), False)
    config = getattr(network, "pretrained_cfg", None) or {}
    return (tuple(config["mean"]), tuple(config["std"])) if "mean" in config else None


def load_resnet(path: str | os.PathLike[str], config: ResNetConfig = BOTTLENECK50) -> ResNet:
    """A residual network with the weights of a torchvision file (.pth or .safetensors).

    The classifier (``fc.*``) is dropped; everything else must fit exactly. Old files lack the
    batch counters of batch norm, which inference does not use: those alone may be missing.
    Pickles are read with ``weights_only=True``.
    """
    network = ResNet(config)
    tensors = {k: v for k, v in _read(Path(path)).items() if not k.startswith("fc.")}
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            tensors.setdefault(key, value)
    hub.load_into(network, tensors, os.fspath(path))
    return network


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise hub.ModelError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise hub.ModelError(f"{path} holds no weights that can be read safely: {first}") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise hub.ModelError(f"{path} must hold a state dict: names and tensors, nothing else")
    return found


def _flag(spec: str, pretrained: str | os.PathLike[str] | bool) -> bool:
    if not isinstance(pretrained, bool):
        raise ValueError(f"{spec} takes pretrained=True or False, not a file")
    return pretrained


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, int]:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch
        raise _missing("timm", error) from error
    try:
        network = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:
        raise ValueError(f"timm cannot make {name!r}: {error}") from error
    # num_features may differ from what the pooled head gives out (MobileNet, EfficientViT).
    return network, getattr(network, "head_hidden_size", None) or network.num_features


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, int]:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise _missing("torchvision", error) from error
    try:
        network = models.get_model(name, weights="DEFAULT" if pretrained else None)
    except Exception as error:
        raise ValueError(f"torchvision cannot make {name!r}: {error}") from error
    linear = [(k, m) for k, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"torchvision's {name} has no linear classifier to replace")
    where, last = linear[-1]  # the classifier stands last; what goes into it are the features
    parent, _, child = where.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network, last.in_features


def _missing(library: str, error: Exception) -> ValueError:
    return ValueError(f"{library} cannot be used ({error}): pip install 'pair-retrieval[timm]'")
