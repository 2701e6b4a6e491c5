"""Broken input of every kind, through the command: exit code 2 and one clear sentence each."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pair import cli, files
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.purifier import Purifier

CAPTIONS = "annotations/captions_train2014.json"
INSTANCES = "annotations/instances_train2014.json"


def refused(*arguments, capsys) -> str:
    """Standard error of a command that must end with exit code 2 and one line."""
    before, sys.argv = sys.argv, ["pair", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = before
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert said.startswith("pair: ") and said.count("\n") == 1 and "Traceback" not in said
    return said


def edit(path: Path, change) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20)).save(out, "JPEG")
    return out.getvalue()


def first(folder: Path) -> Path:
    return sorted(folder.iterdir())[0]


def lists(root: Path, train: str, test: str) -> None:
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text(train)
    (root / "lists" / "test.txt").write_text(test)


# what, miniature, "data set/protocol", how it is broken, what the sentence says
DATA = [
    ("annotations missing", "coco2014", "coco2014", lambda r: (r / CAPTIONS).unlink(),
     "lacks annotations/captions_train2014.json (also looked for captions_train2014.json): it is "
     "in annotations_trainval2014.zip from https://cocodataset.org/#download"),
    ("annotations cut off", "coco2014", "coco2014",
     lambda r: (r / CAPTIONS).write_text((r / CAPTIONS).read_text()[:900]),
     "is cut off or not JSON"),
    ("other annotations", "coco2014", "coco2014", lambda r: (r / CAPTIONS).write_text("[]"),
     "has no 'images' and 'annotations': it is no COCO file"),
    ("photo folder missing", "coco2014", "coco2014", lambda r: os.rename(r / "val2014", r / "val"),
     "lacks val2014 (also looked for images/val2014): it is in val2014.zip"),
    ("photo missing", "coco2014", "coco2014",
     lambda r: [first(r / "train2014").unlink() for _ in range(3)],
     "COCO_train2014_000000000009.jpg is missing and 2 more: it is in train2014.zip"),
    ("captions without image", "coco2014", "coco2014",
     lambda r: edit(r / CAPTIONS, lambda c: c["images"].pop()), "annotates image 170, which it"),
    ("image without caption", "coco2014", "coco2014",
     lambda r: edit(r / CAPTIONS, lambda c: c["annotations"].clear()), "has no caption"),
    ("empty caption", "coco2014", "coco2014",
     lambda r: edit(r / CAPTIONS, lambda c: c["annotations"][0].update(caption=" ")),
     "has an empty caption"),
    ("duplicate id", "coco2014", "coco2014",
     lambda r: edit(r / CAPTIONS, lambda c: c["images"].append(c["images"][0])),
     "lists an image id twice"),
    ("unknown category", "coco2014", "coco2014/leakfree",
     lambda r: edit(r / INSTANCES, lambda c: c["annotations"][0].update(category_id=7)),
     "has the unknown category 7"),
    ("Karpathy file missing", "coco2014", "coco2014/karpathy",
     lambda r: (r / "dataset_coco.json").unlink(), "it is in caption_datasets.zip"),
    ("Karpathy file of another kind", "flickr30k", "flickr30k/karpathy",
     lambda r: (r / "dataset_flickr30k.json").write_text('{"images": [{"file": "a.jpg"}]}'),
     "has no images with filename, split and sentences"),
    ("list with other labels", "coco2014", "coco2014/leakfree",
     lambda r: lists(r, "x/COCO_train2014_000000000009.jpg 0 0 0 1\n", ""),
     "gives COCO_train2014_000000000009 other labels than COCO 2014"),
    ("list with unknown photos", "coco2014", "coco2014/leakfree",
     lambda r: lists(r, "x/y.jpg 0 1 0 0\n", ""), "lists y, which COCO 2014 lacks"),
    ("list that is none", "coco2014", "coco2014/leakfree", lambda r: lists(r, "x/y.jpg cow\n", ""),
     "line 1: expected a path and one 0 or 1 per class"),
    ("broken token line", "flickr30k", "flickr30k",
     lambda r: append(r / "results_20130124.token", "no number here\n"),
     "line 101: expected <photo>#<number><tab><caption>"),
    ("broken csv row", "flickr30k-kaggle", "flickr30k",
     lambda r: append(r / "flickr30k_images/results.csv", "what?\n"),
     "line 102: expected image_name| comment_number| comment"),
    ("csv of other columns", "flickr30k-hub", "flickr30k",
     lambda r: (r / "flickr_annotations_30k.csv").write_text("a,b\n1,2\n"),
     "has no columns raw and filename"),
    ("zip not unpacked", "flickr30k-hub", "flickr30k",
     lambda r: os.rename(r / "flickr30k-images", r / "flickr30k-images.zip") or
     _file(r / "flickr30k-images.zip"), "unpack "),
    ("class missing", "imagenet100", "imagenet100",
     lambda r: os.rename(r / "train/n01514668", r / "train/n09999999"),
     "n01514668 holds no photos, but n01514668 is one of the 100 classes"),
    ("validation unsorted", "imagenet100", "imagenet100",
     lambda r: (r / "LOC_val_solution.csv").unlink(), "are not sorted into folders"),
    ("validation map too short", "imagenet100", "imagenet100",
     lambda r: (r / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n"),
     "does not say what is on ILSVRC2012_val_00000001.JPEG"),
    ("data set of another kind", "flickr30k", "imagenette", lambda r: None, "lacks train (also"),
    ("caption without picture", "folder", "folder",
     lambda r: append(r / "captions.csv", "photos/999.jpg,gone\n"),
     "has a caption for photos/999.jpg, which is not there"),
    ("captions without column", "folder", "folder",
     lambda r: (r / "captions.csv").write_text("image,colour\nphotos/000.jpg,red\n"),
     "row 1: expected one of the fields caption, text, captions, sentences"),
    ("class too small", "classes", "folder/classes",
     lambda r: [first(r / "red").unlink() for _ in range(5)], "a class needs three at least"),
    ("pictures outside of classes", "classes", "folder/classes",
     lambda r: [Image.new("RGB", (9, 9)).save(r / f"{i}.jpg") for i in range(3)],
     "lies in no class folder: use the protocol plain"),
    ("shard damaged", "webdataset", "webdataset",
     lambda r: first(r).write_bytes(b"\x1f\x8b" * 600),
     "is damaged or compressed, not a plain tar"),
    ("shard cut off", "webdataset", "webdataset",
     lambda r: first(r).write_bytes(first(r).read_bytes()[:3000]), "train-000000.tar"),
    ("sample without picture", "webdataset", "webdataset",
     lambda r: shard(first(r), {"7.txt": b"hello"}), "the sample 7 has no picture"),
    ("two pictures in a sample", "webdataset", "webdataset",
     lambda r: shard(first(r), {"7.jpg": jpeg(), "7.png": jpeg()}), "holds two pictures of 7.png"),
    ("broken json in a shard", "webdataset", "webdataset",
     lambda r: shard(first(r), {"7.jpg": jpeg(), "7.json": b"{"}), "7.json is not JSON"),
    ("nothing there", "folder", "huggingface", lambda r: None,
     "holds neither a data set of save_to_disk"),
]  # fmt: skip


def _file(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_bytes(b"PK")


@pytest.mark.parametrize(
    ("folder", "name", "harm", "message"), [row[1:] for row in DATA], ids=[row[0] for row in DATA]
)
def test_broken_data_sets(folder, name, harm, message, miniature_script, tmp_path, capsys):
    root = tmp_path / "data"
    miniature_script.ALL[folder][1](root)
    harm(root)
    name, _, protocol = name.partition("/")
    options = ("--protocol", protocol) if protocol else ()
    said = refused("data", "prepare", name, "--root", root, *options, capsys=capsys)
    assert message in said
    assert not (root / "pair").exists()


def test_there_are_at_least_twenty_five_kinds():
    assert len(DATA) >= 25 and len({row[0] for row in DATA}) == len(DATA)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: p.write_text(p.read_text()[:400]), "is damaged, prepare it again"),
        (
            lambda p: p.write_text(p.read_text().replace("train", "test")),
            "do not match its checksum",
        ),
        (lambda p: p.write_text(p.read_text().replace('"format": 1', '"format": 9')), "reads 1"),
        (lambda p: p.write_text(""), "is damaged, prepare it again"),
        (lambda p: p.unlink(), "no index"),
    ],
)
def test_broken_indexes(harm, message, miniature_script, tmp_path, capsys):
    from pair.data import sets

    miniature_script.folder(tmp_path / "data")
    _, (index,) = sets.prepare("folder", tmp_path / "data", out=tmp_path)
    harm(index)
    assert message in refused("data", "stats", "folder", "--root", index, capsys=capsys)


def test_a_data_set_that_changed_since_it_was_prepared(miniature_script, tmp_path, capsys):
    from pair.data import sets

    miniature_script.folder(tmp_path)
    sets.prepare("folder", tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "new.jpg")
    said = refused("data", "check", "folder", "--root", tmp_path, "--quick", capsys=capsys)
    assert "has changed since it was prepared" in said


def test_truncated_photos_stop_check_and_training(miniature_script, tmp_path, capsys):
    miniature_script.folder(tmp_path / "data")
    for path in (tmp_path / "data" / "photos").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    command = ("data", "check", "folder", "--root", tmp_path / "data")
    before, sys.argv = sys.argv, ["pair", *map(str, command)]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = before
    assert stopped.value.code == 2
    assert "24 of 24 photos cannot be decoded" in capsys.readouterr().err
    said = refused(
        "train", "generator", "--data", tmp_path / "data", "--out", tmp_path / "run", capsys=capsys
    )
    assert "cannot decode" in said and ".jpg" in said


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disks_and_folders_that_may_not_be_written(
    miniature_script, tmp_path, capsys, monkeypatch
):
    root = tmp_path / "data"
    miniature_script.folder(root)
    (tmp_path / "file").write_text("")
    prepare = ("data", "prepare", "folder", "--root", root)
    said = refused(*prepare, "--out", tmp_path / "file" / "index", capsys=capsys)
    assert "Not a directory" in said
    monkeypatch.setattr(files.os, "fsync", full)
    said = refused(*prepare, capsys=capsys)
    assert "cannot write" in said and "No space left on device" in said
    assert not list((root / "pair").iterdir())  # nothing half-written stays
    task = "model = {image_size = 24, patch_size = 8, width = 16, depth = 1, heads = 2, "
    task += "decoder_width = 16, decoder_depth = 1, decoder_heads = 2}"
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"[loop]\nsteps = 1\nbatch_size = 4\n[task]\n{task}\n")
    said = refused(
        *("train", "generator", "--recipe", recipe, "--data", root, "--out", tmp_path / "run"),
        capsys=capsys,
    )
    assert "No space left on device" in said


@contextlib.contextmanager
def no_rights():
    """As a user who owns nothing: permissions do not stop the root of a container."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
def test_folders_that_may_only_be_read(pair, miniature_script, capsys):
    """Preparing, training, converting and measuring: one sentence each, that names the folder."""
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        miniature_script.folder(home / "data")
        for path in mae(home / "mae").iterdir():  # safetensors writes for its owner alone
            path.chmod(0o644)
        recipe = home / "r.toml"
        task = "model = {image_size = 24, patch_size = 8, width = 16, depth = 1, heads = 2, "
        task += "decoder_width = 16, decoder_depth = 1, decoder_heads = 2}"
        recipe.write_text(f"[loop]\nsteps = 1\nbatch_size = 4\n[task]\n{task}\n")

        def commands(out: Path) -> list[tuple]:
            train = ("train", "generator", "--recipe", recipe, "--data", home / "data", "--out")
            return [
                ("data", "prepare", "folder", "--root", home / "data", "--out", out),
                (*train, out / "run"),
                (*train, out),
                ("models", "convert", home / "mae", "--out", out / "mae"),
                ("bench", "run", "table1", "--scale", "smoke", "--only", "undef", "--out",
                 out / "bench"),
            ]  # fmt: skip

        for command in commands(home / "open"):  # they are right, and everything is imported
            assert pair(*command)[0] == 0, command
        closed = home / "closed"
        closed.mkdir()
        for place in (closed, home / "data", home):
            place.chmod(0o555)
        prepare = ("data", "prepare", "folder", "--root", home / "data")
        for command in (prepare, *commands(closed)):
            with no_rights():
                said = refused(*command, capsys=capsys)
            assert "Permission denied" in said and str(home) in said, (command, said)
        assert not list(closed.iterdir()) and not (home / "data" / "pair").exists()
        home.chmod(0o755)


# --- weights ----------------------------------------------------------------------------------

TINY = GeneratorConfig(24, 8, 16, 1, 2, 16, 1, 2)


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("pair-was-here",))


def mae(folder: Path, change=lambda c, t: None) -> Path:
    """A folder of transformers' ViTMAE with old names, then changed."""
    config = {
        "model_type": "vit_mae", "num_attention_heads": 2, "decoder_num_attention_heads": 2,
        "norm_pix_loss": False, "layer_norm_eps": 1e-12,
    }  # fmt: skip
    model = MaskedAutoencoder(TINY)
    tensors = {}
    for key, value in model.state_dict().items():
        if ".attn.qkv." in key:
            for part, name in zip(value.chunk(3), ("query", "key", "value"), strict=True):
                tensors[key.replace(".attn.qkv.", f".attention.attention.{name}.")] = part.clone()
            continue
        tensors[key] = value.clone()
    change(config, tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Hostile()))


WEIGHTS = [
    ("normalised pixels", lambda c, t: c.update(norm_pix_loss=True), None,
     "was trained on per-patch normalised pixels"),
    ("encoder only", lambda c, t: [t.pop(k) for k in list(t) if k.startswith("decoder_")], None,
     "holds no decoder"),
    ("other model", lambda c, t: c.update(model_type="bert"), None, "holds a 'bert' model"),
    ("wrong names", lambda c, t: t.update(strange=t.pop("norm.weight")), None,
     "1 weights missing (norm.weight), 1 unknown (strange)"),
    ("shape mismatch", lambda c, t: t.update({"norm.weight": torch.zeros(3)}), None,
     "norm.weight has shape (3,), the config asks for (16,)"),
    ("pickle posing as safetensors", lambda c, t: None, pickled, "is not a safetensors file"),
    ("no weights", lambda c, t: None, lambda f: (f / "model.safetensors").unlink(),
     "has no model.safetensors"),
    ("broken config", lambda c, t: None, lambda f: (f / "config.json").write_text("{"),
     "is not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "harm", "message"), [w[1:] for w in WEIGHTS], ids=[w[0] for w in WEIGHTS]
)
def test_broken_weights(change, harm, message, tmp_path, capsys):
    folder = mae(tmp_path / "mae", change)
    if harm:
        harm(folder)
    out = tmp_path / "out"
    assert message in refused("models", "convert", folder, "--out", out, capsys=capsys)
    assert not out.exists() and not Path("pair-was-here").exists()


def test_hostile_pth_files_run_nothing(tmp_path, capsys):
    path = tmp_path / "mae_visualize_vit_base.pth"
    path.write_bytes(pickle.dumps({"model": Hostile()}))
    said = refused("models", "convert", path, "--out", tmp_path / "out", capsys=capsys)
    assert "is damaged or holds more than tensors" in said
    assert not Path("pair-was-here").exists()


def test_whole_weights_are_converted_with_licence_and_checksum(tmp_path, capsys):
    """What the broken ones are compared with."""
    folder, out = mae(tmp_path / "mae"), tmp_path / "out"
    before, sys.argv = sys.argv, ["pair", "models", "convert", str(folder), "--out", str(out)]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = before
    assert not stopped.value.code and "CC BY-NC 4.0" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert len(config["source_sha256"]) == 64 and "CC BY-NC" in config["licence"]
    ours = load_file(out / "model.safetensors")
    theirs = load_file(folder / "model.safetensors")
    assert torch.equal(ours["mask_token"], theirs["mask_token"])
    purifier = Purifier.from_pretrained(out)
    assert purifier.output == "paste" and purifier(torch.rand(1, 3, 24, 24)).shape[-1] == 24
    said = refused("models", "convert", out, "--out", tmp_path / "again", capsys=capsys)
    assert "is a model folder of this package already" in said


def test_fetching_records_what_came(tmp_path, capsys, monkeypatch):
    from pair import hub
    from pair.training.weights import fetch

    folder = mae(tmp_path / "hub")
    monkeypatch.setattr(hub, "_download", lambda name, files: folder)
    record = fetch("facebook/vit-mae-base", tmp_path / "got")
    assert "CC BY-NC" in record["licence"]
    stored = json.loads((tmp_path / "got" / "source.json").read_text())
    assert stored["sha256"]["model.safetensors"] == hub.sha256(tmp_path / "got/model.safetensors")
    mae(tmp_path / "other")
    monkeypatch.setattr(hub, "_download", lambda name, files: tmp_path / "other")
    with pytest.raises(ValueError, match="holds other content"):
        fetch("facebook/vit-mae-base", tmp_path / "got")
    said = refused("models", "fetch", folder, "--out", tmp_path / "x", capsys=capsys)
    assert "is here already: folders and files need no fetching" in said


def test_publishing_deletes_nothing_but_a_model(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"kind": "clip"}))
    (run / "model.safetensors").write_bytes(b"new")
    mine = tmp_path / "pub" / "mine"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text("{}")
    (mine / "notes.txt").write_text("mine")
    (tmp_path / "pub" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name in ("", ".", "..", "../..", "a/b", ".hidden", "a b"):
        said = refused("models", "publish", run, "--name", name, "--out", "pub", capsys=capsys)
        assert f"--name: {name!r} is no name of a model" in said
    for name in ("mine", "file"):
        said = refused("models", "publish", run, "--name", name, "--out", "pub", capsys=capsys)
        assert f"pub/{name} is there and is no model folder" in said
    assert sorted(tmp_path.rglob("*")) == before
    (mine / "notes.txt").unlink()
    assert pair("models", "publish", run, "--name", "mine", "--out", "pub")[0] == 0
    assert (mine / "model.safetensors").read_bytes() == b"new" and (mine / "README.md").is_file()
    assert sorted(p.name for p in (tmp_path / "pub").iterdir()) == ["file", "mine"]
    assert pair("models", "publish", run, "--name", "mine")[1] == "models/mine: clip\n"
    (run / "model.safetensors").unlink()
    said = refused("models", "publish", run, "--name", "mine", capsys=capsys)
    assert "run has no model.safetensors" in said and (tmp_path / "models/mine").is_dir()


def test_publishing_to_the_hub(pair, tmp_path, monkeypatch, capsys):
    """What the client of the hub is asked for: there is no hub here."""
    client = pytest.importorskip("huggingface_hub")
    folder = mae(tmp_path / "mae")
    assert pair("models", "convert", folder, "--out", tmp_path / "own")[0] == 0
    asked = []

    class Commit:
        commit_url = "https://hub/org/mine/commit/1"

    class Api:
        def create_repo(self, name, private, exist_ok):
            asked.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            asked.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))
            assert set(allow_patterns) == set(asked[-1][1])
            return Commit

    monkeypatch.setattr(client, "HfApi", Api)
    publish = ("models", "publish", tmp_path / "own", "--name", "mine", "--out", tmp_path / "out")
    code, out, _ = pair(*publish, "--hub", "org/mine")
    assert code == 0 and "https://hub/org/mine/commit/1" in out
    files = ["README.md", "config.json", "model.safetensors"]
    assert asked == [("org/mine", True, True), ("org/mine", files)]
    assert "CC BY-NC" in (tmp_path / "out" / "mine" / "README.md").read_text()
    assert "is written org/name" in refused(*publish, "--hub", "mine", capsys=capsys)

    def offline(self, *names, **options):
        raise RuntimeError("no way\nto the hub")

    monkeypatch.setattr(Api, "create_repo", offline)
    said = refused(*publish, "--hub", "org/mine", capsys=capsys)
    assert "to org/mine failed: no way to the hub" in said


# --- targets that are trained or hardened -----------------------------------------------------


def resnet(path: Path, change=lambda t: None) -> Path:
    """A file of torchvision's ResNet-18, then changed."""
    from pair.retrieval.backbones import build_backbone

    tensors = dict(build_backbone("resnet18")[0].state_dict())
    change(tensors)
    torch.save(tensors, path)
    return path


def half_a_file(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def hostile_file(path: Path) -> Path:
    path.write_bytes(pickle.dumps(Hostile()))
    return path


RESNETS = [
    ("missing", lambda p: p, "no weights file"),
    ("cut off", lambda p: half_a_file(resnet(p)), "holds no weights that can be read safely"),
    ("a program", hostile_file, "holds no weights that can be read safely"),
    ("wrong names", lambda p: resnet(p, lambda t: t.update(strange=t.pop("conv1.weight"))),
     "1 weights missing (conv1.weight), 1 unknown (strange)"),
    ("another depth", lambda p: resnet(p, lambda t: t.update({"conv1.weight": torch.zeros(3)})),
     "conv1.weight has shape (3,)"),
    ("not a state dict", lambda p: torch.save([1, 2], p) or p, "must hold a state dict"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [r[1:] for r in RESNETS], ids=[r[0] for r in RESNETS])
def test_broken_backbones(make, message, miniature_script, tmp_path, capsys):
    miniature_script.classes(tmp_path / "data")
    path = make(tmp_path / "resnet18-f37072fd.pth")
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[task]\nbackbone = "resnet18"\nweights = "{path}"\nimage_size = 32\n')
    said = refused(
        *("train", "csq-paper", "--recipe", recipe, "--data", f"folder/classes:{tmp_path}/data"),
        *("--out", tmp_path / "run"),
        capsys=capsys,
    )
    assert message in said and not Path("pair-was-here").exists()
    assert not (tmp_path / "run").exists()


def opened(folder: Path, harm) -> Path:
    """A folder of open_clip, then harmed."""
    import importlib.util

    script = Path(__file__).parents[1] / "scripts" / "miniature_weights.py"
    spec = importlib.util.spec_from_file_location("miniature_weights", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.open_clip_model(folder)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"open_clip cannot be imported beside this build of torch: {error}")
    harm(folder)
    return folder


CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
CLIPS = [
    ("config missing", lambda f: (f / CLIP_CONFIG).unlink(), "has no open_clip_config.json"),
    ("config cut off", lambda f: half_a_file(f / CLIP_CONFIG), "is not valid JSON"),
    ("no preprocessing", lambda f: edit(f / CLIP_CONFIG, lambda c: c.pop("preprocess_cfg")),
     "names no preprocessing"),
    ("weights missing", lambda f: (f / CLIP_WEIGHTS).unlink(), "cannot load open_clip model"),
    ("weights cut off", lambda f: half_a_file(f / CLIP_WEIGHTS), "cannot load open_clip model"),
    ("weights of another size", lambda f: edit(
        f / CLIP_CONFIG, lambda c: c["model_cfg"].update(embed_dim=24)), "cannot load open_clip"),
    ("a program", lambda f: hostile_file(f / CLIP_WEIGHTS), "cannot load open_clip model"),
]  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize(("harm", "message"), [c[1:] for c in CLIPS], ids=[c[0] for c in CLIPS])
def test_broken_clips(harm, message, miniature_script, tmp_path, capsys):
    folder = opened(tmp_path / "clip", harm)
    miniature_script.flickr30k(tmp_path / "data")
    said = refused(
        *("train", "at", "--init", f"open_clip:local-dir:{folder}"),
        *("--data", f"flickr30k:{tmp_path}/data", "--out", tmp_path / "run"),
        capsys=capsys,
    )
    assert message in said and not Path("pair-was-here").exists()
    assert not (tmp_path / "run").exists()
