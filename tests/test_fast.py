"""The fast path computes the same as the plain one, and less of it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pair import kernels
from pair.generator import GeneratorConfig, MaskedAutoencoder, patchify
from pair.masks import Bernoulli, ExactCount, complement
from pair.purifier import Purifier
from pair.tokens import ROUND, Selection

CONFIG = GeneratorConfig(48, 8, 32, 2, 4, 32, 2, 2)  # 36 tokens
N = 36


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    generator = MaskedAutoencoder(CONFIG)
    for p in generator.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return generator.eval().requires_grad_(False)


def photos(batch: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 48, 48, generator=seeded(seed))


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def fused(request):
    before = kernels.set_fused(request.param)
    yield request.param
    kernels.set_fused(before)


RULES = [ExactCount(0.3), Bernoulli(0.5), Bernoulli(0.8)]


# --- selections ---


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("first", [0, 1])
def test_take_and_put_are_loops_over_tokens(rule, first):
    mask = rule(5, 6, generator=seeded(3))
    chosen = Selection.of(mask)
    full = torch.rand(5, first + N, 7, generator=seeded(4))
    wanted = [full[i, first + t] for i in range(5) for t in range(N) if mask[i, t]]
    rows = chosen.take(full, first)
    assert torch.equal(rows.flatten(0, -2)[: len(wanted)], torch.stack(wanted))
    back = chosen.put(torch.zeros_like(full), rows, first)
    for i in range(5):
        for t in range(-first, N):
            expected = full[i, first + t] if t >= 0 and mask[i, t] else torch.zeros(7)
            assert torch.equal(back[i, first + t], expected)
    table = torch.rand(N, 3)
    looked = chosen.lookup(table).flatten(0, -2)[: len(wanted)]
    places = [t for i in range(5) for t in range(N) if mask[i, t]]
    assert torch.equal(looked, table[places])


def test_packed_rows_pad_and_pack():
    mask = Bernoulli(0.5)(4, 6, generator=seeded(0))
    counts = mask.sum(1).tolist()
    assert len(set(counts)) > 1
    chosen = Selection.of(mask)
    rows = torch.rand(len(chosen.token), 5)
    head = torch.rand(1, 1, 5)
    led = chosen.lead(head, rows)
    assert len(led) % ROUND == 0  # few shapes, whatever the masks
    layout = chosen.layout(first=1)
    padded = layout.pad(led)
    assert padded.shape == (4, 1 + max(counts), 5)
    start = 0
    for i, count in enumerate(counts):
        assert torch.equal(padded[i, 0], head[0, 0])
        assert torch.equal(padded[i, 1 : 1 + count], rows[start : start + count])
        assert not bool(padded[i, 1 + count :].any())
        assert layout.keys[i, 0, 0].tolist() == [t <= count for t in range(1 + max(counts))]
        start += count
    assert torch.equal(layout.pack(padded)[: 4 + start], led[: 4 + start])
    heads, tail = chosen.parted(led)
    assert torch.equal(heads, head[0].expand(4, 5)) and torch.equal(tail, rows)


# --- the same result ---


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("options", [{}, {"output": "paste"}, {"encoder": "zero"}, {"passes": 1}])
@torch.no_grad()
def test_a_batch_equals_one_by_one_through_the_whole_generator(rule, options, fused):
    purifier, images = Purifier(model(), rule, **options), photos(6)
    mask = purifier.draw_mask(6, seeded(0))
    got = purifier(images, mask=mask)
    for i in range(6):
        m, x = mask[i : i + 1], images[i : i + 1]
        first = purifier.autoencoder(x, m, encoder=purifier.encoder)
        last = first
        if purifier.passes == 2:
            last = purifier.autoencoder(first, complement(m), encoder=purifier.encoder)
            if purifier.output == "paste":
                grid = m.view(1, 1, 6, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
                last = torch.where(grid, last, first)
        torch.testing.assert_close(got[i], last[0].clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@torch.no_grad()
def test_fused_kernels_and_gradient_mode_agree(rule):
    purifier, images = Purifier(model(), rule), photos(5)
    mask = purifier.draw_mask(5, seeded(2))
    fast = purifier(images, mask=mask)
    before = kernels.set_fused(False)
    plain = purifier(images, mask=mask)
    kernels.set_fused(before)
    with torch.enable_grad():
        x = images.clone().requires_grad_()
        tracked = purifier(x, mask=mask)
        tracked.sum().backward()
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(tracked, plain, rtol=0, atol=1e-6)
    assert float(x.grad.abs().sum()) > 0


def test_fused_kernels_are_for_inference_on_cpus_only():
    layer = torch.nn.Linear(8, 8)
    x = torch.rand(3, 8)
    if kernels._OP is None:
        pytest.skip("this build of torch has no oneDNN")
    assert not kernels.fused(x, layer)  # its weights want gradients
    with torch.no_grad():
        assert kernels.fused(x, layer)
        assert not kernels.fused(x.double(), layer)
        with torch.autocast("cpu", torch.bfloat16):
            assert not kernels.fused(x, layer)
    layer.requires_grad_(False)
    assert kernels.fused(x, layer)
    assert not kernels.fused(x.requires_grad_(), layer)


@torch.no_grad()
def test_wanted_tokens_are_rows_of_all_tokens(fused):
    generator, tokens = model(), patchify(photos(5), 8)
    for rule in RULES:
        mask = rule(5, 6, generator=seeded(1))
        seen = Selection.of(mask)
        states = generator.states(seen.take(tokens), seen)
        everything = generator.predict(states)
        for chosen in (seen, Selection.of(~mask)):
            rows = generator.predict(states, chosen)
            torch.testing.assert_close(rows, chosen.take(everything), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", [ExactCount(0.5), Bernoulli(0.5)], ids=repr)
@pytest.mark.parametrize("micro_batch", [2, 5, 64])
@torch.no_grad()
def test_draws_are_n_calls_one_after_the_other(rule, micro_batch):
    purifier, images = Purifier(model(), rule, restore_size=True), photos(3)
    got = purifier.draws(images, 4, generator=seeded(7), micro_batch=micro_batch)
    source = seeded(7)
    for k in range(4):
        torch.testing.assert_close(got[k], purifier(images, generator=source), rtol=0, atol=1e-5)
    assert not torch.equal(got[0], got[1])


def test_draws_carry_gradients_and_refuse_nonsense():
    purifier, images = Purifier(model()), photos(2).requires_grad_()
    purifier.draws(images, 3, generator=seeded(0)).mean().backward()
    one = photos(2).requires_grad_()
    source = seeded(0)
    torch.stack([purifier(one, generator=source) for _ in range(3)]).mean().backward()
    torch.testing.assert_close(images.grad, one.grad, rtol=1e-3, atol=1e-7)
    with pytest.raises(ValueError, match="n >= 1"):
        purifier.draws(photos(1), 0)


# --- less work ---


@torch.no_grad()
def test_bernoulli_masks_cost_what_their_tokens_cost():
    """Packed: the same tokens cost the same, even or not (attention excepted)."""
    before = kernels.set_fused(False)
    tokens = patchify(photos(8), 8)
    even = torch.zeros(8, N, dtype=torch.bool)
    even[:, :18] = True
    uneven = torch.zeros(8, N, dtype=torch.bool)
    for i in range(8):
        uneven[i, : 4 + 4 * i] = True
    assert int(uneven.sum()) == int(even.sum())
    generator = model()

    def linear_flops(mask):
        seen = Selection.of(mask)
        with FlopCounterMode(display=False) as counter:
            generator.states(seen.take(tokens), seen)
        table = counter.get_flop_counts()["Global"]
        return sum(v for op, v in table.items() if "mm" in str(op) and "bmm" not in str(op))

    a, b = linear_flops(even), linear_flops(uneven)
    kernels.set_fused(before)
    # At most one round of spare rows more; padding to the longest would cost 33 / 19.
    assert b <= a * (8 * 19 + ROUND) / (8 * 19)
    assert b < a * 33 / 19
