"""Which tokens of a batch: the visible ones, the hidden ones, as many per image as there are.

The rows of a :class:`Selection` lie behind one another, image by image, so that layers which treat
every token alike never see padding. Where all images have equally many tokens, the rows are an
ordinary (B, L, D) tensor; where they do not (Bernoulli masks), they are (R, D), and only attention,
which needs to know whose token is whose, looks at a padded copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Ragged batches are filled up to a multiple of this many rows, so that few shapes occur: fast
# kernels are built anew for each. The spare rows repeat the last one and are always dropped.
ROUND = 64


@dataclass(frozen=True)
class Layout:
    """Packed rows (R, D) as padded ones (B, L, D) and back."""

    slots: Tensor  # (R,) where each row lies in B * L; spare rows are not listed
    read: Tensor  # the same, followed by one entry per spare row
    batch: int
    length: int
    keys: Tensor | None = None  # (B, 1, 1, L), True = a token

    def pad(self, rows: Tensor) -> Tensor:
        # Zeros in the free places: even a masked key must be a number.
        space = rows.new_zeros(self.batch * self.length, rows.shape[-1])
        space = space.index_copy(0, self.slots, rows[: len(self.slots)])
        return space.view(self.batch, self.length, -1)

    def pack(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1).index_select(0, self.read)


@dataclass(frozen=True)
class Selection:
    """Some tokens of every image, in their order; see :meth:`of`."""

    image: Tensor  # (R,) image of each row; spare rows included
    token: Tensor  # (R,) its place among the N tokens of the image
    batch: int
    count: int  # rows without the spare ones
    length: int | None  # tokens per image where all have equally many
    place: Tensor | None = None  # ragged only: (count,) number among the selected of its image
    longest: int = 0

    @staticmethod
    def of(mask: Tensor) -> Selection:
        """The tokens where ``mask`` (B, N) is True."""
        batch = len(mask)
        image, token = mask.nonzero().unbind(1)
        counts = mask.sum(1)
        shortest, longest = (int(c) for c in counts.aminmax()) if batch else (0, 0)
        if shortest == longest:
            return Selection(image, token, batch, len(image), longest)
        count = len(image)
        place = torch.arange(count, device=mask.device) - (counts.cumsum(0) - counts)[image]
        spare = -(count + batch) % ROUND
        image = torch.cat([image, image[-1:].expand(spare)])
        token = torch.cat([token, token[-1:].expand(spare)])
        return Selection(image, token, batch, count, None, place, longest)

    def take(self, full: Tensor, first: int = 0) -> Tensor:
        """Rows of ``full`` (B, first + N, D), whose first slots are no tokens."""
        rows = full.flatten(0, 1).index_select(0, self._flat(full, first))
        return rows if self.length is None else rows.view(self.batch, self.length, rows.shape[-1])

    def put(self, full: Tensor, rows: Tensor, first: int = 0) -> Tensor:
        """A copy of ``full`` (B, first + N, D) with ``rows`` in their places."""
        where = self._flat(full, first)[: self.count]
        flat = rows.flatten(0, -2)[: self.count]
        return full.flatten(0, 1).index_copy(0, where, flat).view_as(full)

    def lookup(self, table: Tensor) -> Tensor:
        """What a table (N, D) says for each token."""
        rows = table.index_select(0, self.token)
        return rows if self.length is None else rows.view(self.batch, self.length, rows.shape[-1])

    def layout(self, first: int = 0, mask: bool = True) -> Layout | None:
        """How the packed rows spread over (B, first + longest) slots; None where nothing is packed.

        With ``first`` = 1 the class tokens of all images come before the rows (:func:`lead`).
        """
        if self.place is None:
            return None
        length = first + self.longest
        slots = self.image[: self.count] * length + first + self.place
        if first:
            heads = torch.arange(self.batch, device=slots.device) * length
            slots = torch.cat([heads, slots])
        read = torch.cat([slots, slots[-1:].expand(len(self.token) - self.count)])
        keys = None
        if mask:
            keys = torch.zeros(self.batch * length, dtype=torch.bool, device=slots.device)
            keys = keys.index_fill(0, slots, True).view(self.batch, 1, 1, length)
        return Layout(slots, read, self.batch, length, keys)

    def lead(self, head: Tensor, rows: Tensor) -> Tensor:
        """``rows`` with a copy of ``head`` (1, 1, D) for each image, in the order of the layout."""
        if self.place is None:
            return torch.cat([head.expand(self.batch, -1, -1), rows], 1)
        return torch.cat([head[0].expand(self.batch, -1), rows])

    def parted(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`lead`: the heads (B, D) and the rows."""
        if self.place is None:
            return rows[:, 0], rows[:, 1:]
        return rows[: self.batch], rows[self.batch :]

    def _flat(self, full: Tensor, first: int) -> Tensor:
        return self.image * full.shape[1] + self.token + first
