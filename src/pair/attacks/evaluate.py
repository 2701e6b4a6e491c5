"""How good a patch is: many draws of a random defense, best of n uploads, transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.attacks.objectives import Goal
from pair.attacks.patch import Patch
from pair.attacks.wrappers import EOT


@torch.no_grad()
def draw_outputs(
    features: Any,
    images: Tensor,
    patch: Patch | None,
    draws: int,
    generator: torch.Generator | None = None,
    *,
    eight_bits: bool = True,
    micro_batch: int = 64,
) -> Tensor:
    """Features (draws, B, D) of the patched images under independent draws of the defense.

    By default the patch is rounded to 8 bits first, as its file would be.
    """
    if patch is not None:
        patch = (patch.quantised() if eight_bits else patch).to(images.device)
        images = patch.apply(images, generator)
    function = EOT(features, draws, "mean_loss", micro_batch=micro_batch, checkpoint=False)
    return function(images, generator=generator)


def score(
    features: Any,
    images: Tensor,
    patch: Patch | None,
    goal: Goal,
    draws: int = 1,
    generator: torch.Generator | None = None,
    **options: Any,
) -> float:
    """Mean loss of a goal over carriers and draws: what restarts are selected by."""
    outputs = draw_outputs(features, images, patch, draws, generator, **options)
    return float(goal(outputs).mean())


def enters(outputs: Tensor, queries: Tensor, thresholds: Tensor) -> Tensor:
    """Does an image get into the top K of a query? (draws, B, D), (Q, D), (Q,) -> (draws, B, Q).

    ``thresholds`` come from :func:`pair.attacks.objectives.rank_thresholds` on the gallery
    without the attacked images; a tie counts as not entering.
    """
    scores = F.normalize(outputs, dim=-1) @ F.normalize(queries, dim=-1).T.to(outputs)
    return scores > thresholds.to(outputs)


def best_of(success: Tensor, uploads: Sequence[int] = (1, 10, 100)) -> dict[int, float]:
    """P(at least one of n uploads succeeds), from ``success`` (draws, ...) of independent draws.

    Averaged over everything but the draws. For n up to the number of draws m this is the unbiased
    1 - C(m - k, n) / C(m, n) with k successes; beyond, 1 - (1 - k/m)^n, which needs many draws.
    """
    m = len(success)
    counts = success.reshape(m, -1).sum(0).tolist()
    curve = {}
    for n in uploads:
        if n <= m:
            each = [1 - comb(m - k, n) / comb(m, n) for k in counts]
        else:
            each = [1 - (1 - k / m) ** n for k in counts]
        curve[n] = sum(each) / len(each)
    return curve


def transfer(
    victims: Mapping[str, Any],
    images: Tensor,
    patch: Patch,
    goals: Mapping[str, Goal],
    draws: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Mean loss of one finished patch on each victim, with that victim's own goal."""
    return {
        name: score(victim, images, patch, goals[name], draws, torch.Generator().manual_seed(seed))
        for name, victim in victims.items()
    }
