"""The masked autoencoder that rebuilds images (PAIR equations 7-12).

The architecture is that of MAE (He et al. 2022): a ViT encoder that sees the visible tokens
and a light decoder that predicts the pixels of *all* tokens. Parameter names follow the public
MAE checkpoints, so those load without translation.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.kernels import linear, linear_add, linear_gelu
from pair.tokens import Layout, Selection

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class GeneratorConfig:
    """Geometry and pixel convention of a generator. Defaults: the small model that ships."""

    image_size: int = 112
    patch_size: int = 8
    width: int = 192
    depth: int = 4
    heads: int = 6
    decoder_width: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        counts = ("image_size", "patch_size", "width", "depth", "heads")
        for name in (*counts, "decoder_width", "decoder_depth", "decoder_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image size {self.image_size} is not a multiple of patch size {self.patch_size}"
            )
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}width"), getattr(self, f"{prefix}heads")
            if width % heads:
                raise ValueError(f"{prefix}width {width} is not a multiple of {heads} heads")
            if width % 4:
                raise ValueError(f"{prefix}width {width} is not a multiple of 4 (sine positions)")
        for name, low in (("mean", -math.inf), ("std", 0.0)):
            values = tuple(getattr(self, name))
            if len(values) != 3 or not all(isinstance(v, int | float) and v > low for v in values):
                raise ValueError(f"{name} must be three numbers, one per channel, got {values}")
            object.__setattr__(self, name, values)

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    def to_dict(self) -> dict:
        return asdict(self)


# ViT-B/16 and ViT-L/16 at 224 px with the 8 x 512 decoder of the public MAE checkpoints.
BASE = GeneratorConfig(224, 16, 768, 12, 12, 512, 8, 16)
LARGE = GeneratorConfig(224, 16, 1024, 24, 16, 512, 8, 16)
HUGE = GeneratorConfig(224, 14, 1280, 32, 16, 512, 8, 16)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, patch*patch*3); a token is flattened as (row, column, channel)."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    n = (h // patch) * (w // patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, n, patch * patch * c)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """Inverse of :func:`patchify` for square images."""
    b, n, _ = tokens.shape
    g = round(n**0.5)
    x = tokens.reshape(b, g, g, patch, patch, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, g * patch, g * patch)


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding with a zero row for the class token: (1, 1 + g*g, D).

    The first half of the channels encodes the column, the second half the row (as MAE does).
    """
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    at = torch.arange(grid, dtype=torch.float64)
    rows, cols = torch.meshgrid(at, at, indexing="ij")
    parts = []
    for coordinate in (cols, rows):
        angle = coordinate.reshape(-1, 1) * omega  # (N, D/4)
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, 1)  # (N, D)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])[None].float()


class Attention(nn.Module):
    """Multi-head attention of tokens (B, T, D), or of the packed rows of a ragged batch.

    With ``asking`` only those rows ask (rows for rows), all tokens answer.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        asking: tuple[Tensor, Layout | None] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        d = x.shape[-1]
        if asking is None:
            q, k, v = self._heads(linear(x, self.qkv), layout, 3)
            back = layout
        else:
            rows, back = asking
            (q,) = self._heads(linear(rows, self.qkv, slice(0, d)), back, 1)
            k, v = self._heads(linear(x, self.qkv, slice(d, None)), layout, 2)
        bias = None if layout is None else layout.keys
        if q.dtype == torch.bfloat16 and q.device.type == "cpu" and bias is None:
            # Measured: the fused kernel's bf16 backward is 2-3 times slower than this on CPUs.
            scores = (q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5
            out = scores.softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2)
        out = out if back is None else back.pack(out)
        return self.proj(out) if residual is None else linear_add(out, self.proj, residual)

    def _heads(self, x: Tensor, layout: Layout | None, parts: int) -> tuple[Tensor, ...]:
        x = x if layout is None else layout.pad(x)
        x = x.unflatten(-1, (parts, self.heads, -1))  # (B, T, parts, heads, D/heads)
        return x.permute(2, 0, 3, 1, 4).unbind()


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        h = linear_gelu(x, self.fc1)
        return self.fc2(h) if residual is None else linear_add(h, self.fc2, residual)


class Block(nn.Module):
    """Pre-norm transformer block for tokens (B, T, D) or packed rows (R, D) with their layout.

    ``wanted`` names tokens behind the first slot; the block then returns their rows only.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def forward(
        self, x: Tensor, layout: Layout | None = None, wanted: Selection | None = None
    ) -> Tensor:
        h = self.norm1(x)
        asking = None
        if wanted is not None:
            asking = (wanted.take(h, first=1), wanted.layout(mask=False))
            x = wanted.take(x, first=1)
        x = self.attn(h, layout, asking, residual=x)
        return self.mlp(self.norm2(x), residual=x)


class PatchEmbed(nn.Module):
    """Linear embedding of tokens, stored as the convolution that MAE checkpoints hold."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, tokens: Tensor) -> Tensor:
        # Tokens are (row, column, channel); the kernel is (channel, row, column).
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(tokens, weight, self.proj.bias)


class MaskedAutoencoder(nn.Module):
    """Generator G: rebuild an image from its visible tokens.

    ``forward(images, mask, encoder="drop")`` takes images (B, 3, S, S) in [0, 1] and a mask
    (B, N), True = visible, and returns the decoder's image (B, 3, S, S), *not* clamped.

    ``encoder="drop"`` removes hidden tokens before the encoder (MAE); images with different
    counts share a batch by packing, which changes results by rounding at most.
    ``encoder="zero"`` feeds hidden tokens as black patches (equations 7-9, literally). Either
    way hidden pixels are removed *before* any arithmetic touches them, so even NaN there can
    reach neither the output nor a gradient.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: GeneratorConfig | None = None):
        super().__init__()
        c = self.config = config or GeneratorConfig()
        self.patch_embed = PatchEmbed(c.patch_size, c.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.register_buffer("pos_embed", sincos_positions(c.width, c.grid))
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.mlp_ratio, c.eps) for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.decoder_embed = nn.Linear(c.width, c.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_width))
        self.register_buffer("decoder_pos_embed", sincos_positions(c.decoder_width, c.grid))
        self.decoder_blocks = nn.ModuleList(
            Block(c.decoder_width, c.decoder_heads, c.mlp_ratio, c.eps)
            for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(c.decoder_width, eps=c.eps)
        self.decoder_pred = nn.Linear(c.decoder_width, c.patch_size**2 * 3)
        self.register_buffer("mean", torch.tensor(c.mean), persistent=False)
        self.register_buffer("std", torch.tensor(c.std), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def grid(self) -> int:
        return self.config.grid

    def forward(self, images: Tensor, mask: Tensor, encoder: str = "drop") -> Tensor:
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images must have shape (B, 3, {size}, {size}), got {tuple(images.shape)}"
            )
        tokens = patchify(images, self.config.patch_size)  # (B, N, p*p*3), in [0, 1]
        return self.to_image(self.forward_tokens(tokens, mask, encoder))

    def forward_tokens(self, tokens: Tensor, mask: Tensor, encoder: str = "drop") -> Tensor:
        """Tokens (B, N, p*p*3) in [0, 1] -> all tokens predicted, in [0, 1] units."""
        if mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected {tuple(tokens.shape[:2])}"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean, True = visible, got {mask.dtype}")
        seen = Selection.of(mask)
        return self.predict(self.states(seen.take(tokens), seen, encoder))

    def states(self, pixels: Tensor, seen: Selection, encoder: str = "drop") -> Tensor:
        """Pixels of the visible tokens -> what the last block of the decoder gets, (B, 1 + N, D).

        ``pixels`` are rows of ``seen``, (B, T, p*p*3) or packed, in [0, 1].
        """
        if encoder == "drop":
            x = self.patch_embed(self._normalise(pixels)) + seen.lookup(self.pos_embed[0, 1:])
            head, rows = seen.parted(self.decoder_embed(self._encode(x, seen)))
        elif encoder == "zero":
            black = pixels.new_zeros(seen.batch, self.grid**2, pixels.shape[-1])
            full = self.patch_embed(self._normalise(seen.put(black, pixels)))
            y = self.decoder_embed(self._encode(full + self.pos_embed[:, 1:]))
            head, rows = y[:, 0], seen.take(y, first=1)
        else:
            raise ValueError(f"encoder must be 'drop' or 'zero', got {encoder!r}")
        hidden = self.mask_token.to(rows.dtype).expand(seen.batch, self.grid**2, -1)
        x = torch.cat([head[:, None], hidden], 1)
        x = seen.put(x, rows, first=1) + self.decoder_pos_embed
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return x

    def predict(self, states: Tensor, wanted: Selection | None = None) -> Tensor:
        """Pixels in [0, 1] units, not clamped: of all tokens (B, N, p*p*3), or rows of ``wanted``.

        Everything is attended to either way; what is not wanted is merely not computed.
        """
        x = self.decoder_blocks[-1](states, wanted=wanted)
        x = linear(self.decoder_norm(x if wanted is not None else x[:, 1:]), self.decoder_pred)
        p2 = self.config.patch_size**2
        return x * self.std.repeat(p2) + self.mean.repeat(p2)

    def _normalise(self, pixels: Tensor) -> Tensor:
        p2 = self.config.patch_size**2
        return (pixels - self.mean.repeat(p2)) / self.std.repeat(p2)

    def to_image(self, tokens: Tensor) -> Tensor:
        return unpatchify(tokens, self.config.patch_size)

    def _encode(self, x: Tensor, seen: Selection | None = None) -> Tensor:
        # (B, T, D), or rows of ``seen``, without; the result with the class token.
        head = self.cls_token + self.pos_embed[:, :1]
        if seen is None:
            x, layout = torch.cat([head.expand(len(x), -1, -1), x], 1), None
        else:
            x, layout = seen.lead(head, x), seen.layout(first=1)
        for block in self.blocks:
            x = block(x, layout)
        return self.norm(x)
