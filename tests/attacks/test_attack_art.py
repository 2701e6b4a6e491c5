"""A patch attack that nobody here wrote: the Adversarial Robustness Toolbox (extra ``art``).

An adapter turns "images -> features" and a target embedding into a classifier with two classes,
"near the target" and "not"; the toolbox optimises its patch for the first.
"""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_models import encoder, photos, purifier
from torch import nn

from pair.attacks.objectives import TextGoal
from pair.attacks.patch import Patch, Placement
from pair.attacks.tth import TTHConfig, tth
from pair.attacks.wrappers import as_features, pipeline
from pair.masks import FixedPattern

pytest.importorskip("art", reason="needs the toolbox: pip install 'pair-retrieval[art]'")


class NearTarget(nn.Module):
    """Logits (10 cos, 0): cross-entropy towards class 0 falls exactly when the cosine rises."""

    def __init__(self, features, embedding):
        super().__init__()
        self.features, self.embedding = as_features(features), embedding
        self.unused = nn.Parameter(torch.zeros(1))  # the toolbox expects a trainable network

    def forward(self, images):
        z = self.features(images.clamp(0, 1), generator=torch.Generator().manual_seed(0))
        cos = F.cosine_similarity(z, self.embedding, dim=-1)
        return torch.stack([10 * cos, 0 * cos], 1) + 0 * self.unused


def classifier(features, embedding):
    from art.estimators.classification import PyTorchClassifier

    model = NearTarget(features, embedding)
    return PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), 2, clip_values=(0.0, 1.0), device_type="cpu"
    )


def loss_of(features, embedding, images) -> float:
    with torch.no_grad():
        return float(TextGoal(embedding)(as_features(features)(images, generator=None)).mean())


STEPS = 40
VICTIMS = {
    "undefended": encoder,
    "known mask": lambda: pipeline(encoder(), purifier(FixedPattern())),
}


@pytest.mark.parametrize("name", VICTIMS)
def test_the_toolbox_attacks_the_same_target_and_ours_is_at_least_as_strong(name):
    from art.attacks.evasion.adversarial_patch.adversarial_patch_numpy import (
        AdversarialPatchNumpy,
    )

    features, images = VICTIMS[name](), photos(3)
    embedding = encoder().encode_image(photos(1, 3))
    np.random.seed(0)  # noqa: NPY002 - the toolbox draws from it

    class Attack(AdversarialPatchNumpy):
        def reset_patch(self, initial_patch_value):  # release 1.20 trips over NumPy 2's scalars
            super().reset_patch(float(initial_patch_value))

    attack = Attack(
        classifier(features, embedding), rotation_max=0, scale_min=0.5, scale_max=0.5,
        learning_rate=5.0, max_iter=STEPS, batch_size=3, verbose=False,
    )  # fmt: skip
    middle = np.zeros((1, 32, 32), dtype=bool)
    middle[0, 16, 16] = True  # the only centre that the toolbox may choose
    y = np.tile([1.0, 0.0], (3, 1)).astype(np.float32)
    attack.generate(images.numpy(), y, mask=middle)
    theirs = torch.from_numpy(attack.apply_patch(images.numpy(), scale=0.5, mask=middle)).float()

    # Where did the toolbox put it? Give ours the same pixels and start, and the same steps.
    grey = torch.full((3, 32, 32), 0.5)
    attack.patch = np.zeros_like(attack.patch)
    black = torch.from_numpy(attack.apply_patch(images.numpy(), scale=0.5, mask=middle)).float()
    cover = ((black - images).abs().amax((0, 1)) > 1e-3).float()
    assert 100 < cover.sum() < 300  # a disc of 16 pixels has 201
    patch = Patch(grey, cover, Placement("fixed"), 32)
    config = TTHConfig(steps=STEPS, lr=0.05, distortion=0, retry=False)
    ours = tth(features, images, embedding, config=config, patch=patch)

    start = loss_of(features, embedding, patch.apply(images))
    found = loss_of(features, embedding, theirs)
    assert found < start - 0.02, "the toolbox's patch moves the features towards the target"
    assert loss_of(features, embedding, ours.patch.apply(images)) <= found


def test_the_adapter_is_the_goal():
    embedding, images = encoder().encode_image(photos(1, 3)), photos(4)
    model = NearTarget(encoder(), embedding)
    torch.testing.assert_close(
        1 - model(images)[:, 0] / 10, TextGoal(embedding)(encoder().encode_image(images))
    )


def _torchvision() -> str | None:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        return f"the toolbox's PyTorch patch needs a torchvision that fits torch ({error})"
    return None


@pytest.mark.skipif(_torchvision() is not None, reason=str(_torchvision()))
def test_the_toolbox_in_pytorch_attacks_the_same_target():
    from art.attacks.evasion import AdversarialPatchPyTorch

    features, images = encoder(), photos(3)
    embedding = encoder().encode_image(photos(1, 3))
    attack = AdversarialPatchPyTorch(
        classifier(features, embedding), rotation_max=0, patch_shape=(3, 12, 12),
        patch_location=(20, 0), patch_type="square", learning_rate=0.05, max_iter=STEPS,
        batch_size=3, verbose=False,
    )  # fmt: skip
    content, _ = attack.generate(images.numpy(), np.zeros(3, dtype=np.int64))
    patch = Patch.make(torch.from_numpy(content).float().clamp(0, 1), image_size=32)
    config = TTHConfig(steps=STEPS, lr=0.05, distortion=0, start="grey", retry=False)
    grey = Patch.make("grey", 12, 32)
    ours = tth(features, images, embedding, config=config, patch=grey)
    start = loss_of(features, embedding, grey.apply(images))
    found = loss_of(features, embedding, patch.apply(images))
    assert found < start - 0.02
    assert loss_of(features, embedding, ours.patch.apply(images)) <= found + 0.02
