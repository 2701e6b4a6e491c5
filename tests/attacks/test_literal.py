"""The literal purifier of the benchmarks computes what PAIR's purifier computes."""

import literal
import pytest
import torch
from attack_models import photos, purifier, seeded

from pair.masks import Bernoulli, ExactCount


@pytest.mark.parametrize(
    ("encoder", "rule"), [("drop", ExactCount(0.5)), ("zero", ExactCount(0.5)),
                          ("zero", Bernoulli(0.5))],
)  # fmt: skip
def test_equations_7_to_13_step_by_step(encoder, rule):
    ours = purifier(rule, dtype=torch.float64)
    ours.encoder = encoder
    images = photos(3, dtype=torch.float64)
    mask = ours.draw_mask(3, seeded(4))
    gradients = []
    for function in (lambda x: ours(x, mask=mask),
                     lambda x: literal.purify(ours.autoencoder, x, mask, encoder)):  # fmt: skip
        x = images.clone().requires_grad_(True)
        out = function(x)
        gradients.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert float(gradients[0][1].abs().max()) > 0
