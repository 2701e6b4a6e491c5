"""The models behind the service: pictures to tensors, tensors to results, batch by batch."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pair.guard.collection import Collection, Hit
from pair.guard.models import Models
from pair.images import ImageError, decode, shrink, to_pil
from pair.picture import Picture
from pair.serve.audits import Examiner, SecretModels
from pair.serve.frames import frames, kind
from pair.serve.problems import Problem
from pair.serve.settings import Limits

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
KINDS = {"embedding": "vector", "code": "code"}


@dataclass(frozen=True)
class Work:
    """What a batch is about: everything in it is computed the same way.

    ``what``: "purify" ((3, S, S) -> the same), "audit" ((3, S, S) -> a record), "embedding" or
    "code" ((3, S, S) -> a row, of the purified picture if ``purified``), "text" (a string -> a
    row).
    """

    what: str
    purified: bool = False

    def __str__(self) -> str:
        return f"{self.what}-purified" if self.purified else self.what


class Engine:
    """Models and, if there is one, the collection that they made."""

    def __init__(
        self,
        models: Models,
        collection: Collection | None = None,
        examiner: Examiner | None = None,
    ):
        purifying: dict[str, Any] = {"purifier": models.purifier, "draws": models.draws}
        self.models = SecretModels(models.encoder, models.hasher, names=models.names, **purifying)
        self.collection, self.examiner = collection, examiner
        self.parts: dict[str, Models] = {}
        if models.encoder is not None:
            self.parts["embedding"] = SecretModels(encoder=models.encoder, **purifying)
        if models.hasher is not None:
            self.parts["code"] = SecretModels(hasher=models.hasher, **purifying)

    @classmethod
    def load(
        cls,
        collection: str | None = None,
        encoder: str | None = "clip-small",
        hasher: str | None = "csq-small",
        purifier: str | None = "pair-small",
        device: str = "cpu",
    ) -> Engine:
        """The models of a collection, or those that are named where there is none."""
        if collection is None:
            return cls(Models.load(encoder, hasher, purifier, device=device))
        opened = Collection.open(collection, device=device)
        return cls(opened.models, opened)

    def audit_with(self, bank: Sequence[str], clean: Sequence[Path], budget: float) -> None:
        """Turn /audit on, with a bank of queries and, for alarms, clean pictures."""
        self.examiner = Examiner(self.models, bank, clean, budget=budget)

    def picture(self, data: bytes, limits: Limits) -> Picture:
        """Decode one upload, or say what is wrong with it."""
        if kind(data) is None:
            text = "this is not a picture of a readable kind: JPEG, PNG, WebP, GIF, TIFF or BMP"
            raise Problem(415, "kind", text)
        if frames(data, limits.frames) > limits.frames:
            text = f"the picture has more than {limits.frames} frames"
            raise Problem(422, "frames", text)
        try:
            return decode(data, max_pixels=limits.pixels)
        except ImageError as error:
            raise Problem(422, "picture", error.reason) from error

    def view(self, picture: Picture, what: str) -> Tensor:
        """(3, S, S) as the model for ``what`` sees the picture."""
        if what == "purify":
            return shrink(picture, self.need("purifier").image_size)
        if what == "audit":
            return shrink(picture, self.need_examiner().image_size)
        return self.part(what).views(picture)[0]

    def part(self, what: str) -> Models:
        if what not in self.parts:
            raise Problem(404, "absent", f"this service makes no {what}s")
        return self.parts[what]

    def need(self, role: str) -> Any:
        model = getattr(self.models, role)
        if model is None:
            raise Problem(404, "absent", f"this service has no {role}")
        return model

    def need_examiner(self) -> Examiner:
        if self.examiner is None:
            raise Problem(404, "absent", "this service audits nothing: start it with --bank")
        return self.examiner

    def need_collection(self) -> Collection:
        if self.collection is None:
            text = "this service has no collection: start it with --collection"
            raise Problem(404, "absent", text)
        return self.collection

    @torch.no_grad()
    def compute(self, work: Any, payloads: list[Any]) -> Sequence[Any]:
        """One batch; every purified picture gets a mask of its own, from fresh secret numbers."""
        if work.what == "text":
            return list(self.models.text(payloads))
        if work.what == "audit":
            return self.need_examiner().examine(payloads)
        views = torch.stack(payloads)
        if work.what == "purify":
            return list(self.models.purify(views).float().cpu())
        part, name = self.part(work.what), KINDS[work.what]
        features = part.features([views], raw=not work.purified, purified=work.purified)
        return list(getattr(features, name if work.purified else f"{name}_raw"))

    def search(
        self, row: np.ndarray, what: str, defend: str | None, k: int, where: str | None
    ) -> list[Hit]:
        """Nearest rows of the collection; one sentence of a filter's parser becomes a 422."""
        try:
            return self.need_collection().search_row(row, k, using=what, defend=defend, where=where)
        except ValueError as error:
            raise Problem(422, "parameter", str(error)) from error


def encoded(image: Tensor, format: str) -> bytes:
    """(3, H, W) in [0, 1] as a file."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if format == "png" else {"quality": 95}
    if format == "jpeg":
        options["subsampling"] = 0
    to_pil(image).save(buffer, format.upper(), **options)
    return buffer.getvalue()


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
