"""Train PAIR's generator (section 4.3, equations 14-17)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.data.pack import Pack
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.losses import patch_loss, patch_ssim, semantic_loss, total_loss
from pair.masks import ExactCount, complement, rule_from_config
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.training.augment import crop_flip, to_float


@dataclass(frozen=True)
class GeneratorTraining:
    """What the generator learns from.

    The paper trains one pass with L_p + beta * L_s. Extensions, each off by default: ``mse``
    adds a weighted squared error; ``second`` is the share of steps that also run the second
    pass and put the losses on its output; ``windows`` is the share of steps that hide one
    rectangle and compare the composite of visible originals and in-painted window (for
    covering masks).
    """

    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    mask: dict[str, Any] = field(default_factory=lambda: {"rule": "exact", "ratio": 0.5})
    init: str = ""  # model folder or shipped name to start from
    discriminator: str = ""  # frozen image encoder of L_s; empty = no semantic loss
    beta: float = 1.0
    pooled: float = 0.0  # extra weight of L_s on D's features before its projection
    mse: float = 0.0
    second: float = 0.0
    windows: float = 0.0
    optimizer: str = "adam"  # or "muon": Muon on the matrices of the blocks, AdamW on the rest
    lr: float = 1e-5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        rule_from_config(self.mask)  # refuses what is not a rule
        if self.optimizer not in ("adam", "muon"):
            raise ValueError(f"optimizer must be adam or muon, got {self.optimizer!r}")
        if min(self.second, self.windows) < 0 or self.second + self.windows > 1:
            raise ValueError(
                "second and windows are shares of the steps and cannot exceed 1 together, "
                f"got {self.second} and {self.windows}"
            )
        for name in ("beta", "pooled", "mse", "lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class GeneratorTask:
    """See :class:`pair.training.loop.Task`."""

    def __init__(self, config: GeneratorTraining, pack: Pack):
        self.config, self.pack = config, pack
        if pack.side < config.model.image_size:
            raise ValueError(
                f"the photos of the pack have {pack.side} pixels a side, "
                f"the generator needs {config.model.image_size}: make a larger pack"
            )
        if config.init:
            self.module = Purifier.from_pretrained(config.init).autoencoder
            if self.module.config != config.model:
                raise ValueError(f"{config.init} has another geometry than the configuration")
        else:
            self.module = MaskedAutoencoder(config.model)
        self.rule = rule_from_config(config.mask)
        self.critic: SmallClip | None = None
        if config.discriminator:
            critic = SmallClip.from_pretrained(config.discriminator)
            self.critic = critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.rows = pack.where(lambda label, data, split: split == "train")
        held = pack.where(lambda label, data, split: data == "imagenette" and split == "val")
        if not len(held):
            held = pack.where(lambda label, data, split: split in ("val", "gallery"))
        if not len(held):
            raise ValueError("the pack holds no photos to validate on (split val or gallery)")
        held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))]
        self.held_out = pack.batch(held[:128].sort().values, config.model.image_size)

    def size(self) -> int:
        return len(self.rows)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        if c.optimizer == "adam":
            return [torch.optim.Adam(self.module.parameters(), lr=c.lr)]
        matrices: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, p in self.module.named_parameters():
            (matrices if "blocks" in name and p.ndim == 2 else rest).append(p)
        muon = torch.optim.Muon(matrices, lr=10 * c.lr, momentum=0.95, weight_decay=0.0, ns_steps=4)
        return [muon, torch.optim.AdamW(rest, lr=c.lr, weight_decay=c.weight_decay)]

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        c, model = self.config, self.module
        images = crop_flip(to_float(self.pack.raw(self.rows[rows])), c.model.image_size, generator)
        kind = float(torch.rand(1, generator=generator))
        grid = model.grid
        if kind < c.windows:
            rule = rule_from_config({"rule": "windows", "windows": 1.0})
            mask = rule(len(images), grid, generator=generator)
            rebuilt = model(images, mask)
            seen = mask.view(-1, 1, grid, grid)
            seen = seen.repeat_interleave(c.model.patch_size, 2)
            seen = seen.repeat_interleave(c.model.patch_size, 3)
            outputs = [torch.where(seen, images, rebuilt)]
            # L_p is averaged over hidden tokens only: the visible ones are the originals.
            hidden = (~mask).float().mean()
            scale = 1 / hidden
        else:
            mask = self.rule(len(images), grid, generator=generator)
            outputs, scale = [model(images, mask)], torch.tensor(1.0)
            if kind < c.windows + c.second:
                outputs.append(model(outputs[0], complement(mask)))
        l_p = scale * torch.stack([self._pixels(images, o) for o in outputs]).mean()
        losses = {"l_p": l_p}
        total = l_p
        if self.critic is not None and c.beta:
            with torch.no_grad():
                wanted = self._look(images)
            l_s = torch.stack([self._semantic(wanted, self._look(o)) for o in outputs]).mean()
            losses["l_s"] = l_s
            total = total_loss(l_p, l_s, c.beta)
        return {"loss": total, **losses}

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's embedding and its pooled features."""
        critic = self.critic
        assert critic is not None
        x = ((images - critic.mean) / critic.std).contiguous(memory_format=torch.channels_last)
        pooled = critic.backbone(x)
        return critic.image_projection(pooled), pooled

    def _semantic(self, wanted: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor]) -> Tensor:
        loss = semantic_loss(wanted[0], got[0])
        if self.config.pooled:
            loss = loss + self.config.pooled * semantic_loss(wanted[1], got[1])
        return loss

    def _pixels(self, images: Tensor, rebuilt: Tensor) -> Tensor:
        loss = patch_loss(images, rebuilt, self.config.model.patch_size)
        if self.config.mse:
            loss = loss + self.config.mse * F.mse_loss(rebuilt, images)
        return loss

    def validate(self) -> dict[str, float]:
        """One and two passes on 128 held-out photos under fixed masks."""
        images, size = self.held_out, self.config.model.patch_size
        seeded = torch.Generator().manual_seed(1)
        mask = ExactCount(0.5)(len(images), self.module.grid, generator=seeded)
        first = self.module(images, mask)
        second = self.module(first, complement(mask)).clamp(0, 1)
        ssim = patch_ssim(images, first, size)
        figures = {
            "ssim_hidden": float(ssim[~mask].mean()),
            "psnr_one_pass": _psnr(images, first.clamp(0, 1)),
            "psnr_two_passes": _psnr(images, second),
        }
        score = figures["psnr_two_passes"] / 20
        if self.critic is not None:
            z = self.critic.image_features(images)
            cos = F.cosine_similarity(z, self.critic.image_features(second)).mean()
            figures["cos_two_passes"] = float(cos)
            score = float(cos)
        return {"score": score, **figures}

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        rule = ExactCount(0.5)
        Purifier(self.module, rule).save_pretrained(folder, torch.float16, **facts)


def _psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10(((a - b) ** 2).mean((1, 2, 3))).mean())
