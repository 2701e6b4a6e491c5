"""Residual networks with torchvision's parameter names.

Small widths make the models that ship; ``ResNet(BOTTLENECK50)`` takes torchvision's ResNet-50
weights. Written out here because torchvision cannot be imported next to every build of torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ResNetConfig:
    layers: tuple[int, int, int, int] = (2, 2, 2, 2)
    width: int = 32
    bottleneck: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def features(self) -> int:
        return self.width * 8 * (4 if self.bottleneck else 1)


BOTTLENECK50 = ResNetConfig((3, 4, 6, 3), 64, True)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inside: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inside, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inside: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.downsample = _shortcut(inside, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shortcut(inside: int, outside: int, stride: int) -> nn.Sequential | None:
    if inside == outside and stride == 1:
        return None
    conv = nn.Conv2d(inside, outside, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside))


class ResNet(nn.Module):
    """(B, 3, H, W), normalised -> pooled features (B, features)."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = config
        block = Bottleneck if config.bottleneck else BasicBlock
        width = config.width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inside = width
        for i, depth in enumerate(config.layers):
            w = width * 2**i
            blocks = []
            for j in range(depth):
                blocks.append(block(inside, w, 2 if i > 0 and j == 0 else 1))
                inside = w * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def feature_map(self, x: Tensor) -> Tensor:
        """Last convolutional features (B, features, h, w)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_map(x).mean((2, 3))
