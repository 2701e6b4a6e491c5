"""What the project says about itself: public names, size, imports, links, commands, claims.

``python tests/test_project.py`` records the present public names in ``api_surface.json``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pair
from pair.data import embedded

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "pair"
SURFACE = Path(__file__).with_name("api_surface.json")
PAGES = [
    page
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    if page.is_file()
]
MEGABYTES = 60
# How the package is run and trained is no API; everything else with a public name is.
PRIVATE = {"pair.__main__", "pair.cli", "pair.demo", "pair.pages"}
PRIVATE_PREFIXES = ("pair.commands", "pair.training")


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(PACKAGE)], "pair.")
    return ["pair", *sorted(m.name for m in found)]


# --- the public API ---------------------------------------------------------------------------


def surface() -> dict[str, dict[str, list[str]]]:
    """module -> public class or function defined there -> names of its parameters."""
    out: dict[str, dict[str, list[str]]] = {}
    for name in modules():
        if name in PRIVATE or name.startswith(PRIVATE_PREFIXES):
            continue
        module = importlib.import_module(name)
        own = {
            key: parameters(value)
            for key, value in sorted(vars(module).items())
            if not key.startswith("_")
            and (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == name
        }
        if own:
            out[name] = own
    return out


def parameters(value: object) -> list[str]:
    try:
        found = inspect.signature(value).parameters.values()  # type: ignore[arg-type]
    except ValueError:  # e.g. exceptions with C constructors
        return []
    return [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def test_no_public_name_or_parameter_has_disappeared():
    recorded, present = json.loads(SURFACE.read_text()), surface()
    lost = []
    for module, names in recorded.items():
        for name, known in names.items():
            if name not in present.get(module, {}):
                lost.append(f"{module}.{name}")
                continue
            now = present[module][name]
            lost += [f"{module}.{name}({p}=)" for p in known if p not in now]
    assert not lost, f"gone: {', '.join(lost)}; if it is meant, see CONTRIBUTING.md"


def test_the_record_is_not_empty_and_knows_the_heart():
    assert json.loads(SURFACE.read_text())["pair.purifier"]["Purifier"][0] == "generator"


# --- the package ------------------------------------------------------------------------------


def test_own_files_stay_small():
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    size = sum(p.stat().st_size for p in files) / 1e6
    assert size < MEGABYTES, f"{size:.1f} MB"


def test_a_wheel_carries_everything_that_the_package_needs(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "src" / "pair", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    needed = (p for p in (source / "src").rglob("*") if p.is_file() and ".egg-info" not in str(p))
    missing = [p for p in needed if p.relative_to(source / "src").as_posix() not in packed]
    assert not missing
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in packed}


def test_version_is_the_same_everywhere():
    assert f"\nversion: {pair.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {pair.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )


def test_every_module_imports_without_extras_and_without_a_word():
    absent = ["torchvision", "open_clip", "timm", "transformers", "huggingface_hub", "matplotlib"]
    absent += ["sklearn", "scipy", "torchmetrics", "art", "pytest", "hypothesis"]
    loads = [name for name in modules() if name != "pair.__main__"]
    done = python(
        "import sys, importlib\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"
        f"for name in {loads!r}: importlib.import_module(name)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_help_does_not_load_torch():
    done = python("import sys, pair.cli; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_runtime_dependencies_are_pinned():
    pins = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"https?:|file:|^-", pins, re.M), "versions only"
    assert "\ntorch==2.13.0\n" in pins
    project = (ROOT / "pyproject.toml").read_text()
    wanted = ast.literal_eval(re.search(r"^dependencies = (\[.*?\])", project, re.M | re.S)[1])
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0]
        assert f"\n{name}==" in pins, f"{name} is not in constraints.txt"


def test_the_lab_has_the_same_versions_but_for_pillow():
    everywhere, lab = (
        dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), re.M))
        for name in ("constraints.txt", "constraints-lab.txt")
    )
    assert {"gradio", "pillow", "pytest", "torch", "websockets"} <= set(lab)
    different = {name for name, version in lab.items() if everywhere.get(name, version) != version}
    assert different == {"pillow"}


# --- what the pages say -----------------------------------------------------------------------


def heading_ids(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"[\s-]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    for target in (a or b for a, b in targets):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in heading_ids(file), f"{page.name} links to {target}"


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S)
    return [body for language, body in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The shell commands of a page, one list of words each."""
    lines = "\n".join(blocks(page, "console", "bash", "sh", "shell")).replace("\\\n", " ")
    out = []
    for line in lines.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words and Path(words[0]).name in ("pair", "make"):
            out.append([Path(words[0]).name, *words[1:]])
    return out


def check_pair(words: list[str]) -> None:
    import typer.main

    from pair.cli import app

    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no command pair {' '.join(words)}"
        command = command.commands[rest.pop(0)]
    known = {"--help"} | {o for p in command.params for o in [*p.opts, *p.secondary_opts]}
    given = {word.partition("=")[0] for word in rest if word.startswith("-")}
    for option in given:
        assert option in known, f"pair {' '.join(words)}: there is no option {option}"
    for needed in (p for p in command.params if p.required and p.opts[0].startswith("-")):
        assert given & set(needed.opts), f"pair {' '.join(words)}: {needed.opts[0]} is missing"


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for word in words:
        assert "=" in word or word in targets, f"there is no target {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_on_pages_exist(page):
    for program, *words in commands(page):
        (check_pair if program == "pair" else check_make)(words)


def test_the_command_checks_can_fail():
    for check, words in ((check_pair, ["purfy"]), (check_make, ["demmo"])):
        with pytest.raises(AssertionError):
            check(words)
    for words in (["demo", "--sede", "1"], ["purify", "photos"]):
        with pytest.raises(AssertionError):
            check_pair(words)


def test_every_target_of_the_makefile_is_described_and_phony():
    text = (ROOT / "Makefile").read_text()
    described = re.findall(r"^([\w-]+):.*## \S", text, re.M)
    assert set(described) == set(re.search(r"^\.PHONY: (.+)$", text, re.M)[1].split())


# The page of the service is run against one, in tests/serve.
RUNNABLE = [p for p in PAGES if blocks(p, "python") and p.name != "serve.md"]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda p: p.name)
def test_python_on_pages_runs(page, tmp_path):
    """The blocks of a page, one after the other, in a process and a folder of their own.
    ``images`` and the folder ``holiday`` are given."""
    (tmp_path / "holiday").mkdir()
    for path, label in embedded.queries(["laptop"])[:2]:
        shutil.copy(path, tmp_path / "holiday" / f"{label}-{path.name}")
    given = "import torch\nimages = torch.rand(2, 3, 112, 112)"
    done = python("\n".join([given, *blocks(page, "python")]), tmp_path)
    assert done.returncode == 0, done.stderr


def test_paths_that_the_pages_name_exist():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for path in re.findall(r"`((?:src|tests|docs|scripts|configs|results)/[\w./-]*)`", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute (of an attribute ...) of one."""
    module, rest = name, []
    while module not in modules():
        module, _, last = module.rpartition(".")
        rest.insert(0, last)
    value = importlib.import_module(module)
    for attribute in rest:
        if not hasattr(value, attribute):
            return False
        value = getattr(value, attribute)
    return True


def test_dotted_names_on_pages_exist():
    for page in PAGES:
        for name in set(re.findall(r"`(pair(?:\.\w+)+)`", page.read_text())):
            assert resolves(name), f"{page.name} names {name}"


def test_photo_counts_of_the_data_page():
    from pair.data import embedded

    page = (ROOT / "docs" / "data.md").read_text()
    stated = {name: int(n) for name, n in re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.M)}
    assert stated == {
        "gallery": len(embedded.gallery()),
        "query": len(embedded.queries()),
        "ads": len(embedded.ads()),
        "pool": len(embedded.pool()),
    }
    assert f"16 of each of {len(embedded.labels())} classes" in page


def test_every_registered_defense_is_on_its_page():
    from pair.defenses import DEFENSES

    page = (ROOT / "docs" / "defenses.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.M)) == set(DEFENSES)


# --- what CONTRIBUTING promises -----------------------------------------------------------------


def test_a_subcommand_is_one_module_and_one_line():
    registered = (PACKAGE / "cli.py").read_text()
    for path in (PACKAGE / "commands").glob("[!_]*.py"):
        uses = re.findall(rf"^app\.\w+\(.*\b{path.stem}\.", registered, re.M)
        assert uses, f"{path.name} is not registered in cli.py"


def main() -> None:
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")
    print(f"recorded {sum(map(len, surface().values()))} names in {SURFACE.name}")


if __name__ == "__main__":
    main()
