"""Model folders: names, strict loading, honest refusals, files that appear whole."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pair import hub

CONFIG, WEIGHTS = hub.CONFIG, hub.WEIGHTS


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)  # has an integer buffer


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(0)
    return hub.save(tmp_path / "model", Small(), {"kind": "small", "size": 3})


def load(folder: Path) -> Small:
    module = Small()
    hub.load_into(module, hub.read_weights(folder, hub.read_config(folder, "small")), str(folder))
    return module


def rewrite(folder: Path, **changes) -> None:
    """Change (or with None remove) entries of the config."""
    config = {**json.loads((folder / CONFIG).read_text()), **changes}
    config = {k: v for k, v in config.items() if v is not None}
    (folder / CONFIG).write_text(json.dumps(config))


def reweigh(folder: Path, tensors: dict) -> None:
    """Other weights with a matching hash, so that the strict loading itself is tested."""
    save_file(tensors, folder / WEIGHTS)
    rewrite(folder, sha256=hub.sha256(folder / WEIGHTS))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(hub.ModelError, match=message) as caught:
        load(folder)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_round_trip(folder):
    torch.manual_seed(0)
    original, loaded = Small(), load(folder)
    for key, value in original.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
        assert value.dtype == loaded.state_dict()[key].dtype
    config = hub.read_config(folder, "small")
    assert config["size"] == 3
    assert config["sha256"] == hub.sha256(folder / WEIGHTS)
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS}  # nothing else left behind


def test_half_precision_keeps_integers_and_loads_as_float32(tmp_path):
    module = Small()
    folder = hub.save(tmp_path, module, {"kind": "small"}, torch.float16)
    stored = load_file(folder / WEIGHTS)
    assert stored["layer.weight"].dtype == torch.float16
    assert stored["norm.num_batches_tracked"].dtype == torch.int64
    loaded = load(folder)
    assert loaded.layer.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.layer.weight, module.layer.weight, atol=1e-3, rtol=0)


def test_half_precision_refuses_values_that_it_cannot_hold(tmp_path):
    module = Small()
    nn.init.constant_(module.layer.weight, 1e6)
    with pytest.raises(hub.ModelError, match=r"layer\.weight .* torch\.float16"):
        hub.save(tmp_path / "model", module, {"kind": "small"}, torch.float16)
    assert not (tmp_path / "model" / CONFIG).exists()


def test_any_memory_layout_can_be_saved(tmp_path):
    module = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    module.weight.data = module.weight.data.transpose(0, 1)  # not contiguous
    hub.save(tmp_path, module, {"kind": "small"})
    assert torch.equal(load_file(tmp_path / WEIGHTS)["weight"], module.weight)


def test_saving_again_replaces_the_whole_model(folder):
    module = Small()
    nn.init.constant_(module.layer.bias, 7.0)
    hub.save(folder, module, {"kind": "small"})
    assert load(folder).layer.bias.tolist() == [7.0, 7.0]


def test_a_failed_save_leaves_the_old_model(folder, monkeypatch):
    before = load(folder).layer.weight
    real = os.replace

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    monkeypatch.setattr(hub, "_exchange", lambda a, b: False)
    with pytest.raises(OSError, match="No space"):
        hub.save(folder, Small(), {"kind": "small"})
    monkeypatch.setattr(os, "replace", real)
    assert torch.equal(load(folder).layer.weight, before)
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # and nothing beside it


@pytest.mark.parametrize("exchange", [True, False])
def test_a_reader_never_sees_half_of_a_model(folder, monkeypatch, exchange):
    """Weights and config change together, with the single step and (one process) without."""
    if not exchange:
        monkeypatch.setattr(hub, "_exchange", lambda a, b: False)
    (folder / "README.md").write_text("a card")
    for value in range(5):
        module = Small()
        nn.init.constant_(module.layer.bias, float(value))
        hub.save(folder, module, {"kind": "small", "value": value})
        assert hub.read_config(folder, "small")["value"] == value
        assert load(folder).layer.bias.tolist() == [value, value]
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_the_folder_changes_places_in_one_step_on_linux(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux has the call")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    assert hub._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").is_file() and (tmp_path / "b" / "a").is_file()
    assert not hub._exchange(tmp_path / "a", tmp_path / "missing")


def test_files_of_others_in_a_model_folder_stay(folder):
    (folder / "notes.txt").write_text("mine")
    hub.save(folder, Small(), {"kind": "small"}, card="new")
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md", "notes.txt"}
    load(folder)


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*: Not a directory") as caught:
        hub.save(tmp_path / "file" / "model", Small(), {"kind": "small"})
    assert "\n" not in str(caught.value)


def test_a_save_killed_between_its_two_files_is_noticed(folder):
    """New weights beside an old config: the hash says so."""
    other = Small().state_dict()
    save_file(other, folder / WEIGHTS)
    refused(folder, "does not match the SHA-256")


def test_missing_files(tmp_path, folder):
    (folder / WEIGHTS).unlink()
    refused(folder, f"has no {WEIGHTS}")
    (folder / CONFIG).unlink()
    refused(folder, f"has no {CONFIG}: it is not a model folder")


def test_missing_extra_and_misshapen_weights(folder):
    good = load_file(folder / WEIGHTS)
    reweigh(folder, {k: v for k, v in good.items() if k != "layer.bias"})
    refused(folder, r"1 weights missing \(layer\.bias\), 0 unknown")
    reweigh(folder, {**good, "layer.extra": torch.zeros(1)})
    refused(folder, r"0 weights missing \(\), 1 unknown \(layer\.extra\)")
    reweigh(folder, {**good, "layer.bias": torch.zeros(5)})
    refused(folder, r"layer\.bias has shape \(5,\), the config asks for \(2,\)")
    reweigh(folder, {**good, "layer.bias": torch.zeros(1)})  # would broadcast
    refused(folder, r"layer\.bias has shape \(1,\)")
    reweigh(folder, good)
    load(folder)


def test_corrupted_and_truncated_files(folder):
    path = folder / WEIGHTS
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 0xFF
    path.write_bytes(flipped)
    refused(folder, "does not match the SHA-256 in its config: fetch it again")
    for broken in (data[:-5], data[:20], b"", b"\x00" * 100):
        path.write_bytes(broken)
        rewrite(folder, sha256=hub.sha256(path))
        refused(folder, "is not a safetensors file")


def test_pickles_are_never_read(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for data in (pickle.dumps(Bomb()), None):
        if data is None:
            torch.save({"layer.weight": torch.zeros(2, 3), "x": Bomb()}, folder / WEIGHTS)
        else:
            (folder / WEIGHTS).write_bytes(data)
        rewrite(folder, sha256=hub.sha256(folder / WEIGHTS))
        refused(folder, "pickles are refused")
        rewrite(folder, sha256=None)
        refused(folder, "pickles are refused")
    assert not (tmp_path / "exploded").exists()


def test_wrong_kind_format_and_hash(folder):
    rewrite(folder, kind="large")
    refused(folder, "holds a model of kind 'large', expected 'small'")
    rewrite(folder, kind="small", format=99)
    refused(folder, "has format 99, this version reads 1")
    rewrite(folder, format=1, sha256="0" * 64)
    refused(folder, "does not match the SHA-256")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"generator"', "\x00\x01"])
def test_broken_configs(folder, text):
    (folder / CONFIG).write_text(text)
    refused(folder, "is not valid JSON|holds a model of kind")
    (folder / CONFIG).write_bytes(b"\xff\xfe{}")
    refused(folder, "is not valid JSON")


def test_sections_hold_exactly_what_is_known(folder):
    config = {"model": {"a": 1, "b": 2}}
    table = hub.section(config, "model", ("a", "b"), folder)
    assert table == {"a": 1, "b": 2}
    table["a"] = 5
    assert config["model"]["a"] == 1  # a copy
    for known, message in (
        (("a", "b", "c"), "no c in its model"),
        (("a",), "unknown model .* 'b'"),
    ):
        with pytest.raises(hub.ModelError, match=message):
            hub.section(config, "model", known, folder)
    with pytest.raises(hub.ModelError, match="no purifier settings"):
        hub.section(config, "purifier", (), folder)


# --- names ---


def test_paths_and_shipped_names_resolve_locally(folder, monkeypatch, tmp_path):
    def network(name, files):
        raise AssertionError(f"{name} touched the network")

    monkeypatch.setattr(hub, "_download", network)
    assert hub.resolve(folder) == folder
    assert hub.resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("model") == Path("model")
    (tmp_path / "org").mkdir()
    os.rename(folder, tmp_path / "org" / "name")
    assert hub.resolve("org/name") == Path("org/name")  # a folder wins over a repository
    for name in hub.shipped_models():
        assert hub.resolve(name) == hub.shipped_root() / name


@pytest.mark.parametrize(
    "name", ["no-such-model", "", "./a/b", "../a", "/no/where", "a/b/c", "~/models"]
)
def test_unknown_names_are_refused_without_network(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_download", lambda name, files: pytest.fail("touched the network"))
    with pytest.raises(hub.ModelError, match="no model"):
        hub.resolve(name)


def test_a_file_is_not_a_model(folder):
    with pytest.raises(hub.ModelError, match=r"is a file: name the folder that holds it"):
        hub.resolve(folder / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("org/name", "org/name"), ("hub:org/name@v1", "org/name@v1"), ("hub:name", "name")],
)
def test_repositories_are_fetched(name, wanted, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(hub, "_download", lambda n, files: asked.append((n, files)) or folder)
    assert hub.resolve(name) == folder
    assert asked == [(wanted, (CONFIG, WEIGHTS))]


def test_offline_repositories_say_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    import huggingface_hub

    def offline(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(hub.ModelError, match="no folder 'runs/best', and fetching it") as caught:
        hub.resolve("runs/best")
    assert "\n" not in str(caught.value)


def test_shipped_models_are_whole():
    for name in hub.shipped_models():
        folder = hub.shipped_root() / name
        config = json.loads((folder / CONFIG).read_text())
        tensors = hub.read_weights(folder, hub.read_config(folder, config["kind"]))
        assert config["sha256"]
        assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
        assert (folder / "README.md").is_file()
