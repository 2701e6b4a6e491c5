"""Attacks without gradients: random search over squares (Square / Sparse-RS style) and NES.

Both see only losses of a goal, which may be a score oracle (any goal) or a rank oracle
(:class:`TopKOracle`). They check for gradient masking; they are rarely the strongest attack.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.attacks.evaluate import score
from pair.attacks.objectives import Goal, TextGoal
from pair.attacks.optimise import AttackResult, Progress
from pair.attacks.parametrise import parametrisation
from pair.attacks.patch import Patch
from pair.attacks.wrappers import EOT


@dataclass(frozen=True)
class TopKOracle:
    """1 - share of queries that list the image: all that an attacker sees of result lists."""

    queries: Tensor  # (Q, D)
    thresholds: Tensor  # (Q,)

    def __call__(self, outputs: Tensor) -> Tensor:
        queries = F.normalize(self.queries.to(outputs), dim=-1)
        scores = F.normalize(outputs, dim=-1) @ queries.T
        return 1 - (scores > self.thresholds.to(outputs)).to(outputs.dtype).mean(-1)


def random_search(
    features: Any,
    images: Tensor,
    target: Tensor | Goal,
    patch: Patch,
    *,
    queries: int = 1000,
    draws: int = 1,
    initial_share: float = 0.4,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """Replace random squares of the patch by one colour each; keep what lowers the loss.

    The side of the squares shrinks as in the Square attack. One query is one candidate, averaged
    over all carriers and ``draws`` draws. Starts from random vertical stripes.
    """
    generator = generator or torch.Generator().manual_seed(0)
    goal: Goal = TextGoal(target) if isinstance(target, Tensor) else target
    h, w = patch.size
    cpu = torch.Generator().manual_seed(generator.initial_seed() & 0x7FFFFFFF)
    stripes = torch.randint(0, 2, (3, 1, w), generator=cpu).float().expand(3, h, w)
    begin = time.perf_counter()

    def rate(content: Tensor) -> float:
        return score(features, images, patch.with_content(content.to(images)), goal, draws,
                     generator, eight_bits=False)  # fmt: skip

    best, low = stripes.clone(), rate(stripes)
    losses = [low]
    for k in range(1, queries):
        share = initial_share * 0.5 ** _halvings(k, queries)
        side = max(1, round(math.sqrt(share * h * w)))
        tall, wide = min(side, h), min(side, w)
        top = int(torch.randint(0, h - tall + 1, (1,), generator=cpu))
        left = int(torch.randint(0, w - wide + 1, (1,), generator=cpu))
        colour = torch.randint(0, 2, (3, 1, 1), generator=cpu).float()
        candidate = best.clone()
        candidate[:, top : top + tall, left : left + wide] = colour
        if (value := rate(candidate)) < low:
            best, low = candidate, value
        losses.append(low)
        if progress is not None:
            progress(k, queries, low)
    return AttackResult(
        patch=patch.with_content(best.to(images), attack="random-search", queries=queries),
        losses=losses,
        config={"attack": "random-search", "queries": queries, "draws": draws},
        seeds={"optimise": generator.initial_seed()},
        gradients_used=0,
        forwards=queries * draws * len(images),
        seconds=time.perf_counter() - begin,
    )


def _halvings(k: int, queries: int) -> int:
    """How often the square's area has been halved after ``k`` of ``queries``."""
    at = 10_000 * k / queries
    marks = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
    return sum(at > m for m in marks)


@torch.no_grad()
def nes(
    features: Any,
    images: Tensor,
    target: Tensor | Goal,
    patch: Patch,
    *,
    parameters: str = "dct:12",
    steps: int = 100,
    directions: int = 50,
    sigma: float = 0.05,
    lr: float = 0.05,
    draws: int = 1,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """Natural evolution strategies: Adam on gradients estimated from antithetic pairs.

    Works in a low-dimensional space (``dct:<k>`` or ``tiles:<side>``); a step costs
    2 * directions * draws forwards per carrier.
    """
    generator = generator or torch.Generator().manual_seed(0)
    goal: Goal = TextGoal(target) if isinstance(target, Tensor) else target
    space = parametrisation(parameters, *patch.size)
    point = space.init(patch.content.to(images)).clone()
    optimizer = torch.optim.Adam([point], lr=lr)
    function = EOT(features, draws, "mean_loss", checkpoint=False)
    begin = time.perf_counter()

    def rate(parameter: Tensor) -> float:
        content = space.render(parameter).clamp(0, 1)
        pasted = patch.apply(images, generator, content=content)
        return float(goal(function(pasted, generator=generator)).mean())

    losses = [rate(point)]
    for k in range(steps):
        gradient = torch.zeros_like(point)
        for _ in range(directions):
            noise = torch.randn(point.shape, generator=generator, device=generator.device).to(point)
            difference = rate(point + sigma * noise) - rate(point - sigma * noise)
            gradient += difference / (2 * sigma * directions) * noise
        point.grad = gradient
        optimizer.step()
        space.project(point)
        losses.append(rate(point))
        if progress is not None:
            progress(k + 1, steps, losses[-1])
    content = space.render(point).clamp(0, 1)
    queries = steps * (2 * directions + 1) + 1
    return AttackResult(
        patch=patch.with_content(content, attack="nes", queries=queries),
        losses=losses,
        config={"attack": "nes", "parameters": parameters, "steps": steps,
                "directions": directions, "sigma": sigma, "lr": lr, "draws": draws},
        seeds={"optimise": generator.initial_seed()},
        gradients_used=0,
        forwards=queries * draws * len(images),
        seconds=time.perf_counter() - begin,
    )  # fmt: skip
