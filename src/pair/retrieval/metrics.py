"""Ranking metrics (placeholder until the metric module lands in this commit series)."""

from __future__ import annotations

import torch
from torch import Tensor


def recall_at_k(similarity: Tensor, relevant: Tensor, k: int) -> float:
    top = similarity.topk(min(k, similarity.shape[1]), 1).indices
    return float(relevant.gather(1, top).any(1).float().mean())


def mean_average_precision(similarity: Tensor, relevant: Tensor) -> float:
    order = similarity.argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, order).float()
    ranks = torch.arange(1, hits.shape[1] + 1)
    precision = hits.cumsum(1) / ranks
    return float(((precision * hits).sum(1) / hits.sum(1).clamp(min=1)).mean())
