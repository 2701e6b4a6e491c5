"""The container files agree with the command that they start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import typer
import yaml

from pair.commands.serve import serve

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def options() -> set[str]:
    app = typer.Typer()
    app.command()(serve)
    command = typer.main.get_command(app)
    return {name for parameter in command.params for name in parameter.opts}


def test_options_exist():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    entry = re.search(r"^ENTRYPOINT (.*)$", (DEPLOY / "Containerfile").read_text(), re.M)
    used = json.loads(entry[1])[2:] + compose["services"]["serve"]["command"]
    assert {word for word in used if word.startswith("--")} <= options()


def test_stopping_is_given_the_time_that_it_needs():
    """Grace before, and the longest request, fit into what the container is allowed."""
    from pair.serve.settings import Limits

    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    allowed = float(compose["services"]["serve"]["stop_grace_period"].removesuffix("s"))
    grace = re.search(r'"--grace", "(\d+)"', (DEPLOY / "Containerfile").read_text())
    assert allowed >= float(grace[1]) + Limits().timeout + 5


def test_the_example_key_must_be_replaced_to_be_safe_but_parses():
    from pair.serve.settings import Keys

    assert list(Keys.read(DEPLOY / "keys.example").digests) == ["search-frontend"]


def test_every_source_of_the_image_exists():
    text = (DEPLOY / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.M):
        for name in line.split():
            assert (DEPLOY.parent / name).exists(), name
