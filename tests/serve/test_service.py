"""The service over a real socket, against the models called directly."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from service_tiny import png, serving

from pair.images import load_image, resize
from pair.retrieval.hashing import binarise
from pair.serve.app import Service
from pair.serve.client import Client, ServiceError
from pair.serve.engine import Engine
from pair.serve.settings import Keys, Limits

KEY = {"reader": "a-key-of-some-length"}


@pytest.fixture
def client(url):
    with Client(url, retries=0) as made:
        yield made


def test_raw_rows_equal_the_models_called_directly(client, models):
    pictures = [png(1), png(2, 50, 20)]
    images = [resize(load_image(p)[None], 32) for p in pictures]
    with torch.no_grad():
        wanted = torch.cat([models.encoder.encode_image(x) for x in images])
        codes = torch.cat([binarise(models.hasher.encode_image(x)) for x in images])
    rows = client.embed(pictures, purified=False)
    assert np.allclose(rows, wanted / wanted.norm(dim=1, keepdim=True), atol=1e-5)
    bits = np.unpackbits(client.codes(pictures, purified=False), axis=1)
    assert np.array_equal(bits * 2.0 - 1, codes.numpy())


def test_purified_pictures_are_some_draw_of_the_purifier(client, models):
    picture = png(3)
    image = resize(load_image(picture)[None], 32)
    answer = client.purify(picture)
    assert answer.shape == (3, 32, 32)
    # The mask is secret, but the model is known: the result must look like its other draws
    # and unlike those of another picture.
    with torch.no_grad():
        own = models.purifier(image.repeat(50, 1, 1, 1))
    assert (own - answer).abs().amax((1, 2, 3)).min() < (own.amax(0) - own.amin(0)).max()
    assert not torch.equal(answer, client.purify(picture)), "every request draws anew"


def test_with_one_possible_mask_the_result_is_exact(models):
    """A purifier whose mask is fixed has one answer only: that of the library."""
    from pair.guard.models import Models
    from pair.masks import FixedPattern
    from pair.purifier import Purifier

    fixed = Purifier(models.purifier.autoencoder, FixedPattern("rows")).eval()
    service = Service(Engine(Models(encoder=models.encoder, purifier=fixed)), threads=2)
    pictures = [png(4), png(5)]
    with torch.no_grad():
        wanted = fixed(torch.cat([resize(load_image(p)[None], 32) for p in pictures]))
        rows = models.encoder.encode_image(wanted)
    with serving(service) as (url, _), Client(url) as client:
        assert (client.purify_many(pictures) - wanted).abs().max() <= 0.5 / 255 + 1e-6
        found = client.embed(pictures)
        assert client.purify(pictures[1]).sub(wanted[1]).abs().max() <= 0.5 / 255 + 1e-6
        for call in (lambda: client.search_text("red"), lambda: client.codes(pictures)):
            with pytest.raises(ServiceError) as error:
                call()
            assert (error.value.status, error.value.code) == (404, "absent")
    assert np.allclose(found, rows / rows.norm(dim=1, keepdim=True), atol=1e-5)


def test_search_finds_what_the_collection_finds(client, collection):
    for defend in ("gallery", "none"):
        hits = client.search_text("a red photo", 5, defend=defend)
        wanted = collection.search_text("a red photo", 5, defend=defend)
        assert [h["id"] for h in hits] == [h.id for h in wanted]
        assert np.allclose([h["score"] for h in hits], [h.score for h in wanted], atol=1e-5)
    own = client.search_image(png(7), 3, defend="none")
    assert own[0]["uri"] == "7.png" and own[0]["score"] > 0.999
    assert client.search_image(png(7), 1, defend="none", what="code")[0]["score"] == 1
    assert client.search_image(png(7), 3, where="uri != '7.png'", defend="none")[0] != own[0]


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_picture_in_gives_a_picture_out(url, format):
    answer = httpx.post(
        f"{url}/purify?format={format}", content=png(), headers={"content-type": "image/png"}
    )
    assert answer.headers["content-type"] == f"image/{format}"
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert (picture.format.lower(), picture.size) == (format, (32, 32))


def test_a_form_gives_json_in_its_order(url):
    files = [("image", ("x", png(n), "image/png")) for n in range(3)]
    answer = httpx.post(f"{url}/purify", files=files).json()
    shapes = [load_image(base64.b64decode(text)).shape for text in answer["images"]]
    assert shapes == [(3, 32, 32)] * 3 and answer["model"]["name"] == "tiny-pair"


def test_client_takes_files_tensors_and_pillow_images(client, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png(9))
    with Image.open(path) as picture:
        forms = [path, str(path), png(9), load_image(path), picture.copy()]
    rows = client.embed(forms, purified=False)
    assert np.allclose(rows, rows[:1], atol=1e-5)


def test_health_ready_metrics_and_request_ids(url):
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/readyz").status_code == 200
    answer = httpx.get(f"{url}/healthz", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["cache-control"] == "no-store" and "server" not in answer.headers
    odd = httpx.get(f"{url}/healthz", headers={"x-request-id": 'a"b{}'})
    assert odd.headers["x-request-id"] != 'a"b{}'
    httpx.get(f"{url}/lab/../../etc/passwd")
    text = httpx.get(f"{url}/metrics").text
    assert 'pair_requests_total{route="/healthz",status="200"}' in text
    assert "pair_queue_pictures 0.0" in text and "passwd" not in text


def test_reference_page_needs_nothing_from_outside(url):
    page = httpx.get(f"{url}/docs")
    for mark in ("http:", "https:", "src=", "<script", "@import", "url("):
        assert mark not in page.text.replace("http://127.0.0.1:8000", ""), mark
    schema = httpx.get(f"{url}/openapi.json").json()
    for path in schema["paths"]:
        assert path in page.text
    assert "``" not in page.text and "true if there is a purifier" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert httpx.get(url).headers["location"] == "docs"


def test_examples_of_the_reference_work(url):
    schema = httpx.get(f"{url}/openapi.json").json()
    body = schema["paths"]["/search/text"]["post"]["requestBody"]["content"]["application/json"]
    answer = httpx.post(f"{url}/search/text", json=body["example"])
    assert answer.status_code == 200 and len(answer.json()["hits"]) == body["example"]["k"]
    example = schema["components"]["schemas"]["Found"]["examples"][0]["hits"][0]
    assert example.keys() == answer.json()["hits"][0].keys()
    rows = httpx.post(f"{url}/embed", content=png(), headers={"content-type": "image/png"}).json()
    assert schema["components"]["schemas"]["Rows"]["examples"][0].keys() == rows.keys()


def test_keys(models):
    keys = Keys({"reader": hashlib.sha256(KEY["reader"].encode()).digest()})
    service = Service(Engine(models), keys=keys, threads=2)
    with serving(service) as (url, _):
        with Client(url, KEY["reader"]) as client:
            assert client.embed([png()]).shape == (1, 16)
        assert httpx.get(f"{url}/metrics", headers={"x-api-key": KEY["reader"]}).status_code == 200
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert httpx.get(url + path).status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": KEY["reader"] + "x"}):
            for method, path in (("GET", "/metrics"), ("POST", "/embed"), ("POST", "/purify")):
                answer = httpx.request(method, url + path, headers=headers, content=b"x")
                assert answer.status_code == 401, (path, headers)
                assert answer.headers["www-authenticate"] == "Bearer"


def test_keys_are_read_from_file_and_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("# ours\nreader a-key-of-some-length\n\n")
    monkeypatch.setenv("PAIR_API_KEYS", "writer:another-key-of-length, third:0123456789abcdef")
    keys = Keys.read(path)
    assert keys.owner("a-key-of-some-length") == "reader"
    assert keys.owner("another-key-of-length") == "writer"
    assert keys.owner("") is None and keys.owner("reader") is None
    assert not any("key" in repr(d) for d in keys.digests.values())
    for text in ("", "reader\n", "reader short\n", "writer another-key-of-length\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"key"):
            Keys.read(path)


def test_limits_are_checked():
    with pytest.raises(ValueError, match="above 0"):
        Limits(body=0)
    with pytest.raises(ValueError, match="cannot hold one request"):
        Limits(queue=4, batch=8)


def test_log_lines_hold_no_content(models, caplog):
    from pair.serve.logs import JsonLines

    with caplog.at_level("INFO", "pair.serve"), serving(Service(Engine(models), threads=2)) as run:
        secret = "hunter2-in-a-file-name"
        httpx.post(f"{run[0]}/embed?where={secret}", files={"image": (secret, png(), "image/png")})
        httpx.post(f"{run[0]}/{secret}", content=secret)
    lines = [JsonLines().format(r) for r in caplog.records if r.name == "pair.serve"]
    records = [json.loads(line) for line in lines]
    assert {r["route"] for r in records} == {"/embed", "other"}
    assert all(secret not in line for line in lines)
    assert records[0]["pictures"] == 1 and records[0]["status"] == 200


def test_audit_says_what_the_auditor_says(models, url, tmp_path):
    from pair.guard.audit import Auditor
    from pair.guard.models import Models
    from pair.masks import FixedPattern
    from pair.purifier import Purifier

    refused = httpx.post(f"{url}/audit", content=png(), headers={"content-type": "image/png"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "absent")
    fixed = Purifier(models.purifier.autoencoder, FixedPattern("rows")).eval()  # one mask only
    same = Models(encoder=models.encoder, purifier=fixed)
    bank = ["red", "a green photo"]
    wanted = Auditor(same, bank).examine(resize(load_image(png(1))[None], 32), [""])[0]
    paths = [tmp_path / f"{n}.png" for n in range(10)]
    for n, path in enumerate(paths):
        path.write_bytes(png(100 + n))
    engine = Engine(same)
    with pytest.raises(ValueError, match="clean pictures"):
        engine.audit_with(bank, paths[:2], 0.3)
    engine.audit_with(bank, paths, 0.5)
    with serving(Service(engine, threads=2)) as (address, _), Client(address) as client:
        first, second = client.audit([png(1), png(100)])
    assert first["query"] == wanted.query and first["window"] == pytest.approx(wanted.window)
    for name, value in wanted.statistics.items():
        assert first["statistics"][name] == pytest.approx(value, abs=1e-4)
    assert np.allclose(first["heat"], wanted.heat, atol=1e-4)
    assert 0 < second["p"] <= 1 and second["alarm"] == (second["p"] <= 0.5)


def test_python_on_the_page_runs(url, tmp_path):
    """The block of docs/serve.md, against this service."""
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "serve.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert block.count("http://127.0.0.1:8000") == 1
    (tmp_path / "photo.jpg").write_bytes(png(1))
    code = block.replace("http://127.0.0.1:8000", url) + "print(tuple(clean.shape), len(hits))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "(3, 32, 32) 5\n", done.stderr
