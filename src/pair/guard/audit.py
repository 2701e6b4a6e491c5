"""Find pictures that may have been tampered with: what a purifier tells almost for free.

Per picture ``x`` and encoder ``f``, with ``s(q, x)`` the cosine of a query and a picture:

- ``shift``: 1 - cos(f(x), mean over draws of f(purified x)). Heuristic.
- ``spread``: mean pairwise 1 - cos between draws. Heuristic.
- ``drop``: max over a bank of frequent queries of s(q, x) - min over views of s(q, view), where
  each view is rebuilt without one window. Heuristic as a ranking; on a hit, "the score falls by
  more than delta without one window" (``one_window``) is Theorem 10 of ``docs/guarantee.md``: a
  patch that lifts a picture by more than that cannot avoid it. No budget holds for it.
- ``focus``: the share of all positive drops that the worst window has. Heuristic, not in the alarm.
- ``hub``: share of the bank for which x is in the top K before purification minus after. Heuristic.

A patch that survives purification moves neither ``shift`` nor ``hub``: an attacker who knows PAIR
evades both for free. See ``benchmarks/audit.py`` for by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pair.certified.covering import PatchFamily, window_cover
from pair.certified.purifier import CertifiedPurifier
from pair.guard import conformal
from pair.guard.models import Models
from pair.images import check_images, resize

STATISTICS = ("drop", "shift", "spread", "hub")  # those that can raise an alarm
HEURISTIC = (
    "Ranking and alarms are heuristics: they find patches that do not know the audit, and miss "
    "many of those that do."
)
PROVED = (
    "Only the mark 'hit that hangs on one window' rests on a proof: a patch that lifts a picture "
    "into the hits by more than delta cannot avoid it. Honest hits may get it too, so it is "
    "counted apart from the alarms."
)


@dataclass
class Finding:
    """What one picture showed. ``heat`` (g, g): mean drop of the views that hide a token, for the
    ``query`` with the largest drop; ``window`` (left, top, right, bottom) as shares of the sides.

    ``drops`` (Q,): the largest drop for each query of the bank. ``plain`` and ``clean`` (D,): the
    embeddings before and after purification. ``p`` and ``alarm`` need clean pictures, see
    :meth:`Auditor.judge`.
    """

    uri: str
    statistics: dict[str, float]
    query: str
    score: float
    lowest: float
    window: tuple[float, float, float, float]
    heat: np.ndarray
    drops: np.ndarray
    plain: np.ndarray
    clean: np.ndarray
    one_window: bool = False  # a hit of the bank that loses more than delta with one window
    p_values: dict[str, float] = field(default_factory=dict)
    p: float = 1.0
    alarm: bool = False

    def record(self) -> dict[str, Any]:
        """For JSON: what is said about the picture, without the arrays."""
        return {k: v for k, v in asdict(self).items() if not isinstance(v, np.ndarray)}


class Auditor:
    """``examine`` pictures one batch at a time; ``compare`` and ``judge`` look at all of them."""

    def __init__(
        self,
        models: Models,
        bank: Sequence[str],
        *,
        draws: int = 4,
        patch: float = 0.35,
        views: int = 9,
        delta: float = 0.2,
        top: int = 10,
    ):
        if models.encoder is None or models.purifier is None:
            raise ValueError("an audit needs a text-image encoder and a purifier")
        if not bank:
            raise ValueError("an audit needs at least one query in its bank")
        if draws < 2:
            raise ValueError(f"an audit needs at least 2 draws, got {draws}")
        self.models, self.bank, self.draws = models, list(bank), draws
        self.delta, self.top = delta, top
        generator = models.purifier.autoencoder
        c = generator.config
        family = PatchFamily.share(patch, c.image_size)
        cover = window_cover(family, c.image_size, c.patch_size, views)
        self.views = CertifiedPurifier(generator, cover)
        self.queries = torch.from_numpy(models.text(self.bank))  # (Q, D)
        self.settings = {
            "bank": self.bank, "draws": draws, "patch": patch, "views": len(cover),
            "delta": delta, "top": top,
            "models": {r: m["fingerprint"] for r, m in models.describe().items()},
        }  # fmt: skip

    @property
    def image_size(self) -> int:
        return self.views.image_size

    @torch.no_grad()
    def examine(
        self, images: Tensor, uris: Sequence[str], *, seeds: Sequence[int] | None = None
    ) -> list[Finding]:
        """Findings of images (B, 3, H, W) in [0, 1]; ``hub`` is not known yet.

        ``seeds``: one per image, for repeatable draws; by default secret and fresh.
        """
        x = resize(check_images(images), self.image_size).clamp(0, 1)
        seen = self.views.embed(self.models.encoder, x)
        plain, masked = seen.plain.float().cpu(), seen.masked.float().cpu()  # (B, D), (B, R, D)
        draws = []
        for draw in range(self.draws):
            picks = None if seeds is None else [s + draw for s in seeds]
            rebuilt = self.models.purify(x, picks)
            draws.append(
                F.normalize(self.models.encoder.encode_image(rebuilt).float().cpu(), dim=1)
            )
        z = torch.stack(draws, 1)  # (B, m, D)
        clean = F.normalize(z.mean(1), dim=1)
        shift = 1 - (plain * clean).sum(1)
        pairs = z @ z.transpose(1, 2)  # (B, m, m)
        m = self.draws
        spread = 1 - (pairs.sum((1, 2)) - m) / (m * (m - 1))
        scores = plain @ self.queries.T  # (B, Q)
        drops = scores[:, :, None] - torch.einsum("qd,brd->bqr", self.queries, masked)
        worst, window = drops.max(2)  # (B, Q)
        found = []
        for i, uri in enumerate(uris):
            q = int(worst[i].argmax())
            by_view = drops[i, q].clamp(min=0)  # (R,)
            r = int(window[i, q])
            size = self.image_size
            box = self.views.cover.boxes()[r]
            statistics = {
                "drop": float(worst[i, q]),
                "shift": float(shift[i]),
                "spread": float(spread[i]),
                "focus": float(by_view.max() / by_view.sum().clamp(min=1e-12)),
            }
            found.append(
                Finding(
                    uri=uri, statistics=statistics, query=self.bank[q],
                    score=float(scores[i, q]), lowest=float(scores[i, q] - worst[i, q]),
                    window=(box[0] / size, box[1] / size, box[2] / size, box[3] / size),
                    heat=self._heat(drops[i, q]), drops=worst[i].numpy(),
                    plain=plain[i].numpy(), clean=clean[i].numpy(),
                )
            )  # fmt: skip
        return found

    def compare(self, findings: Sequence[Finding], gallery: Sequence[Finding]) -> None:
        """Fill ``hub`` and ``one_window``: against the whole ``gallery``, of which ``findings``
        may be a part. A picture is in the top K of a query if fewer than K are better."""
        before = self._bars([f.plain for f in gallery])
        after = self._bars([f.clean for f in gallery])
        queries = self.queries.numpy()
        for f in findings:
            hit = queries @ f.plain >= before - 1e-6
            f.statistics["hub"] = float(hit.mean() - (queries @ f.clean >= after - 1e-6).mean())
            f.one_window = bool((hit & (f.drops > self.delta)).any())

    def judge(
        self, findings: Sequence[Finding], clean: Sequence[Finding], budget: float
    ) -> dict[str, float]:
        """Fill p-values and alarms from clean findings (compared with the same gallery).

        The chance of an alarm is at most ``budget`` for a clean picture like those in ``clean``.
        Returns the threshold of each statistic.
        """
        values = {s: sorted(f.statistics[s] for f in clean) for s in STATISTICS}
        for f in findings:
            f.p_values = {s: conformal.p_value(f.statistics[s], values[s]) for s in STATISTICS}
            f.p = conformal.combined(list(f.p_values.values()))
            f.alarm = f.p <= budget
        share = budget / len(STATISTICS)
        return {s: conformal.threshold(values[s], share) for s in STATISTICS}

    def _bars(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """(Q,): the K-th best score of each query."""
        best = torch.full((len(self.bank), 0), 0.0)
        for start in range(0, len(rows), 8192):
            part = torch.from_numpy(np.stack(rows[start : start + 8192]))
            scores = torch.cat([best, self.queries @ part.T], 1)
            best = scores.topk(min(self.top, scores.shape[1]), dim=1).values
        return best[:, -1].numpy()

    def _heat(self, drops: Tensor) -> np.ndarray:
        """Drops (R,) -> (g, g): the mean over the views that hide a token."""
        hidden = (~self.views.cover.visible).float().cpu()  # (R, N)
        total = (drops[:, None] * hidden).sum(0) / hidden.sum(0).clamp(min=1)
        return total.view(self.views.cover.grid, -1).numpy()
