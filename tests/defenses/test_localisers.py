"""SAC and PatchZero: completion against loops, what is filled in, and the detector loss."""

import math

import pytest
import torch
from defense_models import tiny_network
from torch import nn

from pair.defenses import Compose, NoDefense
from pair.defenses.base import evasion_loss
from pair.defenses.network import NetworkConfig
from pair.defenses.patchzero import PatchZero, PyramidNet
from pair.defenses.sac import Sac, UNet, complete_shape
from pair.generator import IMAGENET_MEAN


def naive(mask, sides):
    """One (H, W) mask, square by square and round by round."""
    h, w = mask.shape
    total = int(mask.sum())
    gamma = 0.9
    for _ in range(15):
        out, accepted = torch.zeros_like(mask), False
        for s in sides:
            for top in range(h - s + 1):
                for left in range(w - s + 1):
                    inside = int(mask[top : top + s, left : left + s].sum())
                    distance = s * s - inside + (total - inside)
                    if distance / s**2 < 1 - gamma:
                        out[top : top + s, left : left + s] = True
                        accepted = True
        if accepted:
            return out
        gamma *= 0.7
    return mask


def blobs(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(20, 24, generator=generator) < [0.0, 0.02, 0.1, 0.5][seed % 4]
    top, left, side = torch.randint(2, 11, (3,), generator=generator).tolist()
    hole = torch.rand(side, side, generator=generator) < [0.05, 0.3, 0.6][seed % 3]
    mask[top : top + side, left : left + side] |= ~hole[: 20 - top, : 24 - left]
    return mask


def test_completion_matches_the_loop():
    masks = torch.stack([*(blobs(s) for s in range(12)), torch.zeros(20, 24, dtype=torch.bool)])
    masks[3] = torch.rand(20, 24) < 0.002  # hardly anything: many rounds
    result = complete_shape(masks, (4, 6, 9, 30))
    for mask, ours in zip(masks, result, strict=True):
        assert torch.equal(ours, naive(mask, (4, 6, 9)))


def test_completion_restores_a_square_with_a_bite():
    mask = torch.zeros(1, 60, 60, dtype=torch.bool)
    mask[0, 10:34, 20:44] = True
    bitten = mask.clone()
    bitten[0, 20:26, 25:31] = False
    assert torch.equal(complete_shape(bitten, (24,)), mask)


def test_completion_leaves_nothing_where_nothing_was_found():
    empty = torch.zeros(2, 30, 30, dtype=torch.bool)
    assert not bool(complete_shape(empty, (8,)).any())
    speck = empty.clone()
    speck[0, 3, 3] = True
    assert torch.equal(complete_shape(speck, (40,)), speck)  # no side fits


class Oracle(nn.Module):
    """A detector that knows: red pixels are the patch."""

    config = NetworkConfig()

    def at_size(self, images):
        return (images[:, :1] - images[:, 1:2] - 0.5) * 40


def patched():
    x = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)) * 0.4
    mask = torch.zeros(2, 1, 56, 56)
    mask[0, :, 8:20, 30:42], mask[1, :, 40:52, 4:16] = 1, 1
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    return torch.where(mask.bool(), red, x), mask


@pytest.mark.parametrize(
    "defense, colour",
    [
        (Sac(Oracle(), sides=(12, 8)), (0, 0, 0)),
        (PatchZero(Oracle(), grow=0), IMAGENET_MEAN),
    ],
)
def test_the_patch_is_filled_and_the_rest_untouched(defense, colour):
    x, mask = patched()
    y = defense(x)
    expected = torch.where(mask.bool(), torch.tensor(colour).view(3, 1, 1), x)
    torch.testing.assert_close(y, expected)
    assert torch.equal(defense.masks(x), mask.bool())


def test_patchzero_grows_its_mask():
    x, mask = patched()
    grown = PatchZero(Oracle(), grow=3).masks(x)
    assert int(grown.sum()) == 2 * 18 * 18 and bool(grown[mask.bool()].all())


def test_sac_scales_its_squares_to_the_image():
    sac = Sac(Oracle())
    mask = torch.zeros(1, 1, 112, 112, dtype=torch.bool)
    mask[..., 10:50, 20:60] = True  # 40 px = 80 on 224
    result = sac.complete(mask)
    assert torch.equal(result[:, 0], complete_shape(mask[:, 0], (48, 40, 32, 24, 16)))
    assert bool(result[mask].all()) and int(result.sum()) < 1.2 * int(mask.sum())


def test_detector_loss_is_the_evasion_it_says():
    logits = torch.tensor([[[[2.0, -1.0], [0.0, 5.0]]]])
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    expected = -(math.log(1 - 1 / (1 + math.exp(-2))) + math.log(1 - 1 / (1 + math.exp(1)))) / 2
    assert float(evasion_loss(logits, mask)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="does not broadcast"):
        evasion_loss(logits, torch.ones(3, 3))


@pytest.mark.parametrize("cls, net", [(Sac, UNet), (PatchZero, PyramidNet)])
def test_descending_the_detector_loss_fools_the_detector(cls, net):
    defense = cls(tiny_network(net)).eval()
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 4:24, 4:24] = 1
    start = float(defense.detector_loss(x, mask).detach())
    for _ in range(40):
        x.requires_grad_()
        loss = defense.detector_loss(x, mask)
        (grad,) = torch.autograd.grad(loss, x)
        x = (x - 0.05 * grad.sign() * mask).clamp(0, 1).detach()
    assert float(defense.detector_loss(x, mask).detach()) < 0.7 * start


def test_compose_hands_the_detector_what_it_sees():
    sac = Sac(tiny_network(UNet)).eval()
    x, mask = torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    assert Compose([NoDefense()]).detector_loss(x, mask) is None
    both = Compose([NoDefense(), sac]).detector_loss(x, mask)
    torch.testing.assert_close(both, sac.detector_loss(x, mask))
