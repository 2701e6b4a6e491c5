"""The models of a collection: loaded by name, known by fingerprint, run on batches of pictures.

Three roles, each optional but one of the first two: ``encoder`` (text-image, gives embeddings),
``hasher`` (gives codes), ``purifier``. Every model sees an image through its own resize rule, its
*view*; models that share a view share the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.images import check_images, resize, shrink
from pair.picture import Picture
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.hashing import HashNet
from pair.retrieval.openclip import OpenClip, fit, split_spec
from pair.secret import mask_generator

ROLES = ("encoder", "hasher", "purifier")


@dataclass
class Features:
    """Rows of a batch as they are stored; None where the collection has no such column.

    ``vector`` (B, D) float32 of unit length, ``code`` (B, bits / 8) uint8; of the purified image
    and, with ``_raw``, of the image as it came.
    """

    vector: np.ndarray | None = None
    vector_raw: np.ndarray | None = None
    code: np.ndarray | None = None
    code_raw: np.ndarray | None = None


@dataclass
class Models:
    """``Models.load()`` by names, or ``Models(encoder=mine)`` with objects of your own.

    ``draws``: purifications of a picture whose features are averaged before they are normalised
    or cut to bits. The paper has one; more cost as many times as much and keep more of the clean
    results.
    """

    encoder: Any = None
    hasher: Any = None
    purifier: Purifier | None = None
    names: dict[str, str] = field(default_factory=dict)
    draws: int = 1

    def __post_init__(self) -> None:
        if self.encoder is None and self.hasher is None:
            raise ValueError("a collection needs an encoder, a hash network, or both")
        if self.draws < 1 or (self.draws > 1 and self.purifier is None):
            raise ValueError(f"draws are purifications, 1 or more of a purifier: got {self.draws}")
        self._prints: dict[str, str] = {}

    @classmethod
    def load(
        cls,
        encoder: str | None = "clip-small",
        hasher: str | None = None,
        purifier: str | None = "pair-small",
        *,
        draws: int = 1,
        device: str = "cpu",
    ) -> Models:
        """Load by shipped name, folder or hub repository; ``open_clip:ARCHITECTURE/WEIGHTS`` too
        (see :meth:`pair.retrieval.openclip.OpenClip.from_spec`)."""
        given = {"encoder": encoder, "hasher": hasher, "purifier": purifier}
        names = {role: name for role, name in given.items() if name}
        made: dict[str, Any] = {role: _load(role, name) for role, name in names.items()}
        models = cls(**made, names=names, draws=draws)
        models.to(device)
        return models

    def to(self, device: str) -> Models:
        for role in ROLES:
            model = getattr(self, role)
            if isinstance(model, nn.Module):
                try:
                    model.to(device).eval().requires_grad_(False)
                except (RuntimeError, AssertionError) as error:  # torch's "there is none"
                    raise ValueError(f"cannot compute on {device!r} here") from error
        return self

    @property
    def dim(self) -> int | None:
        return None if self.encoder is None else int(self.encoder.dim)

    @property
    def bits(self) -> int | None:
        return None if self.hasher is None else int(self.hasher.bits)

    def fingerprint(self, role: str) -> str:
        """16 hexadecimal digits over weights and settings; "" where there is no such model."""
        model = getattr(self, role)
        if model is None:
            return ""
        if role not in self._prints:
            text = fingerprint(model)
            if role == "purifier" and self.draws > 1:
                text = hashlib.sha256(f"{text}, {self.draws} draws".encode()).hexdigest()[:16]
            self._prints[role] = text
        return self._prints[role]

    def describe(self) -> dict[str, dict[str, str]]:
        """role -> name and fingerprint, as it is stored in a collection; draws where several."""
        found = {
            role: {"name": self.names.get(role, ""), "fingerprint": self.fingerprint(role)}
            for role in ROLES
            if getattr(self, role) is not None
        }
        if self.draws > 1:
            found["purifier"]["draws"] = str(self.draws)
        return found

    def views(self, picture: Picture) -> list[Tensor]:
        """What each model (encoder, hasher) sees of a decoded picture; equal views once."""
        made: dict[Any, Tensor] = {}
        for model in self.targets():
            key = _view_key(model)
            if key not in made:
                made[key] = _view(model, picture)
        return list(made.values())

    def views_of(self, image: Tensor) -> list[Tensor]:
        """:meth:`views` of an image (3, H, W) in [0, 1] that is a tensor already."""
        images = check_images(image[None])
        made: dict[Any, Tensor] = {}
        for model in self.targets():
            key = _view_key(model)
            if key not in made:
                made[key] = _view_of_tensor(model, images)[0]
        return list(made.values())

    def targets(self) -> list[Any]:
        return [m for m in (self.encoder, self.hasher) if m is not None]

    @torch.no_grad()
    def features(
        self,
        views: list[Tensor],
        *,
        raw: bool = True,
        purified: bool = True,
        seeds: Sequence[int] | None = None,
    ) -> Features:
        """``views``: one batch (B, 3, S, S) per distinct view, as :meth:`views` orders them.

        ``seeds``: of the mask of each image; by default fresh ones from the operating system.
        """
        out = Features()
        order: list[Any] = []
        clean: dict[int, list[Tensor]] = {}
        for model in self.targets():
            key = _view_key(model)
            if key not in order:
                order.append(key)
            at = order.index(key)
            x = views[at]
            name = "vector" if model is self.encoder else "code"
            if raw:
                setattr(out, f"{name}_raw", self._encode(model, [x]))
            if purified and self.purifier is not None:
                if at not in clean:
                    clean[at] = self.purifications(views[at], seeds)
                setattr(out, name, self._encode(model, clean[at]))
        return out

    def purify(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, 3, S, S), a mask per image from its own seed."""
        return self.purifications(images, seeds, 1)[0]

    @torch.no_grad()
    def purifications(
        self, images: Tensor, seeds: Sequence[int] | None = None, draws: int | None = None
    ) -> list[Tensor]:
        """``draws`` (default: as many as are averaged) times (B, 3, S, S).

        The masks of an image come one after the other from its own seed.
        """
        assert self.purifier is not None
        n = draws or self.draws
        # Drawn on the CPU wherever the model is: the same seed is the same mask on every device.
        asked: Sequence[int | None] = seeds or [None] * len(images)
        sources = [self.source(seed) for seed in asked]
        masks = torch.stack([self.purifier.draw_mask(n, source) for source in sources], 1)
        images = images.to(_device(self.purifier))
        return [self.purifier(images, mask=mask) for mask in masks]

    def source(self, seed: int | None) -> torch.Generator:
        """What an image's masks are drawn from."""
        return mask_generator(seed)

    def _encode(self, model: Any, draws: list[Tensor]) -> np.ndarray:
        """Stored rows for the features of images, averaged over their draws."""
        device = _device(model)
        outputs = torch.stack([model.encode_image(x.to(device)).float().cpu() for x in draws])
        outputs = outputs.mean(0)
        if model is self.encoder:
            return F.normalize(outputs, dim=1).numpy()
        return pack(outputs)

    @torch.no_grad()
    def text(self, texts: list[str]) -> np.ndarray:
        """Unit rows (T, D)."""
        if not hasattr(self.encoder, "encode_text"):
            raise ValueError("the collection has no text encoder: search with a picture")
        return F.normalize(self.encoder.encode_text(texts).float().cpu(), dim=1).numpy()


def pack(outputs: Tensor) -> np.ndarray:
    """Real hash outputs (B, bits) -> bytes (B, bits / 8), a positive output is a 1."""
    return np.packbits((outputs > 0).numpy(), axis=1)


def fingerprint(model: Any) -> str:
    """16 digits of SHA-256 over names, shapes and values of the weights, and the settings.

    A model that is no module says its own with an attribute ``fingerprint``.
    """
    if hasattr(model, "fingerprint"):
        return str(model.fingerprint)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(model).__name__} is no torch module: give it an attribute 'fingerprint'"
        )
    digest = hashlib.sha256(type(model).__name__.encode())
    settings = model.extra_repr() if isinstance(model, Purifier | OpenClip) else ""
    digest.update(f"{getattr(model, 'config', '')} {settings}".encode())
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _load(role: str, name: str) -> Any:
    if role == "purifier":
        return Purifier.from_pretrained(name)
    if role == "hasher":
        return HashNet.from_pretrained(name)
    if name.startswith("open_clip:"):
        spec = name.removeprefix("open_clip:")
        architecture, weights = split_spec(spec)
        if weights and spec == f"{architecture}@{weights}":
            # The earlier spelling takes the activation of the architecture as it is named:
            # collections hold features that were computed so.
            return OpenClip.from_pretrained(architecture, weights)
        return OpenClip.from_spec(spec)
    return SmallClip.from_pretrained(name)


def _view_key(model: Any) -> Any:
    if isinstance(model, OpenClip):
        return model.size, model.resize_mode, model.interpolation, model.fill
    rule = model.config.resize if isinstance(model, HashNet) else "squash"
    return model.image_size, rule


def _view(model: Any, picture: Picture) -> Tensor:
    """(3, S, S) of a picture, as the model itself would resize it."""
    squash = not isinstance(model, OpenClip) and _view_key(model)[1] == "squash"
    if squash:
        return shrink(picture, model.image_size)
    full = picture.upright(picture.pixels())[None]
    if isinstance(model, OpenClip):
        x = fit(full, model.size, model.resize_mode, model.interpolation, model.fill)
    else:
        x = model.prepare(full)
    return x[0].clamp(0, 1)


def _view_of_tensor(model: Any, images: Tensor) -> Tensor:
    """:func:`_view` for images (B, 3, H, W) that are tensors already."""
    if isinstance(model, OpenClip):
        return fit(images, model.size, model.resize_mode, model.interpolation, model.fill)
    return model.prepare(images) if hasattr(model, "prepare") else resize(images, model.image_size)


def _device(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        for value in (*model.parameters(), *model.buffers()):
            return value.device
    return torch.device("cpu")
