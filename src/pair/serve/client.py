"""A client for the service.

with Client("http://127.0.0.1:8000", key="...") as client:
    clean = client.purify("photo.jpg")
    hits = client.search_text("a laptop", k=5)
"""

from __future__ import annotations

import base64
import io
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pair.images import load_image, to_pil

Picture = str | os.PathLike[str] | bytes | Tensor | Image.Image
RETRIED = (429, 503)


class ServiceError(Exception):
    """The service refused or failed: ``status``, ``code`` and one sentence."""

    def __init__(self, status: int, code: str, message: str, request_id: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.message} ({self.status} {self.code})"


class Client:
    """One connection pool to one service; usable from several threads.

    ``key``: default, the environment variable ``PAIR_API_KEY``. Refusals for lack of room (429,
    503) are tried again up to ``retries`` times, after the pause that the service asks for; a
    request whose connection broke is sent once more.
    Pictures are files, bytes of files, tensors (3, H, W) in [0, 1], or Pillow images; those that
    are not files yet travel as PNG. Raises :class:`ServiceError`, and ``ConnectionError`` where
    no service answers.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ):
        try:
            import httpx
        except ImportError as error:  # pragma: no cover - depends on the installation
            raise ValueError(
                "the client needs httpx: pip install 'pair-retrieval[serve]'"
            ) from error
        self._library: Any = httpx
        key = os.environ.get("PAIR_API_KEY") if key is None else key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self.retries, self._sleep = retries, sleep

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def ready(self) -> bool:
        """Does it take requests now?"""
        try:
            return bool(self._http.get("/readyz").status_code == 200)
        except self._library.TransportError:
            return False

    def purify(self, picture: Picture) -> Tensor:
        """(3, S, S) in [0, 1]; every call draws new masks."""
        answer = self._post("/purify", content=_bytes(picture), params={"format": "png"})
        return load_image(answer.content)

    def purify_many(self, pictures: Sequence[Picture]) -> Tensor:
        """(N, 3, S, S), in one request."""
        answer = self._post("/purify", files=_form(pictures), params={"format": "png"}).json()
        return torch.stack([load_image(base64.b64decode(text)) for text in answer["images"]])

    def embed(self, pictures: Sequence[Picture], *, purified: bool = True) -> np.ndarray:
        """(N, D) float32 of unit length."""
        return np.array(self._rows(pictures, "embedding", purified), np.float32)

    def codes(self, pictures: Sequence[Picture], *, purified: bool = True) -> np.ndarray:
        """(N, bits / 8) uint8."""
        rows = self._rows(pictures, "code", purified)
        return np.stack([np.frombuffer(bytes.fromhex(row), np.uint8) for row in rows])

    def search_text(
        self, query: str, k: int = 10, *, defend: str | None = None, where: str | None = None
    ) -> list[dict[str, Any]]:
        """Hits with id, uri, score, rank, width, height and metadata."""
        body = {"query": query, "k": k, "defend": defend, "where": where}
        return self._post("/search/text", json=body).json()["hits"]

    def search_image(
        self,
        picture: Picture,
        k: int = 10,
        *,
        defend: str | None = None,
        what: str = "embedding",
        where: str | None = None,
    ) -> list[dict[str, Any]]:
        """The same for a picture as the query."""
        settings = {"k": k, "defend": defend, "what": what, "where": where}
        params = {name: value for name, value in settings.items() if value is not None}
        return self._post("/search/image", content=_bytes(picture), params=params).json()["hits"]

    def audit(self, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
        """A record per picture: statistics, worst query, window, heat map, p and alarm."""
        return self._post("/audit", files=_form(pictures)).json()["pictures"]

    def _rows(self, pictures: Sequence[Picture], what: str, purified: bool) -> list[Any]:
        params = {"what": what, "purified": str(purified).lower()}
        return self._post("/embed", files=_form(pictures), params=params).json()["rows"]

    def _post(self, path: str, **request: Any) -> Any:
        if "content" in request:
            request["headers"] = {"content-type": "application/octet-stream"}
        for attempt in range(self.retries + 1):
            try:
                answer = self._sent(path, request)
            except self._library.TransportError as error:
                url = self._http.base_url
                raise ConnectionError(f"no answer from {url}: {error or 'it hung up'}") from error
            if answer.status_code not in RETRIED or attempt == self.retries:
                break
            pause = float(answer.headers.get("retry-after", 1))
            self._sleep(pause * random.uniform(0.5, 1.5))  # so that many do not return together
        if answer.status_code == 200:
            return answer
        try:
            told = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            told = {"code": "unknown", "message": "an answer that is not of this service"}
        name = answer.headers.get("x-request-id", "")
        raise ServiceError(answer.status_code, told["code"], told["message"], name)

    def _sent(self, path: str, request: dict[str, Any]) -> Any:
        """Once more where the connection broke: no call changes anything, so none can do harm."""
        library = self._library
        try:
            return self._http.post(path, **request)
        except (library.ReadError, library.WriteError, library.RemoteProtocolError):
            return self._http.post(path, **request)


def _bytes(picture: Picture) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, Tensor):
        picture = to_pil(picture)
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()
    return Path(picture).read_bytes()


def _form(pictures: Sequence[Picture]) -> list[tuple[str, tuple[str, bytes, str]]]:
    kind = "application/octet-stream"
    return [("image", ("picture", _bytes(picture), kind)) for picture in pictures]
