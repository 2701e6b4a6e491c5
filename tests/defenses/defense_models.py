"""Tiny models with random weights, saved as the folders that the factories load."""

from pathlib import Path

import torch
from torch import nn

from pair.defenses.denoise import ArnNet, CafdNet
from pair.defenses.network import NetworkConfig
from pair.defenses.patchzero import PyramidNet
from pair.defenses.sac import UNet
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.purifier import Purifier
from pair.retrieval.clip import ClipConfig, SmallClip
from pair.retrieval.hashing import HashConfig, HashNet
from pair.retrieval.resnet import ResNetConfig

SIZE = 32
CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")


def tiny_generator() -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = MaskedAutoencoder(GeneratorConfig(SIZE, 8, 32, 1, 2, 32, 1, 2))
    nn.init.normal_(model.decoder_pred.weight, std=0.05)  # outputs well inside [0, 1]
    return model


def tiny_network(cls):
    torch.manual_seed(0)
    net = cls(NetworkConfig(image_size=SIZE, width=4)).eval()
    if cls in (UNet, PyramidNet):
        # A detector that fires on about half of the pixels of noise.
        noise = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        logits = net(noise).detach()
        last = net.last if cls is UNet else net.head[-1]
        last.bias.data = (last.bias.data - logits.median()) / logits.std()
        last.weight.data /= logits.std()
    if cls is CafdNet:
        nn.init.normal_(net.last.weight, std=0.01)  # zero at birth: no gradient to check
    return net


def save_models(root: Path) -> None:
    """One tiny model per kind, each in the subfolder of its name."""
    Purifier(tiny_generator()).save_pretrained(root / "pair")
    for cls in (UNet, PyramidNet, ArnNet, CafdNet):
        tiny_network(cls).save_pretrained(root / cls.kind)
    torch.manual_seed(0)
    backbone = ResNetConfig(width=4)
    words = ("<pad>", "<unknown>", "a", "of", "photo", *CLASSES)
    clip = ClipConfig(SIZE, 16, backbone, 16, 1, 2, vocabulary=words)
    SmallClip(clip).save_pretrained(root / "clip")
    HashNet(HashConfig(SIZE, 16, backbone, CLASSES)).save_pretrained(root / "csq")
