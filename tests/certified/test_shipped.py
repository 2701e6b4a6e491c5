"""Real attacks on the shipped models never beat a certificate."""

import pytest
import torch
import torch.nn.functional as F

from pair.attacks.patch import Patch
from pair.attacks.tth import TTHConfig, tth
from pair.certified import CertifiedPurifier, DeltaCap, upper_bound, with_plain
from pair.certified.challenge import challenge
from pair.certified.soundness import interference, measure_slack
from pair.data import embedded
from pair.images import load_batch
from pair.retrieval.clip import SmallClip

WORD = "sunflower"


@pytest.fixture(scope="module")
def models():
    purifier = CertifiedPurifier.from_pretrained("pair-small", patch=0.35, views=4)
    clip = SmallClip.from_pretrained("clip-small").eval().requires_grad_(False)
    query = F.normalize(clip.encode_text([f"a photo of a {WORD}"]), dim=-1)[0]
    return purifier, clip, query


@pytest.fixture(scope="module")
def carriers():
    return load_batch([path for path, _ in embedded.ads()[:2]], 112)


def bounds(models, x):
    purifier, clip, query = models
    slack = measure_slack(purifier, clip, x, (1, 2))
    with torch.no_grad():
        scores = purifier.embed(clip, x).scores(query[None])[0]
    assert slack < 1e-4
    return upper_bound(DeltaCap(0.1), scores, with_plain(purifier.cover.minimal), slack=slack)


def test_shipped_views_hide_what_they_should(models, carriers):
    assert interference(models[0], carriers[:1], torch.Generator().manual_seed(0)) == []


def test_the_strongest_attack_stays_below(models, carriers):
    purifier, clip, query = models
    start = load_batch([embedded.queries([WORD])[0][0]], 112)[0]
    found = challenge(purifier, clip, carriers, query, delta=0.1, steps=5, start=start)
    assert found.violations == 0
    assert bool((found.reached <= bounds(models, carriers)).all())
    assert float((found.reached - found.clean).max()) > 0.05  # it does lift the score


def test_the_suites_attack_through_the_views_stays_below(models, carriers):
    """TTH's universal patch, optimised for the mean over the exact views and the plain image."""
    purifier, clip, query = models

    def features(images, generator=None):
        views = purifier.embed(clip, images)
        return torch.cat([views.masked, views.plain[:, None]], 1).mean(1)

    config = TTHConfig(steps=5, lr=0.1, distortion=0.0, schedule="constant", size=0.35)
    patch = Patch.make("qr", 0.35, 112, "top-right")
    found = tth(features, carriers, query, config=config, patch=patch)
    attacked = found.patch.quantised().apply(carriers)
    with torch.no_grad():
        reached = DeltaCap(0.1)(purifier.embed(clip, attacked).scores(query[None])[0])
    assert found.losses[-1] < found.losses[0]
    assert bool((reached <= bounds(models, carriers)).all())
