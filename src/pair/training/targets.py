"""Train the small retrieval targets: CLIP (text-to-image) and CSQ (content-based)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair import hub
from pair.data.pack import Collection
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.retrieval.clip import ClipConfig, SmallClip, build_vocabulary
from pair.retrieval.hashing import HashConfig, HashNet, binarise, csq_loss
from pair.retrieval.metrics import mean_average_precision, recall_at_k
from pair.retrieval.resnet import ResNetConfig
from pair.training.augment import blur, jitter, resized_crop, to_float
from pair.training.loop import weight_groups
from pair.training.precision import precisely

NOTHING_HELD_OUT = "the pack holds no photos to validate on (Imagenette val or Caltech-101 gallery)"


@dataclass(frozen=True)
class TargetTraining:
    """Training of a small target. ``small_until`` is the share of the steps that run at
    ``small_size`` pixels, which is cheaper and costs no accuracy. ``init`` (CSQ only) names the
    start: a small CLIP, of which the image backbone is taken (as ImageNet weights are for
    CSQ-ResNet50), or a hash network to go on with."""

    image_size: int = 112
    small_size: int = 80
    small_until: float = 0.5
    width: int = 32
    dim: int = 128  # CLIP: embedding width
    bits: int = 64  # CSQ: code length
    lr: float = 2e-3
    text_lr: float = 5e-4  # CLIP: rate of everything but the image backbone
    weight_decay: float = 0.05
    steps: int = 10_000  # of the loop, to know when small_until is over
    balance: float = 0.5  # 0 = every photo equally often, 1 = every class equally often
    init: str = ""  # CSQ: model folder or shipped name; empty = random weights

    def __post_init__(self) -> None:
        for name in ("image_size", "small_size", "width", "dim", "bits", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("small_until", "balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")


class _Labelled:
    """Photos with a class name, sampled by class balance."""

    def __init__(self, config: TargetTraining, pack: Collection):
        self.pack = pack
        self.rows = pack.where(lambda label, data, split: split == "train" and label != "")
        self.classes = sorted({pack.labels[i] for i in self.rows.tolist()})
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[pack.labels[i]] for i in self.rows.tolist()])
        if not self.classes:
            raise ValueError("the pack holds no labelled photos to train on")
        counts = torch.bincount(self.labels).float()
        self.weights = (counts**-config.balance)[self.labels]
        self.number = number

    def draw(self, config: TargetTraining, batch: int, generator: torch.Generator, step: int):
        picked = torch.multinomial(self.weights, batch, replacement=True, generator=generator)
        early = step < config.small_until * config.steps
        size = config.small_size if early else config.image_size
        images = to_float(self.pack.raw(self.rows[picked]))
        images = jitter(resized_crop(images, size, generator), generator)
        images = blur(images, generator).contiguous(memory_format=torch.channels_last)
        return images, self.labels[picked]

    def held_out(self, datasets: tuple[str, ...], per_class: int | None = None):
        """Row numbers and labels of held-out photos: Imagenette val and Caltech gallery."""
        rows = self.pack.where(
            lambda label, data, split: (
                data in datasets
                and ((data == "imagenette" and split == "val") or split == "gallery")
            )
        )
        kept, labels, counts = [], [], [0] * len(self.classes)
        for i in rows.tolist():
            k = self.number.get(self.pack.labels[i])
            if k is None:  # a class that nothing was trained on
                continue
            if per_class is None or counts[k] < per_class:
                counts[k] += 1
                kept.append(i)
                labels.append(k)
        return torch.tensor(kept, dtype=torch.long), torch.tensor(labels, dtype=torch.long)


def _encode(encode, pack: Collection, rows: Tensor, size: int) -> Tensor:
    return torch.cat([encode(pack.batch(r, size)) for r in rows.split(64)])


class ClipTask:
    """Contrastive training on class sentences. See :class:`pair.training.loop.Task`."""

    def __init__(self, config: TargetTraining, pack: Collection):
        self.config = config
        self.data = _Labelled(config, pack)
        texts = sentences(self.data.classes, TRAIN_TEMPLATES)
        model = ClipConfig(
            config.image_size,
            config.dim,
            ResNetConfig(width=config.width),
            vocabulary=tuple(build_vocabulary(texts)),
        )
        self.module = SmallClip(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ids = self.module.tokenize(texts).view(len(self.data.classes), -1, model.context)
        self.rows, self.labels = self.data.held_out(("imagenette", "caltech101"), per_class=16)
        if not len(self.rows):
            raise ValueError(NOTHING_HELD_OUT)

    def size(self) -> int:
        return len(self.data.rows)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        named = list(self.module.named_parameters())
        image = [(n, p) for n, p in named if n.startswith("backbone.")]
        rest = [(n, p) for n, p in named if not n.startswith("backbone.")]
        groups = weight_groups(image, c.lr, c.weight_decay)
        return [torch.optim.AdamW(groups + weight_groups(rest, c.text_lr, c.weight_decay))]

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        images, labels = self.data.draw(self.config, len(rows), generator, step)
        classes, templates = self.ids.shape[:2]
        pick = torch.randint(0, templates, (classes,), generator=generator)
        text = F.normalize(self.module.text_features(self.ids[torch.arange(classes), pick]), dim=-1)
        z = F.normalize(self.module.image_features(images), dim=-1)
        logits = self.module.logit_scale.exp().clamp(max=50) * z @ text.T  # (B, classes)
        image_loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        # Text to image: each class present in the batch should find its own photos.
        present = labels.unique()
        positive = (labels[None, :] == present[:, None]).float()
        log_p = logits[:, present].T.log_softmax(1)
        text_loss = -((log_p * positive).sum(1) / positive.sum(1)).mean()
        return {
            "loss": image_loss + 0.3 * text_loss,
            "image": image_loss,
            "top1": (logits.argmax(1) == labels).float().mean(),
        }

    def validate(self) -> dict[str, float]:
        names = self.data.classes
        z = F.normalize(
            _encode(self.module.image_features, self.data.pack, self.rows, self.config.image_size),
            dim=-1,
        )
        queries = sentences(names, HELD_OUT_TEMPLATES)
        q = F.normalize(self.module.encode_text(queries), dim=-1)
        wanted = torch.arange(len(names)).repeat_interleave(len(HELD_OUT_TEMPLATES))
        relevant = wanted[:, None] == self.labels[None]
        similarity = q @ z.T
        score = mean_average_precision(similarity, relevant)
        return {
            "score": score,
            "text_map": score,
            "text_r10": recall_at_k(similarity, relevant, 10),
            "text_p10": float(relevant.gather(1, similarity.topk(10, 1).indices).float().mean()),
        }

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.module.save_pretrained(folder, torch.float16, **facts)


def _start(net: HashNet, name: str) -> None:
    folder = hub.resolve(name)
    start: SmallClip | HashNet
    if hub.kind_of(folder) == "csq":
        start = HashNet.from_pretrained(folder)
        if start.config != net.config:
            raise ValueError(f"{name} is a hash network of other settings or classes")
        net.load_state_dict(start.state_dict())
        return
    start = SmallClip.from_pretrained(folder)
    if start.backbone.config != net.config.backbone:
        raise ValueError(f"{name} has another backbone than the configuration")
    net.backbone.load_state_dict(start.backbone.state_dict())


class CsqTask:
    """Central similarity hashing. See :class:`pair.training.loop.Task`."""

    def __init__(self, config: TargetTraining, pack: Collection):
        self.config = config
        self.data = _Labelled(config, pack)
        model = HashConfig(
            config.image_size,
            config.bits,
            ResNetConfig(width=config.width),
            tuple(self.data.classes),
        )
        net = HashNet(model)
        if config.init:
            _start(net, config.init)
        self.module = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        held_out = {
            "imagenette": self.data.held_out(("imagenette",)),
            "caltech": self.data.held_out(("caltech101",)),
        }
        # Queries and gallery come from the same held-out photos: it takes a few.
        self.held_out = {n: (r, y) for n, (r, y) in held_out.items() if len(r) >= 4}
        if not self.held_out:
            raise ValueError(NOTHING_HELD_OUT)

    def size(self) -> int:
        return len(self.data.rows)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        return [
            torch.optim.AdamW(weight_groups(self.module.named_parameters(), c.lr, c.weight_decay))
        ]

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        images, labels = self.data.draw(self.config, len(rows), generator, step)
        u = self.module.image_features(images)
        loss = precisely(csq_loss, u, self.module.centres[labels])
        nearest = (u.tanh() @ self.module.centres.T).argmax(1)
        return {"loss": loss, "top1": (nearest == labels).float().mean()}

    def validate(self) -> dict[str, float]:
        """Imagenette val: 1,000 queries against the rest; Caltech: a quarter against the rest."""
        figures = {}
        for name, (rows, labels) in self.held_out.items():
            u = _encode(self.module.image_features, self.data.pack, rows, self.config.image_size)
            codes = binarise(u)
            nearest = (u.tanh() @ self.module.centres.T).argmax(1)
            figures[f"{name}_top1"] = float((nearest == labels).float().mean())
            seeded = torch.Generator().manual_seed(0)
            order = torch.randperm(len(rows), generator=seeded)
            cut = min(1000, len(rows) // 2) if name == "imagenette" else len(rows) // 4
            query, gallery = order[:cut], order[cut:]
            relevant = labels[query][:, None] == labels[gallery][None]
            figures[f"{name}_map"] = mean_average_precision(
                codes[query] @ codes[gallery].T, relevant
            )
        score = figures.get("imagenette_map", 0.0) + 0.5 * figures.get("caltech_map", 0.0)
        return {"score": score, **figures}

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.module.save_pretrained(folder, torch.float16, **facts)
