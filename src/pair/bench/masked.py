"""The certified mode of a search by photo: queries answered by double masking, and its attacker."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.attacks.objectives import Goal
from pair.attacks.wrappers import Adaptive
from pair.bench.models import CERTIFIED, Models
from pair.bench.scenario import Row
from pair.bench.search import HashSearch
from pair.certified.query import double_masked_recovery, hamming
from pair.certified.query_side import QueryFigures, measure
from pair.retrieval.hashing import binarise


class DoubleMasked(HashSearch):
    """Theorem 5 on hash codes: of all windows, the one behind which a second window moves the code
    least. Whatever a patch of the family does, the answer is within so many bits of a code that
    was computed without it.

    The attacker knows all of it (ARC, member by member): of the views that see the patch he moves
    the one that is nearest to his anchor, and keeps it from straying farther from its own second
    round than the view that hides the patch does. A mean over all views would waste the effort.
    """

    PARTNERS = 2  # of the second round, the most distant ones, that are moved in a step

    def __init__(self, models: Models, row: Row):
        s = models.settings
        self.encoder, self.purifier = models.csq(), models.certified(row, s.hash_size)
        self.random, self.device = False, s.device

    def _codes(self, images: Tensor, generator: torch.Generator) -> Tensor:
        second = binarise(self.purifier.embed_pairs(self.encoder, images))  # (B, R, R, K)
        first = second.diagonal(dim1=1, dim2=2).movedim(-1, 1)  # both windows the same
        return double_masked_recovery(first, second, hamming).output

    @torch.no_grad()
    def proved(self, images: Tensor, gallery: Tensor, relevant: Tensor, target: Tensor):
        """What every patch of the family leaves of these clean queries: AP of the true class at
        least, of the target class at most. (Q, N) mark their photos; ties count against us."""
        found: QueryFigures = measure(
            self.purifier, self.encoder, images.to(self.device), gallery.to(self.device),
            relevant, binary=True, targets=target,
        )  # fmt: skip
        return found.cert_ap, found.cert_target_ap

    def victim(
        self, anchor: Tensor | None = None, covered: Tensor | None = None
    ) -> tuple[Adaptive, Goal]:
        """As of the base class. ``covered`` (S, S) marks the pixels of the patch."""
        code = torch.ones(self.encoder.dim) if anchor is None else anchor.reshape(-1)
        visible = self.purifier.cover.visible.to(self.device)
        sees = self._seeing(visible, covered)

        def features(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            x = self.purifier.prepare(images)
            with torch.no_grad():
                member = self._nearest(x, visible[sees], code)  # (B, N): its visible tokens
                bound = self._bound(x, visible, ~sees)  # (B,)
                own = self._outputs(x, member[:, None])[:, 0].tanh()
                pairs = member[:, None] & visible  # (B, R, N)
                others = self._outputs(x, pairs).tanh()
                apart = -(others * own[:, None]).sum(-1)  # (B, R)
                far = apart.topk(min(self.PARTNERS, len(visible)), dim=1).indices
            chosen = pairs.gather(1, far[..., None].expand(-1, -1, pairs.shape[-1]))
            moved = self._outputs(x, torch.cat([member[:, None], chosen], 1))
            return torch.cat([moved.flatten(1), bound[:, None]], 1)

        return Adaptive(features, 1, None, "exact"), Capture(code)

    def _seeing(self, visible: Tensor, covered: Tensor | None) -> Tensor:
        """(R,) whether a view sees some pixel of the patch. All count where its place is unknown,
        and where every window hides it: then nothing can be moved."""
        everything = torch.ones(len(visible), dtype=torch.bool, device=visible.device)
        if covered is None:
            return everything
        shown = self.purifier.pixels(visible)[:, 0]
        sees = (shown & (covered.to(visible.device) > 0)).flatten(1).any(1)
        return sees if bool(sees.any()) else everything

    def _outputs(self, x: Tensor, masks: Tensor) -> Tensor:
        """Real hash outputs (B, V, K) of views by their visible tokens (B, V, N)."""
        views = self.purifier.render(x.repeat_interleave(masks.shape[1], 0), masks.flatten(0, 1))
        return self.encoder.encode_image(views).unflatten(0, masks.shape[:2])

    def _nearest(self, x: Tensor, masks: Tensor, code: Tensor) -> Tensor:
        """(B, N) the view of each image, of those that see the patch, nearest to the anchor."""
        outputs = self._outputs(x, masks.expand(len(x), -1, -1))
        near = F.cosine_similarity(outputs, code.to(outputs), dim=-1)  # (B, A)
        return masks[near.argmax(1)]

    def _bound(self, x: Tensor, visible: Tensor, hides: Tensor) -> Tensor:
        """(B,) bits: the least S of the views that hide the patch, which it cannot change."""
        bound = x.new_full((len(x),), float(self.encoder.dim))
        for mask in visible[hides]:
            codes = binarise(self._outputs(x, (mask & visible).expand(len(x), -1, -1)))
            own = binarise(self._outputs(x, mask.expand(len(x), 1, -1)))
            bound = torch.minimum(bound, hamming(own, codes).amax(1))
        return bound


@dataclass(frozen=True)
class Capture:
    """1 - cos of the moved view to the anchor, and (relaxed) the bits by which it strays farther
    from its second round than it may. Outputs: the view, its partners, the bound."""

    code: Tensor
    weight: float = 1.0  # a bit moved to the anchor gains twice what a bit too far costs

    def __call__(self, outputs: Tensor) -> Tensor:
        bits = len(self.code)
        views, bound = outputs[..., :-1].unflatten(-1, (-1, bits)), outputs[..., -1]
        reach = 1 - F.cosine_similarity(views[..., 0, :], self.code.to(outputs), dim=-1)
        soft = views.tanh()
        apart = (bits - (soft[..., :1, :] * soft[..., 1:, :]).sum(-1)) / 2  # (..., B, P)
        strays = F.relu(apart - (bound[..., None] - 1)).mean(-1) / bits
        return reach + self.weight * strays


def hash_search(models: Models, row: Row) -> HashSearch:
    return DoubleMasked(models, row) if row.defense == CERTIFIED else HashSearch(models, row)
