"""Adversarially trained targets: AT (PGD fine-tuning) and HM (hardness-manipulated triplets).

Both start from a trained target, keep its geometry, and write an ordinary model folder (of a model
of open_clip, one that open_clip reads). The text tower of a CLIP stays frozen, so the text side of
an index stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.data.pack import Collection
from pair.data.prompts import TRAIN_TEMPLATES, sentences
from pair.retrieval.hashing import csq_loss, multilabel_centres
from pair.training import start, towers
from pair.training.augment import crop_flip, to_float
from pair.training.loop import weight_groups
from pair.training.pgd import perturb
from pair.training.precision import precisely

TRAIN, HELD_OUT = ("train", "restval"), ("val", "gallery")


@dataclass(frozen=True)
class AdversarialTraining:
    """AT: min over weights of max over l_inf perturbations within ``epsilon`` (Madry 2018).

    The threat model of the paper's AT row is not stated; 4/255 with 3 inner steps is ours.
    ``clean`` mixes in the loss on the clean photos (0 = Madry). ``init`` names the target, see
    :mod:`pair.training.towers`.
    """

    kind: str = "clip"
    init: str = "clip-small"
    epsilon: float = 4 / 255
    inner_steps: int = 3
    clean: float = 0.0
    lr: float = 1e-4
    weight_decay: float = 0.05
    validation: int = 200

    @property
    def photo_side(self) -> int:
        """Side at which photos of a data set are decoded, until the target is known."""
        return self.side(224)

    @staticmethod
    def side(image_size: int) -> int:
        return image_size * 8 // 7


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
    """See :class:`pair.training.loop.Task`. A trained target, and photos with class names or, for
    CLIP, with captions: there every photo is a class of its own, and its captions are the
    sentences about it."""

    name: str

    def __init__(self, config: AdversarialTraining, pack: Collection):
        self.config, self.pack, self.device = config, pack, torch.device("cpu")
        self.tower = towers.load(config.kind, config.init)
        self.model = self.tower.model
        self.module: nn.Module = self.model
        self.size_px = self.tower.size
        pack.decode_at(config.side(self.size_px))
        if pack.side < self.size_px:
            raise ValueError(
                f"the photos of the pack have {pack.side} pixels a side, {config.init} takes "
                f"{self.size_px}: make a larger pack"
            )
        known = list(self.model.config.classes) if self.tower.hashing else towers.classes(pack)
        self.captioned = not known  # captions instead of classes
        if self.tower.hashing and not known:
            raise ValueError(
                f"{config.init} names no classes: train it with 'pair train csq-paper'"
            )
        if self.captioned and not pack.captions:
            raise ValueError("the photos have neither class names nor captions to train on")
        self.number = {name: i for i, name in enumerate(known)}
        self.rows, held = self._split()
        self.photos = pack.batch(held, self.size_px)
        self.anchors = self._anchors(known)
        self.references, self.matches = self._validation(held)
        if not self.captioned:
            self.labels = self._labels(self.rows)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name.startswith(self.tower.trained))

    def _split(self) -> tuple[Tensor, Tensor]:
        """Rows of the pack to train on, and some that are held out."""
        usable = [(i, split) for i, split in enumerate(self.pack.splits) if self._usable(i)]
        train = [i for i, split in usable if split in TRAIN]
        held = torch.tensor([i for i, split in usable if split in HELD_OUT])
        if not train or not len(held):
            raise ValueError("the pack has no training or no held-out photos of classes it knows")
        seeded = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(held), generator=seeded)[: self.config.validation]
        return torch.tensor(train), held[chosen]

    def _usable(self, row: int) -> bool:
        if self.captioned:
            return bool(self.pack.captions[row])
        return any(name in self.number for name in towers.names_of(self.pack.labels[row]))

    def _validation(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """What held-out photos are compared with (C, D): classes or, of each photo, the mean of
        its captions; and which of them are right (N, C)."""
        if not self.captioned:
            return self.anchors.mean(1), self._labels(held)
        texts = [self.tower.text(list(self.pack.captions[i])) for i in held.tolist()]
        means = torch.stack([F.normalize(t, dim=-1).mean(0) for t in texts])
        return means, torch.eye(len(held), dtype=torch.bool)

    def _anchors(self, names: list[str]) -> Tensor:
        """What each class is compared with: T sentence features (C, T, D) or centres (C, 1, K)."""
        if self.tower.hashing:
            return self.model.centres[:, None]
        if not names:
            return torch.empty(0, 0, self.model.dim)
        texts = self.tower.text(sentences(names, TRAIN_TEMPLATES))
        return F.normalize(texts, dim=-1).unflatten(0, (len(names), -1))

    def _labels(self, rows: Tensor) -> Tensor:
        """Labels (N, C); a name that the target does not know counts for nothing."""
        labels = torch.zeros(len(rows), len(self.number), dtype=torch.bool)
        for at, row in enumerate(rows.tolist()):
            for name in towers.names_of(self.pack.labels[row]):
                if name in self.number:
                    labels[at, self.number[name]] = True
        return labels

    def size(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> None:
        """Move everything that takes part in a step."""
        self.device = device
        self.module.to(device)
        for name in ("photos", "anchors", "references", "matches"):
            setattr(self, name, getattr(self, name).to(device))

    def inputs(self) -> dict[str, str]:
        """SHA-256 of the start, before the first step."""
        return {"init": start.digest(self.model)}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return [torch.optim.AdamW(weight_groups(named, c.lr, c.weight_decay))]

    def pick_anchor(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One sentence feature (or the centre) per label: (B, D)."""
        which = torch.randint(self.anchors.shape[1], (len(labels),), generator=generator)
        return self.anchors[labels.to(self.device), which.to(self.device)]

    def pick_caption(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Unit features (B, D) of a caption of each photo, and which are the same (B, B)."""
        texts = []
        for i in self.rows[rows].tolist():
            own = self.pack.captions[i]
            texts.append(own[int(torch.randint(len(own), (1,), generator=generator))])
        same = torch.tensor([[a == b for b in texts] for a in texts])
        return F.normalize(self.tower.text(texts).float(), dim=-1), same

    def photos_of(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        raw = self.pack.raw(self.rows[rows]).to(self.device)
        return crop_flip(to_float(raw), self.size_px, generator)

    def scores(self, images: Tensor) -> Tensor:
        """Similarity to each class (B, C), for validation."""
        z = self.tower.encode(images)
        z = z.tanh() if self.tower.hashing else F.normalize(z, dim=-1)
        return z @ self.references.T

    def validate(self) -> dict[str, float]:
        """Share of held-out photos nearest to (one of) their classes, or to their own captions:
        clean, and under PGD on this model."""
        c, right = self.config, {"clean": 0, "attacked": 0}
        seeded = torch.Generator().manual_seed(1)
        for x, y in zip(self.photos.split(32), self.matches.split(32), strict=True):

            def wrong(v: Tensor, y: Tensor = y) -> Tensor:
                return F.cross_entropy(20 * self.scores(v), shares(y), reduction="sum")

            attacked = perturb(x, wrong, c.epsilon, c.inner_steps, seeded)
            for name, images in (("clean", x), ("attacked", attacked)):
                best = self.scores(images).argmax(1, keepdim=True)
                right[name] += int(y.gather(1, best).sum())
        clean, attacked_share = (right[k] / len(self.photos) for k in ("clean", "attacked"))
        return {
            "score": clean + attacked_share,
            "top1_clean": clean,
            "top1_attacked": attacked_share,
        }

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        self.tower.save(folder, {"hardened": self.name, **facts})


def shares(marks: Tensor) -> Tensor:
    """Rows of probabilities from marks (B, C): equal shares for all that are marked."""
    return marks / marks.sum(1, keepdim=True)


class AtTask(_FineTuning):
    """The target's own loss on the worst perturbation that PGD finds."""

    name = "at"

    def __init__(self, config: AdversarialTraining, pack: Collection):
        super().__init__(config, pack)
        if self.tower.hashing:
            ties = torch.Generator().manual_seed(0)  # as in ``pair train csq-paper``
            self.targets = multilabel_centres(self.labels, self.model.centres.cpu(), ties)

    def prefetch(self, rows: Tensor) -> None:
        self.pack.prefetch(self.rows[rows])

    def target_loss(self, images: Tensor, wanted: Tensor, texts: Tensor) -> Tensor:
        """CLIP: cross-entropy over sentences (A, D), of which ``wanted`` (B, A) are right; CSQ:
        the loss to the centres ``wanted`` (B, K)."""
        z = self.tower.encode(images)
        if self.tower.hashing:
            return precisely(csq_loss, z, wanted)
        return F.cross_entropy(self.tower.scale() * F.normalize(z, dim=-1) @ texts.T, wanted)

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        c = self.config
        images = self.photos_of(rows, generator)
        if self.captioned:  # among the captions of the batch
            texts, same = self.pick_caption(rows, generator)
            wanted = shares(same).to(self.device)
        else:
            texts = self.pick_anchor(torch.arange(len(self.anchors)), generator)
            wanted = self.targets[rows] if self.tower.hashing else shares(self.labels[rows])
            wanted = wanted.to(self.device)
        self.model.eval()  # the inner attack must not move the batch statistics

        def worst(x: Tensor) -> Tensor:
            return self.target_loss(x, wanted, texts)

        attacked = perturb(images, worst, c.epsilon, c.inner_steps, generator)
        self.model.train()
        loss = adversarial = self.target_loss(attacked, wanted, texts)
        if c.clean:
            loss = loss + c.clean * self.target_loss(images, wanted, texts)
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
    distances: Tensor, positives: Tensor, negatives: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A positive and a negative for each anchor (A,), both drawn among the harder ones.

    ``distances`` (A, N) from anchors to photos; ``positives`` and ``negatives`` (A, N) mark the
    photos that may serve an anchor as such, at least one of each. Positives farther than the
    nearest negative and negatives nearer than the farthest positive are eligible; where none is,
    all are.
    """
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
    TRIES = 100

    def __init__(self, config: HardnessTraining, pack: Collection):
        super().__init__(config, pack)
        self.module = _Remembering(self.model, config.margin)
        if self.captioned:
            self.by_class = [(i, torch.tensor([i])) for i in range(len(self.rows))]
        else:
            photos = [(k, self.labels[:, k].nonzero()[:, 0]) for k in range(self.labels.shape[1])]
            self.by_class = [(k, rows) for k, rows in photos if len(rows)]
        if len(self.by_class) < 2:
            raise ValueError("triplets need photos of at least two classes")

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows (N,) of a batch, ``classes`` classes with ``per_class`` photos of each, and the
        classes. Where photos are their own classes, several crops of each."""
        c = self.config
        chosen = torch.randperm(len(self.by_class), generator=generator)[: c.classes]
        rows, names = [], []
        for k, photos in (self.by_class[i] for i in chosen.tolist()):
            rows.append(photos[torch.randint(len(photos), (c.per_class,), generator=generator)])
            names.append(k)
        return torch.cat(rows), torch.tensor(sorted(names))

    def triplets(self, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Rows (N,) of a batch, the anchors' features (A, D) (None: the photos themselves), and
        which photos each anchor may have for a positive and which for a negative (A, N)."""
        for _ in range(self.TRIES):
            rows, names = self.draw(generator)
            anchors: Tensor | None = None
            if self.tower.hashing:
                same = (self.labels[rows].float() @ self.labels[rows].float().T) > 0
                allowed = ~torch.eye(len(rows), dtype=torch.bool)
            else:
                if self.captioned:
                    own = rows.unique()
                    anchors, alike = self.pick_caption(own, generator)
                    same = alike[:, torch.searchsorted(own, rows)]
                else:
                    anchors = F.normalize(self.pick_anchor(names, generator), dim=-1)
                    same = self.labels[rows][:, names].T
                # Each class speaks as often as it has photos.
                repeat = self.config.per_class
                anchors, same = (v.repeat_interleave(repeat, 0) for v in (anchors, same))
                allowed = torch.ones_like(same)
            positives, negatives = same & allowed, ~same & allowed
            if bool((positives.any(1) & negatives.any(1)).any()):
                return rows, anchors, positives, negatives
        raise ValueError("no batch holds both like and unlike photos: raise classes or per_class")

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        c = self.config
        rows, texts, positives, negatives = self.triplets(generator)
        images = self.photos_of(rows, generator)
        self.model.eval()
        with torch.no_grad():
            z = F.normalize(self.tower.encode(images).float(), dim=-1)
        # Photos of every class of the batch, or of none but theirs, are no anchors.
        kept = (positives.any(1) & negatives.any(1)).nonzero()[:, 0]
        distances = torch.cdist(z if texts is None else texts, z).cpu()
        positive, negative = softhard(distances[kept], positives[kept], negatives[kept], generator)
        textual, count = texts is not None, len(kept)
        texts = texts[kept] if texts is not None else z[kept]
        parts = [images[positive], images[negative]] + ([] if textual else [images[kept]])
        stacked = torch.cat(parts)  # perturbed copies of positives, negatives, anchors
        goal = gradual_adversary(self.module.previous, c.margin)  # type: ignore[arg-type]

        def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z = self.tower.encode(x)
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
            clean = self.tower.encode(images)
            inside = hardness(clean[kept], anchor, clean[positive])
            loss = loss + c.ics * F.relu(inside).mean()
        told = {"triplet": triplet, "hardness": reached.mean(), "goal": reached.new_tensor(goal)}
        return {"loss": loss, **told}

    def stepped(self, losses: dict[str, float]) -> None:
        """The next step's goal depends on this step's loss, that of all slices and processes."""
        self.module.previous.fill_(losses["triplet"])  # type: ignore[operator]
