"""Model cards, written from what the training recorded about itself."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from pair import hub
from pair.files import explained

WHAT = {
    "generator": (
        "Masked autoencoder that rebuilds images for PAIR (plain purification and covering masks)",
        "It is small and was trained on about 17,000 photos: fine detail is lost, and a determined "
        "attacker with gradients through it defeats random masks.",
    ),
    "clip": (
        "Text-image encoder: ResNet image tower, transformer text tower, cosine similarity",
        "It knows the 109 class names that it was trained on and little else; other words count as "
        "unknown. A target for experiments, not a search engine.",
    ),
    "csq": (
        "Deep hash network with central similarity (CSQ), 64 bits, Hadamard centres",
        "It separates the 109 classes that it was trained on. A target for experiments. "
        "Started from a small CLIP, it is no stranger to a generator trained with that CLIP.",
    ),
    "clip-paper": (
        "Text-image encoder of open_clip, fine-tuned on photos with captions",
        "Nobody has described them: say here what it was tested for and what it fails at.",
    ),
    "sac": (
        "Patch segmenter of SAC: a U-Net that marks the pixels of square adversarial patches",
        "It knows squares of noise, QR codes and PGD patches. Whoever attacks it finds others.",
    ),
    "patchzero": (
        "Patch detector of PatchZero: pyramid pooling on a small ResNet, one logit per pixel",
        "It knows squares of noise, QR codes and PGD patches. Whoever attacks it finds others.",
    ),
    "arn": (
        "Denoiser of ARN: a variational encoder-decoder trained on attacked embeddings",
        "It was made for invisible noise, not for patches, and it blurs.",
    ),
    "cafd": (
        "Denoiser of CAFD: a U-Net that corrects images in the space of class activations",
        "It was made for invisible noise, not for patches.",
    ),
    "at": (
        "Target fine-tuned by adversarial training (PGD, l_inf on the whole image)",
        "Trained against invisible noise: patches were never part of its threat model.",
    ),
    "hm": (
        "Target fine-tuned on hardness-manipulated triplets",
        "Trained against invisible noise: patches were never part of its threat model.",
    ),
}
DATA = [
    "| data set | photos used | held out | licence |",
    "|---|---|---|---|",
    "| Caltech-101 (Li, Andreeto, Ranzato, Perona; doi 10.22002/D1.20086) | 7,124 | 16 gallery "
    "photos of each class, 8 query photos of each class with at least 60, 68 background photos "
    "| CC BY 4.0 |",
    "| Imagenette (ten ImageNet classes) | 9,469 | `val` | research use, photos not distributed |",
    "| Flickr8k (part) | 700 | 100 | research use, photos not distributed |",
]


OURS = {"caltech101", "imagenette", "flickr8k"}  # what the shipped models were trained on


RECORD = "training.json"
OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")


def parts(folder: Path) -> tuple[str, ...]:
    """Names of the files that make up a trained model."""
    return (*OPEN_CLIP, RECORD) if (folder / OPEN_CLIP[0]).is_file() else (hub.CONFIG, hub.WEIGHTS)


def describe(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model folder of any kind; of a folder of open_clip, what its
    training wrote down."""
    path, record = folder / hub.CONFIG, folder / RECORD
    if not path.is_file() and record.is_file() and (folder / OPEN_CLIP[0]).is_file():
        return {"kind": "clip-paper", **json.loads(record.read_text())}
    if not path.is_file():
        raise hub.ModelError(f"{folder} has no {hub.CONFIG}: it is not a model folder")
    return json.loads(path.read_text())


def publish(folder: Path, name: str, out: Path) -> tuple[Path, str]:
    """Copy a trained model to ``out/name``, with its card; where it is now, and its kind.

    A folder in its place is replaced only if it holds nothing but a model.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"--name: {name!r} is no name of a model: use letters, digits, '.', '_' and '-', "
            "the first a letter or digit"
        )
    config = describe(folder)
    text = card(name, config)
    for part in parts(folder):
        if not (folder / part).is_file():
            raise hub.ModelError(f"{folder} has no {part}")
    target = out / name
    known = {hub.CONFIG, hub.WEIGHTS, hub.CARD, RECORD, *OPEN_CLIP}
    if target.is_symlink() or target.exists():
        other = not target.is_dir() or target.is_symlink() or set(os.listdir(target)) - known
        if other or os.path.ismount(target):
            raise ValueError(f"{target} is there and is no model folder: use another name")
    fresh = out / f".{name}.writing-{secrets.token_hex(6)}"
    old = fresh.with_name(fresh.name + "-old")
    try:
        fresh.mkdir(parents=True)
        for part in parts(folder):
            shutil.copyfile(folder / part, fresh / part)
        (fresh / hub.CARD).write_text(text, "utf-8")
        if target.is_dir():
            os.replace(target, old)
        os.replace(fresh, target)
    except OSError as error:
        raise explained(error, target) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return target, config["kind"]


def _steps(run: dict[str, Any]) -> str:
    """What is kept is the best state of a run, which may not be its last."""
    step, planned = run.get("step", 0), run.get("loop", {}).get("steps", 0)
    rest = f", the best state of a run of {planned:,}" if 0 < step < planned else ""
    return f"{step:,} steps{rest}"


def card(name: str, config: dict[str, Any]) -> str:
    """Markdown card of a trained model: data, recipe, compute, quality, licence, limits."""
    kind = config.get("hardened", config["kind"])  # AT and HM write ordinary targets
    what, limits = WHAT[kind]
    run = config.get("training", {})
    labelled = kind in ("clip", "csq", "at", "hm")
    photos = config.get("photos", {})
    ours = OURS.issuperset(photos)
    lines = [f"# {name}", "", f"{what}.", "", "## Data", ""]
    if ours:
        lines += [*DATA, ""]
    else:
        limits = "Nobody has described them: say here what it was tested for and what it fails at."
        lines += ["| data set | photos, all splits |", "|---|--:|"]
        lines += [f"| {k} | {v:,} |" for k, v in photos.items()]
        digest = run.get("inputs", {}).get("photos", "not recorded")
        lines += ["", f"SHA-256 of the list of photos: {digest}. Check their licences.", ""]
    if labelled and ours:
        lines += [
            "Only photos with a class name were used: no faces, no background, no Flickr8k.",
            "",
        ]
    task = run.get("task", {})
    start = task.get("init") or (kind == "clip-paper" and task.get("model"))
    trained = "csq-paper" if kind == "csq" and "backbone" in task else kind
    origin = f"starting from `{start}`" if start else "from random weights"
    recipe = ("configs/small/" if ours else "") + config.get("recipe", "")
    lines += [
        "## Recipe",
        "",
        f"`pair train {trained} --recipe {recipe}`, {origin}",
        "",
        f"{run.get('images_seen', 0):,} images in {_steps(run)}; "
        f"{run.get('seconds', 0) / 60:.0f} minutes"
        + (" on one core of a shared 2-core CPU machine." if ours else "."),
        "",
        "```json",
        json.dumps({k: run.get(k) for k in ("loop", "task")}, indent=1),
        "```",
        "",
        "## Measured on held-out photos",
        "",
        "| figure | value |",
        "|---|---|",
    ]
    lines += [f"| {k} | {v} |" for k, v in run.get("validation", {}).items() if k != "score"]
    lines += ["", "## Limits", "", limits, "", "## Licence", ""]
    own = "Apache-2.0 for these weights, which we trained ourselves from scratch."
    lines += [config.get("licence") or (own if ours else "Say here what applies."), ""]
    return "\n".join(lines)
