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
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, D/heads)
        bias = None if keys is None else keys[:, None, None, :]
        if q.dtype == torch.bfloat16 and q.device.type == "cpu" and bias is None:
            # Measured: the fused kernel's bf16 backward is 2-3 times slower than this on CPUs.
            scores = (q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5
            out = scores.softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; ``keys`` (B, T) marks the real tokens of a padded batch."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), keys)
        return x + self.mlp(self.norm2(x))


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
    counts share a batch by padding, which changes results by rounding at most.
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
        p2 = self.config.patch_size**2
        mean, std = self.mean.repeat(p2), self.std.repeat(p2)
        if mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, expected {tuple(tokens.shape[:2])}"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean, True = visible, got {mask.dtype}")
        if encoder == "drop":
            latent, index, keys = self._encode_visible(tokens, mask, mean, std)
            full = self._scatter(self.decoder_embed(latent), index, keys, mask)
        elif encoder == "zero":
            black = torch.zeros((), dtype=tokens.dtype, device=tokens.device)
            seen = torch.where(mask[..., None], tokens, black)
            latent = self._encode(self.patch_embed((seen - mean) / std) + self.pos_embed[:, 1:])
            y = self.decoder_embed(latent)
            rest = torch.where(mask[..., None], y[:, 1:], self.mask_token.to(y.dtype))
            full = torch.cat([y[:, :1], rest], 1)
        else:
            raise ValueError(f"encoder must be 'drop' or 'zero', got {encoder!r}")
        x = full + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:] * std + mean

    def to_image(self, tokens: Tensor) -> Tensor:
        return unpatchify(tokens, self.config.patch_size)

    def _encode(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        # x: (B, T, D) without, result (B, 1 + T, D) with the class token.
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, keys)
        return self.norm(x)

    def _encode_visible(self, tokens, mask, mean, std):
        b, _, d = tokens.shape
        counts = mask.sum(1)
        shortest, longest = (int(c) for c in counts.aminmax()) if b else (0, 0)
        # Visible tokens first, in their order; the rest of a short row is padding.
        index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        picked = tokens.gather(1, index[..., None].expand(-1, -1, d))  # (B, T, p*p*3)
        keys = None
        if shortest != longest:
            real = torch.arange(longest, device=mask.device) < counts[:, None]  # (B, T)
            picked = torch.where(real[..., None], picked, torch.zeros_like(picked))
            keys = torch.cat([real.new_ones(b, 1), real], 1)
        positions = self.pos_embed[0, 1:][index]  # (B, T, D)
        x = self.patch_embed((picked - mean) / std) + positions
        return self._encode(x, keys), index, keys

    def _scatter(self, y: Tensor, index: Tensor, keys: Tensor | None, mask: Tensor) -> Tensor:
        b, n = mask.shape
        full = self.mask_token.to(y.dtype).expand(b, n, -1)
        target = index if keys is None else torch.where(keys[:, 1:], index, n)
        # A spare slot at the end swallows the padding.
        slots = torch.cat([full, full[:, :1]], 1)
        slots = slots.scatter(1, target[..., None].expand(-1, -1, y.shape[-1]), y[:, 1:])
        return torch.cat([y[:, :1], slots[:, :n]], 1)
