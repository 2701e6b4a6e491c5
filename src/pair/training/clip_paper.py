"""Fine-tune an open_clip model on photos with captions (the paper's second text target).

Symmetric contrastive loss over the batch; a caption of each photo is drawn in every step. Two
photos of a batch with the very same caption count as each other's answer, not as a mistake.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pair import hub
from pair.data.pack import Collection
from pair.files import write_atomic
from pair.retrieval.metrics import recall_at_k
from pair.retrieval.openclip import OpenClip
from pair.training import start
from pair.training.augment import to_float

TOWERS = ("both", "image")


@dataclass(frozen=True)
class ClipRecipe:
    """``model`` as ``open_clip:ARCHITECTURE/WEIGHTS``; ``train`` = "image" keeps the text tower."""

    model: str = "open_clip:ViT-B-32/openai"
    image_size: int = 224  # photos are decoded at this side
    train: str = "both"
    lr: float = 1e-6
    weight_decay: float = 0.01
    held_out: int = 1000  # photos of the split val whose R@10 picks the best model

    @property
    def photo_side(self) -> int:
        return self.image_size

    def __post_init__(self) -> None:
        if self.train not in TOWERS:
            raise ValueError(f"train must be one of {', '.join(TOWERS)}, got {self.train!r}")
        if not self.model.startswith(start.OPEN_CLIP):
            raise ValueError(f"model must be {start.OPEN_CLIP}ARCHITECTURE/WEIGHTS: {self.model!r}")
        if "hub:" in self.model:
            raise ValueError(
                f"{self.model}: fetch it first (pair models fetch) and name its folder as "
                "open_clip:local-dir:FOLDER"
            )


class ClipPaperTask:
    """See :class:`pair.training.loop.Task`."""

    def __init__(self, config: ClipRecipe, pack: Collection):
        self.config, self.pack, self.device = config, pack, torch.device("cpu")
        rows = pack.where(lambda label, data, split: split in ("train", "restval"))
        said = pack.captions
        self.rows = torch.tensor([i for i in rows.tolist() if said and said[i]], dtype=torch.long)
        held = pack.where(lambda label, data, split: split == "val").tolist()
        self.held = torch.tensor([i for i in held if said and said[i]][: config.held_out])
        if not len(self.rows) or not len(self.held):
            raise ValueError(
                "fine-tuning needs photos with captions in the splits train and val: name a data "
                "set, such as --data flickr30k:FOLDER"
            )
        self.target = start.open_clip(config.model.removeprefix(start.OPEN_CLIP))
        self.module = self.target.model
        for name, p in self.module.named_parameters():
            p.requires_grad_(config.train == "both" or name.startswith("visual."))

    def size(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> None:
        self.device = device
        self.target.to(device)

    def prefetch(self, rows: Tensor) -> None:
        self.pack.prefetch(self.rows[rows])

    def inputs(self) -> dict[str, str]:
        return {"model": start.digest(self.module)}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        wanted = [p for p in self.module.parameters() if p.requires_grad]
        return [torch.optim.AdamW(wanted, lr=c.lr, weight_decay=c.weight_decay)]

    def _images(self, rows: Tensor) -> Tensor:
        return self.target.encode_image(to_float(self.pack.raw(rows).to(self.device)))

    def loss(self, rows: Tensor, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        chosen = self.rows[rows]
        texts = []
        for i in chosen.tolist():
            said = self.pack.captions[i]
            texts.append(said[int(torch.randint(len(said), (1,), generator=generator))])
        z = F.normalize(self._images(chosen), dim=-1)
        t = F.normalize(self.target.encode_text(texts), dim=-1)
        logits = self.module.logit_scale.exp().clamp(max=100) * z @ t.T  # (B, B)
        same = torch.tensor([[a == b for b in texts] for a in texts], device=logits.device)
        wanted = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
        right = same.gather(1, logits.argmax(1, keepdim=True))
        return {"loss": loss, "top1": right.float().mean()}

    def validate(self) -> dict[str, float]:
        """R@1 and R@10 of the captions of held-out photos among those photos."""
        found = torch.cat([F.normalize(self._images(r), dim=-1).cpu() for r in self.held.split(64)])
        captions = [self.pack.captions[i] for i in self.held.tolist()]
        texts = [text for said in captions for text in said]
        owner = torch.tensor([n for n, said in enumerate(captions) for _ in said])
        parts = [self.target.encode_text(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        similarity = F.normalize(torch.cat(parts), dim=-1).cpu() @ found.T
        relevant = owner[:, None] == torch.arange(len(found))[None]
        r1, r10 = (recall_at_k(similarity, relevant, k) for k in (1, 10))
        return {"score": r10, "recall_at_1": r1, "recall_at_10": r10}

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        save_open_clip(self.target, self.config.model, folder, facts)


def save_open_clip(target: OpenClip, model: str, folder: Path, facts: dict[str, Any]) -> None:
    """A folder that open_clip reads as ``local-dir:``, with our record beside it. ``model`` is the
    name of the start, ``open_clip:ARCHITECTURE/WEIGHTS``."""
    library_config = _architecture(target, model)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in target.model.state_dict().items()}
    partial = folder / "open_clip_model.safetensors.partial"
    save_file(weights, partial)
    digest = hub.sha256(partial)
    partial.replace(folder / "open_clip_model.safetensors")
    for name, content in (
        ("open_clip_config.json", library_config),
        ("training.json", {**facts, "sha256": digest}),
    ):
        write_atomic(folder / name, (json.dumps(content, indent=2) + "\n").encode())


def _architecture(target: Any, model: str) -> dict[str, Any]:
    """What open_clip must know to load the weights again, the right activation included."""
    spec = model.removeprefix(start.OPEN_CLIP)
    preprocess = dict(target.model.visual.preprocess_cfg)
    if spec.startswith("local-dir:"):
        path = Path(spec.removeprefix("local-dir:")) / "open_clip_config.json"
        return json.loads(path.read_text("utf-8"))
    import open_clip

    architecture, _, weights = spec.partition("/")
    config = dict(open_clip.get_model_config(architecture.replace("/", "-")) or {})
    if weights == "openai":
        config["quick_gelu"] = True
    return {"model_cfg": config, "preprocess_cfg": preprocess}
