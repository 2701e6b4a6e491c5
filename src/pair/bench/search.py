"""What stands behind one row of a table: images to rows, rows to scores, and how to attack it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.attacks.objectives import Goal, TextGoal
from pair.attacks.wrappers import Adaptive, adaptive, as_features
from pair.bench.models import CERTIFIED, Models
from pair.bench.photos import Photos
from pair.bench.scenario import Row, Settings
from pair.certified import DeltaCap
from pair.retrieval.hashing import binarise

BATCH = 32
CELLS = 2**27  # scores of views that are held at a time: half a gigabyte


class Defended:
    """An encoder behind the defense of a row."""

    def __init__(self, models: Models, row: Row, encoder: Any, hashing: bool):
        self.defense = models.defense(row, hashing)
        self.encoder = self.defense.harden(encoder)
        self.random = self.defense.random
        self.device = models.settings.device

    def features(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, D), as an evaluation computes them."""
        return self.encoder.encode_image(self.defense(images, generator=generator))

    def samples(self, s: Settings) -> int:
        """Draws of the defense per step of an attack, by the settings of a row."""
        return s.eot if self.random else 1

    def _batches(self, images: Tensor | Photos):
        return (chunk.to(self.device) for chunk in images.split(BATCH))


class Search(Defended):
    """A text search behind a defense. ``rows(images, seed)`` are unit features (B, 1, D)."""

    def __init__(self, models: Models, row: Row):
        super().__init__(models, row, models.clip(), False)

    @torch.no_grad()
    def rows(self, images: Tensor | Photos, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([self._rows(b, generator).cpu() for b in self._batches(images)])

    def _rows(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return F.normalize(self.features(images, generator), dim=-1)[:, None]

    @torch.no_grad()
    def text(self, texts: list[str]) -> Tensor:
        """Unit rows (T, D) of texts."""
        parts = [self.encoder.encode_text(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    @torch.no_grad()
    def target(self, texts: list[str]) -> Tensor:
        """e_t: the mean of the raw text features (D,)."""
        return self.encoder.encode_text(texts).float().mean(0)

    def scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        """(Q, D), (B, 1, D) -> (Q, B)."""
        return queries @ rows[:, 0].T

    def victim(self, target: Tensor, covered: Tensor | None = None) -> tuple[Adaptive, Goal]:
        """What an adaptive attacker differentiates, and its goal. ``covered`` (S, S) marks the
        pixels that the patch will cover, where that is known beforehand."""
        return adaptive(self.encoder, self.defense), TextGoal(target)


class CertifiedSearch(Search):
    """The certified mode: rows are all views (B, R + 1, D), the plain one last, min-pooled.

    It is attacked member by member (ARC, Dbouk and Shanbhag 2022): in every step the views with
    the lowest scores among those that see the patch are raised; the mean over all views would
    waste the effort on views that already lost.
    """

    WEAKEST = 2

    def __init__(self, models: Models, row: Row):
        s = models.settings
        self.encoder, self.purifier = models.clip(), models.certified(row, s.size)
        self.random, self.device = False, s.device
        self.pool = DeltaCap(0.0)

    def _rows(self, images: Tensor, generator: torch.Generator) -> Tensor:
        views = self.purifier.embed(self.encoder, images)
        return torch.cat([views.masked, views.plain[:, None]], 1)

    def scores(self, queries: Tensor, rows: Tensor) -> Tensor:
        most = max(1, CELLS // (len(rows) * rows.shape[1]))  # queries at a time
        parts = [torch.einsum("qd,brd->qbr", q, rows) for q in queries.split(most)]
        return torch.cat([self.pool(part) for part in parts])

    def features(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self._rows(images, torch.Generator()).flatten(1)

    def victim(self, target: Tensor, covered: Tensor | None = None) -> tuple[Adaptive, Goal]:
        attacked = self._seeing(covered)
        wanted = F.normalize(target, dim=-1)
        weakest = min(self.WEAKEST, len(attacked) + 1)

        def features(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            x = self.purifier.prepare(images)
            with torch.no_grad():
                table = self._members(x, attacked) @ wanted  # (B, A + 1)
                lowest = table.topk(weakest, dim=1, largest=False).indices  # (B, w)
            rows = torch.arange(len(x), device=x.device).repeat_interleave(weakest)
            return self._pick(x[rows], attacked, lowest.flatten()).view(len(x), -1)

        def goal(outputs: Tensor) -> Tensor:
            views = outputs.unflatten(-1, (-1, len(wanted)))
            return 1 - F.cosine_similarity(views, wanted.to(views), dim=-1).mean(-1)

        return Adaptive(features, 1, None, "exact"), goal

    def _seeing(self, covered: Tensor | None) -> Tensor:
        """Masks (A, N) of the views that see some pixel of the patch; the others cannot move."""
        visible = self.purifier.cover.visible.to(self.device)
        if covered is None:
            return visible
        shown = self.purifier.pixels(visible)[:, 0]
        sees = (shown & (covered.to(self.device) > 0)).flatten(1).any(1)
        return visible[sees]

    def _members(self, x: Tensor, masks: Tensor) -> Tensor:
        """Unit features (B, A + 1, D) of the attacked views and the plain image."""
        plain = F.normalize(self.encoder.encode_image(x), dim=-1)[:, None]
        if not len(masks):
            return plain
        images = x.repeat_interleave(len(masks), 0)
        seen = self.purifier.encode(self.encoder, images, masks.repeat(len(x), 1))
        return torch.cat([seen.unflatten(0, (len(x), len(masks))), plain], 1)

    def _pick(self, x: Tensor, masks: Tensor, member: Tensor) -> Tensor:
        """Features (M, D) of one member per image; number ``len(masks)`` is the plain image."""
        plain = member == len(masks)
        shown = masks[member.clamp(max=max(0, len(masks) - 1))] if len(masks) else None
        views = x if shown is None else self.purifier.render(x, shown)
        views = torch.where(plain[:, None, None, None], x, views)
        return self.encoder.encode_image(views)


class HashSearch(Defended):
    """A search by photo behind a defense of its *queries*; the gallery's codes are trusted."""

    def __init__(self, models: Models, row: Row):
        super().__init__(models, row, models.csq(), True)

    @torch.no_grad()
    def codes(self, images: Tensor | Photos, seed: int) -> Tensor:
        """Codes (B, K) of +-1 of purified queries."""
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([self._codes(c, generator).cpu() for c in self._batches(images)])

    def _codes(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return binarise(self.features(images, generator))

    @torch.no_grad()
    def gallery(self, images: Tensor | Photos) -> Tensor:
        """Codes (N, K) of the clean gallery."""
        outputs = (self.encoder.encode_image(c) for c in self._batches(images))
        return torch.cat([binarise(o).cpu() for o in outputs])

    def victim(
        self, anchor: Tensor | None = None, covered: Tensor | None = None
    ) -> tuple[Adaptive, Goal]:
        """What an adaptive attacker differentiates, and its goal: the code ``anchor`` (K,)."""
        code = torch.ones(self.encoder.dim) if anchor is None else anchor
        return adaptive(self.encoder, self.defense), TextGoal(code)


def milliseconds(run: Callable[[Tensor, int], Tensor], images: Tensor, repeats: int = 3) -> float:
    """CPU time of ``run(images, seed)`` per image, defense and encoder together: the best of a
    few."""
    run(images, 0)
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        run(images, 0)
        best = min(best, time.process_time() - begin)
    return round(1000 * best / len(images), 2)


def search(models: Models, row: Row) -> Search:
    return CertifiedSearch(models, row) if row.defense == CERTIFIED else Search(models, row)


def undefended(models: Models) -> tuple[Callable[..., Tensor], Any]:
    """Features of the bare text search, and its encoder."""
    encoder = models.clip()
    return as_features(encoder), encoder
