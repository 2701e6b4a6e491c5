"""Ranks, codes, shapes, seeds and the member-wise attack against plain computations."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pair.attacks.patch import Patch, Placement
from pair.bench import codes, text
from pair.bench.checks import gain_of
from pair.bench.grid import PURPOSES, seed_of
from pair.bench.masked import DoubleMasked
from pair.bench.scenario import Settings, load
from pair.bench.search import CertifiedSearch
from pair.bench.world import chosen_classes

from .conftest import bench_at


def naive(scores, inserted, relevant):
    """Ranks by counting who is ahead, one pair at a time."""
    after, planted = [], []
    for line, extra, own in zip(scores.tolist(), inserted.tolist(), relevant.tolist(), strict=True):
        mine = []
        for i, score in enumerate(line):
            if own[i]:
                others = [s for j, s in enumerate(line) if j != i] + extra
                mine.append(1 + sum(s >= score for s in others))
        after.append(sorted(mine))
        row = []
        for i, score in enumerate(extra):
            others = line + [s for j, s in enumerate(extra) if j != i]
            row.append(1 + sum(s > score for s in others))
        planted.append(row)
    return after, planted


def test_ranks_are_counts_of_who_is_ahead_and_ties_go_to_the_attacker():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (6, 12), generator=g).float()  # many ties
    inserted = torch.randint(0, 5, (6, 3), generator=g).float()
    relevant = torch.rand(6, 12, generator=g) < 0.4
    assert text.ranks_after(scores, inserted, relevant) == naive(scores, inserted, relevant)
    none = torch.zeros(6, 0)
    assert text.ranks_before(scores, relevant) == naive(scores, none, relevant)[0]


def test_codes_survive_packing():
    g = torch.Generator().manual_seed(1)
    for bits in (16, 30, 64):
        given = torch.where(torch.rand(5, bits, generator=g) < 0.5, 1.0, -1.0)
        assert torch.equal(codes.unpacked(codes.packed(given), bits), given)


def test_average_precision_of_codes_without_ties():
    gallery = torch.ones(4, 8)
    for row in range(4):
        gallery[row, :row] = -1  # distances 0, 1, 2, 3 from the first query
    relevant = torch.tensor([[False, True, False, True]])
    found = codes.precisions(torch.ones(1, 8), gallery, relevant, 1000)
    assert found == [round((1 / 2 + 2 / 4) / 2, 6)]


def test_seeds_of_different_purposes_never_meet():
    used: dict[int, str] = {}
    for purpose in PURPOSES:
        for unit in ("laptop", "sunflower", "a > b"):
            for draw in range(0, 999, 7):
                seed = seed_of(purpose, 0, unit, draw)
                assert used.setdefault(seed, purpose) == purpose
    assert seed_of("evaluate", 0, "x", 1) != seed_of("evaluate", 1, "x", 1)


def test_shapes_of_table_4():
    side, base = 112, Settings()
    areas = {}
    for row in load("table4").rows:
        from pair.bench.scenario import changed

        s = changed(base, row.attack, "row")
        patch = text.start_patch(row.attack, s, "grey", 3)
        areas[row.label] = patch.area((side, side))
        assert patch.apply(torch.zeros(2, 3, side, side)).shape[-1] == side
    assert abs(areas["square 112 x 112"] - 0.25) < 0.005
    assert abs(areas["rectangle 40 x 160"] - areas["square 80 x 80"]) < 0.005
    assert abs(areas["circle of radius 45"] - 3.14159 * (45 / 224) ** 2) < 0.01


def test_attacked_classes_are_in_the_gallery():
    s = Settings(classes=5, keywords=("laptop",), pairs=("chandelier > watch",))
    names = chosen_classes(s)
    assert len(names) == 5 and {"laptop", "chandelier", "watch"} <= set(names)
    assert chosen_classes(Settings(classes=0)) == sorted(chosen_classes(Settings()))


def test_the_certified_mode_is_attacked_at_its_weakest_members(tmp_path):
    bench = bench_at("table1", tmp_path)
    row = next(r for r in bench.scenario.rows if r.defense == "certified")
    search = bench.search(row)
    assert isinstance(search, CertifiedSearch)
    g = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 32, 32, generator=g)
    target = search.target(["a laptop"])
    start = text.start_patch({}, bench.settings, "grey", 0)
    cover = text.covered(start, 32)
    victim, goal = search.victim(target, cover)
    # By hand: every view by the certified purifier, those that see the patch, and the plain one.
    views = search.purifier.embed(search.encoder, images)
    shown = search.purifier.pixels(search.purifier.cover.visible)[:, 0].bool()
    sees = [bool((m & (cover > 0)).any()) for m in shown]
    assert 0 < sum(sees) < len(sees), "some window must hide the whole patch"
    members = torch.cat([views.masked[:, sees], views.plain[:, None]], 1)
    scores = members @ F.normalize(target, dim=-1)
    wanted = 1 - scores.sort(dim=1).values[:, :2].mean(1)
    assert torch.allclose(goal(victim.features(images)), wanted, atol=1e-5)
    # The score that the table uses is at most that of a view which cannot see the patch.
    rows = search.rows(start.apply(images), 0)
    hidden = views.masked[:, [not s for s in sees]] @ F.normalize(target, dim=-1)
    pooled = search.scores(F.normalize(target, dim=-1)[None], rows)[0]
    assert bool((pooled <= hidden.amin(1) + 1e-5).all())
    # And the gradient reaches the patch.
    content = start.content.clone().requires_grad_(True)
    loss = goal(victim.features(start.apply(images, content=content))).sum()
    assert torch.autograd.grad(loss, content)[0].abs().max() > 0


def test_levelling_off_is_judged_under_equal_draws():
    start = Patch.make("grey", 0.5, 16, Placement("centre"))
    stages = [start.with_content(torch.full_like(start.content, v)) for v in (0.0, 0.9, 1.0)]
    result = SimpleNamespace(losses=[0.0] * 11, snapshots={8: stages[1]}, patch=stages[2])

    def features(images, generator):
        noise = torch.randn(len(images), 1, generator=generator)  # drowns what is gained
        return images.flatten(1).mean(1, keepdim=True) + 100 * noise

    def goal(outputs):
        return 1 - outputs[:, 0]

    victim = SimpleNamespace(features=features)
    images = torch.zeros(3, 3, 16, 16)
    found = gain_of(victim, goal, images, stages[0], result, seed=5, draws=4)
    assert found == pytest.approx(0.1, abs=1e-3)
    backwards = SimpleNamespace(losses=[0.0] * 11, snapshots={8: stages[1]}, patch=stages[0])
    assert gain_of(victim, goal, images, stages[2], backwards, seed=5, draws=4) is None


def test_random_defenses_are_attacked_in_more_and_smaller_steps(tmp_path):
    bench = bench_at("table1", tmp_path, steps=2, random_steps=5, random_ads=1)
    for row in bench.scenario.rows:
        if row.defense not in ("none", "pair"):
            continue
        notes = text.adaptive_patch(bench, row, "laptop")[1]
        drawn = row.defense == "pair"
        assert notes["steps"] == (5 if drawn else 2)
        assert notes["gradients"] == (5 if drawn else 2 * bench.settings.ads)


def certified_photos(tmp_path):
    bench = bench_at("table2", tmp_path)
    row = next(r for r in bench.scenario.rows if r.defense == "certified")
    search = bench.hash_search(row)
    assert isinstance(search, DoubleMasked)
    return bench, row, search


def test_certified_queries_are_answered_by_double_masking(tmp_path):
    _, _, search = certified_photos(tmp_path)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    visible = search.purifier.cover.visible

    def code(image, mask):
        view = search.purifier.render(image[None], mask[None])
        return torch.where(search.encoder.encode_image(view)[0] > 0, 1, -1)

    for image, found in zip(images, search.codes(images, 0), strict=True):
        radii, firsts = [], []
        for own in visible:
            first = code(image, own)
            moved = [int((code(image, own & other) != first).sum()) for other in visible]
            radii.append(max(moved))
            firsts.append(first)
        assert torch.equal(found, firsts[radii.index(min(radii))].float())


def test_no_patch_exceeds_what_is_proved_for_certified_queries(tmp_path):
    bench, row, search = certified_photos(tmp_path)
    world, g = bench.hash, torch.Generator().manual_seed(3)
    gallery, at = bench.codes(row), world.of("chandelier")
    images = world.queries[at]
    rows = slice(0, len(at))
    own = world.same(["chandelier"] * len(at))[rows]
    other = world.same(["watch"] * len(at))[rows]
    least, most = search.proved(images, gallery, own, other)
    start = codes.start_of(row, bench.settings, "grey", g)
    for _ in range(6):
        patched = start.apply(images, content=torch.rand(start.content.shape, generator=g))
        found = search.codes(patched, 0)
        wrong = torch.tensor(codes.precisions(found, gallery, other, 1000))
        right = torch.tensor(codes.precisions(found, gallery, own, 1000))
        assert bool((wrong <= most + 1e-5).all()) and bool((right >= least - 1e-5).all())


def test_the_attacker_of_double_masking_moves_one_view_within_its_bound(tmp_path):
    bench, row, search = certified_photos(tmp_path)
    g = torch.Generator().manual_seed(4)
    images = torch.rand(2, 3, 32, 32, generator=g)
    bits = search.encoder.dim
    anchor = torch.where(torch.rand(bits, generator=g) < 0.5, 1.0, -1.0)
    row = replace(row, attack={"placement": "top-right"})  # every window hides the centre here
    start = codes.start_of(row, bench.settings, "grey", g)
    cover = text.covered(start, 32)
    victim, goal = search.victim(anchor, cover)
    visible = search.purifier.cover.visible
    shown = search.purifier.pixels(visible)[:, 0]
    sees = [bool((m & (cover > 0)).any()) for m in shown]
    assert 0 < sum(sees) < len(sees), "some window must hide the whole patch"

    def outputs(image, mask):
        return search.encoder.encode_image(search.purifier.render(image[None], mask[None]))[0]

    wanted = []
    for image in images:
        first = [outputs(image, m) for m in visible]
        near = [float(F.cosine_similarity(z, anchor, dim=0)) for z in first]
        member = max((i for i in range(len(visible)) if sees[i]), key=near.__getitem__)
        spread = [
            max(int((outputs(image, a & b).sign() != first[i].sign()).sum()) for b in visible)
            for i, a in enumerate(visible)
        ]
        bound = min(s for s, seen in zip(spread, sees, strict=True) if not seen)
        z = first[member].tanh()
        apart = [
            float((bits - (outputs(image, visible[member] & b).tanh() * z).sum()) / 2)
            for b in visible
        ]
        far = sorted(apart)[-2:]
        strays = sum(max(0.0, a - (bound - 1)) for a in far) / 2 / bits
        wanted.append(1 - near[member] + goal.weight * strays)
    found = goal(victim.features(images))
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-4)
    content = start.content.clone().requires_grad_(True)
    loss = goal(victim.features(start.apply(images, content=content))).sum()
    assert torch.autograd.grad(loss, content)[0].abs().max() > 0
