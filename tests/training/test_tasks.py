"""What the tasks minimise and what they look at: naive transcriptions on a tiny pack."""

import dataclasses

import pytest
import torch

from pair.data.pack import Pack
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.generator import GeneratorConfig, MaskedAutoencoder
from pair.losses import patch_ssim
from pair.masks import complement, rule_from_config
from pair.purifier import Purifier
from pair.retrieval.clip import ClipConfig, SmallClip, build_vocabulary
from pair.retrieval.resnet import ResNetConfig
from pair.training.augment import blur, crop_flip, jitter, resized_crop, to_float
from pair.training.generator import GeneratorTask, GeneratorTraining
from pair.training.loop import batch_rows, step_generator
from pair.training.targets import ClipTask, CsqTask, TargetTraining

MODEL = GeneratorConfig(24, 8, 16, 1, 2, 16, 1, 2)
TARGET = TargetTraining(image_size=24, small_size=16, width=4, dim=8, bits=16, steps=10)


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    torch.manual_seed(0)
    words = tuple(build_vocabulary(["a tench"]))
    model = SmallClip(ClipConfig(24, 8, ResNetConfig((1, 1, 1, 1), 4), vocabulary=words))
    folder = tmp_path_factory.mktemp("critic")
    model.save_pretrained(folder)
    return folder


def task(pack: Pack, **settings) -> GeneratorTask:
    torch.manual_seed(0)
    return GeneratorTask(GeneratorTraining(model=MODEL, **settings), pack)


def batch(task: GeneratorTask, step: int):
    """What ``loss`` draws in this step: images, the kind of step, and the source for masks."""
    generator = step_generator(0, step)
    rows = batch_rows(task.size(), 4, 0, step)
    images = crop_flip(to_float(task.pack.raw(task.rows[rows])), 24, generator)
    return images, float(torch.rand(1, generator=generator)), generator


def losses(task: GeneratorTask, step: int = 0) -> dict[str, float]:
    rows = batch_rows(task.size(), 4, 0, step)
    with torch.no_grad():
        return {k: float(v) for k, v in task.loss(rows, step_generator(0, step), step).items()}


def cosine_loss(a, b) -> float:
    return float((1 - torch.nn.functional.cosine_similarity(a, b)).mean())


@torch.no_grad()
def test_one_pass_is_the_loss_of_the_paper(pack, critic):
    """Equation 14 with all tokens in L_p and the frozen encoder's embedding in L_s."""
    trained = task(pack, discriminator=str(critic), beta=0.7)
    images, _, generator = batch(trained, 0)
    mask = trained.rule(4, 3, generator=generator)
    rebuilt = trained.module(images, mask)
    l_p = float((1 - patch_ssim(images, rebuilt, 8)).mean())
    look = SmallClip.from_pretrained(critic).image_features
    l_s = cosine_loss(look(images), look(rebuilt))
    got = losses(trained)
    assert got["l_p"] == pytest.approx(l_p, abs=1e-5)
    assert got["l_s"] == pytest.approx(l_s, abs=1e-5)
    assert got["loss"] == pytest.approx(l_p + 0.7 * l_s, abs=1e-5)


@torch.no_grad()
def test_options_add_what_they_say(pack, critic):
    plain = losses(task(pack))
    assert plain.keys() == {"loss", "l_p"} and plain["loss"] == plain["l_p"]
    trained = task(pack, mse=3.0)
    images, _, generator = batch(trained, 0)
    rebuilt = trained.module(images, trained.rule(4, 3, generator=generator))
    squared = float(((rebuilt - images) ** 2).mean())
    assert losses(trained)["l_p"] == pytest.approx(plain["l_p"] + 3 * squared, abs=1e-5)
    semantic = losses(task(pack, discriminator=str(critic)))
    pooled = losses(task(pack, discriminator=str(critic), pooled=1.0))
    assert pooled["l_s"] > semantic["l_s"]
    off = losses(task(pack, discriminator=str(critic), beta=0.0))
    assert off == plain  # beta = 0: the critic is not even asked


@torch.no_grad()
def test_second_pass_averages_the_losses_of_both_outputs(pack):
    trained = task(pack, second=1.0)
    images, _, generator = batch(trained, 0)
    mask = trained.rule(4, 3, generator=generator)
    first = trained.module(images, mask)
    second = trained.module(first, complement(mask))
    both = [float((1 - patch_ssim(images, o, 8)).mean()) for o in (first, second)]
    assert losses(trained)["l_p"] == pytest.approx(sum(both) / 2, abs=1e-5)


@torch.no_grad()
def test_windows_count_hidden_tokens_only(pack):
    trained = task(pack, windows=1.0)
    images, _, generator = batch(trained, 0)
    rule = rule_from_config({"rule": "windows", "windows": 1.0})
    mask = rule(4, 3, generator=generator)
    ssim = patch_ssim(images, trained.module(images, mask), 8)
    assert losses(trained)["l_p"] == pytest.approx(float((1 - ssim)[~mask].mean()), abs=1e-5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(5)
    model = MaskedAutoencoder(dataclasses.replace(MODEL, decoder_width=32, decoder_depth=2))
    folder = tmp_path_factory.mktemp("teacher")
    Purifier(model).save_pretrained(folder, licence="CC0")
    return folder


def test_a_pupil_starts_from_what_fits_of_its_teacher(pack, teacher):
    pupil, master = task(pack, teacher=str(teacher)), Purifier.from_pretrained(teacher).autoencoder
    assert pupil.module.config == MODEL and pupil.licence == "CC0"
    theirs, alone = master.state_dict(), task(pack).module.state_dict()
    for name, value in pupil.module.state_dict().items():
        fits = value.shape == theirs[name].shape
        assert torch.equal(value, theirs[name] if fits else alone[name]), name
        of_decoder = "decoder" in name or name == "mask_token"
        assert fits == (not of_decoder or name == "decoder_pred.bias"), name
    assert not any(p.requires_grad for p in pupil.teacher.parameters())
    assert pupil.inputs().keys() == {"teacher"}


@torch.no_grad()
def test_a_pupil_is_compared_with_what_its_teacher_makes_of_the_same_tokens(pack, teacher):
    master = Purifier.from_pretrained(teacher).autoencoder
    trained = task(pack, teacher=str(teacher), distil=3.0, second=1.0)
    images, _, generator = batch(trained, 0)
    mask = trained.rule(4, 3, generator=generator)
    first = trained.module(images, mask)
    second = trained.module(first, complement(mask))
    apart = [((first - master(images, mask)) ** 2).mean()]
    apart.append(((second - master(first, complement(mask))) ** 2).mean())
    got = losses(trained)
    assert got["l_t"] == pytest.approx(float(sum(apart)) / 2, abs=1e-5)
    assert got["loss"] == pytest.approx(got["l_p"] + 3 * got["l_t"], abs=1e-5)
    hidden = losses(task(pack, teacher=str(teacher), windows=1.0))
    assert hidden["l_t"] > 0
    assert trained.validate()["psnr_to_teacher"] > 0


def test_a_teacher_must_fit(pack, teacher):
    with pytest.raises(ValueError, match="from init or from its teacher, not from both"):
        task(pack, teacher=str(teacher), init=str(teacher))
    other = GeneratorConfig(24, 12, 16, 1, 2, 16, 1, 2)
    with pytest.raises(ValueError, match="tokens of another size"):
        GeneratorTask(GeneratorTraining(model=other, teacher=str(teacher)), pack)


def test_shares_of_steps(pack):
    trained = task(pack, second=0.3, windows=0.2)
    seen = {"windows": 0, "second": 0, "one": 0}
    for step in range(400):
        kind = batch(trained, step)[1]
        seen["windows" if kind < 0.2 else "second" if kind < 0.5 else "one"] += 1
    assert seen["windows"] == pytest.approx(80, abs=30)
    assert seen["second"] == pytest.approx(120, abs=35)


def test_gradients_reach_the_generator_and_never_the_critic(pack, critic):
    trained = task(pack, discriminator=str(critic), second=1.0)
    rows = batch_rows(trained.size(), 4, 0, 0)
    trained.loss(rows, step_generator(0, 0), 0)["l_s"].backward()
    assert all(p.grad is not None for p in trained.module.parameters())
    assert trained.critic is not None
    assert all(p.grad is None and not p.requires_grad for p in trained.critic.module.parameters())
    assert not trained.critic.module.training


def test_only_training_photos_are_trained_on(pack):
    for trained in (task(pack), ClipTask(TARGET, pack), CsqTask(TARGET, pack)):
        rows = trained.rows if isinstance(trained, GeneratorTask) else trained.data.rows
        assert {pack.splits[i] for i in rows.tolist()} == {"train"}
        if not isinstance(trained, GeneratorTask):
            assert "" not in {pack.labels[i] for i in rows.tolist()}
    labels = {pack.labels[i] for i in task(pack).rows.tolist()}
    assert "" in labels  # the generator also learns from faces, background and Flickr
    held = CsqTask(TARGET, pack).held_out
    for rows, _ in held.values():
        assert {pack.splits[i] for i in rows.tolist()} <= {"val", "gallery"}


def test_labels_belong_to_their_photos(pack):
    data = ClipTask(TARGET, pack).data
    assert data.classes == sorted(data.classes) and len(data.classes) == 12
    for row, label in zip(data.rows.tolist(), data.labels.tolist(), strict=True):
        assert data.classes[label] == pack.labels[row]
    rows, labels = data.held_out(("imagenette", "caltech101"), per_class=2)
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        assert data.classes[label] == pack.labels[row]
    assert int(torch.bincount(labels).max()) == 2


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_class_balance(pack, balance):
    data = ClipTask(dataclasses.replace(TARGET, balance=balance), pack).data
    share = torch.zeros(12).index_add_(0, data.labels, data.weights)
    counts = torch.bincount(data.labels).float()
    wanted = counts ** (1 - balance)
    torch.testing.assert_close(share / share.sum(), wanted / wanted.sum())


def test_small_images_first(pack):
    data = ClipTask(TARGET, pack).data
    sizes = [data.draw(TARGET, 2, step_generator(0, s), s)[0].shape[-1] for s in range(10)]
    assert sizes == [16] * 5 + [24] * 5


def test_sentences_of_training_and_evaluation_differ():
    assert not set(TRAIN_TEMPLATES) & set(HELD_OUT_TEMPLATES)
    assert sentences(["cat", "dog"], ("a {}", "{} there")) == [
        *("a cat", "cat there"),
        *("a dog", "dog there"),
    ]


# --- packs that lack something ---


def part(pack: Pack, keep) -> Pack:
    rows = pack.where(keep).tolist()
    lists = (pack.paths, pack.labels, pack.datasets, pack.splits)
    return Pack(pack.images[rows], *([x[i] for i in rows] for x in lists))


def test_one_data_set_is_enough(pack):
    for name in ("caltech101", "imagenette"):
        some = part(pack, lambda label, data, split, name=name: data == name)
        for trained in (task(some), ClipTask(TARGET, some), CsqTask(TARGET, some)):
            trained.module.eval()
            with torch.no_grad():
                figures = trained.validate()
            assert all(torch.isfinite(torch.tensor(v)) for v in figures.values())


def test_missing_photos_are_refused_in_one_sentence(pack):
    train = part(pack, lambda label, data, split: split == "train")
    val = part(pack, lambda label, data, split: split != "train")
    nameless = part(pack, lambda label, data, split: data == "flickr8k")
    with pytest.raises(ValueError, match="no photos to validate on"):
        task(train)
    for kind in (ClipTask, CsqTask):
        with pytest.raises(ValueError, match="no photos to validate on"):
            kind(TARGET, train)
        for nothing in (val, nameless):
            with pytest.raises(ValueError, match="no labelled photos to train on"):
                kind(TARGET, nothing)
    assert task(val).size() == 0  # the loop refuses that


def test_an_empty_training_set_is_refused(pack, tmp_path):
    from pair.training.loop import LoopConfig, train

    val = part(pack, lambda label, data, split: split != "train")
    with pytest.raises(ValueError, match="no photos to train on"):
        train(task(val), LoopConfig(steps=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- augmentation ---


def test_augmentations_keep_range_shape_and_seed():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for augment in (
        lambda x, g: crop_flip(x, 24, g),
        lambda x, g: resized_crop(x, 20, g),
        jitter,
        lambda x, g: blur(x, g, share=0.5),
    ):
        before = images.clone()
        out = augment(images, step_generator(0, 1))
        assert torch.equal(out, augment(images, step_generator(0, 1)))
        assert not torch.equal(out, augment(images, step_generator(0, 2)))
        assert torch.equal(images, before)  # not in place
        assert float(out.min()) >= -1e-6 and float(out.max()) <= 1 + 1e-6
        assert out.shape[:2] == (6, 3)


def test_crop_flip_copies_pixels():
    images = torch.rand(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    out = crop_flip(images, 7, step_generator(0, 0))
    for image, crop in zip(images, out, strict=True):
        places = [
            torch.equal(crop, piece.flip(-1) if flip else piece)
            for top in range(4)
            for left in range(4)
            for flip in (False, True)
            for piece in [image[:, top : top + 7, left : left + 7]]
        ]
        assert places.count(True) == 1
