"""Retrievers: an encoder with a way to compare, a gallery, and the exact ranking of queries.

A retriever turns images (or texts) into rows (N, D); a gallery is nothing but such rows, so it
can be saved, concatenated with the rows of inserted images, or held in an index. A defense is
any callable ``images -> images``; :class:`DefendedRetriever` puts it in front of the encoder and
leaves the retriever it wraps as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.retrieval.encoders import HashEncoder, ImageEncoder, TextImageEncoder
from pair.retrieval.hashing import binarise
from pair.retrieval.scores import Hamming, Product, row_slices, top

Role = Literal["gallery", "query"]
Images = Tensor | Iterable[Tensor]


class Hits(NamedTuple):
    """Result of a search: (Q, k) scores, best first, and the gallery rows they belong to."""

    scores: Tensor
    indices: Tensor


class Retriever:
    """Base of the two kinds: subclasses say how outputs become rows and how rows compare.

    ``features(images)`` is one differentiable batch, for attacks; ``gallery`` and ``query`` run
    any number of images in batches without gradients.
    """

    def __init__(self, encoder: ImageEncoder, *, batch_size: int = 64):
        _check_eval(encoder)
        self.encoder, self.batch_size = encoder, batch_size

    def features(
        self, images: Tensor, *, role: Role = "gallery", generator: torch.Generator | None = None
    ) -> Tensor:
        """Encoder outputs (B, D) of images (B, 3, H, W) in [0, 1]; differentiable.

        ``role`` says on which side the images stand and ``generator`` feeds a random defense;
        without a defense both change nothing.
        """
        return self.encoder.encode_image(images)

    def finish(self, outputs: Tensor) -> Tensor:
        """Encoder outputs -> comparable rows."""
        raise NotImplementedError

    def compare(self, query: Tensor, gallery: Tensor) -> Product:
        """Scores of query rows (Q, D) against gallery rows (M, D), computed when sliced."""
        return Product(query, gallery)

    def text(self, texts: str | Sequence[str]) -> Tensor:
        """Rows (T, D) of texts. Raises ``ValueError`` where the encoder has no text tower."""
        raise ValueError(f"{type(self.encoder).__name__} cannot encode text: query with images")

    def gallery(self, images: Images, *, generator: torch.Generator | None = None) -> Tensor:
        """Gallery rows (N, D) of one tensor (N, 3, H, W) or of an iterable of batches."""
        return self._rows(images, "gallery", generator)

    def query(
        self, queries: str | Sequence[str] | Images, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Query rows (Q, D) of texts or images."""
        if isinstance(queries, str):
            return self.text(queries)
        if isinstance(queries, Sequence) and queries and isinstance(queries[0], str):
            return self.text(queries)
        return self._rows(queries, "query", generator)  # type: ignore[arg-type]

    def scores(self, query: Tensor, gallery: Tensor) -> Tensor:
        """The full score matrix (Q, M); larger is nearer."""
        return self.compare(query, gallery)[0 : len(query)]

    def search(self, query: Tensor, gallery: Tensor, k: int = 10) -> Hits:
        """The exact k nearest gallery rows of each query row; ties in gallery order."""
        if k < 1 or len(gallery) == 0:
            raise ValueError(f"cannot search {k} items in a gallery of {len(gallery)}")
        matrix, parts = self.compare(query, gallery), []
        for rows in row_slices(matrix):
            block = matrix[rows]
            index = top(block, k)
            parts.append((block.gather(1, index), index))
        if not parts:
            none = torch.empty(0, min(k, len(gallery)))
            return Hits(none, none.long())
        scores, indices = zip(*parts, strict=True)
        return Hits(torch.cat(scores), torch.cat(indices))

    @torch.no_grad()
    def _rows(self, images: Images, role: Role, generator: torch.Generator | None) -> Tensor:
        batches = images.split(self.batch_size) if isinstance(images, Tensor) else images
        rows = [self.finish(self.features(b, role=role, generator=generator)) for b in batches]
        if not rows:
            raise ValueError("no images to encode")
        return torch.cat(rows)


class TextRetriever(Retriever):
    """Cosine ranking by a text-image encoder (equation 2: after normalisation the same order as
    by Euclidean distance). Images can be queries too."""

    encoder: TextImageEncoder

    def finish(self, outputs: Tensor) -> Tensor:
        return F.normalize(outputs.float(), dim=-1)

    @torch.no_grad()
    def text(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        steps = range(0, len(texts), 256)
        return torch.cat([self.finish(self.encoder.encode_text(texts[i : i + 256])) for i in steps])


class HashRetriever(Retriever):
    """Hamming ranking of sign codes; rows are float +-1."""

    encoder: HashEncoder

    def finish(self, outputs: Tensor) -> Tensor:
        return binarise(outputs)

    def compare(self, query: Tensor, gallery: Tensor) -> Hamming:
        return Hamming(query, gallery)


class DefendedRetriever(Retriever):
    """``retriever`` with ``defense`` in front of its encoder; a new object, also differentiable.

    ``gallery`` and ``query`` say which side is purified; texts never are. A defense that takes a
    ``generator`` keyword is given the one of the call. Wrapping twice applies the outer defense
    first.
    """

    def __init__(
        self,
        retriever: Retriever,
        defense: Callable[..., Tensor],
        *,
        gallery: bool = True,
        query: bool = True,
    ):
        super().__init__(retriever.encoder, batch_size=retriever.batch_size)
        _check_eval(defense)
        self.retriever, self.defense = retriever, defense
        self.defended = {"gallery": gallery, "query": query}
        self._takes_generator = _takes_generator(defense)

    def defend(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images as the wrapped retriever sees them."""
        if self._takes_generator:
            return self.defense(images, generator=generator)
        return self.defense(images)

    def features(
        self, images: Tensor, *, role: Role = "gallery", generator: torch.Generator | None = None
    ) -> Tensor:
        if self.defended[role]:
            images = self.defend(images, generator)
        return self.retriever.features(images, role=role, generator=generator)

    def finish(self, outputs: Tensor) -> Tensor:
        return self.retriever.finish(outputs)

    def compare(self, query: Tensor, gallery: Tensor) -> Product:
        return self.retriever.compare(query, gallery)

    def text(self, texts: str | Sequence[str]) -> Tensor:
        return self.retriever.text(texts)


def _takes_generator(defense: Callable[..., Tensor]) -> bool:
    call = defense.forward if isinstance(defense, nn.Module) else defense
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "generator" or p.kind is p.VAR_KEYWORD for p in parameters)


def _check_eval(thing: object) -> None:
    """Batch norm and dropout in training mode make an image depend on its neighbours."""
    if isinstance(thing, nn.Module):
        for module in thing.modules():
            unsteady = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout)
            if unsteady and module.training:
                raise ValueError(f"{type(thing).__name__} is in training mode: call .eval() first")
