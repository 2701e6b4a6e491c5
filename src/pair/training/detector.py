"""Train the patch detectors of SAC and PatchZero on clean photos with generated patches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.data.pack import Collection
from pair.defenses.base import evasion_loss
from pair.defenses.localise import Localiser
from pair.defenses.network import Network, NetworkConfig
from pair.defenses.patchzero import PatchZero, PyramidNet
from pair.defenses.sac import Sac, UNet
from pair.training import start, towers
from pair.training.augment import crop_flip, to_float
from pair.training.crafted import KINDS, Bank, build_bank, craft, draw, paste, victims


@dataclass(frozen=True)
class DetectorTraining:
    """What a detector learns from.

    Photos of the training split, a share ``clean`` of them without a patch, the others with one
    square of side ``low`` to ``high`` of the image. The bank of patches is crafted once, before
    the first step, against ``clip`` and ``csq`` (empty = leave out), without the held-out
    classes. With probability ``adaptive`` a step attacks the detector itself, starting from the
    pasted patch (SAC: self adversarial training; PatchZero: its second stage).
    """

    image_size: int = 112
    width: int = 16
    init: str = ""  # detector to continue from
    clip: str = "clip-small"
    csq: str = "csq-small"
    clean: float = 0.3
    low: float = 0.15
    high: float = 0.5
    bank: int = 192  # patches of each kind
    craft_steps: int = 30
    craft_step: float = 0.08
    adaptive: float = 0.0
    inner_steps: int = 10
    inner_step: float = 0.05
    validation: int = 64  # held-out photos
    lr: float = 1e-4

    @property
    def photo_side(self) -> int:
        """Side at which photos are decoded when they come from a data set."""
        return self.image_size * 8 // 7


class _DetectorTask:
    """See :class:`pair.training.loop.Task`."""

    network: ClassVar[type[Network]]

    def __init__(self, config: DetectorTraining, pack: Collection):
        self.config, self.pack, self.device = config, pack, torch.device("cpu")
        if config.init:
            self.module = self.network.from_pretrained(config.init).requires_grad_(True)
            if self.module.config.image_size != config.image_size:
                raise ValueError(f"{config.init} was trained at {self.module.config.image_size} px")
        else:
            self.module = self.network(NetworkConfig(config.image_size, config.width))
        self.rows = pack.where(lambda label, data, split: split == "train")
        held = pack.where(lambda label, data, split: split in ("val", "gallery"))
        if not len(self.rows) or not len(held):
            raise ValueError("the pack has no training or no held-out photos (splits val, gallery)")
        self.seeded = torch.Generator().manual_seed(0)
        held = held[torch.randperm(len(held), generator=self.seeded)][: config.validation]
        labels, said = towers.classes(pack), towers.captions(pack)
        self.victims, self.unseen_victims = (
            victims(config.clip, config.csq, labels, side, said) for side in (False, True)
        )
        chosen = self.rows[torch.randperm(len(self.rows), generator=self.seeded)][: config.bank]
        self.sources = pack.batch(chosen, config.image_size)
        self.photos = pack.batch(held, config.image_size)

    @cached_property
    def banks(self) -> tuple[Bank, Bank]:
        """Patches to train on and, of other photos, classes and codes, to validate on. Made when
        they are first needed, on the device of the training, in single precision."""
        c = self.config
        made = (c.low, c.high, c.craft_steps, c.craft_step)
        with torch.autocast(self.device.type, enabled=False):
            known = build_bank(self.sources, self.victims, *made, generator=self.seeded)
            unseen = build_bank(self.photos, self.unseen_victims, *made, generator=self.seeded)
        del self.sources
        return known, unseen

    @property
    def bank(self) -> Bank:
        return self.banks[0]

    @property
    def unseen(self) -> Bank:
        return self.banks[1]

    def to(self, device: torch.device) -> None:
        """Move everything that takes part in a step."""
        self.device = device
        self.module.to(device)
        self.sources, self.photos = self.sources.to(device), self.photos.to(device)
        for victim in (*self.victims, *self.unseen_victims):
            victim.to(device)

    def prefetch(self, rows: Tensor) -> None:
        self.pack.prefetch(self.rows[rows])

    def inputs(self) -> dict[str, str]:
        """SHA-256 of what the settings name, before the first step."""
        found = {"csq" if v.hashing else "clip": start.digest(v.module) for v in self.victims}
        return {**found, "init": start.digest(self.module)} if self.config.init else found

    def size(self) -> int:
        return len(self.rows)

    def defense(self) -> Localiser:
        """The defense around the present weights."""
        raise NotImplementedError

    def segmentation_loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        raise NotImplementedError

    def inner_objective(self, masks: Tensor, generator: torch.Generator):
        """What the inner attack of adaptive steps minimises."""
        raise NotImplementedError

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        c = self.config
        raw = self.pack.raw(self.rows[rows]).to(self.device)
        images = crop_flip(to_float(raw), c.image_size, generator)
        contents = draw(self.bank, len(images), c.clean, generator)
        patched, masks = paste(images, contents, generator)
        if float(torch.rand(1, generator=generator)) < c.adaptive:
            self.module.eval()  # the attack must not move the batch statistics
            objective = self.inner_objective(masks, generator)
            patched = craft(images, masks, patched, objective, c.inner_steps, c.inner_step)
            self.module.train()
        logits = self.module(patched)
        found = logits.detach() > 0
        hit = (found & (masks > 0)).sum()
        return {
            "loss": self.segmentation_loss(logits.float(), masks),
            "precision": hit / found.sum().clamp(min=1),
            "recall": hit / masks.sum().clamp(min=1),
        }

    def validate(self) -> dict[str, float]:
        """Pixel precision and recall of the completed masks on unseen patches of each kind, and
        the share of pixels covered on clean photos."""
        defense = self.defense()
        seeded = torch.Generator().manual_seed(1)
        figures: dict[str, float] = {"covered_clean": self._covered(defense, self.photos)}
        dice = []
        for kind in KINDS:
            patched, masks = paste(self.photos, list(self.unseen[kind]), seeded)
            hit = found = 0.0
            for x, m in zip(patched.split(32), masks.split(32), strict=True):
                covered = defense.masks(x)
                hit += float((covered & (m > 0)).sum())
                found += float(covered.sum())
            real = float(masks.sum())
            figures[f"precision_{kind}"] = hit / found if found else 0.0
            figures[f"recall_{kind}"] = hit / real
            dice.append(2 * hit / (found + real))
        score = sum(dice) / len(dice) - figures["covered_clean"]
        return {"score": score, **figures}

    @staticmethod
    def _covered(defense: Localiser, images: Tensor) -> float:
        return sum(float(defense.masks(x).sum()) for x in images.split(32)) / images[:, 0].numel()

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.module.save_pretrained(folder, torch.float16, **facts)


class SacTask(_DetectorTask):
    """U-Net of SAC: BCE, RMSprop, then self adversarial training (inner PGD raises the BCE)."""

    network = UNet

    def optimizers(self) -> list[torch.optim.Optimizer]:
        parameters = self.module.parameters()
        return [torch.optim.RMSprop(parameters, self.config.lr, momentum=0.9, weight_decay=1e-8)]

    def defense(self) -> Localiser:
        return Sac(self.module)  # type: ignore[arg-type]

    def segmentation_loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, masks)

    def inner_objective(self, masks: Tensor, generator: torch.Generator):
        return lambda x: -F.binary_cross_entropy_with_logits(self.module(x), masks)


class PatchZeroTask(_DetectorTask):
    """PSPNet of PatchZero: weighted BCE and an image-level term; its second stage attacks
    detector and target together."""

    network = PyramidNet
    CLASS_WEIGHTS = (1.04, 26.04)  # background, patch
    IMAGE_LEVEL = 1.0

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.module.parameters(), self.config.lr)]

    def defense(self) -> Localiser:
        return PatchZero(self.module)  # type: ignore[arg-type]

    def segmentation_loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        background, patch = self.CLASS_WEIGHTS
        weight = background + (patch - background) * masks
        pixels = F.binary_cross_entropy_with_logits(logits, masks, weight, reduction="sum")
        image = F.binary_cross_entropy_with_logits(logits.amax((1, 2, 3)), masks.amax((1, 2, 3)))
        return pixels / weight.sum() + self.IMAGE_LEVEL * image

    def inner_objective(self, masks: Tensor, generator: torch.Generator):
        which = int(torch.randint(len(self.victims), (1,), generator=generator))
        attack = self.victims[which].objective(len(masks), generator)
        defense = self.defense()
        return lambda x: attack(defense(x)) + len(x) * evasion_loss(self.module(x), masks)
