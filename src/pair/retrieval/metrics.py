"""Ranking metrics with an explicit rule for ties, exact and in chunks of queries.

Scores and relevance are ``Rows`` (:mod:`pair.retrieval.scores`): (Q, M), larger is nearer.
Codes have only bits + 1 different scores, so that most of a ranking is ties, and "the" mAP of a
hash network depends on how they are broken. The rules:

``expected``     the exact mean over all orders of the tied items (no sampling)
``pessimistic``  among tied items the irrelevant ones come first
``optimistic``   among tied items the relevant ones come first: the defender's worst case where
                 "relevant" means an attacker's target
``stable``       tied items keep the order of the gallery, as a stable sort leaves them

One formula serves all four: items with equal scores form a *level*; the rules split levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pair.retrieval.scores import Hamming, Rows, SameLabel, check_finite, row_slices, top

TIES = ("expected", "pessimistic", "optimistic", "stable")
DENOMINATORS = ("hits", "min")


@dataclass(frozen=True)
class Levels:
    """A ranking as groups of equally good places, best first.

    ``total`` and ``hits`` (B, L), float64: items and relevant items of each level; within a
    level every order is equally likely. Levels beyond the top k may be missing. ``relevant``
    (B,): relevant items in the whole gallery.
    """

    total: Tensor
    hits: Tensor
    relevant: Tensor

    def taken(self, k: int) -> tuple[Tensor, Tensor]:
        """Places (B, L) ahead of each level, and how many of its places lie in the top k."""
        ahead = self.total.cumsum(1) - self.total
        return ahead, torch.minimum((k - ahead).clamp(min=0), self.total)

    def found(self, k: int) -> Tensor:
        """Expected number of relevant items in the top k (B,)."""
        _, taken = self.taken(k)
        return (self.hits * taken / self.total.clamp(min=1)).sum(1)

    def any_found(self, k: int) -> Tensor:
        """Probability that the top k holds a relevant item (B,)."""
        _, m = self.taken(k)
        n, r = self.total, self.hits
        # None among m of n places: C(n - r, m) / C(n, m).
        log_miss = _log_choose(n - r, m) - _log_choose(n, m)
        miss = torch.where(m > n - r, 0.0, log_miss.exp())
        miss = torch.where((m == 0) | (r == 0), 1.0, miss)
        return 1 - miss.prod(1)

    def average_precision(self, k: int, denominator: str = "hits") -> Tensor:
        """Expected average precision over the top k (B,); 0 where nothing is found."""
        ahead, taken = self.taken(k)
        found = self.hits.cumsum(1) - self.hits
        table = _harmonic(k, self.total.device)
        sums = _precision_sum(table, k, ahead, found, self.total, self.hits, taken)
        if denominator == "min":
            return sums.sum(1) / self.relevant.clamp(min=1, max=k)
        # The level that the cut goes through brings a random number x of hits, and with it a
        # random denominator: average over the hypergeometric distribution of x.
        places = torch.arange(taken.shape[1], device=taken.device)
        last = ((taken > 0) * places).amax(1, keepdim=True)
        n, r, m, before, base = (
            t.gather(1, last) for t in (self.total, self.hits, taken, ahead, found)
        )
        done = sums.sum(1, keepdim=True) - sums.gather(1, last)
        x = torch.arange(int(torch.minimum(r, m).max()) + 1, device=n.device).double()  # (X,)
        possible = (x <= torch.minimum(r, m)) & (x >= m - (n - r))
        log_p = _log_choose(r, x) + _log_choose(n - r, m - x)
        p = log_p.masked_fill(~possible, -torch.inf).softmax(1)
        inside = _precision_sum(table, k, before, base, m, x.expand_as(p), m)
        return (p * (done + inside) / (base + x).clamp(min=1)).sum(1)


def _precision_sum(table, k, ahead, found, size, hits, taken) -> Tensor:
    """Expected sum of the precisions at the hits in the first ``taken`` places of a level.

    The item at place j = 1..n of a level is relevant with probability r/n, and then (j-1)(r-1)/
    (n-1) of the places before it are, so the expected precision there is (found + 1 + (j-1)c) /
    (ahead + j) with c = (r-1)/(n-1). Summed over j this needs harmonic numbers only.
    """
    h = table[(ahead + taken).clamp(max=k).long()] - table[ahead.clamp(max=k).long()]
    c = (hits - 1).clamp(min=0) / (size - 1).clamp(min=1)
    return hits / size.clamp(min=1) * ((found + 1) * h + c * (taken - (ahead + 1) * h))


def _harmonic(n: int, device: torch.device) -> Tensor:
    """Harmonic numbers H(0) .. H(n)."""
    steps = torch.arange(n + 1, dtype=torch.float64, device=device)
    return torch.where(steps > 0, 1 / steps.clamp(min=1), 0.0).cumsum(0)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    k = torch.minimum(k.clamp(min=0), n)
    return (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()


def levels(
    similarity: Tensor, relevant: Tensor, k: int, ties: str = "expected", bits: int | None = None
) -> Levels:
    """Levels of the top k of each row of (B, M) scores and boolean relevance.

    ``bits`` says that the scores are inner products of +-1 codes, which counts instead of sorts.
    """
    count = relevant.sum(1).double()
    if ties == "stable":
        hits = relevant.gather(1, top(similarity, k)).double()
        return Levels(torch.ones_like(hits), hits, count)
    if bits is None:
        total, hits = _sorted_levels(similarity, relevant, k)
    else:
        total, hits = _code_levels(similarity, relevant, bits)
    if ties != "expected":
        misses, none = total - hits, torch.zeros_like(hits)
        pairs = [(misses, none), (hits, hits)]
        if ties == "optimistic":
            pairs.reverse()
        total, hits = (torch.stack(t, 2).flatten(1) for t in zip(*pairs, strict=True))
    return Levels(total, hits, count)


def _sorted_levels(similarity: Tensor, relevant: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_finite(similarity)
    k = min(k, similarity.shape[1])
    values, index = similarity.topk(k, dim=1)
    fresh = torch.ones_like(index)
    fresh[:, 1:] = values[:, 1:] != values[:, :-1]
    level = fresh.cumsum(1) - 1  # (B, k)
    total = torch.zeros(len(level), k, dtype=torch.float64, device=level.device)
    hits = total.clone()
    total.scatter_add_(1, level, torch.ones_like(total))
    hits.scatter_add_(1, level, relevant.gather(1, index).double())
    # The last level may go on beyond the cut.
    tied = similarity == values[:, -1:]
    total.scatter_(1, level[:, -1:], tied.sum(1, keepdim=True).double())
    hits.scatter_(1, level[:, -1:], (tied & relevant).sum(1, keepdim=True).double())
    return total, hits


def _code_levels(similarity: Tensor, relevant: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Counts per Hamming distance 0 .. bits, by one histogram over (row, relevant, distance)."""
    rows, width = len(similarity), bits + 1
    distance = (similarity * -0.5).add_(bits / 2).long()
    start = torch.arange(rows, device=similarity.device)[:, None] * (2 * width)
    key = distance.add_(start).add_(relevant.long(), alpha=width)
    counts = torch.bincount(key.flatten(), minlength=rows * 2 * width).view(rows, 2, width)
    return counts.sum(1).double(), counts[:, 1].double()


def _per_query(similarity: Rows, relevant: Rows, k: int | None, ties: str, measure: Callable):
    if tuple(similarity.shape) != tuple(relevant.shape):
        raise ValueError(
            f"scores {tuple(similarity.shape)} and relevance {tuple(relevant.shape)} differ"
        )
    if ties not in TIES:
        raise ValueError(f"unknown tie rule {ties!r}: use one of {', '.join(TIES)}")
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if 0 in similarity.shape:
        raise ValueError("metrics need at least one query and one gallery item")
    bits = similarity.bits if isinstance(similarity, Hamming) else None
    out = []
    for rows in row_slices(similarity):
        scores = similarity[rows]
        size = scores.shape[1]
        cut = size if k is None else min(k, size)
        found = levels(scores, relevant[rows].to(scores.device).bool(), cut, ties, bits)
        out.append(measure(found, cut).cpu())
    return torch.cat(out).clamp(0, 1)  # sums of harmonic numbers end a few 1e-16 beside 0 and 1


def recall(
    similarity: Rows, relevant: Rows, k: int, *, ties: str = "expected", each: bool = False
) -> Tensor:
    """Recall@K of every query (Q,), float64.

    Default: 1 where *any* relevant item is in the top k (a probability under ``expected``).
    ``each=True``: the share of the query's relevant items that is in the top k.
    """

    def measure(found: Levels, cut: int) -> Tensor:
        if each:
            return found.found(cut) / found.relevant.clamp(min=1)
        return found.any_found(cut)

    return _per_query(similarity, relevant, k, ties, measure)


def recall_at_k(
    similarity: Rows, relevant: Rows, k: int, *, ties: str = "expected", each: bool = False
) -> float:
    """Mean of :func:`recall` over the queries.

    *Clean* recall: relevance marks the query's own images. *Irrelevant* recall, the success of
    an attack: it marks the adversarial images (``each=False``: at least one of N was shown;
    ``each=True``: per image).
    """
    return float(recall(similarity, relevant, k, ties=ties, each=each).mean())


def precision_at_k(similarity: Rows, relevant: Rows, k: int, *, ties: str = "expected") -> Tensor:
    """P@K of every query (Q,): hits in the top k / k, also where the gallery is smaller."""
    return _per_query(similarity, relevant, k, ties, lambda found, cut: found.found(cut) / k)


def average_precision(
    similarity: Rows,
    relevant: Rows,
    k: int | None = None,
    *,
    ties: str = "expected",
    denominator: str = "hits",
) -> Tensor:
    """Average precision over the top k (default: all) of every query (Q,), float64.

    ``denominator="hits"`` divides by the hits in the top k, as the hashing literature does;
    ``"min"`` by min(R, k), R = relevant items in the gallery. A query without hits scores 0.
    With "hits" a worse ranking can score *more* (a hit that falls out of the top k leaves the
    denominator too), so ``pessimistic`` is the pessimistic ranking, not always the lower figure.
    """
    if denominator not in DENOMINATORS:
        raise ValueError(f"unknown denominator {denominator!r}: use 'hits' or 'min'")
    return _per_query(
        similarity, relevant, k, ties, lambda found, cut: found.average_precision(cut, denominator)
    )


def mean_average_precision(
    similarity: Rows,
    relevant: Rows,
    k: int | None = None,
    *,
    ties: str = "expected",
    denominator: str = "hits",
) -> float:
    """mAP@topK: the mean of :func:`average_precision`; queries without hits count as 0."""
    return float(
        average_precision(similarity, relevant, k, ties=ties, denominator=denominator).mean()
    )


def targeted_average_precision(
    similarity: Rows, gallery_labels: Tensor, target: Tensor | int, k: int | None = None, **options
) -> Tensor:
    """AP of every query (Q,) as if it had the attacker's label; its mean is the t-mAP.

    ``gallery_labels`` (M,) classes or (M, C) multi-hot; ``target`` one class for all queries,
    or (Q,) classes. Options as in :func:`average_precision`.
    """
    queries = similarity.shape[0]
    wanted = torch.as_tensor(target, device=gallery_labels.device).expand(queries)
    if gallery_labels.ndim == 2:
        classes = gallery_labels.shape[1]
        wanted = torch.nn.functional.one_hot(wanted.long(), classes)
    return average_precision(similarity, SameLabel(wanted, gallery_labels), k, **options)


def item_ranks(similarity: Rows, items: Tensor, *, ties: str = "pessimistic") -> Tensor:
    """Ranks (Q, T), from 1, of the gallery items ``items`` (Q, T) of each query, float64.

    Under ``expected`` a rank is the mean over the orders of its ties, and may end in .5.
    """
    if ties not in TIES:
        raise ValueError(f"unknown tie rule {ties!r}: use one of {', '.join(TIES)}")
    out = []
    for rows in row_slices(similarity):
        scores = similarity[rows]
        check_finite(scores)
        columns = torch.arange(scores.shape[1], device=scores.device)
        ranks = []
        for item in items[rows].to(scores.device).T[..., None]:  # (B, 1), one item per query
            own = scores.gather(1, item)
            rank = 1.0 + (scores > own).sum(1).double()
            if ties != "optimistic":
                tied = scores == own
                if ties == "stable":
                    tied &= columns < item
                others = tied.sum(1) - int(ties != "stable")  # not the item itself
                rank += others * (0.5 if ties == "expected" else 1.0)
            ranks.append(rank)
        out.append(torch.stack(ranks, 1).cpu())
    return torch.cat(out)


@dataclass(frozen=True)
class InsertionRanks:
    """Ranks, from 1, around the insertion of A adversarial images: everything that Recall@K of
    a text-to-image attack needs, for any K.

    ``before`` (Q,): the query's own image in the untouched gallery; ``after`` (Q,): the same
    with the adversarial images inserted; ``inserted`` (Q, A): the adversarial images themselves.
    """

    before: Tensor
    after: Tensor
    inserted: Tensor

    def clean(self, k: int) -> Tensor:
        """Clean recall@k per query (relevant, without attack)."""
        return (self.before <= k).double()

    def relevant(self, k: int) -> Tensor:
        """Relevant recall@k per query (with the attack)."""
        return (self.after <= k).double()

    def irrelevant(self, k: int, each: bool = False) -> Tensor:
        """Success of the attack per query: any adversarial image in the top k, or the share."""
        shown = (self.inserted <= k).double()
        return shown.mean(1) if each else shown.amax(1)


def insertion_ranks(
    gallery: Rows, inserted: Tensor, own: Tensor, *, ties: str = "pessimistic"
) -> InsertionRanks:
    """Ranks for queries whose own image is gallery item ``own`` (Q,).

    ``gallery`` (Q, G) and ``inserted`` (Q, A) are the scores of the untouched gallery and of the
    adversarial images. ``pessimistic`` is the defender's worst case: in a tie the own image is
    last and the adversarial image first. The adversarial images come last in gallery order.
    """
    adverse = "optimistic" if ties == "pessimistic" else ties
    before, after, shown = [], [], []
    for rows in row_slices(gallery):
        scores, extra, item = gallery[rows], inserted[rows], own[rows, None]
        both = torch.cat([scores, extra.to(scores.device)], 1)
        ids = torch.arange(scores.shape[1], both.shape[1]).expand(len(both), -1)
        before.append(item_ranks(scores, item, ties=ties)[:, 0])
        after.append(item_ranks(both, item, ties=ties)[:, 0])
        shown.append(item_ranks(both, ids, ties=adverse))
    return InsertionRanks(torch.cat(before), torch.cat(after), torch.cat(shown))
