"""Both passes of a purifier as one graph of plain operations, with the masks as inputs.

For engines that compile a graph once and then take any masks (OpenVINO). What
:class:`pair.purifier.Purifier` does with selections is done here with token numbers: everything is
a product, a sum, or a row looked up. Same weights, same results up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.generator import Attention, MaskedAutoencoder

NAMES = ("tokens", "visible", "hidden", "place")
RAGGED = ("visible_bias", "hidden_bias")  # further inputs where counts differ
ROUND = 8  # ragged lengths are multiples of this: engines prepare for each shape anew


def inputs(tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Graph inputs for tokens (B, N, P) and masks (B, N), True = visible in the first pass.

    ``visible`` (B, V) and ``hidden`` (B, H) are token numbers, ``place`` (B, N) says where in both
    together each token is. Where images have different counts, short rows repeat their last token
    and the biases (B, 1, 1, 1 + V) and (B, 1, 1, 1 + H) take the repetitions out of attention.
    """
    visible, shown = _numbers(mask)
    hidden, gone = _numbers(~mask)
    rank = mask.cumsum(1) - 1
    rest = (~mask).cumsum(1) - 1 + visible.shape[1]
    out = {"tokens": tokens, "visible": visible, "hidden": hidden}
    out["place"] = torch.where(mask, rank, rest)
    if shown is not None or gone is not None:
        out["visible_bias"] = _bias(visible, shown, tokens.dtype)
        out["hidden_bias"] = _bias(hidden, gone, tokens.dtype)
    return out


def _numbers(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Numbers of the True tokens (B, L), and which of them are real (None: all)."""
    counts = mask.sum(1)
    longest = int(counts.max())
    if int(counts.min()) == longest:
        return mask.nonzero()[:, 1].view(len(mask), longest), None
    longest = min(-(-longest // ROUND) * ROUND, mask.shape[1])
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    at = torch.arange(longest, device=mask.device)
    # The last token of the same kind, not just any: what is hidden must not be looked up.
    return order.gather(1, torch.minimum(at, counts[:, None] - 1)), at < counts[:, None]


def _bias(index: Tensor, real: Tensor | None, dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(index.shape, dtype=dtype, device=index.device)
    if real is not None:
        bias = bias.masked_fill(~real, -1e9)
    return F.pad(bias, (1, 0))[:, None, None, :]  # the class token is always there


class Passes(nn.Module):
    """Tokens (B, N, P) to tokens (B, N, P) in [0, 1] units, not clamped; see :func:`inputs`."""

    mean: Tensor
    std: Tensor

    def __init__(self, generator: MaskedAutoencoder, paste: bool = False):
        super().__init__()
        self.generator, self.paste = generator, paste
        p2 = generator.config.patch_size**2
        self.register_buffer("mean", generator.mean.repeat(p2), persistent=False)
        self.register_buffer("std", generator.std.repeat(p2), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        visible: Tensor,
        hidden: Tensor,
        place: Tensor,
        visible_bias: Tensor | None = None,
        hidden_bias: Tensor | None = None,
    ) -> Tensor:
        v, h = visible.shape[1], hidden.shape[1]
        # Slot 0 is the class token, the one behind the seen tokens the mask token.
        first = place.clamp(max=v) + 1
        second = torch.where(place >= v, place - v, h) + 1
        rebuilt = self._one(rows(tokens, visible), visible, first, visible_bias, hidden)
        wanted = visible if self.paste else None
        last = self._one(rebuilt, hidden, second, hidden_bias, wanted)
        if not self.paste:
            return last[:, 1:]
        return rows(torch.cat([last, rebuilt], 1), place)

    def _one(
        self,
        pixels: Tensor,
        seen: Tensor,
        slots: Tensor,
        bias: Tensor | None,
        wanted: Tensor | None,
    ) -> Tensor:
        g = self.generator
        x = g.patch_embed((pixels - self.mean) / self.std) + F.embedding(seen, g.pos_embed[0, 1:])
        x = torch.cat([(g.cls_token + g.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], 1)
        for block in g.blocks:
            x = _block(block, x, bias)
        y = g.decoder_embed(g.norm(x))
        y = torch.cat([y, g.mask_token.expand(y.shape[0], -1, -1)], 1)
        y = rows(y, torch.cat([torch.zeros_like(slots[:, :1]), slots], 1)) + g.decoder_pos_embed
        for block in g.decoder_blocks[:-1]:
            y = _block(block, y)
        y = _block(g.decoder_blocks[-1], y, None, None if wanted is None else wanted + 1)
        return g.decoder_pred(g.decoder_norm(y)) * self.std + self.mean


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: x (B, S, D) and numbers (B, K) -> (B, K, D)."""
    b, s, d = x.shape
    start = torch.arange(b, device=x.device)[:, None] * s
    return F.embedding(index + start, x.reshape(-1, d))


def _block(
    block: Any, x: Tensor, bias: Tensor | None = None, wanted: Tensor | None = None
) -> Tensor:
    h = block.norm1(x)
    if wanted is None:
        x = x + _attend(block.attn, h, h, bias)
    else:
        x = rows(x, wanted) + _attend(block.attn, rows(h, wanted), h, bias)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def _attend(layer: Attention, asking: Tensor, answering: Tensor, bias: Tensor | None) -> Tensor:
    d = answering.shape[-1]
    if asking is answering:
        q, k, v = _heads(layer.qkv(answering), 3, layer.heads)
    else:
        weight, start = layer.qkv.weight, layer.qkv.bias
        (q,) = _heads(F.linear(asking, weight[:d], start[:d]), 1, layer.heads)
        k, v = _heads(F.linear(answering, weight[d:], start[d:]), 2, layer.heads)
    scores = (q * (d // layer.heads) ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    out = scores.softmax(-1) @ v
    return layer.proj(out.transpose(1, 2).reshape(out.shape[0], -1, d))


def _heads(x: Tensor, parts: int, heads: int) -> list[Tensor]:
    x = x.reshape(x.shape[0], x.shape[1], parts, heads, x.shape[2] // (parts * heads))
    x = x.permute(2, 0, 3, 1, 4)
    return [x[i] for i in range(parts)]
