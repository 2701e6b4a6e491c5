"""What an attack wants: small callables from features to losses, which the attack averages.

``outputs`` is (B, D), or (n, B, D) when n random draws are kept apart; lower is better for the
attacker. The TTH target (which captions, which embedding) is in :mod:`pair.attacks.keywords`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Goal(Protocol):
    """outputs (..., B, D) -> losses, usually (..., B)."""

    def __call__(self, outputs: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class TextGoal:
    """1 - cos(features, embedding): TTH's performance term (PAIR equation 2, normalised)."""

    embedding: Tensor  # (D,) or (1, D), any norm

    def __call__(self, outputs: Tensor) -> Tensor:
        target = self.embedding.reshape(-1).to(outputs)
        return 1 - F.cosine_similarity(outputs, target, dim=-1)


@dataclass(frozen=True)
class FeatureGoal(TextGoal):
    """1 - cos to the features of a picture: the same distance, aimed at a photo."""


@dataclass(frozen=True)
class RankHinge:
    """softplus((tau - cos) / temperature), averaged over queries: what Recall@K itself needs.

    ``queries`` (Q, D) are texts of the keyword, ``thresholds`` (Q,) the cosine that entry number
    K of each ranking has now (see :func:`rank_thresholds`).
    """

    queries: Tensor
    thresholds: Tensor
    temperature: float = 0.01

    def __call__(self, outputs: Tensor) -> Tensor:
        queries = F.normalize(self.queries.to(outputs), dim=-1)
        scores = F.normalize(outputs, dim=-1) @ queries.T  # (..., B, Q)
        return F.softplus((self.thresholds.to(outputs) - scores) / self.temperature).mean(-1)


def rank_thresholds(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """(Q,) cosine of the K-th best gallery entry (N, D) for each query (Q, D)."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).T
    return scores.topk(min(k, scores.shape[1]), 1).values[:, -1]


@dataclass(frozen=True)
class HubGoal:
    """One picture near many unrelated queries (Q, D): mean over queries of 1 - cos."""

    queries: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        queries = F.normalize(self.queries.to(outputs), dim=-1)
        return (1 - F.normalize(outputs, dim=-1) @ queries.T).mean(-1)


@dataclass(frozen=True)
class Selective:
    """Mean over the best (or worst) ``share`` of the draws of each image.

    The best half serves best-of-n uploads, the worst half reliability. Needs draws kept apart:
    features of :class:`pair.attacks.wrappers.EOT` with ``form="mean_loss"``.
    """

    goal: Goal
    share: float = 0.5
    worst: bool = False

    def __call__(self, outputs: Tensor) -> Tensor:
        if outputs.ndim < 3:
            raise ValueError(
                "a selective goal needs several draws per image: use EOT(..., form='mean_loss')"
            )
        losses = self.goal(outputs)  # (n, B)
        keep = max(1, round(self.share * len(losses)))
        return losses.topk(keep, dim=0, largest=self.worst).values.mean(0)


@dataclass(frozen=True)
class HashGoal:
    """AdvHash's loss on real hash outputs H (..., K) for an anchor ``code`` (K,) of +-1.

    Bits with |tanh(H) - c| < ``margin`` count as done and get weight 0; the loss is
    -sum(w * tanh(alpha H) * c) / sum(w) over the whole batch: one number, 0 when all are done.
    """

    code: Tensor
    alpha: float = 1.0
    margin: float = 0.3

    def active(self, outputs: Tensor) -> Tensor:
        code = self.code.reshape(-1).to(outputs)
        return ((outputs.detach().tanh() - code).abs() >= self.margin).to(outputs.dtype)

    def __call__(self, outputs: Tensor) -> Tensor:
        code = self.code.reshape(-1).to(outputs)
        weight = self.active(outputs)
        products = weight * (self.alpha * outputs).tanh() * code
        return -products.sum() / weight.sum().clamp(min=1)


@dataclass(frozen=True)
class HashHinge:
    """sum over bits of max(0, margin - c_k h_k): no saturation, so it suits Adam."""

    code: Tensor
    margin: float = 0.5

    def __call__(self, outputs: Tensor) -> Tensor:
        code = self.code.reshape(-1).to(outputs)
        return (self.margin - code * outputs).clamp(min=0).sum(-1)


@dataclass(frozen=True)
class Together:
    """Weighted sum of goals; each goal is averaged first."""

    goals: Sequence[tuple[Goal, float]]

    def __call__(self, outputs: Tensor) -> Tensor:
        return torch.stack([w * goal(outputs).mean() for goal, w in self.goals]).sum()


@dataclass(frozen=True)
class FoolDetector:
    """Penalty on the *images*: make a patch detector miss the patch.

    ``detector`` maps images (B, 3, H, W) to one logit per pixel (B, 1, H, W) or (B, H, W),
    positive where it sees a patch. The penalty is softplus(logit), averaged over the pixels that
    the patch covers (PAIR section 3.2 for SAC and PatchZero; the weight is not stated there).
    """

    detector: object
    weight: float = 1.0

    def __call__(self, images: Tensor, covered: Tensor) -> Tensor:
        """``covered`` (B or 1, 1, H, W): weights of the patch's pixels."""
        logits = self.detector(images)  # type: ignore[operator]
        logits = logits if logits.ndim == 4 else logits[:, None]
        cover = covered.to(logits).expand_as(logits)
        return self.weight * (F.softplus(logits) * cover).sum() / cover.sum().clamp(min=1)


def anchor_code(codes: Tensor) -> Tensor:
    """Component-wise voting: the majority of each bit over codes (n, K) of +-1; a tie is +1."""
    return torch.where(codes.sum(0) >= 0, 1.0, -1.0)
