"""The masked autoencoder against a naive transcription of equations 7-12, and its guarantees."""

import math

import pytest
import torch

from pair.generator import (
    BASE,
    GeneratorConfig,
    MaskedAutoencoder,
    patchify,
    sincos_positions,
    unpatchify,
)
from pair.masks import Bernoulli, ExactCount

CONFIG = GeneratorConfig(
    image_size=16,
    patch_size=4,
    width=16,
    depth=2,
    heads=2,
    decoder_width=12,
    decoder_depth=1,
    decoder_heads=3,
    mlp_ratio=2.0,
)
N = 16
ENCODERS = pytest.mark.parametrize("encoder", ["drop", "zero"])


def toy(seed: int = 0, dtype: torch.dtype = torch.float64) -> MaskedAutoencoder:
    """A tiny generator in which every parameter matters (biases and norms are not trivial)."""
    torch.manual_seed(seed)
    model = MaskedAutoencoder(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype).eval()


def photos(batch: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ragged(batch: int = 5) -> torch.Tensor:
    mask = Bernoulli(0.5)(batch, 4, generator=torch.Generator().manual_seed(2))
    assert len(set(mask.sum(1).tolist())) > 1  # different counts
    return mask


# --- a transcription with loops, sharing nothing with the implementation but the weights ---


def naive_norm(x, layer):
    rows = []
    for row in x:
        mu = sum(row) / len(row)
        var = sum((v - mu) ** 2 for v in row) / len(row)
        rows.append((row - mu) / torch.sqrt(var + layer.eps) * layer.weight + layer.bias)
    return torch.stack(rows)


def naive_linear(x, layer):
    return torch.stack([layer.weight @ row + layer.bias for row in x])


def naive_attention(x, layer, heads):
    d = x.shape[1]
    size = d // heads
    w, b = layer.qkv.weight, layer.qkv.bias
    q, k, v = (x @ w[i * d : (i + 1) * d].T + b[i * d : (i + 1) * d] for i in range(3))
    joined = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(len(x)):
            scores = [float(q[i, part] @ k[j, part]) / math.sqrt(size) for j in range(len(x))]
            weights = [math.exp(s - max(scores)) for s in scores]
            for j in range(len(x)):
                joined[i, part] += weights[j] / sum(weights) * v[j, part]
    return naive_linear(joined, layer.proj)


def naive_block(x, block, heads):
    x = x + naive_attention(naive_norm(x, block.norm1), block.attn, heads)
    hidden = naive_linear(naive_norm(x, block.norm2), block.mlp.fc1)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
    return x + naive_linear(hidden, block.mlp.fc2)


def naive_generator(model, image, m, encoder):
    """Equations 7-12 for one image (3, S, S) and one mask (N,)."""
    c = model.config
    s, g = c.patch_size, c.grid
    mean, std = torch.tensor(c.mean).double(), torch.tensor(c.std).double()

    def fc(p):  # a patch (3, s, s) in [0, 1]
        p = (p - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        kernel, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
        return torch.stack([(kernel[i] * p).sum() + bias[i] for i in range(c.width)])

    e_pos = model.pos_embed[0]
    embedded, shown = [model.cls_token[0, 0] + e_pos[0]], []
    for i in range(g * g):
        row, column = divmod(i, g)
        x_i = image[:, row * s : (row + 1) * s, column * s : (column + 1) * s]
        if encoder == "drop" and not m[i]:
            continue
        p_i = x_i if m[i] else torch.zeros_like(x_i)  # equation 7
        embedded.append(fc(p_i) + e_pos[1 + i])  # equation 8
        shown.append(i)
    f = torch.stack(embedded)
    for block in model.blocks:  # equation 9
        f = naive_block(f, block, c.heads)
    f = naive_linear(naive_norm(f, model.norm), model.decoder_embed)
    q = [f[0] + model.decoder_pos_embed[0, 0]]
    for i in range(g * g):  # equation 10
        feature = f[1 + shown.index(i)] if m[i] else model.mask_token[0, 0]
        q.append(feature + model.decoder_pos_embed[0, 1 + i])
    x = torch.stack(q)
    for block in model.decoder_blocks:  # equation 11
        x = naive_block(x, block, c.decoder_heads)
    x = naive_linear(naive_norm(x, model.decoder_norm), model.decoder_pred)[1:]
    out = torch.zeros_like(image)  # equation 12
    for i in range(g * g):
        row, column = divmod(i, g)
        for a in range(s):
            for b in range(s):
                value = x[i, (a * s + b) * 3 : (a * s + b) * 3 + 3] * std + mean
                out[:, row * s + a, column * s + b] = value
    return out


@ENCODERS
@torch.no_grad()
def test_equations_7_to_12(encoder):
    model, images, mask = toy(), photos(3), ragged(3)
    got = model(images, mask, encoder=encoder)
    for i in range(3):
        wanted = naive_generator(model, images[i], mask[i], encoder)
        torch.testing.assert_close(got[i], wanted, rtol=1e-9, atol=1e-9)
    assert float(got.std()) > 0.1  # not a trivial picture


@torch.no_grad()
def test_a_ragged_batch_equals_one_image_at_a_time():
    model, images, mask = toy(), photos(5), ragged(5)
    together = model(images, mask)
    for i in range(5):
        alone = model(images[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)


@ENCODERS
@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours(encoder):
    model, images, mask = toy(dtype=torch.float32), photos(5, torch.float32), ragged(5)
    before = model(images, mask, encoder=encoder)
    others = images.clone()
    others[1:] = float("nan")
    assert torch.equal(model(others, mask, encoder=encoder)[0], before[0])
    others[1:] = 1e30
    assert torch.equal(model(others, mask, encoder=encoder)[0], before[0])


@ENCODERS
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e38, 0.5])
@pytest.mark.parametrize("kind", ["ragged", "exact"])
def test_hidden_tokens_cannot_reach_the_output_or_any_gradient(encoder, poison, kind):
    model = toy(dtype=torch.float32)
    mask = ragged(4) if kind == "ragged" else ExactCount(0.5)(4, 4)
    hidden = ~mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    hidden = hidden.expand(-1, 3, -1, -1)

    def run(images):
        images = images.clone().requires_grad_()
        model.zero_grad()
        out = model(images, mask, encoder=encoder)
        out.square().sum().backward()
        return out.detach(), images.grad, [p.grad.clone() for p in model.parameters()]

    clean = photos(4, torch.float32)
    poisoned = torch.where(hidden, torch.tensor(poison), clean)
    out, grad, weights = run(clean)
    out_p, grad_p, weights_p = run(poisoned)
    assert torch.equal(out, out_p)  # bit for bit
    assert bool(torch.isfinite(out_p).all())
    assert torch.equal(grad, grad_p)
    assert bool((grad_p[hidden] == 0).all())
    assert bool((grad_p[~hidden] != 0).any())
    for a, b in zip(weights, weights_p, strict=True):
        assert torch.equal(a, b)
        assert bool(torch.isfinite(b).all())


@ENCODERS
def test_gradients_match_finite_differences(encoder):
    model, mask = toy(), ragged(2)
    images = photos(2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: model(x, mask, encoder=encoder), images, fast_mode=True
    )


@torch.no_grad()
def test_visible_tokens_do_reach_the_output():
    """The opposite of non-interference: without this, the tests above would prove nothing."""
    model, images, mask = toy(), photos(1), ragged()[:1]
    changed = images.clone()
    token = int(mask[0].nonzero()[0])
    row, column = divmod(token, 4)
    changed[0, :, row * 4, column * 4] = 1 - changed[0, :, row * 4, column * 4]
    assert not torch.allclose(model(images, mask), model(changed, mask))


@torch.no_grad()
def test_the_encoders_differ_and_agree_when_all_is_visible():
    model, images = toy(), photos(2)
    everything = torch.ones(2, N, dtype=torch.bool)
    a, b = (model(images, everything, encoder=e) for e in ("drop", "zero"))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    mask = ragged(2)
    a, b = (model(images, mask, encoder=e) for e in ("drop", "zero"))
    assert not torch.allclose(a, b)


@torch.no_grad()
def test_zero_encoder_feeds_black_pixels():
    """z of equation 7 is zero before normalisation: black, not the mean colour."""
    model, images, mask = toy(), photos(1), ragged()[:1]
    hidden = ~mask.view(1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    black = torch.where(hidden, torch.zeros((), dtype=torch.float64), images)
    tokens = patchify(black, 4)
    mean, std = model.mean.repeat(16), model.std.repeat(16)
    latent = model._encode(model.patch_embed((tokens - mean) / std) + model.pos_embed[:, 1:])
    y = model.decoder_embed(latent)
    full = torch.where(mask[..., None], y[:, 1:], model.mask_token)
    x = torch.cat([y[:, :1], full], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    wanted = model.decoder_pred(model.decoder_norm(x))[:, 1:] * std + mean
    got = model(images, mask, encoder="zero")
    torch.testing.assert_close(got, unpatchify(wanted, 4), rtol=1e-10, atol=1e-10)


def test_patchify_orders_pixels_by_row_column_channel():
    image = torch.arange(3 * 4 * 4, dtype=torch.float32).view(1, 3, 4, 4)
    tokens = patchify(image, 2)
    for i in range(4):
        row, column = divmod(i, 2)
        wanted = [
            float(image[0, c, row * 2 + a, column * 2 + b])
            for a in range(2)
            for b in range(2)
            for c in range(3)
        ]
        assert tokens[0, i].tolist() == wanted
    assert torch.equal(unpatchify(tokens, 2), image)


def test_positions_follow_the_formula():
    width, grid = 8, 3
    table = sincos_positions(width, grid)[0]
    assert table[0].tolist() == [0.0] * width  # class token
    for row in range(grid):
        for column in range(grid):
            wanted = []
            for at in (column, row):  # the column comes first, as in MAE
                angles = [at / 10000 ** (k / (width / 4)) for k in range(width // 4)]
                wanted += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            got = table[1 + row * grid + column].tolist()
            assert got == pytest.approx(wanted, abs=1e-6)


@torch.no_grad()
def test_half_precision_autocast_runs_ragged_and_zero():
    model = toy(dtype=torch.float32)
    images, mask = photos(3, torch.float32), ragged(3)
    for encoder in ("drop", "zero"):
        with torch.autocast("cpu", torch.bfloat16):
            low = model(images, mask, encoder=encoder)
        high = model(images, mask, encoder=encoder)
        assert low.dtype == torch.float32
        assert float((low - high).abs().mean()) < 0.05 * float(high.std())


def test_geometry():
    assert BASE.grid == 14
    assert CONFIG.grid == 4
    assert GeneratorConfig(**CONFIG.to_dict()) == CONFIG
    as_lists = {**CONFIG.to_dict(), "mean": list(CONFIG.mean), "std": list(CONFIG.std)}
    assert GeneratorConfig(**as_lists) == CONFIG  # as JSON gives them back


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 18}, "not a multiple of patch size 4"),
        ({"patch_size": 0}, "patch_size must be a positive"),
        ({"depth": "two"}, "depth must be a positive"),
        ({"heads": 3}, "width 16 is not a multiple of 3 heads"),
        ({"decoder_heads": 5}, "decoder_width 12 is not a multiple of 5 heads"),
        ({"width": 18}, "width 18 is not a multiple of 4"),
        ({"std": (0.2, 0.2)}, "std must be three"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be three"),
        ({"mean": "grey"}, "mean must be three"),
    ],
)
def test_bad_geometry_is_refused_in_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(**{**CONFIG.to_dict(), **change})


def test_bad_calls_are_refused_in_one_sentence():
    model, images = toy(dtype=torch.float32), photos(2, torch.float32)
    mask = ragged(2)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 16\), expected \(2, 16\)"):
        model(images, mask[:1])
    with pytest.raises(ValueError, match="encoder must be 'drop' or 'zero', got 'skip'"):
        model(images, mask, encoder="skip")
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 16, 16\)"):
        model(images[..., :12], mask)
    with pytest.raises(ValueError, match="mask must be boolean"):
        model(images, mask.float())
