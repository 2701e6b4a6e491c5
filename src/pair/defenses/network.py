"""The networks inside trained defenses: one configuration, saved and loaded as model folders."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair import hub
from pair.generator import IMAGENET_MEAN, IMAGENET_STD
from pair.images import resize


@dataclass(frozen=True)
class NetworkConfig:
    """Size that the network was trained at, its width, and the pixel statistics it uses."""

    image_size: int = 112
    width: int = 16
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))


class Network(nn.Module):
    """Base of detectors and denoisers. ``at_size`` runs the network at its trained size."""

    kind: ClassVar[str]
    multiple: ClassVar[int] = 16  # inputs are padded to a multiple of this

    def __init__(self, config: NetworkConfig | None = None):
        super().__init__()
        self.config = config or NetworkConfig()

    def at_size(self, images: Tensor) -> Tensor:
        """The network's map for images of any size, resized back to that size."""
        small = resize(images, self.config.image_size)
        h, w = small.shape[-2:]
        pad = (0, -w % self.multiple, 0, -h % self.multiple)
        out = self(F.pad(small, pad, mode="replicate"))[..., :h, :w]
        return resize(out, (images.shape[-2], images.shape[-1]))

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> Self:
        """A shipped name, a folder or a hub repository; strict."""
        folder = hub.resolve(name)
        config = hub.read_config(folder, cls.kind)
        try:
            model = cls(NetworkConfig(**config["model"]))
        except (KeyError, TypeError) as error:
            raise hub.ModelError(f"{folder / hub.CONFIG} is incomplete: {error}") from error
        hub.load_into(model, hub.read_weights(folder, config), str(folder))
        return model.eval().requires_grad_(False)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        card: str | None = None,
        **facts: Any,
    ) -> None:
        config = {"kind": self.kind, "model": asdict(self.config), **facts}
        hub.save(folder, self, config, dtype, card)


def conv_bn(inside: int, outside: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(),
    )


def double_size(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
