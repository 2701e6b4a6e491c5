"""Train PAIR's generator (section 4.3, equations 14-17)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pair.data.pack import Collection
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.losses import patch_loss, patch_ssim, semantic_loss, total_loss
from pair.masks import ExactCount, complement, rule_from_config
from pair.purifier import Purifier
from pair.retrieval.metrics import recall_at_k
from pair.training import start
from pair.training.augment import crop_flip, to_float

HELD_OUT = 128  # photos that validation rebuilds
AUGMENTATIONS = ("crop-flip", "none")


@dataclass(frozen=True)
class GeneratorTraining:
    """What the generator learns from.

    The paper trains one pass with L_p + beta * L_s. Extensions, each off by default: ``mse``
    adds a weighted squared error; ``second`` is the share of steps that also run the second
    pass and put the losses on its output; ``windows`` is the share of steps that hide one
    rectangle and compare the composite of visible originals and in-painted window (for
    covering masks).

    ``init`` and ``discriminator``: see :mod:`pair.training.start`. A generator that starts from
    somewhere has the geometry of its start, unless ``model`` says otherwise (which is refused).

    ``teacher`` distils: a generator of another geometry (a smaller decoder, say) starts from those
    of the teacher's weights that fit by name and shape, and ``distil`` times the squared distance
    to what the teacher makes of the same tokens joins the loss, in both passes.
    """

    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    mask: dict[str, Any] = field(default_factory=lambda: {"rule": "exact", "ratio": 0.5})
    init: str = ""  # what to start from; empty = random weights
    teacher: str = ""  # generator to imitate, frozen; empty = none
    distil: float = 20.0  # weight of the distance to the teacher
    discriminator: str = ""  # frozen image encoder of L_s; empty = no semantic loss
    beta: float = 1.0
    pooled: float = 0.0  # extra weight of L_s on D's features before its projection
    mse: float = 0.0
    second: float = 0.0
    windows: float = 0.0
    optimizer: str = "adam"  # or "muon": Muon on the matrices of the blocks, AdamW on the rest
    lr: float = 1e-5
    weight_decay: float = 0.0
    augment: str = "crop-flip"  # or "none", as the paper says of none
    recompute: bool = False  # gradient checkpointing: less memory, a third more time
    retrieval: int = 0  # held-out photos with captions whose R@10 picks the best model; 0 = none

    @property
    def photo_side(self) -> int:
        """Side at which photos are decoded when they come from a data set."""
        return self.model.image_size * (8 if self.augment == "crop-flip" else 7) // 7

    def __post_init__(self) -> None:
        rule_from_config(self.mask)  # refuses what is not a rule
        if self.optimizer not in ("adam", "muon"):
            raise ValueError(f"optimizer must be adam or muon, got {self.optimizer!r}")
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be crop-flip or none, got {self.augment!r}")
        if min(self.second, self.windows) < 0 or self.second + self.windows > 1:
            raise ValueError(
                "second and windows are shares of the steps and cannot exceed 1 together, "
                f"got {self.second} and {self.windows}"
            )
        if self.init and self.teacher:
            raise ValueError("a generator starts from init or from its teacher, not from both")
        for name in ("beta", "pooled", "mse", "distil", "lr", "weight_decay", "retrieval"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class GeneratorTask:
    """See :class:`pair.training.loop.Task`."""

    def __init__(self, config: GeneratorTraining, pack: Collection):
        if config.init:
            self.module, self.licence = start.generator(config.init)
            if config.model == GeneratorConfig():
                config = replace(config, model=self.module.config)
            if self.module.config != config.model:
                raise ValueError(f"{config.init} has another geometry than the configuration")
            self.module.train().requires_grad_(True)
        else:
            self.module, self.licence = MaskedAutoencoder(config.model), ""
        self.teacher: MaskedAutoencoder | None = None
        if config.teacher:
            self.teacher, self.licence = start.generator(config.teacher)
            self.teacher.eval().requires_grad_(False)
            _inherit(self.module, self.teacher, config.teacher)
        self.config, self.pack, self.device = config, pack, torch.device("cpu")
        pack.decode_at(config.photo_side)  # known only now, where the start decides the geometry
        if pack.side < config.model.image_size:
            raise ValueError(
                f"the photos of the pack have {pack.side} pixels a side, "
                f"the generator needs {config.model.image_size}: make a larger pack"
            )
        self.rule = rule_from_config(config.mask)
        self.critic = start.critic(config.discriminator) if config.discriminator else None
        if config.pooled and self.critic is not None and not self.critic.pooled:
            raise ValueError(
                "pooled needs a small CLIP as discriminator: the features before the projection "
                "of an open_clip model are not defined for all architectures"
            )
        self.rows = pack.where(lambda label, data, split: split == "train")
        self.held_out = pack.batch(self._held(), config.model.image_size)
        self.texts = self._texts() if config.retrieval else None
        if config.recompute:
            _recompute(self.module)

    def _held(self) -> Tensor:
        """Rows of the photos that validation rebuilds."""
        pack = self.pack
        held = pack.where(lambda label, data, split: data == "imagenette" and split == "val")
        if not len(held):
            held = pack.where(lambda label, data, split: split in ("val", "gallery"))
        if not len(held):
            raise ValueError("the pack holds no photos to validate on (split val or gallery)")
        held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))]
        return held[:HELD_OUT].sort().values

    def _texts(self) -> tuple[Tensor, Tensor]:
        """Embedded captions of held-out photos, and the number of the photo of each."""
        held = self.pack.where(lambda label, data, split: split == "val")
        rows = [i for i in held.tolist() if self.pack.captions and self.pack.captions[i]]
        if not rows or self.critic is None:
            raise ValueError(
                "retrieval needs a discriminator, and photos with captions in the split val"
            )
        self.searched = torch.tensor(rows[: self.config.retrieval])
        captions = [self.pack.captions[i] for i in self.searched.tolist()]
        owner = torch.tensor([n for n, said in enumerate(captions) for _ in said])
        texts = [text for said in captions for text in said]
        encode = self.critic.encode_text
        with torch.no_grad():
            parts = [encode(texts[at : at + 256]) for at in range(0, len(texts), 256)]
        return F.normalize(torch.cat(parts), dim=-1), owner

    def to(self, device: torch.device) -> None:
        """Move everything that takes part in a step."""
        self.device = device
        self.module.to(device)
        self.held_out = self.held_out.to(device)
        if self.texts is not None:
            self.texts = (self.texts[0].to(device), self.texts[1].to(device))
        if self.teacher is not None:
            self.teacher.to(device)
        if self.critic is not None:
            self.critic.module.to(device)

    def inputs(self) -> dict[str, str]:
        """SHA-256 of what the settings name, before the first step."""
        found = {"init": start.digest(self.module)} if self.config.init else {}
        if self.teacher is not None:
            found["teacher"] = start.digest(self.teacher)
        if self.critic is not None:
            found["discriminator"] = start.digest(self.critic.module)
        return found

    def check_cut(self) -> None:
        """Whether the module may be cut over processes: all must call it equally often."""
        if 0 < self.config.second < 1:
            raise ValueError(
                "with loop.parallel = 'fsdp' every step has the same passes: task.second must be "
                f"0 or 1, got {self.config.second}"
            )
        if self.config.optimizer != "adam":
            raise ValueError("Muon needs whole matrices: use loop.parallel = 'ddp', or adam")

    def prefetch(self, rows: Tensor) -> None:
        self.pack.prefetch(self.rows[rows])

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
        images = to_float(self.pack.raw(self.rows[rows]).to(self.device))
        if c.augment == "crop-flip":
            images = crop_flip(images, c.model.image_size, generator)
        kind = float(torch.rand(1, generator=generator))
        grid = model.grid
        asked: list[tuple[Tensor, Tensor]] = []  # what the model was shown, for the teacher
        if kind < c.windows:
            rule = rule_from_config({"rule": "windows", "windows": 1.0})
            mask = rule(len(images), grid, generator=generator, device=self.device)
            rebuilt = model(images, mask)
            asked.append((images, mask))
            answers = [rebuilt]
            seen = mask.view(-1, 1, grid, grid)
            seen = seen.repeat_interleave(c.model.patch_size, 2)
            seen = seen.repeat_interleave(c.model.patch_size, 3)
            outputs = [torch.where(seen, images, rebuilt)]
            # L_p is averaged over hidden tokens only: the visible ones are the originals.
            hidden = (~mask).float().mean()
            scale = 1 / hidden
        else:
            mask = self.rule(len(images), grid, generator=generator, device=self.device)
            outputs, scale = [model(images, mask)], torch.ones((), device=self.device)
            asked.append((images, mask))
            if kind < c.windows + c.second:
                asked.append((outputs[0], complement(mask)))
                outputs.append(model(*asked[1]))
            answers = outputs
        l_p = scale * torch.stack([self._pixels(images, o) for o in outputs]).mean()
        losses = {"l_p": l_p}
        total = l_p
        if self.critic is not None and c.beta:
            with torch.no_grad():
                wanted = self._look(images)
            l_s = torch.stack([self._semantic(wanted, self._look(o)) for o in outputs]).mean()
            losses["l_s"] = l_s
            total = total_loss(l_p, l_s, c.beta)
        if self.teacher is not None:
            with torch.no_grad():
                lessons = [self.teacher(x, m) for x, m in asked]
            pairs = zip(answers, lessons, strict=True)
            losses["l_t"] = torch.stack([F.mse_loss(a, b) for a, b in pairs]).mean()
            total = total + c.distil * losses["l_t"]
        return {"loss": total, **losses}

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The discriminator's embedding and, where it has them, its pooled features."""
        assert self.critic is not None
        return self.critic.look(images)

    def _semantic(
        self, wanted: tuple[Tensor, Tensor | None], got: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        loss = semantic_loss(wanted[0], got[0])
        if self.config.pooled and wanted[1] is not None and got[1] is not None:
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
        mask = ExactCount(0.5)(len(images), self.module.grid, generator=seeded, device=self.device)
        first = self.module(images, mask)
        second = self.module(first, complement(mask)).clamp(0, 1)
        ssim = patch_ssim(images, first, size)
        figures = {
            "ssim_hidden": float(ssim[~mask].mean()),
            "psnr_one_pass": _psnr(images, first.clamp(0, 1)),
            "psnr_two_passes": _psnr(images, second),
        }
        if self.teacher is not None:
            taught = self.teacher(self.teacher(images, mask), complement(mask)).clamp(0, 1)
            figures["psnr_to_teacher"] = _psnr(taught, second)
        score = figures["psnr_two_passes"] / 20
        if self.critic is not None:
            z = self._look(images)[0]
            cos = F.cosine_similarity(z, self._look(second)[0]).mean()
            figures["cos_two_passes"] = score = float(cos)
        if self.texts is not None:
            figures["recall_at_10"] = score = self._recall(self.texts, seeded)
        return {"score": score, **figures}

    def _recall(self, texts: tuple[Tensor, Tensor], generator: torch.Generator) -> float:
        """R@10 of the captions of held-out photos among those photos, purified."""
        found = []
        for rows in self.searched.split(64):
            images = self.pack.batch(rows, self.config.model.image_size).to(self.device)
            mask = ExactCount(0.5)(
                len(images), self.module.grid, generator=generator, device=self.device
            )
            second = self.module(self.module(images, mask), complement(mask))
            found.append(self._look(second.clamp(0, 1))[0])
        similarity = texts[0] @ F.normalize(torch.cat(found), dim=-1).T
        owners = torch.arange(len(self.searched), device=self.device)
        return recall_at_k(similarity, texts[1][:, None] == owners[None], 10)

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        rule = ExactCount(0.5)
        if self.licence:
            facts = {**facts, "licence": self.licence}
        Purifier(self.module, rule).save_pretrained(folder, torch.float16, **facts)


def _inherit(module: MaskedAutoencoder, teacher: MaskedAutoencoder, name: str) -> None:
    """Give ``module`` the teacher's weights where name and shape agree."""
    ours, theirs = module.config, teacher.config
    same = ("image_size", "patch_size", "mean", "std")
    if any(getattr(ours, key) != getattr(theirs, key) for key in same):
        raise ValueError(f"{name} has images or tokens of another size than the model it teaches")
    mine = module.state_dict()
    fitting = {k: v for k, v in teacher.state_dict().items() if k in mine}
    fitting = {k: v for k, v in fitting.items() if v.shape == mine[k].shape}
    module.load_state_dict(fitting, strict=False)


def _recompute(module: MaskedAutoencoder) -> None:
    """Forget the activations inside every block and compute them again for the gradient."""
    for block in [*module.blocks, *module.decoder_blocks]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10(((a - b) ** 2).mean((1, 2, 3))).mean())
