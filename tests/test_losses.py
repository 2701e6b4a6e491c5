"""Losses against naive transcriptions of equations 14-17."""

import math

import pytest
import torch

from pair.losses import C1, C2, patch_loss, patch_ssim, semantic_loss, total_loss


def pictures(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_ssim(a: list[float], b: list[float]) -> float:
    """Equation 16 for two lists of pixel values."""
    n, c1, c2 = len(a), 1e-4, 9e-4
    mu_a, mu_b = sum(a) / n, sum(b) / n
    var_a = sum((v - mu_a) ** 2 for v in a) / n
    var_b = sum((v - mu_b) ** 2 for v in b) / n
    cov = sum((v - mu_a) * (w - mu_b) for v, w in zip(a, b, strict=True)) / n
    top = (2 * mu_a * mu_b + c1) * (2 * cov + c2)
    return top / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))


def naive_tokens(image: torch.Tensor, s: int) -> list[list[list[float]]]:
    """Pixel values by token and channel."""
    _, height, width = image.shape
    return [
        [
            [float(image[c, y + i, x + j]) for i in range(s) for j in range(s)]
            for c in range(image.shape[0])
        ]
        for y in range(0, height, s)
        for x in range(0, width, s)
    ]


@pytest.mark.parametrize("per_channel", [True, False])
def test_equations_15_and_16(per_channel):
    x, y = pictures(0), pictures(1)
    y[0] = 0.7 * x[0] + 0.3 * y[0]  # one alike, one not
    wanted = []
    for a, b in zip(x, y, strict=True):
        row = []
        for t, u in zip(naive_tokens(a, 4), naive_tokens(b, 4), strict=True):
            if per_channel:
                row.append(sum(naive_ssim(t[c], u[c]) for c in range(3)) / 3)
            else:
                row.append(naive_ssim([v for c in t for v in c], [v for c in u for v in c]))
        wanted.append(row)
    got = patch_ssim(x, y, 4, per_channel)
    assert got.shape == (2, 6)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    mean = sum(1 - v for row in wanted for v in row) / 12
    assert float(patch_loss(x, y, 4, per_channel)) == pytest.approx(mean, abs=1e-12)


def test_colour_readings_differ_where_only_the_hue_changes():
    x = torch.zeros(1, 3, 4, 4)
    x[:, 0], y = 1.0, torch.zeros(1, 3, 4, 4)
    y[:, 1] = 1.0  # red against green, both flat
    assert float(patch_ssim(x, y, 4, True)) != pytest.approx(float(patch_ssim(x, y, 4, False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_images_give_exactly_one(dtype):
    x = pictures(3, dtype)
    assert patch_ssim(x, x, 4).eq(1).all()
    assert float(patch_loss(x, x, 4)) == 0.0


def test_constants_and_flat_patches():
    assert (C1, C2) == (1e-4, 9e-4)
    a, b = 0.3, 0.8
    flat = [torch.full((1, 3, 4, 4), v) for v in (a, b)]
    wanted = (2 * a * b + C1) / (a * a + b * b + C1)
    assert float(patch_ssim(flat[0], flat[1], 4)) == pytest.approx(wanted, rel=1e-5)


def test_range_and_symmetry():
    x, y = pictures(4), pictures(5)
    ssim = patch_ssim(x, y, 2)
    assert bool((ssim >= -1).all()) and bool((ssim <= 1).all())
    torch.testing.assert_close(ssim, patch_ssim(y, x, 2))
    stripes = torch.zeros(1, 3, 4, 4)
    stripes[..., ::2] = 1
    assert float(patch_ssim(stripes, 1 - stripes, 4)) < -0.99  # anti-correlated


def test_equation_17():
    generator = torch.Generator().manual_seed(0)
    z, w = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    total = 0.0
    for a, b in zip(z.tolist(), w.tolist(), strict=True):
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        norms = math.sqrt(sum(p * p for p in a)) * math.sqrt(sum(q * q for q in b))
        total += 1 - dot / norms
    assert float(semantic_loss(z, w)) == pytest.approx(total / 5, abs=1e-12)
    assert float(semantic_loss(z, 3 * z)) == pytest.approx(0, abs=1e-12)
    assert float(semantic_loss(z, -z)) == pytest.approx(2, abs=1e-12)


def test_equation_14():
    l_p, l_s = torch.tensor(0.3), torch.tensor(0.2)
    assert float(total_loss(l_p, l_s)) == pytest.approx(0.5)
    assert float(total_loss(l_p, l_s, beta=0.0)) == pytest.approx(0.3)
    assert float(total_loss(l_p, l_s, beta=2.5)) == pytest.approx(0.8)


def test_gradients_match_finite_differences():
    x, y = pictures(6), pictures(7).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: patch_loss(x, t, 4), y, fast_mode=True)
    assert torch.autograd.gradcheck(lambda t: patch_loss(x, t, 4, False), y, fast_mode=True)
    z = x.flatten(1)
    assert torch.autograd.gradcheck(lambda t: semantic_loss(z, t.flatten(1)), y, fast_mode=True)


def test_half_precision_input_is_computed_in_float32():
    x, y = pictures(8, torch.float32), pictures(9, torch.float32)
    low = patch_ssim(x.bfloat16(), y.bfloat16(), 4)
    assert low.dtype == torch.float32
    exact = patch_ssim(x.bfloat16().double(), y.bfloat16().double(), 4)
    torch.testing.assert_close(low.double(), exact, rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused_in_one_sentence():
    x = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="8 x 8 pixels do not divide into tokens of side 3"):
        patch_ssim(x, x, 3)
    with pytest.raises(ValueError, match="differ in shape"):
        patch_ssim(x, x[:, :1], 4)
