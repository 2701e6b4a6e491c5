"""MAEDefense, the controls, PAIR's rows and the hardened targets."""

import pytest
import torch
from defense_models import tiny_generator

from pair.defenses import make
from pair.defenses.controls import Blur, MeanBlock
from pair.defenses.hardened import Hardened
from pair.defenses.mae import MaeDefense, choose_weight
from pair.masks import Bernoulli, ExactCount, FixedPattern, NoMask
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.hashing import HashNet


def batch(seed=0):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def seeded():
    return torch.Generator().manual_seed(7)


def test_maedefense_is_the_blend_it_says():
    model, x = tiny_generator(), batch()
    mask = ExactCount(0.5)(2, 4, generator=seeded())
    seen = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    pasted = torch.where(seen, x, model(x, mask).clamp(0, 1))
    result = MaeDefense(model, weight=0.25)(x, generator=seeded())
    torch.testing.assert_close(result, 0.25 * x + 0.75 * pasted)
    # Visible tokens are the originals, whatever the weight.
    torch.testing.assert_close(result[seen.expand_as(x)], x[seen.expand_as(x)])


def test_choose_weight_takes_the_strongest_that_is_clean_enough():
    class Fake(MaeDefense):
        def __init__(self, weight):
            torch.nn.Module.__init__(self)
            self.weight = weight

    chosen, scores = choose_weight(Fake, lambda d: 0.6 + d.weight / 2, 0.75, (0.5, 0.1, 0.3, 0.4))
    assert chosen == 0.3 and scores[0.1] == pytest.approx(0.65)
    assert choose_weight(Fake, lambda d: d.weight, 2.0, (0.1, 0.6))[0] == 0.6


@pytest.mark.parametrize("options", [{"weight": 1.1}, {"mask": "stripes"}, {"ratio": 0.0}])
def test_maedefense_refuses_settings_out_of_range(options):
    with pytest.raises(ValueError):
        MaeDefense(tiny_generator(), **options)


def test_rows_of_the_ablation(models):
    rows = {
        "pair": (ExactCount, 2),
        "pair-reconstruction": (NoMask, 1),
        "pair-fixed-mask": (FixedPattern, 2),
        "pair-random-mask": (ExactCount, 2),
        "single-pass": (ExactCount, 1),
    }
    for name, (rule, passes) in rows.items():
        purifier = make(name, name=str(models / "pair")).purifier
        assert isinstance(purifier.rule, rule) and purifier.passes == passes
        assert purifier.output == "decoder"
    paper = make("pair", name=str(models / "pair"), preset="paper").purifier
    assert isinstance(paper.rule, Bernoulli) and paper.encoder == "zero"


def test_pair_is_the_purifier_at_the_size_of_the_input(models):
    purifier, x = Purifier.from_pretrained(models / "pair"), batch()
    pair = make("pair", name=str(models / "pair"))
    torch.testing.assert_close(pair(x, generator=seeded()), purifier(x, generator=seeded()))
    large = torch.rand(1, 3, 50, 70)
    assert pair(large).shape == large.shape


def test_mean_block_fills_one_square_with_the_mean_colour():
    x = batch() * 0.5
    x[:, 0] += 0.5
    y = MeanBlock(0.5)(x, generator=seeded())
    changed = (y != x).any(1)
    for image, old, where in zip(y, x, changed, strict=True):
        rows, cols = where.any(1).nonzero(), where.any(0).nonzero()
        assert len(rows) == len(cols) == 16 and int(where.sum()) == 256
        torch.testing.assert_close(image[:, where], old.mean((1, 2))[:, None].expand(3, 256))
    places = {tuple((MeanBlock(0.5)(x) != x)[0, 0].nonzero()[0].tolist()) for _ in range(20)}
    assert len(places) > 5


def test_blur_keeps_the_mean_and_lowers_the_contrast():
    x = batch()
    y = Blur(1.5)(x)
    assert float(y.std()) < 0.4 * float(x.std())
    assert abs(float(y.mean() - x.mean())) < 0.02
    flat = torch.full((1, 3, 20, 20), 0.3)
    torch.testing.assert_close(Blur(2.0)(flat), flat)


def test_hardened_targets_replace_the_raw_ones(models):
    defense = make("at", clip=str(models / "clip"), csq=str(models / "csq"))
    clip, csq = (
        cls.from_pretrained(models / k) for cls, k in ((SmallClip, "clip"), (HashNet, "csq"))
    )
    assert isinstance(defense.harden(clip), SmallClip) and defense.harden(clip) is not clip
    assert isinstance(defense.harden(csq), HashNet)
    assert make("blur").harden(clip) is clip
    with pytest.raises(ValueError, match="pair train at"):
        defense.harden(object())
    with pytest.raises(ValueError, match="neither a folder"):
        Hardened("nowhere", "nowhere").harden(clip)
