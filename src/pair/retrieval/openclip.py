"""Any open_clip model as a text-image target (extra ``clip``), differentiable to the pixels."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.images import check_images


def _library():
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch
        raise ValueError(
            f"open_clip cannot be used here ({error}): pip install 'pair-retrieval[clip]'"
        ) from error
    return open_clip


class OpenClip(nn.Module):
    """An open_clip model with its own preprocessing: images (B, 3, H, W) in [0, 1] of any size.

    The library resizes 8-bit PIL images, which rounds after each of two passes and has no
    gradient; here the same filter runs on floats, width first and clamped between the passes, as
    Pillow does it. The difference is at most 1.5/255 per pixel value (before normalisation), 1/3
    of a level on average, and none for images that have the model's size already. One exception:
    Pillow 13 takes the height first where it shrinks more than twice as many rows as columns
    (pictures taller than 2:1); single bicubic pixels at hard edges then differ by more.
    Features are not normalised; compare them by cosine. Weights are frozen.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, tokenizer: Any, preprocess: dict[str, Any], name: str):
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer, self.name = tokenizer, name
        size = preprocess["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.resize_mode = preprocess["resize_mode"]
        # Everything that is not bilinear is bicubic, as in the library ("random" too).
        self.interpolation = "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"
        self.fill = preprocess.get("fill_color", 0) / 255
        self.image_size = max(self.size)
        for key in ("mean", "std"):
            value = torch.tensor(preprocess[key]).view(-1, 1, 1)
            self.register_buffer(key, value, persistent=False)
        with torch.no_grad():
            self.dim = self.model.encode_image(self.mean.new_zeros(1, 3, *self.size)).shape[1]

    def extra_repr(self) -> str:
        return f"{self.name}, {self.size}, {self.interpolation}, {self.resize_mode}"

    @classmethod
    def from_pretrained(
        cls, name: str, pretrained: str | os.PathLike[str] | None = None, **options: Any
    ) -> OpenClip:
        """Load a model.

        ``name`` is an architecture of open_clip together with a ``pretrained`` tag ("openai",
        "laion2b_s34b_b79k") or weights file (.safetensors, .pt); or ``local-dir:FOLDER``,
        ``hf-hub:ORG/NAME`` (also ``hub:ORG/NAME``), which need no ``pretrained``. Folders and
        files never touch the network. Further options go to the library's
        ``create_model_and_transforms`` (``image_mean``, ``force_quick_gelu``, ``cache_dir``).

        Warns where activation or preprocessing would silently differ from the ones that the
        weights were trained with. Raises ``ValueError`` for names, weights and preprocessing
        that are missing.
        """
        library = _library()
        if name.startswith("hub:"):
            name = "hf-hub:" + name.removeprefix("hub:")
        source = None if pretrained is None else os.fspath(pretrained)
        if name.startswith("local-dir:"):
            _check_folder(Path(name.removeprefix("local-dir:")))
        elif not name.startswith("hf-hub:"):
            _check_name(library, name, source, options)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="QuickGELU mismatch")  # said above
                model, _, _ = library.create_model_and_transforms(
                    name, pretrained=source, require_pretrained=True, **options
                )
            tokenizer = library.get_tokenizer(name)
        except Exception as error:
            raise ValueError(f"cannot load open_clip model {name!r}: {error}") from error
        return cls(model, tokenizer, dict(model.visual.preprocess_cfg), name)

    @classmethod
    def from_spec(cls, spec: str) -> OpenClip:
        """``ViT-B-32/openai``, ``ViT-B-32//path/to/file.pt``, ``local-dir:FOLDER``,
        ``hub:ORG/NAME``: an architecture and its weights in one word (":" for "/" will do).

        OpenAI's weights get their QuickGELU, whichever of the two names the architecture has.
        """
        if spec.startswith(("local-dir:", "hf-hub:", "hub:")):
            return cls.from_pretrained(spec)
        architecture, weights = split_spec(spec)
        if not weights:
            raise ValueError(
                f"open_clip:{spec} names no weights: write open_clip:{spec}/TAG, such as "
                "open_clip:ViT-B-32/openai"
            )
        options = {"force_quick_gelu": True} if weights == "openai" else {}
        return cls.from_pretrained(architecture, weights, **options)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> the model's normalised input (B, 3, h, w)."""
        x = fit(check_images(images), self.size, self.resize_mode, self.interpolation, self.fill)
        return (x - self.mean) / self.std

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.encode_image(self.preprocess(images))

    def encode_visible(self, images: Tensor, shown: Tensor) -> Tensor:
        """Features from the visible tokens alone: those with a hidden pixel never enter the
        transformer. ``shown`` (B, 1, H, W) is False where images (B, 3, H, W) are hidden; what lies
        there must have been replaced already, because resizing smears it over its neighbours.

        Raises ``ValueError`` for towers other than open_clip's own vision transformers.
        """
        tower = self.model.visual
        if not all(hasattr(tower, name) for name in ("_embeds", "transformer", "_pool", "proj")):
            raise ValueError(
                f"{self.name} has no tokens to leave out: use another fill than 'drop'"
            )
        tokens = tower._embeds(self.preprocess(images))  # (B, 1 + N, width), class token first
        weight = fit(
            shown.to(images).expand(-1, 3, -1, -1), self.size, self.resize_mode, self.interpolation
        )[:, :1]
        # A token is visible if every pixel that its own pixels were made of is.
        grid = tuple(s // p for s, p in zip(self.size, tower.patch_size, strict=True))
        seen = (-F.adaptive_max_pool2d(-weight, grid) > 1 - 1e-4).flatten(1)  # (B, N)
        if not bool(seen.any(1).all()):
            raise ValueError("a view shows no whole token of this encoder: use more views")
        out: list[Tensor] = [tokens[:0]] * len(tokens)
        counts = seen.sum(1)
        for count in counts.unique():  # rows of equal length need no padding
            rows = (counts == count).nonzero()[:, 0]
            kept = seen[rows].nonzero()[:, 1].view(len(rows), -1)
            part = tokens[rows[:, None], torch.cat([kept.new_zeros(len(rows), 1), kept + 1], 1)]
            pooled = tower._pool(tower.transformer(part))[0]
            pooled = pooled if tower.proj is None else pooled @ tower.proj
            for row, features in zip(rows.tolist(), pooled, strict=True):
                out[row] = features
        return torch.stack(out)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.model.encode_text(self.tokenizer(texts).to(self.mean.device))


def split_spec(spec: str) -> tuple[str, str]:
    """Architecture and weights of ``ViT-B-32/openai``, ``ViT-B-32:openai``."""
    found = re.fullmatch(r"([^:/@]+)[:/@](.+)", spec)
    return (found[1], found[2]) if found else (spec, "")


def fit(
    images: Tensor,
    size: tuple[int, int],
    mode: str = "shortest",
    interpolation: str = "bicubic",
    fill: float = 0.0,
) -> Tensor:
    """Resize (B, 3, H, W) to ``size`` by open_clip's three modes.

    ``shortest``: cover the target and crop the centre; ``longest``: fit inside and pad with
    ``fill``; ``squash``: stretch. Sizes and offsets are rounded as the library rounds them.
    """
    h, w = images.shape[-2:]
    if mode == "squash":
        return _resample(images, size, interpolation)
    if mode not in ("shortest", "longest"):
        raise ValueError(f"unknown resize mode {mode!r}: use shortest, longest or squash")
    if mode == "shortest" and size[0] == size[1]:
        short, long = min(h, w), max(h, w)
        sides = (size[0], int(size[0] * long / short))  # torchvision truncates here
        inner = sides if h <= w else sides[::-1]
    else:
        if mode == "shortest":
            interpolation = "bicubic"  # whatever the config says, as in the library
        pick = max if mode == "longest" else min
        ratio = pick(h / size[0], w / size[1])
        inner = (round(h / ratio), round(w / ratio))
    x = _resample(images, inner, interpolation)
    up, left = max(0, size[0] - inner[0]), max(0, size[1] - inner[1])
    if up or left:
        padding = (left // 2, (left + 1) // 2, up // 2, (up + 1) // 2)
        x = F.pad(x, padding, value=fill)
    top, start = (round((a - b) / 2) for a, b in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], start : start + size[1]]


def _resample(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    # Not pair.images.resize: these weights were trained behind this filter, mostly bicubic. Width
    # first, as Pillow does it, and each pass clamped: bicubic overshoots, 8-bit images cannot.
    x = images
    for target in ((x.shape[-2], size[1]), size):
        if tuple(x.shape[-2:]) != target:
            x = F.interpolate(x, target, mode=interpolation, antialias=True, align_corners=False)
            x = x.clamp(0, 1)
    return x


def _check_folder(folder: Path) -> None:
    path = folder / "open_clip_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no open_clip_config.json: it is not an open_clip folder")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not {"mean", "std"} <= config.get("preprocess_cfg", {}).keys():
        raise ValueError(f"{path} names no preprocessing: add preprocess_cfg with mean and std")


def _check_name(library: Any, name: str, source: str | None, options: dict[str, Any]) -> None:
    key = name.replace("/", "-")
    config = library.get_model_config(key)
    if config is None:
        raise ValueError(f"open_clip has no model {name!r}: see open_clip.list_models()")
    tag = library.get_pretrained_cfg(key, source) if source else {}
    if not source or not (tag or Path(source).is_file()):
        tags = ", ".join(library.list_pretrained_tags_by_model(key)) or "none"
        raise ValueError(f"{source!r} is neither a file nor a tag of {name} (tags: {tags})")
    quick = bool(config.get("quick_gelu")) or bool(options.get("force_quick_gelu"))
    if not tag:
        if not {"image_mean", "image_std"} <= options.keys():
            warnings.warn(
                f"{source} does not say how its images were normalised nor which activation it "
                f"was trained with: taking open_clip's defaults and "
                f"{'QuickGELU' if quick else 'GELU'}; pass image_mean, image_std and, for "
                "OpenAI's weights, force_quick_gelu=True",
                stacklevel=3,
            )
    elif bool(tag.get("quick_gelu")) != quick:
        wanted = "QuickGELU" if tag.get("quick_gelu") else "GELU"
        twin = f"{name}-quickgelu"
        if not tag.get("quick_gelu"):
            advice = "leave force_quick_gelu out"
        elif library.get_model_config(twin.replace("/", "-")):
            advice = f"load {twin!r} instead"
        else:
            advice = "pass force_quick_gelu=True"
        warnings.warn(
            f"the weights {source!r} were trained with {wanted}, but {name} as asked for computes "
            f"the other, and its features will be wrong: {advice}",
            stacklevel=3,
        )
