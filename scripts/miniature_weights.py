"""Tiny random checkpoints in the genuine formats of the public ones, for trying everything out.

    python scripts/miniature_weights.py OUT [--only vit-mae ...]

Names, keys and containers are those of the originals: ``vit-mae`` and ``vit-mae-old`` (Hugging
Face's ViTMAE, by the names of transformers 5 and of the published files), ``meta`` (Meta's
``mae_visualize_vit_base.pth``, its widths but one block deep), ``open-clip`` (a folder for
``open_clip:local-dir:``, and the same weights as one ``.safetensors`` file), ``resnet`` (the state
dict of torchvision's ResNet-18). Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SIDE = 32
CLIP = "pair-miniature"  # an architecture that open_clip learns from ``open-clip/architectures``


def old_name(key: str) -> str:
    """A key of transformers 5 as transformers 4 and the published files have it."""
    key = re.sub(r"^vit\.layers\.", "vit.encoder.layer.", key)
    key = key.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
    if ".layer." not in key and "decoder_layers" not in key:
        return key
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        key = key.replace(f".{letter}_proj.", f".attention.{name}.")
    key = key.replace(".o_proj.", ".output.dense.").replace(".mlp.fc1.", ".intermediate.dense.")
    return key.replace(".mlp.fc2.", ".output.dense.")


def vitmae(out: Path) -> None:
    """A folder of ``ViTMAEForPreTraining.save_pretrained``."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=SIDE, patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    ViTMAEForPreTraining(config).save_pretrained(out)


def vitmae_old(out: Path) -> None:
    """The same with the key names of the published files."""
    vitmae(out)
    tensors = load_file(out / "model.safetensors")
    old = {old_name(k): v for k, v in tensors.items()}
    save_file(old, out / "model.safetensors", metadata={"format": "pt"})


def meta(out: Path) -> None:
    """Root entry "model", names of the MAE code; its heads are known by its widths."""
    from pair.generator import GeneratorConfig, MaskedAutoencoder

    torch.manual_seed(1)
    model = MaskedAutoencoder(GeneratorConfig(SIDE, 16, 768, 1, 12, 512, 1, 16, eps=1e-6))
    out.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, out / "mae_visualize_vit_base.pth")


def open_clip_model(out: Path) -> None:
    """``local-dir`` as open_clip pushes it to the hub, and an architecture with a weights file."""
    import open_clip

    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": SIDE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8
        },
        "text_cfg": {
            "context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1
        },
    }  # fmt: skip
    known = out / "architectures"
    known.mkdir(parents=True, exist_ok=True)
    (known / f"{CLIP}.json").write_text(json.dumps(model_cfg))
    open_clip.add_model_config(known)
    torch.manual_seed(2)
    tensors = {k: v.contiguous() for k, v in open_clip.create_model(CLIP).state_dict().items()}
    save_file(tensors, out / "open_clip_model.safetensors")
    statistics = {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": statistics}
    (out / "open_clip_config.json").write_text(json.dumps(config))


def resnet(out: Path) -> None:
    """torchvision's own, where it can be imported; else this package's, by the same names."""
    torch.manual_seed(3)
    try:
        from torchvision.models import resnet18

        tensors = resnet18(weights=None).state_dict()
    except (ImportError, RuntimeError):
        from pair.retrieval.backbones import build_backbone

        tensors = dict(build_backbone("resnet18")[0].state_dict())
        tensors |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    out.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, out / "resnet18-f37072fd.pth")


ALL: dict[str, Callable[[Path], None]] = {
    "vit-mae": vitmae,
    "vit-mae-old": vitmae_old,
    "meta": meta,
    "open-clip": open_clip_model,
    "resnet": resnet,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(ALL), help="some of them")
    args = parser.parse_args()
    for name in args.only or ALL:
        try:
            ALL[name](args.out / name)
        except (ImportError, RuntimeError) as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
            continue
        print(args.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
