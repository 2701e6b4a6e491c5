"""``pair attack`` beyond one patch at one place: shapes, noise, black box, floor, scores."""

import json
from dataclasses import replace
from math import comb

import pytest
import torch
import torch.nn.functional as F
from attack_models import photos, seeded
from typer.testing import CliRunner

from pair.attacks.patch import Patch
from pair.cli import app
from pair.data.prompts import TRAIN_TEMPLATES, sentences
from pair.defenses import make
from pair.images import load_batch, load_image, quantise, save_image
from pair.retrieval.clip import SmallClip

RUN = CliRunner()


def pair(*words) -> str:
    result = RUN.invoke(app, ["attack", *(str(w) for w in words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def base(folder):
    return (folder / "ads", "--keyword", "laptop", "--model", folder / "clip")


@pytest.fixture(scope="module")
def clip(folder):
    return SmallClip.from_pretrained(folder / "clip")


def ads(folder):
    return load_batch(sorted((folder / "ads").iterdir()), 32)


def target(clip):
    with torch.no_grad():
        return clip.encode_text(sentences(["laptop"], TRAIN_TEMPLATES)).mean(0)


def loss(clip, images, e_t) -> torch.Tensor:
    with torch.no_grad():
        return 1 - F.cosine_similarity(clip.encode_image(images), e_t, dim=-1)


def test_the_place_is_searched(base, tmp_path):
    said = pair("tth", *base, "--locate", 2, "--steps", 4, "--limit", 1, "--out", tmp_path / "p")
    steps = (4 + 3) * 30 + 4  # every place of 2 x 2, the best three again, then the budget
    assert f"{steps} updates, at most {steps} sample gradients" in said
    patch = Patch.load(tmp_path / "p")
    assert patch.placement.kind == "fixed" and patch.notes["gradients_used"] == steps
    assert patch.notes["config"]["steps"] == 4 and len(patch.notes["losses"]) == 5
    for words in (("--restarts", "grey"), ("--each",)):
        with pytest.raises(ValueError, match="leave out --"):
            pair("tth", *base, "--locate", 2, *words, "--out", tmp_path / "q")


def test_named_starts_compete_and_the_cost_is_told_before(base, tmp_path):
    said = pair("tth", *base, "--preset", "strong", "--steps", 10, "--restarts", "grey, dct",
                "--out", tmp_path / "p")  # fmt: skip
    patch = Patch.load(tmp_path / "p")
    assert patch.notes["start"] in ("grey", "dct")
    assert patch.notes["config"]["restarts"] == ["grey", "dct"]
    assert f"at most {patch.notes['gradients_used']} sample gradients" in said
    with pytest.raises(ValueError, match="no carrier 'gray'"):
        pair("tth", *base, "--restarts", "gray", "--out", tmp_path / "q")


def test_a_patch_for_every_photo(base, folder, clip, tmp_path):
    pair("tth", *base, "--preset", "std", "--each", "--steps", 8, "--out", tmp_path / "own")
    names = [f"own-ads{i}" for i in range(3)]
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == names
    patches = [Patch.load(tmp_path / n) for n in names]
    assert not torch.equal(patches[0].content, patches[1].content)
    e_t, images, grey = target(clip), ads(folder), Patch.make("grey", 11, 32)
    for i, patch in enumerate(patches):
        before, after = (loss(clip, p.apply(images[i : i + 1]), e_t) for p in (grey, patch))
        assert float(after) < float(before)


@pytest.mark.parametrize(
    ("shape", "covered"),
    [("rectangle:0.25x0.75", 8 * 24), ("several:4", 4 * 5 * 5), ("mask:bars.png", 11 * 5)],
)
def test_other_shapes(base, tmp_path, monkeypatch, shape, covered):
    monkeypatch.chdir(tmp_path)
    bars = torch.zeros(3, 11, 11)
    bars[:, ::2] = 1
    bars[:, 10] = 0  # rows 0, 2, 4, 6, 8
    save_image(tmp_path / "bars.png", bars)
    pair("tth", *base, "--shape", shape, "--steps", 2, "--out", tmp_path / "p")
    patch = Patch.load(tmp_path / "p")
    assert float(patch.mask.sum()) == covered
    black = torch.zeros(1, 3, 32, 32)
    changed = (replace(patch, content=torch.ones_like(patch.content)).apply(black) > 0).all(1)
    assert int(changed.sum()) == covered
    if shape == "several:4":  # one in every corner
        assert all(bool(changed[0, y, x]) for y in (0, 31) for x in (0, 31))


@pytest.mark.parametrize("shape", ["several:0", "several:900", "rectangle:2", "mask:none.png"])
def test_impossible_shapes(base, tmp_path, shape):
    with pytest.raises((ValueError, OSError)):
        pair("tth", *base, "--shape", shape, "--steps", 2, "--out", tmp_path / "p")


def test_a_hub_meets_many_searches(base, folder, clip, tmp_path):
    lines = tmp_path / "searches.txt"
    lines.write_text("a laptop\n\na photo\n")
    with torch.no_grad():
        texts = F.normalize(clip.encode_text(["a laptop", "a photo"]), dim=1)

    def far(images):
        with torch.no_grad():
            return float((1 - F.normalize(clip.encode_image(images), dim=1) @ texts.T).mean())

    rest = (folder / "ads", "--searches", lines, "--model", folder / "clip")
    pair("tth", *rest, "--preset", "std", "--start", "grey", "--steps", 10, "--lr", 0.05,
         "--out", tmp_path / "hub")  # fmt: skip
    hub = Patch.load(tmp_path / "hub")
    assert hub.notes["searches"] == 2
    grey = Patch.make("grey", 11, 32)
    assert far(hub.apply(ads(folder))) < far(grey.apply(ads(folder)))
    pair("perturb", *rest, "--steps", 10, "--limit", 1, "--out", tmp_path / "noise")
    stored = load_image(tmp_path / "noise" / "ads0.png")[None]
    assert far(stored) < far(ads(folder)[:1])
    for words in ((), ("--keyword", "laptop", "--searches", lines)):
        with pytest.raises(ValueError, match="either --keyword or"):
            pair("perturb", folder / "ads", *words, "--model", folder / "clip", "--out", tmp_path)


def test_the_tenth_place_is_the_aim(base, folder, clip, tmp_path):
    def scores(images):
        with torch.no_grad():
            texts = F.normalize(clip.encode_text(sentences(["laptop"], TRAIN_TEMPLATES)), dim=1)
            return F.normalize(clip.encode_image(images), dim=1) @ texts.T

    pool = quantise(photos(100, 9))
    many = pool[scores(pool).mean(1).argsort(descending=True)[:10]]  # hard to beat
    (tmp_path / "many").mkdir()
    for i, image in enumerate(many):
        save_image(tmp_path / "many" / f"{i:02}.png", image)
    pair("tth", *base, "--gallery", tmp_path / "many", "--preset", "std", "--start", "grey",
         "--steps", 10, "--out", tmp_path / "p")  # fmt: skip
    patch = Patch.load(tmp_path / "p")
    bars = scores(many).min(0).values  # the tenth of ten

    def want(p):
        return float(F.softplus((bars - scores(p.apply(ads(folder)))) / 0.01).mean())

    losses = patch.notes["losses"]
    assert losses[0] == pytest.approx(want(Patch.make("grey", 11, 32)), rel=1e-3)
    assert losses[-1] == pytest.approx(want(patch), rel=0.05) and losses[-1] < 0.9 * losses[0]


def test_noise_stays_in_the_ball_and_resumes(base, folder, clip, tmp_path):
    out, e_t = tmp_path / "noise", target(clip)
    assert "30 updates, at most 30" in pair("perturb", *base, "--steps", 10, "--dry-run",
                                             "--out", out)  # fmt: skip
    assert not out.exists()
    pair("perturb", *base, "--steps", 10, "--epsilon", 6, "--out", out)
    images = quantise(ads(folder))
    stored = load_batch(sorted(out.glob("*.png")), 32)
    change = (stored - images).abs().amax((1, 2, 3)) * 255
    assert float(change.max()) == pytest.approx(6, abs=1e-3)
    assert bool((loss(clip, stored, e_t) < loss(clip, images, e_t)).all())
    record = json.loads((out / "ads1.json").read_text())
    assert record["largest change"] == 6 and record["settings"]["epsilon"] == 6

    (out / "ads1.png").unlink()
    old = (out / "ads0.png").stat().st_mtime_ns
    pair("perturb", *base, "--steps", 10, "--epsilon", 6, "--out", out)
    assert (out / "ads0.png").stat().st_mtime_ns == old  # not computed again
    assert torch.equal(load_image(out / "ads1.png"), stored[1])
    pair("perturb", *base, "--steps", 10, "--epsilon", 2, "--out", out)  # other settings: anew
    assert json.loads((out / "ads0.json").read_text())["largest change"] <= 2


@pytest.mark.parametrize("method", ["squares", "nes"])
def test_without_gradients(base, folder, clip, tmp_path, method):
    words = ("blackbox", *base, "--method", method, "--queries", 64, "--size", 0.6)
    assert "192 forward passes" in pair(*words, "--dry-run", "--out", tmp_path / "p")
    assert not list(tmp_path.iterdir())
    said = pair(*words, "--out", tmp_path / "p")
    patch, e_t = Patch.load(tmp_path / "p"), target(clip)
    assert "forward passes (budget)" in said and "sample gradients" not in said
    if method == "squares":  # what was kept is never worse than what it began with
        found = float(loss(clip, patch.apply(ads(folder)), e_t).mean())
        assert found == pytest.approx(patch.notes["losses"][-1], abs=1e-5)
    assert patch.notes["losses"][-1] < patch.notes["losses"][0]
    with pytest.raises(ValueError, match="no method"):
        pair("blackbox", *base, "--method", "cubes", "--out", tmp_path / "q")


def test_without_scores(base, folder, tmp_path):
    pair("blackbox", *base, "--gallery", folder / "target", "--queries", 5, "--out", tmp_path / "p")
    losses = Patch.load(tmp_path / "p").notes["losses"]
    lists = 3 * len(sentences(["laptop"], TRAIN_TEMPLATES))  # a loss is a share of these
    assert all(0 <= v <= 1 for v in losses)
    assert [lists * v for v in losses] == pytest.approx(
        [round(lists * v) for v in losses], abs=1e-3
    )


def test_the_floor(base, folder, clip, tmp_path):
    said = pair("floor", *base, "--concept", folder / "target", "--collages", 6, "--draws", 1,
                "--out", tmp_path / "best")  # fmt: skip
    rows = [line.split() for line in said.splitlines()[:7]]
    assert {r[0] for r in rows} == {"no", "grey", "noise", "qr", "typographic", "collage", "tiled"}
    best, e_t = Patch.load(tmp_path / "best"), target(clip)
    losses = best.notes["losses"]
    assert min(losses, key=losses.get) == rows[1][0] == best.notes["family"]
    found = float(loss(clip, best.apply(ads(folder)), e_t).mean())
    assert found == pytest.approx(min(losses.values()), abs=1e-4)
    bare = float(loss(clip, ads(folder), e_t).mean())
    assert float(rows[0][3]) == pytest.approx(bare, abs=1e-3)


def test_scores_transfer_and_many_uploads(base, folder, clip, tmp_path):
    torch.manual_seed(7)
    SmallClip(clip.config).save_pretrained(tmp_path / "other")
    (tmp_path / "many").mkdir()
    for i, image in enumerate(photos(12, 9)):
        save_image(tmp_path / "many" / f"{i:02}.png", image)
    Patch.make("noise", 0.6, 32, generator=seeded(3)).save(tmp_path / "p")
    said = pair("score", tmp_path / "p", *base, "--model", tmp_path / "other", "--defense", "none",
                "--defense", "mean-block", "--gallery", tmp_path / "many", "--draws", 20,
                "--uploads", "1,5", "--out", tmp_path / "score.json")  # fmt: skip
    assert said.count("loss") == 8  # two models x two defenses, without and with
    rows = json.loads((tmp_path / "score.json").read_text())["rows"]
    bare, moved = rows[0]["with"], rows[1]["with"]

    # Undefended, by hand: the tenth best of the gallery is the bar.
    lines = sentences(["laptop"], TRAIN_TEMPLATES)
    patch = Patch.load(tmp_path / "p")

    def embed(images):
        with torch.no_grad():
            return F.normalize(clip.encode_image(images), dim=1)

    with torch.no_grad():
        texts = F.normalize(clip.encode_text(lines), dim=1)
    many = load_batch(sorted((tmp_path / "many").iterdir()), 32)
    bars = (texts @ embed(many).T).sort(dim=1, descending=True).values[:, 9]
    inside = embed(patch.apply(ads(folder))) @ texts.T > bars
    assert bare["share"] == pytest.approx(float(inside.float().mean()))
    assert bare["any"] == pytest.approx(float(inside.any(0).float().mean()))
    assert bare["uploads"] == {"1": bare["share"], "5": bare["share"]}  # nothing is drawn

    # Behind a random defense: as many draws, taken one after the other from the same seed.
    defense, generator = make("mean-block"), seeded(9_000_002)
    hidden = torch.cat([embed(defense(many, generator=generator))])
    bars = (texts @ hidden.T).sort(dim=1, descending=True).values[:, 9]
    generator, hits = seeded(9_000_001), torch.zeros(3, len(lines))
    for _ in range(20):
        z = embed(defense(patch.apply(ads(folder)), generator=generator))
        hits += z @ texts.T > bars
    five = [1 - comb(20 - int(k), 5) / comb(20, 5) for k in hits.flatten()]
    assert moved["share"] == pytest.approx(float(hits.mean() / 20))
    assert moved["uploads"]["5"] == pytest.approx(sum(five) / len(five))
    with pytest.raises(ValueError, match="--uploads takes numbers"):
        pair("score", tmp_path / "p", *base, "--uploads", "many")


def test_what_was_made_is_applied_elsewhere(base, folder, tmp_path):
    pair("tth", *base, "--shape", "several:2", "--steps", 2, "--out", tmp_path / "p")
    save_image(tmp_path / "large.png", torch.zeros(3, 64, 64))
    pair("apply", tmp_path / "p", tmp_path / "large.png", "--out", tmp_path / "out")
    changed = (load_image(tmp_path / "out" / "large.png") > 0).any(0)
    assert 0 < float(changed.float().mean()) < 0.25
