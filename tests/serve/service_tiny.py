"""Tiny random models, a collection of drawn pictures, and the real server on a real socket."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.guard.models import Models
from pair.images import to_pil
from pair.purifier import Purifier
from pair.retrieval.clip import ClipConfig, SmallClip, build_vocabulary
from pair.retrieval.hashing import HashConfig, HashNet
from pair.retrieval.resnet import ResNetConfig
from pair.serve.app import Service
from pair.serve.server import Server, listen, server

WORDS = ("red", "green", "blue", "photo", "of", "a")


def tiny_models() -> Models:
    torch.manual_seed(0)
    generator = GeneratorConfig(
        image_size=32, patch_size=8, width=32, depth=1, heads=2,
        decoder_width=32, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    backbone = ResNetConfig(width=8)
    clip = ClipConfig(
        image_size=32, dim=16, backbone=backbone, text_width=16, text_depth=1, text_heads=2,
        vocabulary=tuple(build_vocabulary(WORDS)),
    )  # fmt: skip
    net = HashNet(HashConfig(image_size=32, bits=16, backbone=backbone, classes=("x",)))
    torch.nn.init.normal_(net.head.weight)  # as it starts, all codes would be equal
    return Models(
        encoder=SmallClip(clip).eval().requires_grad_(False),
        hasher=net.eval().requires_grad_(False),
        purifier=Purifier(MaskedAutoencoder(generator)).eval().requires_grad_(False),
        names={"encoder": "tiny-clip", "hasher": "tiny-csq", "purifier": "tiny-pair"},
    )


def png(seed: int = 0, height: int = 40, width: int = 36) -> bytes:
    picture = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    buffer = io.BytesIO()
    to_pil(picture).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def serving(service: Service, app=None) -> Iterator[tuple[str, Server]]:
    """The address of a running server; stops it in good order at the end."""
    found = listen("127.0.0.1", 0)
    running = server(service, app=app)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [found]})
    thread.start()
    until = time.monotonic() + 30
    while not running.started:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{found.getsockname()[1]}", running
    finally:
        running.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
