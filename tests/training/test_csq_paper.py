"""The two public CSQ recipes: the files, what they build, and a short real training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pair.data.pack import Pack
from pair.retrieval.backbones import RESNETS
from pair.retrieval.hashing import HashNet
from pair.retrieval.resnet import ResNet, ResNetConfig
from pair.training import csq_paper
from pair.training.csq_paper import CsqPaperTask, CsqRecipe, build
from pair.training.loop import LoopConfig, train
from pair.training.run import read_recipe

PAPER = Path(__file__).parents[2] / "configs" / "paper"
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture
def pack() -> Pack:
    """72 noisy colour fields of 40 pixels; some have two labels, half of each."""
    rng = np.random.default_rng(0)
    images, labels, splits = [], [], []
    for i in range(72):
        names = [list(COLOURS)[i % 3]] + ([list(COLOURS)[(i + 1) % 3]] if i % 6 == 0 else [])
        image = np.zeros((40, 40, 3))
        image[:] = COLOURS[names[0]]
        image[:, 20:] = COLOURS[names[-1]]
        images.append((image + rng.normal(0, 20, image.shape)).clip(0, 255).astype(np.uint8))
        labels.append(";".join(names))
        splits.append(("train", "train", "gallery", "query")[i // 18])
    return Pack(np.stack(images), [""] * 72, labels, ["toy"] * 72, splits)


@pytest.fixture
def small(monkeypatch):
    config = ResNetConfig((1, 1, 1, 1), 4)
    monkeypatch.setitem(RESNETS, "resnet50", config)
    return config


def recipe(name: str) -> CsqRecipe:
    return read_recipe(PAPER / f"{name}.toml", "csq-paper")[1]


@pytest.mark.parametrize(
    ("name", "epochs", "facts"),
    [
        ("csq-deephash", 150, ("linear", "rmsprop", 1e-5, 1.0, 1e-5, 1e-4, "short")),
        ("csq-official", 90, ("mlp", "adam", 1e-3, 0.01, 0.0, 0.05, "square")),
    ],
)
def test_the_files_say_what_the_recipes_say(name, epochs, facts):
    loop, task = read_recipe(PAPER / f"{name}.toml", "csq-paper")
    assert loop.steps == epochs * (13_000 // 64) and loop.batch_size == 64
    assert (loop.warmup, loop.schedule, loop.clip_grad) == (0, "constant", 0)
    assert (task.backbone, task.bits, task.image_size) == ("resnet50", 64, 224)
    keys = ("head", "optimiser", "lr", "backbone_lr", "weight_decay", "quantisation", "resize")
    assert tuple(getattr(task, k) for k in keys) == facts


def test_weights_come_from_the_file_and_cannot_be_forgotten(tmp_path, small):
    torch.manual_seed(3)
    weights = ResNet(small).state_dict()
    torch.save(weights, tmp_path / "resnet.pth")
    named = dataclasses.replace(recipe("csq-deephash"), weights=str(tmp_path / "resnet.pth"))
    net = build(named, ("a", "b"))
    assert all(torch.equal(v, weights[k]) for k, v in net.backbone.state_dict().items())
    with pytest.raises(ValueError, match="name the ImageNet weights"):
        CsqRecipe()
    with pytest.raises(ValueError, match="no weights file"):
        build(recipe("csq-deephash"), ("a",))
    with pytest.raises(ValueError, match="optimiser"):
        CsqRecipe(from_scratch=True, optimiser="sgd")
    with pytest.raises(ValueError, match="augmentation"):
        CsqRecipe(from_scratch=True, augment="none")


def test_rates_of_the_official_recipe(pack, small):
    official = dataclasses.replace(
        recipe("csq-official"), weights="", from_scratch=True, image_size=32, bits=16, decay_every=2
    )
    task = CsqPaperTask(official, pack)
    (optimiser,) = task.optimizers()
    assert [g["lr"] for g in optimiser.param_groups] == pytest.approx([1e-5, 1e-3])
    seen = []
    for step in range(5):
        for group, peak in zip(optimiser.param_groups, (1e-5, 1e-3), strict=True):
            group["lr"] = peak  # as the loop does before every step
        task.loss(torch.arange(4), torch.Generator().manual_seed(step), step)["loss"].backward()
        optimiser.step()
        seen.append([g["lr"] for g in optimiser.param_groups])
    assert [s[1] for s in seen] == pytest.approx([1e-3, 1e-3, 7e-4, 7e-4, 4.9e-4])
    assert [s[0] for s in seen] == pytest.approx([1e-5, 1e-5, 7e-6, 7e-6, 4.9e-6])


def test_targets_of_photos_with_several_labels(pack, small):
    task = CsqPaperTask(CsqRecipe(from_scratch=True, image_size=32, bits=16), pack)
    assert task.classes == ("blue", "green", "red")
    centres = task.module.centres
    single = task.labels.sum(1) == 1
    assert torch.equal(task.targets[single], centres[task.labels[single].int().argmax(1)])
    for row in (~single).nonzero().flatten().tolist():
        first, second = centres[task.labels[row]]
        agree = first == second
        assert torch.equal(task.targets[row][agree], first[agree])
    assert len(task.gallery) == 54 and len(task.query) == 18  # the training photos are in it


@pytest.mark.parametrize("name", ["csq-deephash", "csq-official"])
def test_short_training_learns(tmp_path, pack, small, name):
    settings = dataclasses.replace(
        recipe(name), weights="", from_scratch=True, image_size=32, bits=16, lr=2e-3,
        backbone_lr=1.0, decay_every=15, top_k=20, train_in_gallery=False,
    )  # fmt: skip
    loop = LoopConfig(
        30, 12, warmup=0, schedule="constant", clip_grad=0, val_every=30, checkpoint_every=15,
        log_every=30,
    )  # fmt: skip
    torch.manual_seed(0)
    task = CsqPaperTask(settings, pack)
    task.module.eval()
    with torch.no_grad():
        before = task.validate()["score"]
    best = train(task, loop, tmp_path / "run", echo=lambda text: None)
    net = HashNet.from_pretrained(best)
    assert net.config.head == settings.head and net.config.resize == settings.resize
    task.module.eval()
    with torch.no_grad():
        after = task.validate()["score"]
        codes = task.codes(task.query)
    assert after > max(0.8, before)
    assert torch.equal(net.codes(torch.rand(2, 3, 32, 32)).abs(), torch.ones(2, 16))
    assert codes.shape == (18, 16)


def test_augmentations_are_seeded_and_sized(pack, small):
    for name in csq_paper.AUGMENTATIONS:
        task = CsqPaperTask(CsqRecipe(from_scratch=True, augment=name, image_size=32), pack)
        first, again, other = (
            task.draw(torch.arange(3), torch.Generator().manual_seed(s)) for s in (0, 0, 1)
        )
        assert first.shape == (3, 3, 32, 32)
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_packs_without_the_needed_splits_are_refused(pack, small):
    settings = CsqRecipe(from_scratch=True, image_size=32)
    everything = dataclasses.replace(pack, splits=["train"] * 72)
    with pytest.raises(ValueError, match="query and gallery"):
        CsqPaperTask(settings, everything).validate()
    nothing = dataclasses.replace(pack, splits=["gallery"] * 72)
    with pytest.raises(ValueError, match="split 'train'"):
        CsqPaperTask(settings, nothing)
