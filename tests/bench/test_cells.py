"""Ranks, codes, shapes, seeds and the member-wise attack against plain computations."""

import torch
import torch.nn.functional as F

from pair.bench import codes, text
from pair.bench.grid import PURPOSES, seed_of
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
