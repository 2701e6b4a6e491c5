"""Public MAE weights: parity with transformers, files in the very formats, honest refusals."""

import argparse
import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from pair.checkpoints import from_hf_vitmae, from_meta_mae
from pair.generator import BASE, IMAGENET_MEAN, IMAGENET_STD, GeneratorConfig, MaskedAutoencoder
from pair.hub import ModelError

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "mask_ratio": 0.5,
}
GEOMETRY = GeneratorConfig(32, 8, 32, 2, 4, 24, 2, 3, mlp_ratio=2.0, eps=1e-12)


@pytest.fixture(scope="module")
def theirs():
    """A tiny ViTMAE of transformers in which every parameter matters."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SMALL)).eval()
    for name, p in model.named_parameters():
        if "pos" not in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "vitmae")
    return tmp_path / "vitmae"


def photos() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def compare(model: MaskedAutoencoder, theirs, tolerance: float = 1e-5) -> None:
    """The same pixels for all tokens, under the same masks (given to ViTMAE as noise)."""
    images = photos()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    output = theirs(pixel_values=(images - mean) / std, noise=noise)
    visible = ~output.mask.bool()  # theirs: 1 = removed
    assert visible.sum(1).tolist() == [8, 8, 8]
    wanted = theirs.unpatchify(output.logits) * std + mean
    torch.testing.assert_close(model(images, visible), wanted, rtol=0, atol=tolerance)
    assert float(wanted.std()) > 0.05


def test_parity_with_transformers_from_memory(theirs):
    model = from_hf_vitmae(theirs.state_dict(), theirs.config.to_dict())
    assert model.config == GEOMETRY
    compare(model, theirs)


def test_parity_with_transformers_from_its_folder(theirs, folder):
    model = from_hf_vitmae(folder)
    assert model.config == GEOMETRY
    compare(model, theirs)
    compare(from_hf_vitmae(str(folder)), theirs)


def old_name(key: str) -> str:
    """Names as transformers up to 4, and the published files, have them."""
    key = re.sub(r"^vit\.layers\.", "vit.encoder.layer.", key)
    if ".layer." in key or "decoder_layers" in key:
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
            key = key.replace(f".{letter}_proj.", f".attention.{name}.")
        key = key.replace(".o_proj.", ".output.dense.")
        key = key.replace(".mlp.fc1.", ".intermediate.dense.").replace(
            ".mlp.fc2.", ".output.dense."
        )
    return key


@pytest.mark.parametrize("container", ["memory", "safetensors", "bin"])
def test_parity_with_old_names(theirs, folder, container):
    old = {old_name(k): v.clone() for k, v in theirs.state_dict().items()}
    assert "vit.encoder.layer.1.attention.attention.query.weight" in old
    assert "decoder.decoder_layers.0.attention.output.dense.bias" in old
    assert "decoder.decoder_layers.1.intermediate.dense.bias" in old
    if container == "memory":
        compare(from_hf_vitmae(old, SMALL), theirs)
        return
    (folder / "model.safetensors").unlink()
    if container == "bin":
        torch.save(old, folder / "pytorch_model.bin")
    else:
        save_file(old, folder / "model.safetensors")
    compare(from_hf_vitmae(folder), theirs)


def test_the_layer_norm_epsilon_is_taken_from_the_config(theirs):
    assert from_hf_vitmae(theirs.state_dict(), SMALL).config.eps == 1e-12
    assert from_hf_vitmae(theirs.state_dict(), {**SMALL, "layer_norm_eps": 1e-3}).config.eps == 1e-3


def test_imported_weights_make_a_purifier_that_saves_and_loads(folder, tmp_path):
    from pair.purifier import Purifier

    purifier = Purifier(from_hf_vitmae(folder))
    purifier.save_pretrained(tmp_path / "ours")
    again = Purifier.from_pretrained(tmp_path / "ours")
    mask = purifier.draw_mask(3)
    with torch.no_grad():
        assert torch.equal(purifier(photos(), mask=mask), again(photos(), mask=mask))


# --- Meta's files ---


def meta_model() -> MaskedAutoencoder:
    torch.manual_seed(3)
    config = GeneratorConfig(**{**GEOMETRY.to_dict(), "eps": 1e-6})
    return MaskedAutoencoder(config).eval()


def write_meta(path, tensors=None, **entries):
    torch.save({"model": tensors or meta_model().state_dict(), **entries}, path)
    return path


def test_meta_files(tmp_path):
    """Root key "model", positions stored with the weights, LayerNorm epsilon 1e-6."""
    path = write_meta(tmp_path / "mae_visualize_vit_tiny.pth")
    model, wanted = from_meta_mae(path, heads=4, decoder_heads=3), meta_model()
    assert model.config == wanted.config
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch.no_grad():
        assert torch.equal(model(photos(), mask), wanted(photos(), mask))


def test_meta_files_with_settings(tmp_path):
    path = tmp_path / "checkpoint-799_full.pth"
    plain = argparse.Namespace(norm_pix_loss=False, lr=1e-4, device="cuda")
    write_meta(path, args=plain, epoch=799, optimizer={"state": {}})
    assert from_meta_mae(path, 4, 3).config == meta_model().config  # settings beat the name
    write_meta(path, args=argparse.Namespace(norm_pix_loss=True))
    with pytest.raises(ModelError, match=r"normalised pixels \(its settings say norm_pix_loss\)"):
        from_meta_mae(path, 4, 3)


def test_heads_of_the_published_sizes_are_known():
    """ViT-B/16 in names and shapes only: no memory, no time."""
    with torch.device("meta"):
        tensors = MaskedAutoencoder(BASE).state_dict()
    import pair.checkpoints as module

    heads = (module.HEADS[BASE.width], module.DECODER_HEADS[BASE.decoder_width])
    assert heads == (BASE.heads, BASE.decoder_heads)
    assert tensors["pos_embed"].shape == (1, 197, 768)


# --- refusals: one sentence each ---


def refused(message: str, call, *arguments) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def test_encoders_without_decoder_are_refused(theirs, folder, tmp_path):
    state = theirs.state_dict()
    refused(
        "holds no decoder",
        from_hf_vitmae,
        {k: v for k, v in state.items() if k[:3] == "vit"},
        SMALL,
    )
    theirs.vit.save_pretrained(tmp_path / "encoder")  # a ViTMAEModel
    refused("holds no decoder", from_hf_vitmae, tmp_path / "encoder")
    weights = meta_model().state_dict()
    encoder = {k: v for k, v in weights.items() if "decoder" not in k and k != "mask_token"}
    path = write_meta(tmp_path / "mae_pretrain_vit_base.pth", encoder)
    refused("mae_pretrain_vit_base.pth holds no decoder", from_meta_mae, path)


def test_normalised_pixel_targets_are_refused(theirs, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "norm_pix_loss": True}))
    refused("its config sets norm_pix_loss", from_hf_vitmae, folder)
    refused("norm_pix_loss", from_hf_vitmae, theirs.state_dict(), {**SMALL, "norm_pix_loss": True})
    path = write_meta(tmp_path / "mae_pretrain_vit_base_full.pth")
    refused("its name ends in _full", from_meta_mae, path, 4, 3)


def test_other_models_and_files_are_refused(theirs, folder, tmp_path):
    refused("'vit' model, expected 'vit_mae'", from_hf_vitmae, {}, {"model_type": "vit"})
    refused("give the numbers of attention heads", from_hf_vitmae, theirs.state_dict())
    refused("no file", from_meta_mae, tmp_path / "none.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    refused("no entry 'model'", from_meta_mae, tmp_path / "other.pth")
    write_meta(tmp_path / "odd.pth", {"decoder_x": torch.zeros(1)})
    refused("no masked autoencoder: it has no 'cls_token'", from_meta_mae, tmp_path / "odd.pth")
    weights = meta_model().state_dict()
    weights.pop("decoder_norm.bias")
    write_meta(tmp_path / "short.pth", weights)
    refused(r"1 weights missing \(decoder_norm.bias\)", from_meta_mae, tmp_path / "short.pth", 4, 3)
    (folder / "config.json").write_text("{}")
    refused("names no model_type", from_hf_vitmae, folder)
    (folder / "config.json").write_text("{")
    refused("not valid JSON", from_hf_vitmae, folder)
    (folder / "config.json").unlink()
    refused("has no config.json", from_hf_vitmae, folder)


def test_truncated_and_hostile_files_are_refused_and_run_nothing(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    path = write_meta(tmp_path / "mae.pth", extra=Bomb())
    refused("damaged or holds more than tensors", from_meta_mae, path)
    write_meta(path)
    path.write_bytes(path.read_bytes()[:1000])
    refused("damaged or holds more than tensors", from_meta_mae, path)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, "extra": Bomb()}, folder / "pytorch_model.bin")
    refused("damaged or holds more than tensors", from_hf_vitmae, folder)
    assert not (tmp_path / "exploded").exists()
