"""What the lab does, without its page: place a patch, attack, purify, search, look closer.

Everything here is a function of tensors and can be used, and tested, without a browser.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.attacks.patch import Patch
from pair.attacks.tth import TTHConfig, tth
from pair.attacks.wrappers import pipeline
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.guard.audit import Auditor
from pair.guard.audit_report import draw_heat
from pair.images import check_images, decode, load_batch, quantise, resize, shrink
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.secret import secret_generator
from pair.serve.audits import SecretModels

KINDS = ("QR code", "text", "own picture", "grey")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")
PIXELS = 40_000_000
SHOWN = 8  # results of a search


@dataclass
class Hit:
    """A result: (3, S, S), its class or "your picture", cosine; ``own``: it is the inserted one."""

    image: Tensor
    label: str
    score: float
    own: bool
    relevant: bool


@dataclass
class Ranking:
    """The first results, and where the inserted picture came (1 is first)."""

    hits: list[Hit]
    rank: int
    score: float


@dataclass
class Frame:
    """A moment of a running attack; ``picture`` (3, S, S) is what the model saw last."""

    step: int
    steps: int
    loss: float
    picture: Tensor


@dataclass
class Passes:
    """The way through the purifier: what pass 1 sees (hidden tokens grey), what it makes of it,
    what pass 2 sees, and the result. Each (3, S, S)."""

    seen_first: Tensor
    first: Tensor
    seen_second: Tensor
    second: Tensor


@dataclass
class Scene:
    """Models and a gallery of labelled photos, which is purified when a search first needs it."""

    encoder: Any
    purifier: Purifier
    photos: Tensor
    labels: list[str]
    samples: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.models = SecretModels(encoder=self.encoder, purifier=self.purifier)
        self.size = self.encoder.image_size
        self._rows: dict[bool, Tensor] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, purifier: str = "pair-small", encoder: str = "clip-small", per_class: int = 8
    ) -> Scene:
        """The shipped models with up to ``per_class`` of the embedded photos of each class."""
        clip = SmallClip.from_pretrained(encoder)
        counts: dict[str, int] = {}
        files = []
        for path, label in embedded.gallery():
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= per_class:
                files.append((path, label))
        photos = load_batch([path for path, _ in files], clip.image_size)
        samples = [path for path, _ in embedded.ads()[:6]]
        made = Purifier.from_pretrained(purifier).requires_grad_(False)
        return cls(clip, made, photos, [label for _, label in files], samples)

    def picture(self, source: str | Path | bytes) -> Tensor:
        """(3, S, S) of a file, squeezed; one sentence for what is no picture."""
        return shrink(decode(source, max_pixels=PIXELS), self.size)

    def patch(
        self,
        kind: str,
        text: str = "",
        own: Tensor | None = None,
        size: float = 0.35,
        place: str = "top-right",
    ) -> Patch:
        """The patch before any attack. ``size`` is a share of the side."""
        if kind not in KINDS:
            raise ValueError(f"unknown patch {kind!r}: use {', '.join(KINDS)}")
        side = max(1, int(size * self.size))
        if kind == "own picture":
            if own is None:
                raise ValueError("choose the picture that shall be the patch")
            start: str | Tensor = resize(check_images(own[None]), side)[0].clamp(0, 1)
        elif kind == "text":
            if not text.strip():
                raise ValueError("write the text that shall be on the patch")
            start = f"text:{text}"
        else:
            start = {"QR code": f"qr:{text}" if text else "qr", "grey": "grey"}[kind]
        return Patch.make(start, size, self.size, place)

    def attack(
        self,
        image: Tensor,
        patch: Patch,
        words: str,
        *,
        steps: int = 40,
        knows: bool = False,
        seed: int | None = None,
    ) -> Iterator[Frame]:
        """Optimise the patch so that a search for ``words`` finds the image; frames as it goes.

        ``knows``: through the purifier, with fresh masks in every step. Closing the iterator
        stops the attack. The last frame holds the finished picture, rounded to 8 bits.
        """
        target = self.text(words, TRAIN_TEMPLATES).mean(0)
        victim = pipeline(self.encoder, self.purifier) if knows else pipeline(self.encoder)
        seen = [image]

        def features(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            seen[0] = images[0].detach()
            return victim(images, generator=generator)

        config = TTHConfig(
            steps=steps,
            lr=0.05,
            schedule="cosine",
            distortion=0.05,
            eot=4 if knows else 1,
            retry=False,
        )
        generator = torch.Generator().manual_seed(seed) if seed is not None else secret_generator()

        def run(report: Callable[[int, int, float], None]) -> Tensor:
            result = tth(
                features, image[None], target,
                config=config, patch=patch, generator=generator, progress=report,
            )  # fmt: skip
            return quantise(result.patch.apply(image[None]))[0]

        return _frames(run, steps, seen)

    @torch.no_grad()
    def text(self, words: str, templates: Sequence[str] = HELD_OUT_TEMPLATES) -> Tensor:
        """Unit rows (T, D) of words through templates; a sentence is taken as it is."""
        if not words.strip():
            raise ValueError("write what the search looks for")
        lines = [words] if len(words.split()) > 3 else sentences([words], tuple(templates))
        return F.normalize(self.encoder.encode_text(lines), dim=1)

    @torch.no_grad()
    def passes(self, image: Tensor) -> Passes:
        """One purification, step by step, under a fresh secret mask."""
        mask = self.purifier.draw_mask(1, secret_generator())
        first, second = self.purifier.steps(image[None], mask=mask)
        x = resize(image[None], self.purifier.image_size).clamp(0, 1)
        side = self.purifier.image_size // self.purifier.autoencoder.grid
        shown = mask.view(1, 1, self.purifier.autoencoder.grid, -1)
        visible = shown.repeat_interleave(side, 2).repeat_interleave(side, 3)

        def covered(picture: Tensor, keep: Tensor) -> Tensor:
            return torch.where(keep, picture, torch.full_like(picture, 0.5))[0]

        return Passes(covered(x, visible), first[0], covered(first, ~visible), second[0])

    def heat(self, image: Tensor, words: str) -> Tensor:
        """(3, S, S): where a search for ``words`` depends on the picture; see ``pair audit``."""
        auditor = Auditor(self.models, [words], draws=2)
        (finding,) = auditor.examine(image[None], [""])
        return draw_heat(resize(image[None], auditor.image_size)[0].clamp(0, 1), finding)

    def search(self, image: Tensor, words: str, *, defended: bool) -> Ranking:
        """Search the gallery with ``image`` in it; ``defended``: all of them purified."""
        rows = self.rows(defended)
        own = self._embed(image[None], defended)
        query = self.text(words)[:1]
        scores = (torch.cat([rows, own]) @ query.T)[:, 0]
        order = scores.argsort(dim=0, descending=True).tolist()
        last, wanted = len(rows), words.strip().lower()
        hits = []
        for i in order[:SHOWN]:
            mine = i == last
            label = "your picture" if mine else self.labels[i]
            shown = image if mine else self.photos[i]
            hits.append(Hit(shown, label, float(scores[i]), mine, label.lower() == wanted))
        return Ranking(hits, order.index(last) + 1, float(scores[last]))

    def rows(self, defended: bool) -> Tensor:
        """Unit rows (N, D) of the gallery, computed once."""
        with self._lock:
            if defended not in self._rows:
                self._rows[defended] = self._embed(self.photos, defended)
            return self._rows[defended]

    @torch.no_grad()
    def _embed(self, images: Tensor, defended: bool) -> Tensor:
        parts = [self.models.purify(x) if defended else x for x in images.split(32)]
        return F.normalize(torch.cat([self.encoder.encode_image(x) for x in parts]), dim=1)


class _Stopped(Exception):
    pass


def _frames(run: Callable[..., Tensor], steps: int, seen: list[Tensor]) -> Iterator[Frame]:
    """``run(report)`` in a thread, its reports as frames."""
    waiting: queue.Queue[Frame | Tensor | BaseException] = queue.Queue()
    stop, last = threading.Event(), [float("nan")]

    def report(step: int, of: int, loss: float) -> None:
        if stop.is_set():
            raise _Stopped
        last[0] = loss
        waiting.put(Frame(step, of, loss, seen[0].clamp(0, 1)))

    def work() -> None:
        try:
            waiting.put(run(report))
        except BaseException as error:
            waiting.put(error)

    thread = threading.Thread(target=work, name="pair-attack", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Tensor):
                yield Frame(steps, steps, last[0], item)
                return
            yield item
    finally:
        stop.set()
        thread.join()
