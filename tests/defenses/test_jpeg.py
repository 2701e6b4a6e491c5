"""The differentiable codec against the real one."""

import io

import pytest
import torch
from PIL import Image

from pair.defenses.jpeg import (
    CHROMINANCE,
    LUMINANCE,
    Jpeg,
    dct_matrix,
    differentiable_jpeg,
    quantisation,
    real_jpeg,
    smooth_round,
)
from pair.images import to_pil


def photo(size=(64, 80), seed=0):
    """Edges, ramps and texture, as photos have: (1, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    h, w = size
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    base = torch.stack([x, y, 0.5 + 0.4 * torch.sin(9 * x + 5 * y)])
    base[:, h // 4 : h // 2, w // 3 : 2 * w // 3] = torch.tensor([0.9, 0.1, 0.3]).view(3, 1, 1)
    texture = 0.06 * torch.randn(3, h, w, generator=generator)
    return (base + texture).clamp(0, 1)[None]


@pytest.mark.parametrize("quality", [10, 30, 49, 50, 75, 90, 100])
def test_tables_are_those_that_the_codec_writes(quality):
    buffer = io.BytesIO()
    to_pil(photo()[0]).save(buffer, "JPEG", quality=quality, subsampling=2)
    written = Image.open(buffer).quantization  # row by row in Pillow >= 8.3
    for number, table in enumerate((LUMINANCE, CHROMINANCE)):
        ours = quantisation(table, quality)
        assert sorted(written[number]) == sorted(ours.flatten().tolist())
        assert written[number][0] == ours[0, 0] and written[number][63] == ours[7, 7]


@pytest.mark.parametrize("quality", [30, 50, 75, 90])
@pytest.mark.parametrize("size", [(64, 80), (49, 35)])
def test_surrogate_is_close_to_the_codec(quality, size):
    x = photo(size)
    real, ours = real_jpeg(x, quality), differentiable_jpeg(x, quality)
    error = float((real - ours).abs().mean())
    assert error < 2.5 / 255
    # Far closer than doing nothing: the surrogate models the loss, not the identity.
    assert error < 0.6 * float((real - x).abs().mean()) or quality == 90


def test_surrogate_has_a_useful_gradient_everywhere():
    x = photo().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (differentiable_jpeg(x, 75, clamp=False) * weight).sum().backward()
    assert float((x.grad == 0).float().mean()) < 0.01


def test_the_dct_is_orthonormal():
    d = dct_matrix().double()
    torch.testing.assert_close(d @ d.T, torch.eye(8).double(), atol=1e-6, rtol=0)


def test_smooth_rounding():
    x = torch.tensor([0.0, 0.25, -1.75, 3.0, 0.4])
    expected = torch.tensor([0.0, 0.25**3, -2 + 0.25**3, 3.0, 0.4**3])
    torch.testing.assert_close(smooth_round(x), expected)


def test_the_defense_is_what_a_file_would_hold():
    x = photo()
    buffer = io.BytesIO()
    to_pil(x[0]).save(buffer, "JPEG", quality=60, subsampling="4:2:0")
    pixels = torch.tensor(list(Image.open(buffer).tobytes())).view(*x.shape[-2:], 3)
    assert torch.equal(Jpeg(60)(x)[0], pixels.permute(2, 0, 1) / 255)
