"""Photos on disk, searched by certified score: every answer comes with its certificate.

Adding a photo costs one embedding. Its views (one generator pass each) are made when it is first
about to be shown and are then kept on disk by content, so the cost follows what people search
for. The order of certification is the plain score, which bounds the certified one: the answers
are the exact certified ranking of the whole folder, and no number of uploads can push an honest
photo off a shortlist, because there is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pair.certified import CertifiedIndex, CertifiedPurifier, Hit
from pair.certified.report import Certificate, judge
from pair.certified.store import ViewStore, content_key
from pair.files import write_atomic
from pair.guard import filters
from pair.guard.collection import Collection
from pair.guard.models import fingerprint
from pair.guard.plan import named_like_image
from pair.images import ImageError, decode, resize_crop, shrink
from pair.retrieval.encoders import ImageEncoder

PHOTOS = "photos.safetensors"


@dataclass(frozen=True)
class Photo:
    """A file as it was when it was embedded; ``key`` is the SHA-256 of its bytes."""

    path: str
    key: str
    size: int
    mtime_ns: int
    height: int
    width: int


@dataclass
class Added:
    """Counts of :meth:`CertifiedPhotos.add`."""

    found: int = 0
    embedded: int = 0
    known: int = 0
    failed: int = 0
    stopped: bool = False


@dataclass(frozen=True)
class Answer:
    """One photo of a certified result.

    ``score`` is min(plain, lowest view + delta), ``rank`` its place by it and ``plain_rank`` the
    place by the plain score alone. ``alarm``: plain minus lowest exceeds the alarm's delta
    (Theorem 10), so the hit may be the work of one patch.
    """

    photo: Photo
    rank: int | None
    plain_rank: int
    score: float
    certificate: Certificate

    @property
    def alarm(self) -> bool:
        return not self.certificate.clear

    def record(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "path": self.photo.path,
            "sha256": self.photo.key,
            "rank": self.rank,
            "plain_rank": self.plain_rank,
            "score": self.score,
            "alarm": self.alarm,
            **self.certificate.record(),
        }


@dataclass(frozen=True)
class Result:
    """``answers`` in certified order; ``kept_out``: those of the plain top k that lost it.

    ``views_made`` counts the photos that this search had to certify; ``lost`` names files that
    were changed or removed since they were embedded, which no search shows.
    """

    answers: list[Answer]
    kept_out: list[Answer]
    views_made: int
    lost: list[str]


def _read_file(path: str) -> bytes:
    return Path(path).read_bytes()


class CertifiedPhotos:
    """A collection of files in ``folder`` (created if missing) for one purifier and encoder.

    A folder made with another model, family, set of windows or fill is refused in one sentence;
    ``delta`` is free to change. ``whole``: pictures are squeezed into the square that the models
    see, instead of cut to it. ``read`` gives the bytes of a path. Several processes may search at
    once; only one should add.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        purifier: CertifiedPurifier,
        encoder: ImageEncoder,
        *,
        delta: float = 0.0,
        whole: bool = False,
        read: Callable[[str], bytes] = _read_file,
    ):
        self.folder, self.purifier, self.encoder = Path(folder), purifier, encoder
        self.whole, self.read = whole, read
        cover = purifier.cover
        settings = {
            "generator": fingerprint(purifier.autoencoder),
            "encoder": fingerprint(encoder),
            "family": str(cover.family),
            "windows": [list(box) for box in cover.boxes()],
            "fill": purifier.fill,
            "seen": "whole" if whole else "centre",
        }
        self.store = ViewStore(self.folder, settings, len(cover), encoder.dim)
        self.index = CertifiedIndex(
            encoder.dim, len(cover), delta=delta, certify=self._certify, batch=4
        )
        self.photos: list[Photo] = []
        self._gone: set[int] = set()
        self._made = 0
        self._read()

    def __len__(self) -> int:
        return len(self.photos)

    @torch.no_grad()
    def add(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        every: int = 256,
        progress: Callable[[Added], None] = lambda added: None,
        failed: Callable[[str, str], None] = lambda path, reason: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Added:
        """Embed files and folders with all below; photos that have not changed are skipped.

        What is done is written every ``every`` photos and at the end, so a killed run loses
        little and the same call goes on. A file that cannot be read is counted and reported to
        ``failed(path, reason)``, and does not stop the others.
        """
        files = list_photos(paths)
        known = {p.path: p for p in self.photos}
        done, fresh = Added(found=len(files)), 0
        for path in files:
            if stop():
                done.stopped = True
                break
            try:
                stat = os.stat(path)
                old = known.get(path)
                if old is not None and (old.size, old.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                    done.known += 1
                else:
                    self._embed(path, stat)
                    done.embedded, fresh = done.embedded + 1, fresh + 1
            except ImageError as error:
                done.failed += 1
                failed(path, error.reason)
            except OSError as error:
                done.failed += 1
                failed(path, f"the file cannot be read: {error.strerror or error}")
            if fresh >= every:
                self._write()
                fresh = 0
            progress(done)
        if fresh:
            self._write()
        return done

    @torch.no_grad()
    def search(
        self, query: Tensor, k: int = 10, *, alarm: float = 0.2, slack: float = 1e-5
    ) -> Result:
        """The ``k`` photos with the highest certified score for a query (d,), and what they hang
        on. ``alarm`` is the loss of score with one window that raises an alarm (Theorem 10)."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        query = F.normalize(query.detach().float(), dim=-1)
        self.store.refresh()
        before = self._made
        while True:
            hits, first = self.index.search(query, k), self.index.plain_top(query, k)
            table = self.index.hits(query, first)
            changed = [i for i in {h.item for h in (*hits, *table)} if not self._same(i)]
            if not changed:
                break
            self._drop(changed)
        ranks = {h.item: place for place, h in enumerate(hits, 1)}
        order = {item: place for place, item in enumerate(first, 1)}

        def answer(hit: Hit) -> Answer:
            photo = self.photos[hit.item]
            place = order.get(hit.item) or self.index.plain_rank(query, hit.item)
            scores = self.index.scores(query, [hit.item])[0]
            proof = judge(
                scores, self.purifier.cover, (photo.height, photo.width), alarm, slack=slack,
                whole=self.whole,
            )  # fmt: skip
            return Answer(photo, ranks.get(hit.item), place, hit.score, proof)

        kept_out = [answer(h) for h in table if h.item not in ranks]
        lost = sorted({self.photos[i].path for i in self._gone})
        return Result([answer(h) for h in hits], kept_out, self._made - before, lost)

    @torch.no_grad()
    def embed(self, data: bytes) -> Tensor:
        """Unit features (1, d) of a picture's bytes: a query that is trusted."""
        return F.normalize(self.encoder.encode_image(self._seen(data)[0]), dim=-1)

    def _embed(self, path: str, stat: os.stat_result) -> None:
        data = self.read(path)
        seen, height, width = self._seen(data)
        plain = F.normalize(self.encoder.encode_image(seen), dim=-1)
        photo = Photo(path, content_key(data), stat.st_size, stat.st_mtime_ns, height, width)
        stale = [i for i, p in enumerate(self.photos) if p.path == path and i not in self._gone]
        self._drop(stale)
        self.photos.append(photo)
        self.index.add(plain)

    def load(self, photos: Sequence[Photo], plain: Tensor) -> None:
        """Take photos whose plain unit features (n, d) you have, such as rows of a database."""
        if plain.shape != (len(photos), self.encoder.dim):
            raise ValueError(f"{len(photos)} photos need features of {self.encoder.dim} numbers")
        self.photos.extend(photos)
        self.index.add(plain)

    def _seen(self, data: bytes) -> tuple[Tensor, int, int]:
        """What the models see (1, 3, S, S), and height and width of the file."""
        size = self.purifier.image_size
        picture = decode(data)
        height, width = picture.size
        if self.whole:
            return shrink(picture, size)[None], height, width
        image = picture.upright(picture.pixels())[None]
        return resize_crop(image, size).clamp(0, 1), height, width

    def _certify(self, items: list[int]) -> Tensor:
        """Views of photos, from the store or made one photo at a time: batches of equal shape
        whoever else is searched, so the numbers do not depend on it (assumption A3)."""
        out = []
        for item in items:
            photo = self.photos[item]
            if photo.key not in self.store:
                data = self._bytes(item)
                if data is None:  # never shown: search drops it
                    self._gone.add(item)
                    out.append(torch.zeros(1, *self.store.shape))
                    continue
                masked = self.purifier.embed(self.encoder, self._seen(data)[0]).masked
                self.store.put([photo.key], masked)
                self._made += 1
            out.append(self.store.get([photo.key]))
        return torch.cat(out)

    def _bytes(self, item: int) -> bytes | None:
        """The file, if it still is what was embedded."""
        photo = self.photos[item]
        try:
            data = self.read(photo.path)
        except (OSError, ValueError):  # sources of a collection refuse in either way
            return None
        return data if content_key(data) == photo.key else None

    def _same(self, item: int) -> bool:
        """Is what would be shown what was certified? Names and times prove nothing."""
        return item not in self._gone and self._bytes(item) is not None

    def _drop(self, items: Sequence[int]) -> None:
        self._gone.update(items)
        self.index.remove(items)

    def _write(self) -> None:
        keep = [i for i in range(len(self.photos)) if i not in self._gone]
        rows = json.dumps([vars(self.photos[i]) for i in keep])
        plain = self.index.plain[keep].contiguous()
        write_atomic(self.folder / PHOTOS, save({"plain": plain}, metadata={"photos": rows}))

    def _read(self) -> None:
        path = self.folder / PHOTOS
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as table:
                plain = table.get_tensor("plain")
                self.photos = [Photo(**row) for row in json.loads(table.metadata()["photos"])]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: delete it and add the photos again") from error
        if plain.shape != (len(self.photos), self.encoder.dim):
            raise ValueError(
                f"{path} does not fit this encoder: delete it and add the photos again"
            )
        self.index.add(plain)


def from_collection(
    collection: Collection,
    folder: str | os.PathLike[str],
    purifier: CertifiedPurifier,
    encoder: ImageEncoder,
    *,
    delta: float = 0.0,
    where: str | None = None,
) -> CertifiedPhotos:
    """The rows of a collection (those that fit the filter ``where``), ready for certified search.

    Their unpurified embeddings are read once, exactly, whatever approximate index there is: an
    approximate shortlist could be flooded by uploads. ``folder`` keeps the views.
    """
    if "vector_raw" not in collection.layout.columns():
        raise ValueError(f"{collection.uri} has no embeddings: certified search needs them")
    found = CertifiedPhotos(
        folder, purifier, encoder, delta=delta, whole=True, read=collection.read
    )
    rule = None if where is None else filters.parse(where, collection.searchable())
    for rows in collection.store.rows(("vector_raw",), rule):
        photos = [Photo(r.uri, r.sha256, 0, 0, r.height, r.width) for r in rows]
        plain = torch.stack([torch.from_numpy(np.array(r.vector_raw)) for r in rows])
        found.load(photos, F.normalize(plain.float(), dim=-1))
    return found


def list_photos(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Absolute paths of files, and of everything below folders that is named like an image.

    Raises ``ValueError`` if a path does not exist or nothing is found.
    """
    found: set[str] = set()
    for given in paths:
        path = os.path.abspath(given)
        if not os.path.exists(path):
            raise ValueError(f"no such file or folder: {path}")
        if not os.path.isdir(path):
            found.add(path)
        for where, _, names in os.walk(path):
            found.update(os.path.join(where, name) for name in names if named_like_image(name))
    if not found:
        raise ValueError(f"no image found in {', '.join(map(str, paths))}")
    return sorted(found)
