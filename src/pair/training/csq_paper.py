"""The two public CSQ recipes at paper scale: the official code's, and the one of DeepHash that
the published AdvHash attack and, by its figures, the paper's target use.

The pack holds the splits ``train``, ``query`` and ``gallery``; a photo with several labels has
their names joined by ";". Where the training photos belong to the database, as in ImageNet-100
(13,000 of 128,503), ``train_in_gallery`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pair import hub
from pair.data.pack import Collection
from pair.images import resize
from pair.retrieval.backbones import RESNETS, build_backbone, load_resnet, normalisation
from pair.retrieval.hashing import (
    HashConfig,
    HashNet,
    binarise,
    csq_loss,
    multilabel_centres,
)
from pair.retrieval.metrics import mean_average_precision
from pair.retrieval.scores import Hamming, SameLabel
from pair.training.augment import crop_flip, resized_crop, to_float
from pair.training.precision import precisely

OPTIMISERS = {"rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam}
AUGMENTATIONS = ("random-crop", "resized-crop")


@dataclass(frozen=True)
class CsqRecipe:
    """Everything in which the two recipes differ. Rates are constant but for ``decay``."""

    backbone: str = "resnet50"  # any name of pair.retrieval.backbones.build_backbone
    weights: str = ""  # torchvision file for resnet*, "default" for timm: and torchvision:
    from_scratch: bool = False  # must be said aloud where no weights are named
    image_size: int = 224
    bits: int = 64
    head: str = "linear"  # or "mlp"
    resize: str = "short"  # preprocessing of photos of another size: "short" or "square"
    augment: str = "random-crop"  # or "resized-crop"
    optimiser: str = "rmsprop"  # or "adam"
    lr: float = 1e-5
    backbone_lr: float = 1.0  # factor on the rate of the backbone
    weight_decay: float = 0.0
    decay: float = 1.0  # factor on all rates ...
    decay_every: int = 0  # ... every so many steps; 0 = never
    quantisation: float = 1e-4  # lambda of L_Q
    top_k: int = 1000  # of the validation's mAP
    train_in_gallery: bool = True
    validate_on: int = 0  # so many seeded photos of the database and a tenth of that; 0 = all

    @property
    def photo_side(self) -> int:
        """Side at which photos are decoded when they come from a data set."""
        return self.image_size * 8 // 7

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"unknown optimiser {self.optimiser!r}: use rmsprop or adam")
        if self.augment not in AUGMENTATIONS:
            raise ValueError(
                f"unknown augmentation {self.augment!r}: use random-crop, resized-crop"
            )
        if not self.weights and not self.from_scratch:
            raise ValueError(
                f"name the ImageNet weights of {self.backbone} (weights = ...), or set "
                "from_scratch = true"
            )


def build(recipe: CsqRecipe, classes: tuple[str, ...]) -> HashNet:
    """The hash network of a recipe, its backbone with the weights that the recipe names."""
    known = normalisation(recipe.backbone)
    statistics: dict[str, Any] = dict(zip(("mean", "std"), known, strict=True)) if known else {}
    net = HashNet(
        HashConfig(
            recipe.image_size,
            recipe.bits,
            RESNETS.get(recipe.backbone, recipe.backbone),
            classes,
            head=recipe.head,
            resize=recipe.resize,
            **statistics,
        )
    )
    if recipe.weights and recipe.backbone in RESNETS:
        net.backbone = load_resnet(recipe.weights, RESNETS[recipe.backbone])
    elif recipe.weights == "default":
        net.backbone = build_backbone(recipe.backbone, True)[0]
    elif recipe.weights:
        raise ValueError(f"{recipe.backbone} takes weights = 'default', not a file")
    return net


class CsqPaperTask:
    """CSQ training by a recipe. See :class:`pair.training.loop.Task`."""

    def __init__(self, config: CsqRecipe, pack: Collection):
        self.config, self.pack, self.device = config, pack, torch.device("cpu")
        self.rows = pack.where(lambda label, data, split: split == "train" and label != "")
        if len(self.rows) == 0:
            raise ValueError("the pack holds no labelled photos in its split 'train'")
        names = [pack.labels[i].split(";") for i in self.rows.tolist()]
        self.classes = tuple(sorted({name for each in names for name in each}))
        self._number = {name: i for i, name in enumerate(self.classes)}
        self.module = build(config, self.classes)
        self.labels = self._hot(self.rows)
        # One fixed code breaks the ties of all photos with several labels.
        ties = torch.Generator().manual_seed(0)
        self.targets = multilabel_centres(self.labels, self.module.centres, ties)
        sides = ("gallery", "train") if config.train_in_gallery else ("gallery",)
        self.query = self._held_out(("query",))
        self.gallery = self._held_out(sides)
        self._step = 0

    def to(self, device: torch.device) -> None:
        """Move everything that takes part in a step."""
        self.device = device
        self.module.to(device)
        self.targets = self.targets.to(device)

    def prefetch(self, rows: Tensor) -> None:
        self.pack.prefetch(self.rows[rows])

    def inputs(self) -> dict[str, str]:
        """SHA-256 of the weights that the settings only name."""
        path = Path(self.config.weights)
        return {"weights": hub.sha256(path)} if path.is_file() else {}

    def _hot(self, rows: Tensor) -> Tensor:
        """Multi-hot labels (N, C); classes without training photos count for nothing."""
        hot = torch.zeros(len(rows), len(self.classes), dtype=torch.bool)
        for at, row in enumerate(rows.tolist()):
            for name in self.pack.labels[row].split(";"):
                if name in self._number:
                    hot[at, self._number[name]] = True
        return hot

    def _held_out(self, splits: tuple[str, ...]) -> Tensor:
        rows = self.pack.where(lambda label, data, split: split in splits and label != "")
        most = self.config.validate_on // (10 if splits == ("query",) else 1)
        if most and len(rows) > most:
            seeded = torch.Generator().manual_seed(0)
            rows = rows[torch.randperm(len(rows), generator=seeded)[:most]].sort().values
        return rows

    def size(self) -> int:
        return len(self.rows)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        groups = [
            {"params": list(self.module.backbone.parameters()), "lr": c.lr * c.backbone_lr},
            {"params": list(self.module.head.parameters()), "lr": c.lr},
        ]
        optimiser = OPTIMISERS[c.optimiser](groups, lr=c.lr, weight_decay=c.weight_decay)
        # The loop sets every rate before each step; the recipe's decay comes on top of that.
        optimiser.register_step_pre_hook(self._decay)
        return [optimiser]

    def _decay(self, optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        c = self.config
        if c.decay_every:
            for group in optimiser.param_groups:
                group["lr"] *= c.decay ** (self._step // c.decay_every)

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        self._step = step
        images = self.draw(self.rows[rows], generator)
        u = self.module.image_features(images)
        loss = precisely(csq_loss, u, self.targets[rows], self.config.quantisation)
        right = (u.detach() > 0) == (self.targets[rows] > 0)
        return {"loss": loss, "bits": right.float().mean()}

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Augmented photos (B, 3, S, S)."""
        images, size = to_float(self.pack.raw(rows).to(self.device)), self.config.image_size
        if self.config.augment == "resized-crop":
            return resized_crop(images, size, generator, (0.08, 1.0))
        return crop_flip(resize(images, size * 8 // 7), size, generator)

    def codes(self, rows: Tensor) -> Tensor:
        parts = rows.split(64)
        out = []
        for i, part in enumerate(parts):
            for soon in parts[i : i + 3]:
                self.pack.prefetch(soon)
            photos = to_float(self.pack.raw(part).to(self.device))
            out.append(binarise(self.module.encode_image(photos)).cpu())
        return torch.cat(out)

    def validate(self) -> dict[str, float]:
        """mAP@topK of the queries against the database, expected over ties."""
        if not len(self.query) or not len(self.gallery):
            raise ValueError("validation needs labelled photos in the splits query and gallery")
        score = mean_average_precision(
            Hamming(self.codes(self.query), self.codes(self.gallery)),
            SameLabel(self._hot(self.query), self._hot(self.gallery)),
            self.config.top_k,
        )
        return {"score": score, "map": score}

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.module.save_pretrained(folder, torch.float32, **facts)
