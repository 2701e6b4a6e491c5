"""docs/method.md names only what exists, and its preset table is what the presets are."""

import importlib
import re
from pathlib import Path

import pair.purifier
from pair.generator import MaskedAutoencoder
from pair.masks import rule_to_config

PAGE = (Path(__file__).parents[1] / "docs" / "method.md").read_text("utf-8")


def test_every_place_exists():
    dotted = set(re.findall(r"`(pair\.[\w.]+)", PAGE))
    assert len(dotted) >= 12
    for name in dotted:
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            try:
                thing = importlib.import_module(".".join(parts[:cut]))
            except ModuleNotFoundError:
                continue
            break
        for attribute in parts[cut:]:
            thing = getattr(thing, attribute)
    for method in re.findall(r"`MaskedAutoencoder\.(\w+)`", PAGE):
        assert hasattr(MaskedAutoencoder, method)
    for name in re.findall(r"`(test_\w+\.py)`", PAGE):
        assert (Path(__file__).parent / name).is_file()


def test_every_equation_has_a_row():
    covered = set()
    for first, last in re.findall(r"^\| (\d+)(?:-(\d+))? \|", PAGE, re.M):
        covered |= set(range(int(first), int(last or first) + 1))
    assert covered == set(range(1, 18))


def test_preset_table():
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[3:6]]
        for line in PAGE.splitlines()
        if line.startswith(
            ("| mask rule", "| hidden tokens in the encoder", "| passes", "| output")
        )
        and line.count("|") == 6
    }
    paper, released = (pair.purifier.PRESETS[n] for n in ("paper", "released"))
    assert rows["hidden tokens in the encoder"] == ["drop", paper["encoder"], released["encoder"]]
    assert rows["passes"] == ["2", str(paper["passes"]), str(released["passes"])]
    assert rows["output"] == ["decoder", paper["output"], released["output"]]
    assert rule_to_config(paper["rule"]) == {"rule": "bernoulli", "ratio": 0.5}
    assert rows["mask rule"][1] == "Bernoulli, α = 0.5"
    assert rule_to_config(released["rule"]) == {"rule": "exact", "ratio": 0.5, "shared": True}
    assert rows["mask rule"][2] == "exact, half, **one mask for the batch**"
