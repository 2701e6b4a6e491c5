"""A decoded picture: 8- or 16-bit samples of some colour mode, turned into RGB on demand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MODES_8 = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
# EXIF orientation -> axes of (3, H, W) to flip, from 5 on after a transposition.
FLIPS = {1: (), 2: (-1,), 3: (-2, -1), 4: (-2,), 5: (), 6: (-1,), 7: (-2, -1), 8: (-2,)}


@dataclass
class Picture:
    """A decoded picture as it is stored, before orientation; at 1-8 bytes per pixel.

    ``low`` holds the low bytes of 16-bit colour, whose high bytes are in ``main``.
    """

    main: Image.Image
    low: Image.Image | None = None
    orientation: int = 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) before orientation."""
        return self.main.height, self.main.width

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright picture."""
        h, w = self.stored_size
        return (w, h) if self.orientation >= 5 else (h, w)

    def pixels(self, box: tuple[int, int, int, int] | None = None) -> Tensor:
        """(3, h, w) float32 in [0, 1] of ``box`` = (left, top, right, bottom), as stored."""
        main = self.main.crop(box) if box else self.main
        low = self.low.crop(box) if box and self.low else self.low
        key = main.info.get("transparency")
        if low is not None or main.mode.startswith("I"):
            full, values = 65535.0, np.array(main, dtype=np.float32)
            if low is not None:
                values = values * 256 + np.asarray(low)
        elif main.mode == "F":
            full, values, key = 1.0, np.array(main), None
        else:
            full, values, key = 255.0, np.array(_plain(main), dtype=np.float32), None
        x = torch.from_numpy(values if values.ndim == 3 else values[..., None]).permute(2, 0, 1)
        x = x.div_(full)
        if key is not None:  # the one 16-bit colour that stands for "transparent"
            colour = torch.tensor(key, dtype=torch.float32).view(-1, 1, 1).div(full)
            x = torch.cat([x[:3], (x[:3] != colour).any(0, keepdim=True)])
        if len(x) in (2, 4):
            x = x[:-1] * x[-1:] + (1 - x[-1:])
        return x.expand(3, -1, -1).contiguous()

    @property
    def opaque_bytes(self) -> bool:
        """Whether this is the ordinary case: 8-bit grey or RGB, nothing transparent."""
        main = self.main
        return main.mode in ("L", "RGB") and self.low is None and not main.has_transparency_data

    def samples(self, top: int, bottom: int) -> np.ndarray:
        """(rows, w) or (rows, w, 3) bytes as stored, of an ordinary picture."""
        whole = (top, bottom) == (0, self.main.height)
        return np.asarray(self.main if whole else self.main.crop((0, top, self.main.width, bottom)))

    def upright(self, x: Tensor) -> Tensor:
        """Apply the orientation to (..., H, W); equals Pillow's ``exif_transpose``."""
        if self.orientation >= 5:
            x = x.transpose(-1, -2)
        return x.flip(FLIPS[self.orientation]).contiguous()


def _plain(picture: Image.Image) -> Image.Image:
    """To 8-bit RGB or, where anything may be transparent, RGBA."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
