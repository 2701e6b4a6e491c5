"""Adversarially trained targets: AT (PGD fine-tuning) and HM (hardness-manipulated triplets).

Both start from a trained target, keep its geometry, and write an ordinary model folder. The text
tower of a CLIP stays frozen, so the text side of an index stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.data.pack import Pack
from pair.data.prompts import TRAIN_TEMPLATES, sentences
from pair.retrieval.clip import SmallClip
from pair.retrieval.hashing import HashNet, csq_loss
from pair.training.augment import crop_flip, to_float
from pair.training.loop import weight_groups
from pair.training.pgd import perturb


@dataclass(frozen=True)
class AdversarialTraining:
    """AT: min over weights of max over l_inf perturbations within ``epsilon`` (Madry 2018).

    The threat model of the paper's AT row is not stated; 4/255 with 3 inner steps is ours.
    ``clean`` mixes in the loss on the clean photos (0 = Madry).
    """

    kind: str = "clip"
    init: str = "clip-small"
    epsilon: float = 4 / 255
    inner_steps: int = 3
    clean: float = 0.0
    lr: float = 1e-4
    weight_decay: float = 0.05
    validation: int = 200


@dataclass(frozen=True)
class HardnessTraining(AdversarialTraining):
    """HM[S, g_LGA] (Zhou and Patel 2022): softhard source triplets, linear gradual adversary.

    Batches hold ``classes`` classes with ``per_class`` photos each. For CLIP the anchor is a
    sentence about the class (not perturbed), for CSQ a photo. ``ics`` weighs the intra-class
    structure term (0 = off).
    """

    epsilon: float = 8 / 255
    inner_steps: int = 8
    inner_step: float = 1 / 255
    margin: float = 0.2
    classes: int = 8
    per_class: int = 4
    ics: float = 0.0


class _FineTuning:
    """See :class:`pair.training.loop.Task`. A trained target and photos with class names."""

    name: str

    def __init__(self, config: AdversarialTraining, pack: Pack):
        self.config, self.pack = config, pack
        if config.kind == "clip":
            self.model: SmallClip | HashNet = SmallClip.from_pretrained(config.init)
            known = sorted({n for n in pack.labels if n})
        elif config.kind == "csq":
            self.model = HashNet.from_pretrained(config.init)
            known = list(self.model.config.classes)
        else:
            raise ValueError(f"kind must be 'clip' or 'csq', got {config.kind!r}")
        number = {name: i for i, name in enumerate(known)}
        self.rows = pack.where(lambda label, data, split: split == "train" and label in number)
        held = pack.where(
            lambda label, data, split: split in ("val", "gallery") and label in number
        )
        if not len(self.rows) or not len(held):
            raise ValueError("the pack has no training or no held-out photos of classes it knows")
        self.labels = torch.tensor([number[pack.labels[i]] for i in self.rows.tolist()])
        self.size_px = self.model.image_size
        seeded = torch.Generator().manual_seed(0)
        held = held[torch.randperm(len(held), generator=seeded)][: config.validation]
        self.photos = pack.batch(held, self.size_px)
        self.wanted = torch.tensor([number[pack.labels[i]] for i in held.tolist()])
        self.anchors = self._anchors(known)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name.startswith(("backbone.", "image_projection.", "head.")))
        self.module: nn.Module = self.model

    def _anchors(self, names: list[str]) -> Tensor:
        """What each class is compared with: T sentence features (C, T, D) or centres (C, 1, K)."""
        if isinstance(self.model, HashNet):
            return self.model.centres[:, None]
        with torch.no_grad():
            texts = self.model.encode_text(sentences(names, TRAIN_TEMPLATES))
        return F.normalize(texts, dim=-1).unflatten(0, (len(names), -1))

    def size(self) -> int:
        return len(self.rows)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return [torch.optim.AdamW(weight_groups(named, c.lr, c.weight_decay))]

    def pick_anchor(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One sentence feature (or the centre) per label: (B, D)."""
        which = torch.randint(self.anchors.shape[1], (len(labels),), generator=generator)
        return self.anchors[labels, which]

    def photos_of(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return crop_flip(to_float(self.pack.raw(self.rows[rows])), self.size_px, generator)

    def scores(self, images: Tensor) -> Tensor:
        """Similarity to each class (B, C), for validation."""
        z = self.model.image_features(images)
        z = z.tanh() if isinstance(self.model, HashNet) else F.normalize(z, dim=-1)
        return z @ self.anchors.mean(1).T

    def validate(self) -> dict[str, float]:
        """Share of held-out photos nearest to their class: clean, and under PGD on this model."""
        c, right = self.config, {"clean": 0, "attacked": 0}
        seeded = torch.Generator().manual_seed(1)
        for x, y in zip(self.photos.split(32), self.wanted.split(32), strict=True):

            def wrong(v: Tensor, y: Tensor = y) -> Tensor:
                return F.cross_entropy(20 * self.scores(v), y, reduction="sum")

            attacked = perturb(x, wrong, c.epsilon, c.inner_steps, seeded)
            for name, images in (("clean", x), ("attacked", attacked)):
                right[name] += int((self.scores(images).argmax(1) == y).sum())
        clean, attacked_share = (right[k] / len(self.photos) for k in ("clean", "attacked"))
        return {
            "score": clean + attacked_share,
            "top1_clean": clean,
            "top1_attacked": attacked_share,
        }

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.model.save_pretrained(folder, torch.float16, **{"hardened": self.name, **facts})


class AtTask(_FineTuning):
    """The target's own loss on the worst perturbation that PGD finds."""

    name = "at"

    def target_loss(self, images: Tensor, labels: Tensor, sentences: Tensor) -> Tensor:
        """CLIP: cross-entropy over one sentence per class, (C, D); CSQ: its centre loss."""
        z = self.model.image_features(images)
        if isinstance(self.model, HashNet):
            return csq_loss(z, self.model.centres[labels])
        scale = self.model.logit_scale.detach().exp().clamp(max=50)
        return F.cross_entropy(scale * F.normalize(z, dim=-1) @ sentences.T, labels)

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        c = self.config
        labels = self.labels[rows]
        images = self.photos_of(rows, generator)
        texts = self.pick_anchor(torch.arange(len(self.anchors)), generator)
        self.model.eval()  # the inner attack must not move the batch statistics

        def worst(x: Tensor) -> Tensor:
            return self.target_loss(x, labels, texts)

        attacked = perturb(images, worst, c.epsilon, c.inner_steps, generator)
        self.model.train()
        loss = adversarial = self.target_loss(attacked, labels, texts)
        if c.clean:
            loss = loss + c.clean * self.target_loss(images, labels, texts)
        return {"loss": loss, "adversarial": adversarial}


def hardness(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """H(A, P, N) = d(a, p) - d(a, n), Euclidean on unit-norm embeddings (B, D): (B,) in [-2, 2]."""
    a, p, n = (F.normalize(z.float(), dim=-1) for z in (anchor, positive, negative))
    return _distance(a, p) - _distance(a, n)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).square().sum(-1) + 1e-12).sqrt()


def gradual_adversary(previous: float | Tensor, margin: float) -> float:
    """Destination hardness g_LGA = -margin * min(u, previous loss) / u with u = margin.

    A loss at or above the margin asks for easy triplets (-margin), a vanishing one for
    triplets whose positive and negative are equally far (0).
    """
    return -margin * min(margin, float(previous)) / margin


def softhard(
    distances: Tensor, same: Tensor, allowed: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A positive and a negative for each anchor (A,), both drawn among the harder ones.

    ``distances`` (A, N) from anchors to photos, ``same`` (A, N) marks photos of the anchor's
    class, ``allowed`` (A, N) those that may be used. Positives farther than the nearest negative
    and negatives nearer than the farthest positive are eligible; where none is, all are.
    """
    positives, negatives = same & allowed, ~same & allowed
    infinite = torch.full_like(distances, float("inf"))
    nearest = torch.where(negatives, distances, infinite).amin(1, keepdim=True)
    farthest = torch.where(positives, distances, -infinite).amax(1, keepdim=True)

    def pick(kind: Tensor, hard: Tensor) -> Tensor:
        eligible = kind & hard
        eligible = torch.where(eligible.any(1, keepdim=True), eligible, kind)
        return torch.multinomial(eligible.float(), 1, generator=generator)[:, 0]

    return pick(positives, distances > nearest), pick(negatives, distances < farthest)


class _Remembering(nn.Module):
    """The target and the last triplet loss, so that a resumed run goes on as it was."""

    previous: Tensor

    def __init__(self, model: nn.Module, start: float):
        super().__init__()
        self.model = model
        self.register_buffer("previous", torch.tensor(start))


class HmTask(_FineTuning):
    """Triplets perturbed to a chosen hardness, then the triplet loss on them."""

    name = "hm"
    config: HardnessTraining

    def __init__(self, config: HardnessTraining, pack: Pack):
        super().__init__(config, pack)
        self.module = _Remembering(self.model, config.margin)
        photos = [(self.labels == k).nonzero()[:, 0] for k in range(len(self.anchors))]
        self.by_class = [rows for rows in photos if len(rows)]
        if len(self.by_class) < 2:
            raise ValueError("triplets need photos of at least two classes")

    def draw(self, generator: torch.Generator) -> Tensor:
        """Rows of a batch: ``classes`` classes, ``per_class`` photos of each."""
        c = self.config
        chosen = torch.randperm(len(self.by_class), generator=generator)[: c.classes]
        rows = []
        for photos in (self.by_class[k] for k in chosen.tolist()):
            rows.append(photos[torch.randint(len(photos), (c.per_class,), generator=generator)])
        return torch.cat(rows)

    def source(self, images: Tensor, labels: Tensor, generator: torch.Generator):
        """Anchor features or rows, positive rows and negative rows of the source triplets."""
        with torch.no_grad():
            z = F.normalize(self.model.image_features(images).float(), dim=-1)
        if isinstance(self.model, SmallClip):
            anchor_of = labels.unique()
            anchors = F.normalize(self.pick_anchor(anchor_of, generator), dim=-1)
            # Each class speaks as often as it has photos.
            repeat = self.config.per_class
            anchor_of, anchors = (v.repeat_interleave(repeat, 0) for v in (anchor_of, anchors))
            allowed = torch.ones(len(anchors), len(images), dtype=torch.bool)
        else:
            anchor_of, anchors = labels, z
            allowed = ~torch.eye(len(images), dtype=torch.bool)
        same = anchor_of[:, None] == labels[None]
        distances = torch.cdist(anchors, z)
        positive, negative = softhard(distances, same, allowed, generator)
        return anchors, positive, negative

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        c = self.config
        rows = self.draw(generator)
        labels, images = self.labels[rows], self.photos_of(rows, generator)
        self.model.eval()
        texts, positive, negative = self.source(images, labels, generator)
        textual = isinstance(self.model, SmallClip)
        count = len(positive)
        parts = [images[positive], images[negative]] + ([] if textual else [images])
        stacked = torch.cat(parts)  # perturbed copies of positives, negatives, anchors
        goal = gradual_adversary(self.module.previous, c.margin)  # type: ignore[arg-type]

        def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z = self.model.image_features(x)
            return (texts if textual else z[2 * count :]), z[:count], z[count : 2 * count]

        def too_easy(x: Tensor) -> Tensor:  # raised by ``perturb``, hence the sign
            return -F.relu(goal - hardness(*split(x))).square().sum()

        attacked = perturb(
            stacked, too_easy, c.epsilon, c.inner_steps, generator, step=c.inner_step
        )
        self.model.train()
        anchor, near, far = split(attacked)
        reached = hardness(anchor, near, far)
        triplet = F.relu(reached + c.margin).mean()
        loss = triplet
        if c.ics and not textual:
            clean = self.model.image_features(images)
            loss = loss + c.ics * F.relu(hardness(clean, anchor, clean[positive])).mean()
        self.module.previous.copy_(triplet.detach())  # type: ignore[operator]
        return {"loss": loss, "hardness": reached.mean(), "goal": torch.tensor(goal)}
