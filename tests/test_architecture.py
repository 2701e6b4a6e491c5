"""The rules of docs/architecture.md, read from that page and checked against every import."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "pair"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 450


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path, late: bool = True) -> set[str]:
    """Modules of the package that a file imports; ``late``: also inside functions."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write absolute imports"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name == "pair" or name.startswith("pair.")}


def part(module: str) -> str:
    """'pair.attacks.tth' -> 'attacks'; the package itself is ''."""
    return module.partition(".")[2].partition(".")[0]


def rules() -> dict[str, set[str]]:
    """The table "part | may import" of the architecture page."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition("## Who may import whom")[2].partition("\n## ")[0]
    table = {}
    for first, second in re.findall(r"^\| (`\w+`) \|(.*)\|$", section, re.M):
        table[first.strip("`")] = set(re.findall(r"`(\w+)`", second)), second
    everything = set(table) - {"__main__"}
    return {
        name: everything - allowed - {name} if "all but" in text else allowed
        for name, (allowed, text) in table.items()
    }


RULES = rules()


def test_the_table_names_every_part_of_the_package_and_no_other():
    parts = {part(module) for module in MODULES if module != "pair"}
    assert set(RULES) == parts


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_follow_the_table(path):
    own = part(module_name(path))
    allowed = RULES.get(own, set()) | {own, ""}
    wrong = sorted(name for name in imports(path) if part(name) not in allowed)
    assert not wrong, f"{module_name(path)} must not import {', '.join(wrong)}"


def test_the_table_itself_has_no_cycle():
    assert list(TopologicalSorter(RULES).static_order())


def test_a_cycle_is_noticed():
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_modules_do_not_need_each_other_in_a_circle():
    # A package's __init__ gathers its modules; they never import it back.
    graph = {name: imports(path, late=False) - {name} for name, path in MODULES.items()}
    graph = {name: {i for i in found if i in MODULES} for name, found in graph.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{path.name} has {lines} lines: split it"


def test_the_method_by_its_equations_stands_alone():
    """masks, losses and the generator can be read and reused without the rest."""
    for name in ("masks", "losses"):
        assert not imports(PACKAGE / f"{name}.py")
    assert "attacks" not in RULES["defenses"] and "defenses" not in RULES["attacks"]
