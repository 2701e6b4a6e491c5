"""``pair attack``: optimise, store, continue, apply."""

import json

import pytest
import torch
from attack_models import seeded
from typer.testing import CliRunner

from pair.attacks.patch import Patch
from pair.cli import app
from pair.images import load_image, save_image

RUN = CliRunner()


def pair(*words) -> str:
    result = RUN.invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_tth_writes_a_patch_with_its_record(folder, tmp_path):
    out = tmp_path / "laptop"
    said = pair(
        "attack", "tth", folder / "ads", "--keyword", "laptop", "--out", out, "--model",
        folder / "clip", "--preset", "released", "--steps", 6, "--limit", 2,
    )  # fmt: skip
    assert "2 photos; 6 updates, at most 12 sample gradients" in said
    patch = Patch.load(out)
    assert patch.size == (11, 11) and patch.image_size == 32
    notes = patch.notes
    assert (notes["keyword"], notes["gradients_used"], notes["stopped"]) == ("laptop", 12, "budget")
    assert len(notes["losses"]) == 7 and notes["config"]["eot"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["laptop.json", "laptop.png"]


def test_tth_takes_captions_and_a_warm_start(folder, tmp_path):
    lines = tmp_path / "captions.txt"
    lines.write_text("A laptop on a desk\nA cow\nTwo laptops.\n")
    Patch.make("grey", 8, 64, "bottom-left").save(tmp_path / "warm")
    pair(
        "attack", "tth", folder / "ads", "--keyword", "laptop", "--captions", lines, "--warm",
        tmp_path / "warm", "--out", tmp_path / "p", "--model", folder / "clip", "--steps", 2,
    )  # fmt: skip
    patch = Patch.load(tmp_path / "p")
    assert patch.notes["captions"] == 2
    assert patch.size == (4, 4) and patch.placement.kind == "bottom-left"
    with pytest.raises(ValueError, match="no caption"):
        pair("attack", "tth", folder / "ads", "--keyword", "zebra", "--captions", lines, "--out",
             tmp_path / "q", "--model", folder / "clip")  # fmt: skip


def test_tth_in_other_shapes_for_print_with_few_carriers_until_it_levels_off(folder, tmp_path):
    base = ("attack", "tth", folder / "ads", "--keyword", "laptop", "--model", folder / "clip",
            "--size", 0.5)  # fmt: skip
    said = pair(*base, "--shape", "circle", "--printed", "--carriers", 1, "--preset", "std",
                "--steps", 3, "--out", tmp_path / "disc")  # fmt: skip
    assert "3 updates, at most 3 sample gradients" in said
    disc = Patch.load(tmp_path / "disc")
    assert disc.mask[0, 0] == 0 and disc.mask[8, 8] == 1 and disc.notes["gradients_used"] == 3
    pair(*base, "--shape", "frame:0.25", "--steps", 2, "--out", tmp_path / "ring")
    ring = Patch.load(tmp_path / "ring")
    assert ring.mask[8, 8] == 0 and float(ring.mask.mean()) == 0.75
    pair(*base, "--steps", 500, "--lr", 1e-7, "--plateau", 3, "--out", tmp_path / "flat")
    assert Patch.load(tmp_path / "flat").notes["stopped"] == "plateau"
    for words, message in (
        (("--shape", "heart"), "no shape 'heart'.*mask:<picture>$"),
        (("--shape", "frame:0.6"), "no shape 'frame:0.6'.*leaves no middle"),
        (("--carriers", 9), "carriers must lie in 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            pair(*base, *words, "--out", tmp_path / "no")


def test_a_defense_is_attacked_through(folder, tmp_path):
    said = pair(
        "attack", "tth", folder / "ads", "--keyword", "laptop", "--defense", "blur", "--out",
        tmp_path / "p", "--model", folder / "clip", "--steps", 2, "--limit", 1,
    )  # fmt: skip
    assert "at most 2 sample gradients" in said  # not random: one draw is enough
    assert Patch.load(tmp_path / "p").notes["defense"] == "blur"


def test_a_dry_run_prints_the_cost_only(folder, tmp_path):
    said = pair(
        "attack", "tth", folder / "ads", "--keyword", "laptop", "--out", tmp_path / "p",
        "--model", folder / "clip", "--preset", "max", "--eot", 100, "--dry-run",
    )  # fmt: skip
    assert "sample gradients" in said and "here" in said
    assert not list(tmp_path.iterdir())


def test_advhash_writes_a_patch(folder, tmp_path):
    said = pair(
        "attack", "advhash", folder / "ads", "--target", folder / "target", "--out",
        tmp_path / "p", "--model", folder / "csq", "--budget", 5,
    )  # fmt: skip
    assert "3 photos; 5 updates" in said
    patch = Patch.load(tmp_path / "p")
    assert patch.size == (7, 7) and patch.notes["target"] == "target"  # int(.22 * 32)
    with pytest.raises(ValueError, match="leaves the range"):
        pair(
            "attack", "advhash", folder / "ads", "--target", folder / "target", "--out",
            tmp_path / "q", "--model", folder / "csq", "--defense", "blur", "--preset", "released",
        )  # fmt: skip


def test_advhash_in_any_shape_and_place(folder, tmp_path):
    base = ("attack", "advhash", folder / "ads", "--target", folder / "target", "--model",
            folder / "csq", "--budget", 4, "--eot", 1)  # fmt: skip
    pair(*base, "--shape", "circle", "--size", 0.5, "--out", tmp_path / "disc")
    disc = Patch.load(tmp_path / "disc")
    assert disc.size == (16, 16) and disc.mask[0, 0] == 0 and disc.mask[8, 8] == 1
    assert disc.placement.at(1, (32, 32), disc.size) == [(13, 13)]  # corner at 29 = 200/224 of 32
    assert disc.notes["config"]["optimiser"] == "sign"
    pair(*base, "--shape", "rectangle:0.125x0.5", "--preset", "strong", "--placement", "top-left",
         "--batch", 2, "--lr", 0.5, "--shrink", 0.75, "--printed",
         "--out", tmp_path / "bar")  # fmt: skip
    bar = Patch.load(tmp_path / "bar")
    assert bar.size == (4, 16) and bar.placement.at(1, (32, 32), bar.size) == [(0, 0)]
    config = bar.notes["config"]
    assert (config["batch"], config["lr"], config["shrink"]) == (2, 0.5, 0.75)
    assert bar.notes["gradients_used"] == 4 * 2
    pair(*base, "--preset", "strong", "--warm", tmp_path / "disc", "--lr", 1e-9,
         "--out", tmp_path / "on")  # fmt: skip
    on = Patch.load(tmp_path / "on")
    assert torch.equal(on.mask, disc.mask) and on.notes["config"]["shrink"] is None
    assert (on.content - disc.content).abs().max() < 1e-6
    pair(*base, "--start", "grey", "--size", 0.25, "--preset", "std", "--lr", 1e-9,
         "--placement", "random-step", "--out", tmp_path / "grey")  # fmt: skip
    grey = Patch.load(tmp_path / "grey")
    assert grey.size == (8, 8) and grey.content.std() < 1e-6 and grey.placement.random
    for words, message in (
        (("--lr", 0.1), "--lr is for the presets std"),
        (("--shrink", 0.5), "--shrink is for the presets std"),
        (("--preset", "strong", "--placement", "random-step"), "add --shrink 0"),
        (("--warm", tmp_path / "disc", "--shape", "circle"), "leave out --shape"),
        (("--placement", "left"), "unknown placement 'left'"),
        (("--preset", "strong", "--shrink", 1.5), "1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            pair(*base, *words, "--out", tmp_path / "no")


def test_apply_scales_to_each_photo(folder, tmp_path):
    patch = Patch(torch.ones(3, 8, 8), torch.ones(8, 8), image_size=32)
    patch.save(tmp_path / "white")
    image = torch.rand(3, 64, 96, generator=seeded(0)) / 2
    save_image(tmp_path / "wide.png", image)
    pair("attack", "apply", tmp_path / "white", tmp_path / "wide.png", folder / "ads", "--out",
         tmp_path / "out")  # fmt: skip
    wide = load_image(tmp_path / "out" / "wide.png")
    assert wide.shape == (3, 64, 96)
    assert (wide[:, :16, 80:] == 1).all()
    assert (wide[:, 16:] < 0.6).all() and (wide[:, :, :80] < 0.6).all()
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_words_that_the_model_does_not_know_are_named(folder, tmp_path):
    base = ("attack", "tth", folder / "ads", "--model", folder / "clip", "--dry-run", "--out",
            tmp_path / "p")  # fmt: skip
    said = pair(*base, "--keyword", "laptop zebra")
    assert f"{folder / 'clip'} does not know: zebra\n" in said
    assert "does not know" not in pair(*base, "--keyword", "laptop")
    with pytest.raises(ValueError, match="--keyword is empty"):
        pair(*base, "--keyword", " ")
    lines = tmp_path / "searches.txt"
    lines.write_text("laptop photo\nqwertz\n")
    assert "does not know: qwertz\n" in pair(*base, "--searches", lines)


def test_models_of_open_clip_are_named_in_one_word(monkeypatch):
    from pair.commands._attack import text_model
    from pair.guard.models import _load
    from pair.retrieval.openclip import OpenClip

    monkeypatch.setattr(OpenClip, "from_pretrained", lambda *names, **options: (*names, options))
    quick = {"force_quick_gelu": True}
    for load in (lambda name: text_model(name, None), lambda name: _load("encoder", name)):
        assert load("open_clip:ViT-B-32/openai") == ("ViT-B-32", "openai", quick)
        assert load("open_clip:ViT-B-32//a@b/c.pt") == ("ViT-B-32", "/a@b/c.pt", {})
        assert load("open_clip:local-dir:mine") == ("local-dir:mine", {})
        assert load("open_clip:ViT-B-32@laion2b") == ("ViT-B-32", "laion2b", {})
        with pytest.raises(ValueError, match="names no weights: write open_clip:ViT-B-32/TAG"):
            load("open_clip:ViT-B-32")
    assert text_model("ViT-B-32", "openai") == ("ViT-B-32", "openai", {})


def test_no_photo_and_no_foreign_file_is_replaced(folder, tmp_path):
    Patch.make("grey", 4, 32).save(tmp_path / "p")
    image = torch.rand(3, 32, 32, generator=seeded(0))
    mine = tmp_path / "photos"
    mine.mkdir()
    for file in (mine / "a.png", tmp_path / "b.png", tmp_path / "c-a.png"):
        save_image(file, image)
    (tmp_path / "d.json").write_text("{}")
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    base = ("--keyword", "laptop", "--model", folder / "clip", "--out")
    for words in (
        ("apply", tmp_path / "p", mine, "--out", mine),
        ("apply", tmp_path / "p", mine, "--out", mine / "deeper"),
        ("apply", tmp_path / "p", tmp_path / "b.png", "--out", tmp_path),
        ("perturb", mine, *base, mine),
    ):
        with pytest.raises(ValueError, match="would land among the inputs"):
            pair("attack", *words)
    for words in (
        ("tth", mine, *base, tmp_path / "b"),
        ("tth", mine, *base, tmp_path / "b.png", "--dry-run"),
        ("tth", mine, "--each", *base, tmp_path / "c"),
        ("tth", mine, *base, tmp_path / "d"),
        ("blackbox", mine, *base, tmp_path / "b"),
        ("floor", mine, *base, tmp_path / "b"),
        ("advhash", mine, "--target", mine, "--out", tmp_path / "b"),
    ):
        with pytest.raises(ValueError, match="is no patch of this program: use another --out"):
            pair("attack", *words)
    after = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    assert after == before
    pair("attack", "tth", mine, "--steps", 1, *base, tmp_path / "p")  # a patch is replaced


def test_mistakes_are_one_sentence(folder, tmp_path):
    Patch.make("grey", 4, 32).save(tmp_path / "p")
    with pytest.raises(ValueError, match=r"gone\.png is missing: a patch is a \.png and its"):
        pair("attack", "apply", tmp_path / "gone.png", folder / "ads", "--out", tmp_path / "o")
    with pytest.raises(ValueError, match=r"shares of the image's side.*: got 39.0"):
        pair("attack", "tth", folder / "ads", "--keyword", "laptop", "--size", 39, "--model",
             folder / "clip", "--shape", "circle", "--out", tmp_path / "q")  # fmt: skip
    with pytest.raises(ValueError, match="there is no photo or folder"):
        pair("attack", "apply", tmp_path / "p", tmp_path / "none.png", "--out", tmp_path / "o")
    with pytest.raises(ValueError, match="two photos would become"):
        pair("attack", "apply", tmp_path / "p", folder / "ads", folder / "ads", "--out",
             tmp_path / "o")  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no photos in"):
        pair("attack", "apply", tmp_path / "p", tmp_path / "empty", "--out", tmp_path / "o")
    assert json.loads((tmp_path / "p.json").read_text())["kind"] == "patch"
