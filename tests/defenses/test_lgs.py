"""LGS against a loop written from its definition."""

import math

import pytest
import torch

from pair.defenses.lgs import LGS, gradient_magnitude


def naive(image, block, overlap, threshold, smoothing):
    """One (3, H, W) image, pixel by pixel."""
    h, w = image.shape[-2:]
    grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    g = torch.zeros(h, w, dtype=image.dtype)
    for y in range(h):
        for x in range(w):
            dx = grey[y, min(x + 1, w - 1)] - grey[y, x]
            dy = grey[min(y + 1, h - 1), x] - grey[y, x]
            g[y, x] = math.sqrt(float(dx**2 + dy**2) + 1e-12)
    low, high = float(g.min()), float(g.max())
    g = (g - low) / max(high - low, 1e-6)
    kept = torch.zeros_like(g)
    stride = block - overlap
    top = 0
    while True:
        left = 0
        while True:
            part = g[top : top + block, left : left + block]
            if float(part.mean()) > threshold:
                kept[top : top + block, left : left + block] = 1
            if left + block >= w:
                break
            left += stride
        if top + block >= h:
            break
        top += stride
    return image * (1 - smoothing * g * kept).clamp(0, 1)


def scene(h, w):
    """Smooth background with a busy square in the bottom right corner."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0.2, 0.8, w).expand(3, h, w).clone().double()
    ramp[:, -20:, -18:] = torch.rand(3, 20, 18, generator=generator).double()
    return ramp


@pytest.mark.parametrize("size", [(56, 56), (41, 63), (12, 30), (15, 15)])
@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3])
def test_matches_the_loop(size, threshold):
    image = scene(*size) if min(size) > 20 else torch.rand(3, *size, dtype=torch.float64)
    result = LGS(threshold=threshold)(image[None])[0]
    torch.testing.assert_close(result, naive(image, 15, 5, threshold, 2.3))


def test_smooths_the_busy_corner_and_nothing_far_from_it():
    image = scene(56, 56)
    result = LGS()(image[None])[0]
    assert torch.equal(result[:, :, :25], image[:, :, :25])
    # The last rows and columns are covered too: no border escapes.
    assert bool((result[:, -15:, -3:] < image[:, -15:, -3:]).any((0, 1)).all())


def test_a_flat_image_has_no_gradient_and_stays():
    flat = torch.full((1, 3, 32, 32), 0.4)
    assert float(gradient_magnitude(flat).max()) == 0
    assert torch.equal(LGS()(flat), flat)


def test_the_bridge_reaches_pixels_that_went_black():
    image = scene(56, 56)[None].float()
    grads = []
    for bridge in (False, True):
        x = image.clone().requires_grad_()
        LGS(bridge=bridge)(x)[..., -18:, -16:].sum().backward()
        grads.append(x.grad[..., -17:, -15:])
    dead = (LGS()(image)[..., -17:, -15:] == 0).all(1, keepdim=True).expand_as(grads[0])
    assert int(dead.sum()) > 100
    assert float((grads[1][dead] != 0).float().mean()) > float((grads[0][dead] != 0).float().mean())
