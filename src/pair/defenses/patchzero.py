"""PatchZero (Xu et al. 2023): a PSPNet finds the patch, the mean pixel replaces it."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.defenses.localise import Localiser
from pair.defenses.network import Network, NetworkConfig, conv_bn
from pair.retrieval.resnet import ResNet, ResNetConfig

BINS = (1, 2, 3, 6)


def _dilate(layer: nn.Module, dilation: int) -> None:
    """Trade the stride of a ResNet stage for dilation: same weights, twice the resolution."""
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)


class PyramidNet(Network):
    """Pyramid scene parsing on a small ResNet of output stride 8, one logit per pixel.

    (B, 3, H, W) in [0, 1] -> (B, 1, H, W); H, W multiples of 8.
    """

    kind = "patchzero"
    multiple = 8
    mean: Tensor
    std: Tensor

    def __init__(self, config: NetworkConfig | None = None):
        super().__init__(config)
        c = self.config
        self.backbone = ResNet(ResNetConfig(width=c.width))
        _dilate(self.backbone.layer3, 2)
        _dilate(self.backbone.layer4, 4)
        features = 8 * c.width
        self.pyramid = nn.ModuleList(
            nn.Sequential(nn.Conv2d(features, features // 4, 1), nn.ReLU()) for _ in BINS
        )
        self.head = nn.Sequential(conv_bn(2 * features, 4 * c.width), nn.Conv2d(4 * c.width, 1, 1))
        self.register_buffer("mean", torch.tensor(c.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(c.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.backbone.feature_map((images - self.mean) / self.std)
        size = tuple(x.shape[-2:])
        context = [
            F.interpolate(conv(F.adaptive_avg_pool2d(x, bins)), size, mode="bilinear")
            for bins, conv in zip(BINS, self.pyramid, strict=True)
        ]
        logits = self.head(torch.cat([x, *context], 1))
        return F.interpolate(logits, tuple(images.shape[-2:]), mode="bilinear")


class PatchZero(Localiser):
    """Replace what the detector finds, grown by ``grow`` pixels, by the mean pixel.

    ``grow`` comes from a second-hand summary (3 to 5 pixels); 0 switches it off.
    """

    def __init__(self, detector: PyramidNet, threshold: float = 0.5, grow: int = 3):
        super().__init__(detector, detector.config.mean, threshold)
        if grow < 0:
            raise ValueError(f"grow must not be negative, got {grow}")
        self.grow = grow

    def complete(self, mask: Tensor) -> Tensor:
        if not self.grow:
            return mask
        return F.max_pool2d(mask.float(), 2 * self.grow + 1, 1, self.grow) > 0

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str] = "patchzero-small", **options
    ) -> PatchZero:
        return cls(PyramidNet.from_pretrained(name), **options).eval()
