"""The published algorithms as they are described: step by step, nothing shared, nothing saved.

Benchmarks and tests compare the package with these. They are written from descriptions (PAIR's
equations 7 to 13, MAE's masking, the loops of TTH and AdvHash) on plain tensors; of the package
they use weights only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(layer, x):
    b, t, d = x.shape
    qkv = layer.qkv(x).reshape(b, t, 3, layer.heads, d // layer.heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    weights = ((q @ k.transpose(-2, -1)) * (d // layer.heads) ** -0.5).softmax(-1)
    return layer.proj((weights @ v).transpose(1, 2).reshape(b, t, d))


def blocks(layers, x):
    for layer in layers:
        x = x + attention(layer.attn, layer.norm1(x))
        x = x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(x))))
    return x


def one_pass(model, images, mask, encoder):
    """Images (B, 3, S, S) in [0, 1], mask (B, N), True = visible -> images, not clamped.

    ``encoder="zero"``: hidden patches are black and go through the encoder (equations 7 to 9).
    ``"drop"``: they are removed as MAE removes them, which needs equally many in each image.
    """
    c = model.config
    b, g, p = len(images), c.grid, c.patch_size
    mean, std = model.mean.view(3, 1, 1), model.std.view(3, 1, 1)
    if encoder == "zero":
        kept = mask.view(b, 1, g, g).repeat_interleave(p, 2).repeat_interleave(p, 3)
        images = images * kept
    embed = model.patch_embed.proj((images - mean) / std)
    x = embed.flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    cls = (model.cls_token + model.pos_embed[:, :1]).expand(b, -1, -1)
    if encoder == "zero":
        x = model.norm(blocks(model.blocks, torch.cat([cls, x], 1)))
        x = model.decoder_embed(x)
        told = torch.where(mask[..., None], x[:, 1:], model.mask_token)
    else:
        order = (~mask).int().argsort(dim=1, stable=True)  # visible first
        back, count = order.argsort(dim=1), int(mask[0].sum())
        width = x.shape[-1]
        x = x.gather(1, order[:, :count, None].expand(-1, -1, width))
        x = model.norm(blocks(model.blocks, torch.cat([cls, x], 1)))
        x = model.decoder_embed(x)
        filled = torch.cat([x[:, 1:], model.mask_token.expand(b, g * g - count, -1)], 1)
        told = filled.gather(1, back[..., None].expand(-1, -1, filled.shape[-1]))
    x = torch.cat([x[:, :1], told], 1) + model.decoder_pos_embed
    x = model.decoder_pred(model.decoder_norm(blocks(model.decoder_blocks, x)))[:, 1:]
    x = x.reshape(b, g, g, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(b, 3, g * p, g * p)
    return x * std + mean


def purify(model, images, mask, encoder):
    """Equation 13: again with the inverted mask; the last clamp lets gradients through."""
    once = one_pass(model, images, mask, encoder)
    twice = one_pass(model, once, ~mask, encoder)
    return twice + (twice.clamp(0, 1) - twice).detach()


def tth(encode, carriers, e_t, init, iterations, lr=0.01, lam=1.0):
    """The published loop: a whole-image parameter, a binary mask (top right), iterations 0..n, the
    patch that the last iteration composed, and the rule against divergence (at most 10 trials).
    Returns it and the losses."""
    h, w = carriers.shape[-2:]
    side = init.shape[-1]
    patch_init = torch.zeros(3, h, w, dtype=init.dtype)
    patch_init[:, :side, w - side :] = init
    mask = torch.zeros(1, h, w, dtype=init.dtype)
    mask[:, :side, w - side :] = 1
    for _ in range(10):
        patch = patch_init.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([patch], lr=lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.95)
        losses, smallest, converged = [], float("inf"), False
        for _step in range(iterations + 1):
            patch.data.clamp_(0, 1)
            composed = patch.detach().clone()
            x = (1 - mask) * carriers + mask * patch
            cos = F.cosine_similarity(encode(x), e_t)
            perf = (1 - cos).mean()
            loss = perf + lam * ((patch - patch_init) ** 2).sum() / (h * w)
            value = float(perf.detach())
            losses.append(value)
            smallest = min(smallest, value)
            converged = converged or value < 1e-4
            if not converged and value > 2 * smallest:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        else:
            return composed[:, :side, w - side :], losses
        lr, iterations = lr / 5, iterations * 2
    raise AssertionError("no trial converged")


def advhash_loss(output, real, target):
    weights = torch.where((real - target).abs() < 0.3, 0, 1)
    k = weights.sum()
    return None if k == 0 else -(weights * output * target).sum() / k


def advhash_batch(images, applied, mask, target, h, low, high, step, iterations):
    """One mini-batch: applied patch of image size, products measured after each update."""
    bits = len(target)
    adversarial = mask * applied + (1 - mask) * images
    products = (h(adversarial).sign() * target).sum(1)  # the published code leaves this undefined
    average, count, losses = 0.0, 0, []
    while average < bits and count < iterations:
        alpha = 1.0 if average / bits > 0.9 else 0.01
        count += 1
        adversarial = adversarial.detach().requires_grad_(True)
        real = h(adversarial)
        loss = advhash_loss((alpha * real).tanh(), real.tanh(), target)
        if loss is None:
            break
        losses.append(float(loss.detach()))
        loss.backward()
        grads = adversarial.grad
        weights = [float(p) + abs(float(products.min())) + 2 for p in products]
        total = sum(w * g for w, g in zip(weights, grads, strict=True)) / sum(weights)
        applied = (applied - step * total.sign()).clamp(low, high)
        adversarial = mask * applied + (1 - mask) * images
        products = (h(adversarial).sign() * target).sum(1)
        average = float(products.mean())
    return applied, losses


def advhash(images, content, corner, target, h, config, generator, low=0.0, high=1.0):
    """``content`` (3, s, s) at ``corner`` (top, left); ``config`` has epochs, batch, iterations and
    budget (updates in all, or None). Returns the mean of the last two patches, the patch that the
    last mini-batch started from, and the losses."""
    (top, left), side = corner, content.shape[-1]
    box = (slice(None), slice(top, top + side), slice(left, left + side))
    applied = torch.zeros_like(images[0])
    applied[box] = content
    mask = torch.zeros_like(images[0])
    mask[box] = 1
    recent, losses, started = [applied], [], applied
    budget = float("inf") if config.budget is None else config.budget
    for _ in range(config.epochs):
        for rows in torch.randperm(len(images), generator=generator).split(config.batch):
            if len(losses) >= budget:
                break
            started = torch.stack(recent).mean(0)
            iterations = int(min(config.iterations, budget - len(losses)))
            new, part = advhash_batch(
                images[rows], started, mask, target, h, low, high, 1 / 255, iterations
            )
            losses += part
            recent = [*recent, new][-2:]
    return torch.stack(recent).mean(0)[box], started[box], losses
