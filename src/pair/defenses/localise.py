"""Detect and remove: find the patch pixels, then cover them."""

from __future__ import annotations

import torch
from torch import Tensor

from pair.defenses.base import Defense, evasion_loss
from pair.defenses.network import Network


class Localiser(Defense):
    """x' = x * (1 - M) + fill * M, with M the completed mask of pixels whose probability
    exceeds ``threshold``.

    The gradient passes threshold and completion straight through to the probabilities (BPDA with
    identity, as the sources of SAC and PatchZero attack themselves), and an adaptive attacker
    adds :meth:`detector_loss`.
    """

    bridged = True
    fill: Tensor

    def __init__(self, detector: Network, fill: tuple[float, float, float], threshold: float = 0.5):
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie strictly between 0 and 1, got {threshold}")
        self.detector, self.threshold = detector, threshold
        self.register_buffer("fill", torch.tensor(fill).view(3, 1, 1), persistent=False)

    def complete(self, mask: Tensor) -> Tensor:
        """(B, 1, H, W) bool -> the pixels to cover, same shape."""
        return mask

    def logits(self, images: Tensor) -> Tensor:
        """(B, 1, H, W), positive where a patch is seen (at the threshold 0.5)."""
        return self.detector.at_size(images)

    def probabilities(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) in [0, 1]."""
        return self.logits(images).sigmoid()

    def masks(self, images: Tensor) -> Tensor:
        """What is covered: (B, 1, H, W) bool."""
        return self.complete(self.probabilities(images) > self.threshold)

    def defend(self, images, generator, join):
        probability = self.probabilities(images)
        found = self.complete(probability.detach() > self.threshold).to(images.dtype)
        mask = join(found, lambda: probability)
        return images * (1 - mask) + self.fill * mask

    def detector_loss(self, images: Tensor, patch_mask: Tensor) -> Tensor:
        return evasion_loss(self.logits(images), patch_mask)
