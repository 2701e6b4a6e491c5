"""Any defense as a preprocessor of the Adversarial Robustness Toolbox (ART).

::

    from art.estimators.classification import PyTorchClassifier
    from pair.defenses import make
    from pair.integrations.art import preprocessor

    classifier = PyTorchClassifier(
        ..., clip_values=(0, 1), preprocessing_defences=[preprocessor(make("jpeg"))]
    )

ART's white-box attacks then differentiate through the defense with the gradient that it declares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pair.defenses.base import Defense

if TYPE_CHECKING:
    from art.defences.preprocessor import Preprocessor


def preprocessor(
    defense: Defense,
    *,
    scale: float = 1.0,
    channels_first: bool = True,
    seed: int | None = None,
    device_type: str = "cpu",
    apply_fit: bool = False,
) -> Preprocessor:
    """``defense`` as an ART ``PreprocessorPyTorch``.

    ``scale`` is the upper end of ART's ``clip_values``: 1 for images in [0, 1], 255 for images in
    [0, 255]. ``channels_first=False`` takes (B, H, W, 3). ``seed`` makes a random defense repeat
    one sequence of draws; without it every call draws afresh, and an attack should average
    ``defense.gradient.samples`` of them. ``apply_fit=True`` also defends training images.

    AT and HM harden the target and leave images alone: use ``defense.harden(target)`` instead.
    Raises ``ValueError`` where ART is not installed or an option makes no sense.
    """
    try:
        from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
    except ImportError as error:
        raise ValueError(
            "this adapter needs the Adversarial Robustness Toolbox: "
            "pip install 'pair-retrieval[art]'"
        ) from error
    if not isinstance(defense, Defense):
        raise ValueError(f"expected a defense of pair.defenses, got {type(defense).__name__}")
    if scale <= 0:
        raise ValueError(f"scale must be the positive upper end of clip_values, got {scale}")

    class DefensePreprocessor(PreprocessorPyTorch):
        params = ["scale", "channels_first"]  # noqa: RUF012  (ART's convention)

        def __init__(self) -> None:
            super().__init__(device_type=device_type, apply_fit=apply_fit, apply_predict=True)
            self.defense = defense.to(self.device)
            self.scale, self.channels_first = scale, channels_first
            self.generator = None if seed is None else torch.Generator().manual_seed(seed)

        def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
            images = x if self.channels_first else x.permute(0, 3, 1, 2)
            out = self.defense(images.float() / self.scale, generator=self.generator)
            out = (out * self.scale).to(x.dtype)
            return (out if self.channels_first else out.permute(0, 2, 3, 1)), y

    return DefensePreprocessor()
