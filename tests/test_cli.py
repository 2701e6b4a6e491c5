"""The command as a whole: exit codes, no tracebacks, help that does not wait for torch."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from typer.main import get_command

from pair import __version__, cli

HEAVY = ("torch", "numpy", "PIL", "transformers", "sklearn", "matplotlib", "torchvision")


def commands(group=None, path=()) -> list[tuple[str, ...]]:
    """Every command and group, such as ("data", "pack")."""
    group = group or get_command(cli.app)
    found = [path]
    for name, command in getattr(group, "commands", {}).items():
        found += commands(command, (*path, name))
    return found


def test_help_of_every_command_loads_nothing_heavy():
    """In a fresh interpreter; imports inside functions keep the command line quick."""
    script = f"""
import sys
from pair import cli
for path in {commands()!r}:
    sys.argv = ["pair", *path, "--help"]
    try:
        cli.main()
    except SystemExit as stopped:
        assert not stopped.code, (path, stopped.code)
    loaded = [m for m in {HEAVY!r} if m in sys.modules]
    assert not loaded, (path, loaded)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for path in commands():
        assert " ".join(("pair", *path)) in re.sub(r"\s+", " ", done.stdout.replace("cli ", ""))
    assert "train" in done.stdout and "purify" in done.stdout


def test_help_is_quick():
    start = os.times()
    subprocess.run([sys.executable, "-m", "pair", "--help"], capture_output=True, check=True)
    end = os.times()
    used = end.children_user + end.children_system - start.children_user - start.children_system
    assert used < 2  # seconds of processor; importing torch alone takes longer


def test_every_command_has_a_help_text():
    for path in commands():
        command = get_command(cli.app)
        for name in path:
            command = command.commands[name]
        assert command.help, path
        for option in command.params:
            if option.name not in ("help", "install_completion", "show_completion"):
                assert getattr(option, "help", None), (path, option.name)


def test_version(pair):
    code, out, _ = pair("--version")
    assert (code, out) == (0, f"pair {__version__}\n")
    assert version("pair-retrieval") == __version__


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("train",),
        ("train", "clip", "--recipe"),
        ("data", "pack", "--size", "big", "--out", "x"),
        ("--no-such-option",),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, pair):
    code, _, err = pair(*arguments)
    assert code == 2
    assert "Traceback" not in err and err.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data", "pack", "--out", "OUT"), "no photos: give at least one of --caltech101"),
        (
            ("data", "pack", "--out", "OUT", "--imagenette", "no"),
            "--imagenette: no is not a folder",
        ),
        (("data", "pack", "--out", "OUT", "--imagenette", "EMPTY"), "No such file"),
        (("data", "pack", "--out", "OUT", "--caltech101", "EMPTY"), "no photos in "),
        (("models", "show", "no-such-model"), "no model 'no-such-model'"),
        (("models", "show", "EMPTY"), "has no config.json"),
        (
            ("train", "clip", "--recipe", "no.toml", "--data", "x", "--out", "OUT"),
            "no recipe no.toml",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message, tmp_path, pair):
    (tmp_path / "empty").mkdir()
    places = {"OUT": tmp_path / "out", "EMPTY": tmp_path / "empty"}
    code, _, err = pair(*(places.get(a, a) for a in arguments))
    assert code == 2
    assert message in err
    assert err.startswith("pair: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_errors_of_many_lines_are_folded_into_one(monkeypatch, capsys):
    def fail():
        raise ValueError("first line\n  second line")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "pair: first line second line\n"


def test_the_lab_without_its_library_says_only_that(monkeypatch, pair):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = pair("lab")
    assert code == 2
    assert err == "pair: the lab needs Gradio: pip install 'pair-retrieval[lab]'\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "missing.jpg"), "missing.jpg: No such"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied", b"a", None, "b"), "b: Permission denied"),
        (OSError("cannot write x: full"), "cannot write x: full"),
        (OSError(), "OSError"),
    ],
)
def test_errors_of_the_system_are_told_without_their_number(error, said, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"pair: {said}")


def test_packing_photos(photo_root, tmp_path, pair):
    from pair.data.pack import Pack

    code, out, _ = pair(
        *("data", "pack", "--out", tmp_path / "pack", "--size", "16"),
        *("--imagenette", photo_root / "imagenette"),
    )
    assert code == 0
    assert "70 photos in" in out
    assert len(Pack.open(tmp_path / "pack")) == 70


def test_interrupting_a_training_says_how_to_go_on(pack_folder, tmp_path):
    """A real Ctrl-C in a real process."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[loop]\nsteps = 100000\nlog_every = 1\nbatch_size = 2\nval_every = 100000\n"
        "[task]\nmodel = {image_size = 24, patch_size = 8, width = 16, depth = 1, heads = 2, "
        "decoder_width = 16, decoder_depth = 1, decoder_heads = 2}\n"
    )
    command = [sys.executable, "-m", "pair", "train", "generator", "--recipe", str(recipe)]
    command += ["--data", str(pack_folder), "--out", str(tmp_path / "run")]
    # A job started in the background inherits "ignore SIGINT" from its shell; a user's does not.
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 300
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err == "pair: stopped; run the same command again to continue\n"
