"""The assumptions of the guarantee, as checks that run on the real models.

(A1) no view reads what it hides: :func:`interference`.
(A2) the windows cover the family: :func:`pair.certified.covering.verify_covering`.
(A3) results do not depend on the batch, up to rounding: :func:`measure_slack`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pair.certified.purifier import CertifiedPurifier, Views
from pair.retrieval.encoders import ImageEncoder


@torch.no_grad()
def interference(
    purifier: CertifiedPurifier, images: Tensor, generator: torch.Generator | None = None
) -> list[int]:
    """Views of (B, 3, H, W) that change, in any bit, when the pixels they hide change.

    Each window is filled with NaN, infinity and random values; an empty list is the only result
    that supports a certificate.
    """
    x = purifier.prepare(images)
    noise = torch.rand(x.shape, generator=generator).to(x)
    taints = [torch.full_like(x, v) for v in (float("nan"), float("inf"))] + [noise]
    bad = []
    for r, mask in enumerate(purifier.cover.visible.to(x.device)):
        masks = mask.expand(len(x), -1)
        shown = purifier.pixels(masks)
        clean = purifier.render(x, masks)
        tainted = [purifier.render(torch.where(shown, x, t), masks) for t in taints]
        if not bool(clean.isfinite().all()) or any(not torch.equal(clean, t) for t in tainted):
            bad.append(r)
    return bad


@torch.no_grad()
def measure_slack(
    purifier: CertifiedPurifier,
    encoder: ImageEncoder,
    images: Tensor,
    batches: tuple[int, ...] = (1, 7, 32),
    factor: float = 4.0,
) -> float:
    """eps_num: how far a unit feature moves with the batch it is computed in, times ``factor``.

    The largest Euclidean difference over ``images`` (B, 3, H, W), all views and the batch sizes;
    it bounds the change of any cosine with a unit query. Measured, not proved: certify in
    float32 on the kind of machine that serves the index.
    """
    runs = [[purifier.embed(encoder, part) for part in images.split(b)] for b in batches]
    tables = [torch.cat([_stack(v) for v in run]) for run in runs]
    return factor * max(float((t - tables[0]).norm(dim=-1).max()) for t in tables)


def _stack(views: Views) -> Tensor:
    return torch.cat([views.masked, views.plain[:, None]], 1)
