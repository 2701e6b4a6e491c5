"""One service for all tests that do not need one of their own."""

from __future__ import annotations

import pytest

collect_ignore_glob: list[str] = []
for _name in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "httpx", "lancedb"):
    try:
        __import__(_name)
    except ImportError:  # the extra "serve" is not installed: nothing here can run
        collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def models():
    from service_tiny import tiny_models

    return tiny_models()


@pytest.fixture(scope="session")
def collection(models, tmp_path_factory):
    from service_tiny import png

    from pair.guard.collection import Collection

    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        (folder / f"{number}.png").write_bytes(png(number))
    made = Collection.create(str(folder / "c.lance"), models, root=folder)
    made.add(folder)
    return made


@pytest.fixture(scope="session")
def url(models, collection):
    from service_tiny import serving

    from pair.serve.app import Service
    from pair.serve.engine import Engine

    with serving(Service(Engine(models, collection), threads=2)) as (address, _):
        yield address
