"""Numbers in README and docs come from result files."""

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "readme.py"))


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_pages_agree_with_their_result_files():
    for page in pages():
        text = page.read_text()
        assert SCRIPT["refreshed"](text) == text, f"{page.name}: run python scripts/readme.py"


def test_the_front_page_has_a_measured_table():
    names = SCRIPT["BLOCK"].findall((ROOT / "README.md").read_text())
    assert [name for _, name, _ in names] == ["results/demo.json"]


def test_a_changed_number_is_noticed():
    text = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "results" / "demo.json").read_text())
    value = SCRIPT["figure"](results["parts"][0]["rows"][0]["clean"])
    broken = text.replace(f"| {value} |", "| 12.3 |", 1)
    assert broken != text
    assert SCRIPT["refreshed"](broken) == text
