"""Photos on disk searched by certified score: exact, lazy, kept, and sound when files change."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pair.certified import CertifiedPurifier, DeltaCap, PatchFamily, window_cover
from pair.certified.store import SETTINGS, ViewStore
from pair.cli import main
from pair.commands._certified_search import run
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.guard.certified import PHOTOS, CertifiedPhotos
from pair.images import load_batch, save_image
from pair.purifier import Purifier
from pair.retrieval.clip import ClipConfig, SmallClip, build_vocabulary
from pair.retrieval.resnet import ResNetConfig

SIZE, TOKEN = 32, 4


class Encoder(torch.nn.Module):
    image_size, dim = SIZE, 12

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 5, 4), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(8 * 7 * 7, self.dim),
        )  # fmt: skip
        self.eval().requires_grad_(False)

    def encode_image(self, images):
        return self.net(images - 0.5)


def purifier(seed=0, side=7):
    torch.manual_seed(seed)
    config = GeneratorConfig(SIZE, TOKEN, 32, 1, 2, 32, 1, 2)
    generator = MaskedAutoencoder(config).eval().requires_grad_(False)
    return CertifiedPurifier(generator, window_cover(PatchFamily.square(side), SIZE, TOKEN, 9))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(14):
        seeded = torch.Generator().manual_seed(i)
        base = torch.rand(3, 1, 1, generator=seeded)
        picture = (base + 0.4 * torch.rand(3, 40, 52, generator=seeded)).clamp(0, 1)
        save_image(folder / f"{i:02}.png", picture)
    return folder


def query(seed=5):
    return F.normalize(torch.randn(12, generator=torch.Generator().manual_seed(seed)), dim=0)


@pytest.mark.parametrize("delta", [0.0, 0.05])
def test_answers_are_the_certified_ranking_of_all_photos(photos, tmp_path, delta):
    model, encoder = purifier(), Encoder()
    found = CertifiedPhotos(tmp_path / "c", model, encoder, delta=delta)
    counts = found.add([photos])
    assert (counts.found, counts.embedded, len(found)) == (14, 14, 14)
    files = sorted(photos.iterdir())
    with torch.no_grad():
        table = model.embed(encoder, load_batch(files, SIZE)).scores(query()[None])[0]
    scores = DeltaCap(delta)(table)  # not rounded, in one batch: an independent computation
    result = found.search(query(), 5)
    want = scores.topk(5)
    assert [a.score for a in result.answers] == pytest.approx(want.values.tolist(), abs=5e-3)
    assert {a.photo.path for a in result.answers[:1]} <= {str(files[i]) for i in want.indices}
    for answer in result.answers:
        row = table[files.index(Path(answer.photo.path))]
        assert answer.certificate.plain == pytest.approx(float(row[-1]), abs=1e-5)
        assert answer.certificate.lowest == pytest.approx(float(row[:-1].min()), abs=5e-3)
        assert answer.plain_rank == 1 + int((table[:, -1] > row[-1] + 1e-6).sum())
    first = {str(files[i]) for i in table[:, -1].topk(5).indices}
    kept_out = {a.photo.path for a in result.kept_out}
    assert kept_out == first - {a.photo.path for a in result.answers}
    json.dumps([a.record() for a in (*result.answers, *result.kept_out)])


def test_views_are_made_once_and_only_where_needed(photos, tmp_path):
    model, encoder = purifier(), Encoder()
    found = CertifiedPhotos(tmp_path / "c", model, encoder, delta=0.5)
    found.add([photos])
    first = found.search(query(), 2)
    assert 2 <= first.views_made < 14  # a wide cap lets the search stop early
    assert found.search(query(), 2).views_made == 0
    again = CertifiedPhotos(tmp_path / "c", model, encoder, delta=0.5)  # another process
    assert len(again) == 14
    second = again.search(query(), 2)
    assert second.views_made == 0
    assert [a.record() for a in second.answers] == [a.record() for a in first.answers]
    counts = again.add([photos])
    assert (counts.known, counts.embedded) == (14, 0)


def test_a_changed_file_is_never_shown(photos, tmp_path):
    """The attacker swaps the best hit's contents and keeps name, size and time."""
    model, encoder = purifier(), Encoder()
    found = CertifiedPhotos(tmp_path / "c", model, encoder)
    found.add([photos])
    best = found.search(query(), 1).answers[0].photo
    data = bytearray(Path(best.path).read_bytes())
    data[-20] ^= 1
    Path(best.path).write_bytes(data)
    os.utime(best.path, ns=(best.mtime_ns, best.mtime_ns))
    result = found.search(query(), 3)
    assert len(result.answers) == 3
    assert best.path not in {a.photo.path for a in result.answers}
    assert result.lost == [best.path]
    fresh = CertifiedPhotos(tmp_path / "c", model, encoder)  # the same on a cold start
    os.remove(fresh.search(query(3), 1).answers[0].photo.path)
    assert len(fresh.search(query(3), 14).answers) == 12


def test_a_changed_file_is_embedded_again(photos, tmp_path):
    found = CertifiedPhotos(tmp_path / "c", purifier(), Encoder())
    found.add([photos])
    other = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(99))
    save_image(photos / "03.png", other)
    counts = found.add([photos])
    assert (counts.embedded, counts.known) == (1, 13)
    paths = [a.photo.path for a in found.search(query(), 20).answers]
    assert len(paths) == len(set(paths)) == 14
    assert len(CertifiedPhotos(tmp_path / "c", purifier(), Encoder())) == 14


def test_one_bad_file_and_a_stop(photos, tmp_path):
    (photos / "bad.jpg").write_bytes(b"nothing")
    reasons = []
    found = CertifiedPhotos(tmp_path / "c", purifier(), Encoder())
    counts = found.add([photos], failed=lambda path, reason: reasons.append(path))
    assert (counts.failed, counts.embedded) == (1, 14)
    assert reasons == [str(photos / "bad.jpg")]
    other = CertifiedPhotos(tmp_path / "d", purifier(), Encoder())
    asked = iter(range(100))
    assert other.add([photos], stop=lambda: next(asked) >= 5).stopped
    rest = CertifiedPhotos(tmp_path / "d", purifier(), Encoder()).add([photos])
    assert (rest.known, rest.embedded) == (5, 9)


def test_other_settings_are_refused_in_one_sentence(photos, tmp_path):
    CertifiedPhotos(tmp_path / "c", purifier(), Encoder()).add([photos])
    CertifiedPhotos(tmp_path / "c", purifier(), Encoder(), delta=0.3)  # no part of the views
    for model, encoder, name in (
        (purifier(1), Encoder(), "generator"),
        (purifier(), Encoder(1), "encoder"),
        (purifier(0, 9), Encoder(), "family"),
    ):
        with pytest.raises(ValueError, match=f"different: .*{name}"):
            CertifiedPhotos(tmp_path / "c", model, encoder)
    (tmp_path / "c" / PHOTOS).write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        CertifiedPhotos(tmp_path / "c", purifier(), Encoder())
    with pytest.raises(ValueError, match="no such file"):
        CertifiedPhotos(tmp_path / "e", purifier(), Encoder()).add([tmp_path / "none"])
    with pytest.raises(ValueError, match="k must be"):
        CertifiedPhotos(tmp_path / "e", purifier(), Encoder()).search(query(), 0)


def test_a_squeezed_picture_is_certified_as_squeezed(photos, tmp_path):
    """``whole``: windows lie in the file as the models saw it."""
    found = CertifiedPhotos(tmp_path / "c", purifier(), Encoder(), whole=True)
    found.add([photos])
    boxes = {a.certificate.window for a in found.search(query(), 14).answers}
    assert max(right for _, _, right, _ in boxes) == 52  # the border column is seen
    with pytest.raises(ValueError, match="seen"):
        CertifiedPhotos(tmp_path / "c", purifier(), Encoder())


def test_a_collection_is_searched_by_the_same_rule(photos, tmp_path):
    """Rows of a database, certified from its unpurified vectors; the command does the same."""
    pytest.importorskip("lancedb")
    from pair.guard.certified import from_collection
    from pair.guard.collection import Collection
    from pair.guard.models import Models

    model, encoder = purifier(), Encoder()
    models = Models(encoder=encoder, purifier=Purifier(model.autoencoder))
    rows = Collection.create(str(tmp_path / "rows"), models, fields={"label": "str"})
    rows.add(photos)
    found = from_collection(rows, tmp_path / "views", model, encoder)
    assert len(found) == 14
    direct = CertifiedPhotos(tmp_path / "direct", model, encoder, whole=True)
    direct.add([photos])
    pairs = zip(found.search(query(), 6).answers, direct.search(query(), 6).answers, strict=True)
    for a, b in pairs:
        assert a.photo.key == b.photo.key
        assert a.score == pytest.approx(b.score, abs=1e-4)
        assert a.certificate.window == b.certificate.window
    one = from_collection(
        rows, tmp_path / "views", model, encoder, where=f"uri = '{photos / '03.png'}'"
    )
    assert [Path(a.photo.path).name for a in one.search(query(), 5).answers] == ["03.png"]


def test_the_command(photos, tmp_path, monkeypatch, capsys):
    model = purifier()
    Purifier(model.autoencoder).save_pretrained(tmp_path / "g")
    words = build_vocabulary(["a photo of a cat"])
    torch.manual_seed(1)
    config = ClipConfig(SIZE, 16, ResNetConfig((1, 1, 1, 1), 8), 16, 1, 2, vocabulary=tuple(words))
    SmallClip(config).eval().save_pretrained(tmp_path / "c")
    own = {"generator": str(tmp_path / "g"), "encoder": str(tmp_path / "c"), "patch": "7"}
    sheet = tmp_path / "s.png"
    run("a cat", photos=[photos], k=4, as_json=True, picture=sheet, **own)
    result = json.loads(capsys.readouterr().out)
    assert [a["rank"] for a in result["answers"]] == [1, 2, 3, 4]
    assert result["family"] == "7 x 7 px" and result["views_made"] >= 4
    scores = [a["score"] for a in result["answers"]]
    assert scores == sorted(scores, reverse=True)
    for a in result["answers"]:
        assert a["score"] == pytest.approx(min(a["plain"], a["lowest"]))  # delta 0
        assert a["alarm"] is (not a["clear"])
    shown = len(result["answers"]) + len(result["kept_out"])
    assert Image.open(sheet).height == 24 + 292 * shown  # the query, and names
    run("a cat", photos=[photos], k=1, picture=sheet.with_suffix(".jpg"), **own)
    assert Image.open(sheet.with_suffix(".jpg")).format == "JPEG"
    capsys.readouterr()
    run("a cat", photos=[photos], k=4, **own)
    assert "certified against 7 x 7 px" in capsys.readouterr().out
    run(photos / "03.png", photos=[photos], k=1, delta=2.0, as_json=True, **own)
    assert json.loads(capsys.readouterr().out)["answers"][0]["path"].endswith("03.png")
    for given, message in (
        (["a cat", "--photos", str(photos)], "needs --certified"),
        ([], "say what to search"),
        (["--certified", "--photos", str(photos)], "give either words"),
        (["--certified", "--photos", "missing", "a"], "no such file or folder: missing"),
        (["--certified", "--photos", str(photos), "a", "--sheet", str(photos / "03.png")], "among"),
        (["--certified", "--photos", str(photos), "a", "b"], "either a collection or --photos"),
        (["--certified", "--photos", str(photos), "a", "--exact"], "goes without"),
        (["--certified", "--photos", str(photos), "a", "--patch", "x"], "no patch family"),
        (["--certified", "--photos", str(photos / "03.png"), "a"], "--certificates"),
    ):
        monkeypatch.setattr("sys.argv", ["pair", "search", *given])
        with pytest.raises(SystemExit) as stop:
            main()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1


# --- the views on disk ----------------------------------------------------------------------


def keys(*numbers):
    return [f"{n:064x}" for n in numbers]


def views(seed, n=2):
    x = torch.randn(n, 4, 6, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


def test_two_writers_share_a_store(tmp_path):
    a, b = (ViewStore(tmp_path, {"x": 1}, 4, 6) for _ in range(2))
    a.put(keys(1, 2), views(1))
    b.put(keys(2, 3), views(2))
    assert a.refresh() == b.refresh() == 3
    assert torch.allclose(a.get(keys(1)), views(1)[:1], atol=5e-3)
    assert torch.equal(a.get(keys(3)), b.get(keys(3)))
    a.merge()
    assert len(list(tmp_path.glob("views-*.safetensors"))) == 1
    c = ViewStore(tmp_path, {"x": 1}, 4, 6)
    assert len(c) == 3 and torch.equal(c.get(keys(1, 3)), a.get(keys(1, 3)))
    b.put(keys(4), views(3, 1))
    assert b.refresh() == a.refresh() == 4


def test_a_store_explains_what_is_wrong(tmp_path):
    store = ViewStore(tmp_path / "s", {"x": 1}, 4, 6)
    with pytest.raises(ValueError, match="shape"):
        store.put(keys(1), views(1))
    with pytest.raises(ValueError, match="different: dim, x"):
        ViewStore(tmp_path / "s", {"x": 2}, 4, 7)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        ViewStore(tmp_path / "file", {}, 4, 6)
    store.put(keys(1, 2), views(1))
    (segment,) = (tmp_path / "s").glob("views-*")
    segment.write_bytes(segment.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        ViewStore(tmp_path / "s", {"x": 1}, 4, 6)
    (tmp_path / "s" / SETTINGS).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ViewStore(tmp_path / "s", {"x": 1}, 4, 6)
