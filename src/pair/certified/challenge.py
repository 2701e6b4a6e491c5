"""The strongest attack we know on this very mode, to stand beside its certificate.

It knows everything: windows, weights, pooling, query, and the number that it cannot exceed. It
puts the patch where that number is largest, starts from a genuine small picture of the concept if
it has one (Theorem 3 says why), and lifts view by view (not their mean: the pooled score is as
good as its worst member) through the exact views that the defense uses. Whatever it reaches must
stay below the bound; how far below says how loose the bound may be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.certified.covering import Cover
from pair.certified.pooling import DeltaCap, upper_bound, with_plain
from pair.certified.purifier import CertifiedPurifier
from pair.images import quantise, resize
from pair.retrieval.encoders import ImageEncoder


@dataclass(frozen=True)
class Challenge:
    """Result for B carriers: the attacked ``images`` as 8-bit files would hold them.

    ``clean``, ``start``, ``reached`` and ``ceiling`` (B,) are pooled scores: of the carrier, with
    the patch's first contents, of the best patch found, and the proved bound for any patch.
    ``boxes`` are (top, left, height, width).
    """

    images: Tensor
    clean: Tensor
    start: Tensor
    reached: Tensor
    ceiling: Tensor
    boxes: list[tuple[int, int, int, int]]

    @property
    def violations(self) -> int:
        """Carriers whose certificate was beaten: anything but 0 is a soundness bug."""
        return int((self.reached > self.ceiling).sum())


def challenge(
    model: CertifiedPurifier,
    encoder: ImageEncoder,
    images: Tensor,
    query: Tensor,
    *,
    delta: float = 0.0,
    steps: int = 30,
    size: float = 0.15,
    start: Tensor | None = None,
    slack: float = 1e-5,
) -> Challenge:
    """Lift the pooled score of carriers (B, 3, S, S) for a unit query (d,), each with its own
    patch of the first shape of the family.

    ``start`` (3, h, w) is resized into the patch, otherwise it begins as the carrier itself.
    Sign gradient with momentum; the step falls linearly from ``size`` to 0.
    """
    x = model.prepare(images)
    pool, patterns = DeltaCap(delta), with_plain(model.cover.minimal).to(x.device)
    with torch.no_grad():
        scores = model.embed(encoder, x).scores(query[None])[0]  # (B, R + 1)
    ceiling = upper_bound(pool, scores, patterns, slack=slack)
    out, boxes, first = [], [], []
    for i in range(len(x)):
        box = worst_place(model.cover, scores[i], delta)
        boxes.append(box)
        best, begun = _lift(
            model, encoder, x[i : i + 1], query, box, float(ceiling[i]), delta, steps, size, start
        )
        out.append(best)
        first.append(begun)
    attacked = torch.cat(out)
    with torch.no_grad():
        reached = pool(model.embed(encoder, attacked).scores(query[None])[0])
    return Challenge(attacked, pool(scores), torch.tensor(first), reached, ceiling, boxes)


def worst_place(cover: Cover, scores: Tensor, delta: float = 0.0) -> tuple[int, int, int, int]:
    """Where a patch of the first shape may reach most, given clean scores (R + 1,).

    Among the places with the highest bound, the middle one; (top, left, height, width).
    """
    height, width = cover.family.shapes[0]
    covered = places(cover, (height, width))  # (rows, cols, R)
    open_to_us = torch.where(covered, scores[:-1].cpu(), torch.inf).amin(-1)
    best = (open_to_us == open_to_us.max()).nonzero()
    top, left = best[len(best) // 2].tolist()
    return top, left, height, width


def places(cover: Cover, shape: tuple[int, int]) -> Tensor:
    """Which masks hide a patch of ``shape`` at every pixel offset: (rows, cols, R) boolean."""
    g, t = cover.grid, cover.token
    pixels = cover.visible.view(-1, 1, g, g).float()
    pixels = pixels.repeat_interleave(t, 2).repeat_interleave(t, 3)
    return (F.max_pool2d(pixels, shape, stride=1) == 0)[:, 0].permute(1, 2, 0)


def pasted(images: Tensor, content: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Images (B, 3, S, S) with ``content`` (3, h, w) in ``box``; differentiable in both."""
    top, left, height, width = box
    side = images.shape[-1]
    around = (left, side - left - width, top, side - top - height)
    inside = F.pad(content.new_ones(height, width), around) > 0
    return torch.where(inside, F.pad(content, around), images)


def _lift(model, encoder, x, query, box, ceiling, delta, steps, size, start):
    """The best 8-bit patch on one carrier, and the pooled score before the first step."""
    top, left, height, width = box
    content = x[0, :, top : top + height, left : left + width]
    if start is not None:
        content = resize(start[None].to(x), (height, width))[0].clamp(0, 1)
    content = content.clone().requires_grad_(True)
    # Views that hide the patch are what they are: nothing to gain there, nothing to compute.
    free = ~places(model.cover, (height, width))[top, left]
    visible = model.cover.visible[free].to(x.device)
    fixed = model.cover.visible[~free].to(x.device)
    with torch.no_grad():
        floor = float(
            (model.encode(encoder, x.expand(len(fixed), -1, -1, -1), fixed) @ query).min()
        )
    best, highest, first, speed = x, -torch.inf, 0.0, torch.zeros_like(content)
    for step in range(steps + 1):
        with torch.no_grad():  # what counts is the file: judge, and learn from, 8-bit values
            rounded = quantise(content)
        now = pasted(x, content + (rounded - content).detach(), box)
        views = model.encode(encoder, now.expand(len(visible), -1, -1, -1), visible) @ query
        plain = F.normalize(encoder.encode_image(now), dim=-1)[0] @ query
        lowest = torch.cat([views, views.new_tensor([floor])]).min()
        pooled = float(torch.minimum(plain, lowest + delta).detach())
        if step == 0:
            first = pooled
        if pooled > highest:
            highest, best = pooled, now.detach()
        if step == steps or pooled >= ceiling:
            break
        # Every member below the bound counts, the worst of them most.
        lacking = ceiling - torch.cat([views + delta, plain[None]])
        loss = torch.logsumexp(20 * lacking.clamp(min=0), 0) / 20
        (slope,) = torch.autograd.grad(loss, content)
        speed = 0.8 * speed + slope / slope.abs().mean().clamp(min=1e-12)
        with torch.no_grad():
            content -= size * (1 - step / steps) * speed.sign()
            content.clamp_(0, 1)
    return best, first
