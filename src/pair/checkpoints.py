"""Public masked-autoencoder weights as generators: Hugging Face's ViTMAE and Meta's MAE files.

Both are the architecture of :mod:`pair.generator`; only names differ. Needed are the weights of
encoder *and* decoder, trained on plain pixels. Two kinds of file are refused: encoders without a
decoder, and models of per-patch normalised pixels ("norm_pix"), whose outputs become an image
only with the statistics of the very patches that PAIR must forget.

Meta's code and weights are licensed CC BY-NC 4.0 (no commercial use); nothing of them ships with
this package.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pair import hub
from pair.generator import GeneratorConfig, MaskedAutoencoder

PICKLED = "pytorch_model.bin"
HEADS = {768: 12, 1024: 16, 1280: 16}  # of the published encoders, by width
DECODER_HEADS = {512: 16}
# Names in transformers up to 4 and since 5 (on disk, 5 writes yet another for the decoder).
RENAMES = [
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.(encoder\.layer|layers)\.", "blocks."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
]


def from_hf_vitmae(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
) -> MaskedAutoencoder:
    """A ``ViTMAEForPreTraining`` of transformers as generator.

    ``source`` is a folder, a hub repository such as ``facebook/vit-mae-base``, or a state dict;
    ``config`` is its configuration as a dict (default: the folder's ``config.json``; for a state
    dict of a published size it may be left out). Raises :class:`pair.hub.ModelError`.
    """
    if isinstance(source, Mapping):
        where, tensors = "the state dict", dict(source)
    else:
        folder = hub.resolve(source, (hub.CONFIG, hub.WEIGHTS, PICKLED))
        where = str(folder)
        if config is None:
            config = _read_config(folder)
        tensors = _read_weights(folder)
    config = dict(config or {})
    if config.get("model_type", "vit_mae") != "vit_mae":
        raise hub.ModelError(f"{where} holds a {config['model_type']!r} model, expected 'vit_mae'")
    if config.get("norm_pix_loss"):
        raise hub.ModelError(_normalised(where, "its config sets norm_pix_loss"))
    return _build(
        where,
        _join_qkv({_renamed(k): v for k, v in tensors.items()}),
        heads=config.get("num_attention_heads"),
        decoder_heads=config.get("decoder_num_attention_heads"),
        eps=config.get("layer_norm_eps", 1e-12),  # the default of transformers; MAE has 1e-6
    )


def from_meta_mae(
    path: str | os.PathLike[str], heads: int | None = None, decoder_heads: int | None = None
) -> MaskedAutoencoder:
    """Meta's ``mae_visualize_vit_*.pth`` as generator.

    The file is read without executing anything in it. Numbers of attention heads are known for
    the published sizes. Raises :class:`pair.hub.ModelError`.
    """
    path = Path(path)
    if not path.is_file():
        raise hub.ModelError(f"no file {path}: name a mae_visualize_vit_*.pth")
    content = _load_pickled(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise hub.ModelError(f"{path} has no entry 'model': it is not a checkpoint of MAE")
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    flag = args.get("norm_pix_loss") if isinstance(args, dict) else None
    if flag or (flag is None and path.stem.endswith("_full")):
        why = "its settings say norm_pix_loss" if flag else "its name ends in _full"
        raise hub.ModelError(_normalised(str(path), why))
    return _build(str(path), content["model"], heads, decoder_heads, eps=1e-6)


def _normalised(where: str, why: str) -> str:
    return (
        f"{where} was trained on per-patch normalised pixels ({why}): PAIR needs plain pixels, "
        "such as mae_visualize_vit_base.pth or facebook/vit-mae-base"
    )


def _renamed(key: str) -> str:
    for pattern, name in RENAMES:
        key = re.sub(pattern, name, key)
    return key


def _join_qkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Three projections -> the one of MAE, where all three are there."""
    out = dict(tensors)
    for key in tensors:
        head, middle, tail = key.rpartition(".attn.q.")
        parts = [f"{head}.attn.{letter}.{tail}" for letter in "qkv"]
        if middle and all(p in tensors for p in parts):
            out[f"{head}.attn.qkv.{tail}"] = torch.cat([out.pop(p) for p in parts])
    return out


def _build(
    where: str,
    tensors: dict[str, Tensor],
    heads: int | None,
    decoder_heads: int | None,
    eps: float,
) -> MaskedAutoencoder:
    if not any(k.startswith("decoder_") for k in tensors):
        raise hub.ModelError(
            f"{where} holds no decoder: PAIR needs encoder and decoder, "
            "such as mae_visualize_vit_base.pth or facebook/vit-mae-base"
        )
    try:
        width, decoder_width = (tensors[k].shape[-1] for k in ("cls_token", "mask_token"))
        patch = tensors["patch_embed.proj.weight"].shape[-1]
        grid = math.isqrt(tensors["pos_embed"].shape[1] - 1)
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise hub.ModelError(f"{where} is no masked autoencoder: it has no {error}") from error
    heads = heads or HEADS.get(width)
    decoder_heads = decoder_heads or DECODER_HEADS.get(decoder_width)
    if heads is None or decoder_heads is None:
        raise hub.ModelError(
            f"{where} has widths {width} and {decoder_width}, which no published model has: "
            "give the numbers of attention heads"
        )
    model = MaskedAutoencoder(
        GeneratorConfig(
            image_size=grid * patch,
            patch_size=patch,
            width=width,
            depth=_depth(tensors, "blocks."),
            heads=heads,
            decoder_width=decoder_width,
            decoder_depth=_depth(tensors, "decoder_blocks."),
            decoder_heads=decoder_heads,
            mlp_ratio=hidden / width,
            eps=eps,
        )
    )
    hub.load_into(model, {k: v.float() for k, v in tensors.items()}, where)
    return model.eval()


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({k.split(".")[1] for k in tensors if k.startswith(prefix)})


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / hub.CONFIG
    if not path.is_file():
        raise hub.ModelError(f"{folder} has no {hub.CONFIG}: it is not a folder of transformers")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise hub.ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise hub.ModelError(f"{path} names no model_type: it is not a folder of transformers")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / hub.WEIGHTS).is_file() or not (folder / PICKLED).is_file():
        return hub.read_weights(folder, {})
    content = _load_pickled(folder / PICKLED)
    if not isinstance(content, dict):
        raise hub.ModelError(f"{folder / PICKLED} holds no weights")
    return content


def _load_pickled(path: Path) -> Any:
    """Tensors and plain values of a PyTorch file; whatever would run code is refused."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises a dozen unrelated kinds
            raise hub.ModelError(
                f"{path} is damaged or holds more than tensors and settings: it is not read"
            ) from error
