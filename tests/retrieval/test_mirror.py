"""Mirrored features: their cosines are the mean of two, and hidden pixels stay hidden."""

import torch
import torch.nn.functional as F

from pair.retrieval.clip import ClipConfig, SmallClip, build_vocabulary
from pair.retrieval.mirror import Mirrored
from pair.retrieval.resnet import ResNetConfig


def test_cosines_are_means_of_two():
    torch.manual_seed(0)
    words = tuple(build_vocabulary(["a b"]))
    config = ClipConfig(32, 16, ResNetConfig((1, 1, 1, 1), 8), 16, 1, 2, vocabulary=words)
    clip = SmallClip(config).eval().requires_grad_(False)
    both = Mirrored(clip)
    x = torch.rand(3, 3, 32, 32)
    seen, texts = both.encode_image(x), both.encode_text(["a b", "b"])
    assert seen.shape == (3, 32) and texts.shape == (2, 32)
    assert torch.allclose(seen.norm(dim=1), torch.ones(3)) and both.dim == 32
    text = F.normalize(clip.encode_text(["a b", "b"]), dim=1)
    cosines = [F.normalize(clip.encode_image(y), dim=1) @ text.T for y in (x, x.flip(-1))]
    assert torch.allclose(seen @ texts.T, sum(cosines) / 2, atol=1e-5)
    assert torch.allclose(seen @ texts.T, both.encode_image(x.flip(-1)) @ texts.T, atol=1e-5)
    alone = F.normalize(clip.encode_image(x), dim=1)
    assert torch.allclose(Mirrored.upright(seen), alone, atol=1e-6)
