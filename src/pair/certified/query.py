"""Query side: one patched query moves every score at once, so bound the embedding instead.

Theorems 4, 5 and 6. ``distance`` is ``chord`` for unit features or ``hamming`` for codes; both
are metrics, which is all the theorems use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Metric = Callable[[Tensor, Tensor], Tensor]


def chord(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance over the last dimension: between unit vectors 0 ... 2."""
    return (a - b).norm(dim=-1)


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Number of differing bits of codes of +-1 over the last dimension."""
    return (a != b).sum(-1).to(torch.float32)


@dataclass(frozen=True)
class Answer:
    """An embedding (d,) with its run-time radius, or a refusal.

    ``radius`` is observed on the received query: an embedding computed only from pixels outside
    the patch lies within it, wherever the patch is. ``view`` is the view that was returned,
    ``cost`` the number of views that were computed.
    """

    accepted: bool
    output: Tensor
    radius: float
    view: int
    cost: int


def diameter(views: Tensor, metric: Metric = chord) -> Tensor:
    """Largest distance between two views: (..., R, d) -> (...)."""
    return metric(views[..., :, None, :], views[..., None, :, :]).amax((-1, -2))


def agree_or_reject(views: Tensor, tau: float, metric: Metric = chord) -> Answer:
    """Theorem 4: accept iff all views (R, d) lie within ``tau`` of each other; output the first.

    If accepted, some view r* hides the patch and is therefore a clean view of the clean query;
    the output is within the observed diameter (<= tau) of it. Assumes A1-A3. A clean query is
    accepted iff its own diameter is at most tau.
    """
    width = float(diameter(views, metric))
    return Answer(width <= tau, views[0], width, 0, len(views))


@dataclass(frozen=True)
class Recovery:
    """Result of double masking for a batch: ``output`` (B, d), ``view`` (B,), ``radii`` (B, R)."""

    output: Tensor
    view: Tensor
    radii: Tensor

    @property
    def radius(self) -> Tensor:
        """S of the chosen view, (B,): the certificate that can be printed for this query."""
        return self.radii.amin(-1)

    @property
    def live(self) -> Tensor:
        """max_r S_r, (B,): with a rejection threshold above it no patch can cause a rejection."""
        return self.radii.amax(-1)


def double_masked_recovery(first: Tensor, second: Tensor, metric: Metric = chord) -> Recovery:
    """Theorem 5: the view whose second round moves it least.

    ``first`` (B, R, d): z_r; ``second`` (B, R, R, d): z_{r,r'} hides both windows. With
    S_r = max_r' d(z_r, z_{r,r'}) the output is z_r for the smallest S_r. For every patch hidden
    by r*: the output is within S of the clean z_{r,r*}, and S <= S_{r*}(clean). Assumes A1-A3.
    """
    radii = metric(first[:, :, None], second).amax(-1)  # (B, R)
    view = radii.argmin(-1)
    output = first[torch.arange(len(first)), view]
    return Recovery(output, view, radii)


def recover(
    views: Tensor, second_round: Callable[[int], Tensor], tau: float, metric: Metric = chord
) -> Answer:
    """Theorems 4 and 5 at the cost of R views for benign queries.

    If the views (R, d) agree within ``tau``, answer at once. Otherwise try them in order of their
    distance to the medoid; ``second_round(r)`` returns z_{r,r'} (R, d). The first with
    S_r <= tau is the answer; with none, the query is refused. Always within tau of an embedding
    that the patch has not touched.
    """
    quick = agree_or_reject(views, tau, metric)
    if quick.accepted:
        return quick
    table = metric(views[:, None], views[None])  # (R, R)
    order = table[table.sum(1).argmin()].argsort().tolist()
    cost, best = len(views), (float("inf"), order[0])
    for r in order:
        cost += len(views) - 1  # z_{r,r} is z_r
        radius = float(metric(views[r], second_round(r)).max())
        best = min(best, (radius, r))
        if radius <= tau:
            return Answer(True, views[r], radius, r, cost)
    return Answer(False, views[best[1]], best[0], best[1], cost)


def intersection(lists: Tensor) -> Tensor:
    """Theorem 6, certified non-injection: items in the top-K list of *every* view.

    ``lists`` (R, N) boolean membership -> (N,). A patch can shrink this answer; it can never add
    an item that the view which hides it would not return.
    """
    return lists.all(-2)


def union(lists: Tensor) -> Tensor:
    """Theorem 6, certified recall with a shortlist: items in the top-K list of *some* view."""
    return lists.any(-2)


def certain_members(lists: Tensor, patterns: Tensor) -> Tensor:
    """Items that the union rule returns under every patch: (R, N), (P, R) -> (N,).

    For each region the union holds the lists of the views in Cov(L); the attacker picks L.
    """
    return _per_region(lists, patterns).all(0)


def possible_members(lists: Tensor, patterns: Tensor) -> Tensor:
    """Items that the intersection rule could return under some patch: (R, N), (P, R) -> (N,)."""
    return ~_per_region(~lists, patterns).all(0)


def _per_region(lists: Tensor, patterns: Tensor) -> Tensor:
    """(P, N): is the item in the list of some view of each Cov(L)?"""
    return (patterns.to(torch.float32) @ lists.to(torch.float32)) > 0


def top_k_lists(scores: Tensor, k: int) -> Tensor:
    """Membership of the K best of N items: (..., N) -> boolean (..., N)."""
    best = scores.topk(min(k, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
