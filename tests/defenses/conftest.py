"""A folder of tiny models with random weights."""

from pathlib import Path

import pytest
from defense_models import save_models


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root
