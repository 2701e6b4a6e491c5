"""Scenarios are data: they load strictly, cover the paper's tables, and settings have an order."""

import pytest

from pair.bench import scenario
from pair.bench.scenario import NAMES, SCALES, Row, Settings, at_scale, load, settings

PRINTED = {  # picked by hand from the printed tables, one per row kind
    ("table1", "PAIR", "flickr30k"): (88.86, 2.52, 92.93, 0.07, 93.02),
    ("table1", "undefended", "coco"): (89.88, 81.30, 56.42, 81.30, 56.42),
    ("table2", "LGS", "imagenet"): (74.77, 18.41, 79.33, 0.46, 85.60),
    ("table3", "fixed mask", "flickr30k"): (75.06, 85.36, 65.06, 0.13, 81.04),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_scenario_loads_at_every_scale(name, scale):
    found = load(name)
    made = settings(found, scale)
    assert made.seeds >= 2 if scale == "smoke" else made.seeds >= 5
    assert found.title and found.citation and found.differences
    assert found.rows or found.needs
    labels = [(r.label, r.system, r.scales) for r in found.rows]
    assert len(set(labels)) == len(labels)


def test_the_papers_numbers_stand_in_their_columns():
    for (name, label, dataset), values in PRINTED.items():
        found = load(name)
        row = next(r for r in found.rows if r.label == label)
        shown = tuple(row.printed(dataset, c.key) for c in found.columns)
        assert shown == values


def test_tables_have_the_rows_of_the_paper():
    assert [r.defense for r in load("table1").rows] == [
        "none", "patchzero", "sac", "maedefense", "lgs", "at", "pair", "certified",
    ]  # fmt: skip
    assert len({r.label for r in load("table4").rows}) == 6
    assert {r.defense for r in load("table5").rows} == {
        "none", "arn", "cafd", "maedefense", "jpeg", "hm", "pair",
    }  # fmt: skip


def test_table_4_keeps_areas_when_scaled():
    rows = {r.label: r.attack for r in load("table4").rows}
    strip, square = rows["rectangle 40 x 160"], rows["square 80 x 80"]
    assert strip["height"] * strip["width"] == pytest.approx(square["size"] ** 2)
    assert rows["circle of radius 45"]["size"] == pytest.approx(90 / 224)


def test_settings_win_in_order(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text('title = "x"\nkind = "text"\n[smoke]\nsteps = 7\n')
    found = load(str(path))
    assert settings(found, "smoke").steps == 7  # scenario over scale
    assert settings(found, "smoke", steps=9, eot=None).steps == 9  # user over scenario
    assert settings(load("table1"), "smoke").steps != 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('title = "x"\nkind = "text"\nspeed = 3', "unknown setting 'speed'"),
        ('title = "x"\nkind = "music"', "kind must be one of"),
        ('title = "x"\nkind = "text"\n[smoke]\nsteps = "many"', "steps must be int"),
        ('title = "x"\nkind = "text"\n[smoke]\nseeds = 0', "seeds must be at least 1"),
        ('title = "x"\nkind = "text"\n[smoke]\npairs = ["a b"]', "source > target"),
        ('title = "x"\nkind = "text"\ncolumns = [["clean", "c"]]\n[[rows]]\nlabel = "a"\n'
         "paper.p = [1, 2]", "2 printed values for 1 columns"),
        ("title = ", "is not valid TOML"),
    ],
)  # fmt: skip
def test_bad_scenarios_are_refused_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(str(path))


def test_unknown_names():
    with pytest.raises(ValueError, match="no scenario 'table9'"):
        load("table9")
    with pytest.raises(ValueError, match=r"^no file my\.toml$"):
        load("my.toml")
    with pytest.raises(ValueError, match="unknown scale"):
        settings(load("table1"), "huge")


def test_a_row_changes_settings_and_only_those():
    base = Settings()
    row = Row("a", attack={"steps": 3, "shape": "circle"})
    made = scenario.changed(base, row.attack, "row")
    assert made.steps == 3 and made.eot == base.eot


def test_a_row_may_be_attacked_otherwise_at_a_scale(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        'title = "x"\nkind = "text"\n[[rows]]\nlabel = "a"\nattack = { size = 0.2 }\n'
        "at.small = { steps = 7 }\n"
    )
    found = load(str(path))
    assert at_scale(found, "small").rows[0].attack == {"size": 0.2, "steps": 7}
    assert at_scale(found, "paper").rows[0].attack == {"size": 0.2}
    assert at_scale(at_scale(found, "small"), "small") == at_scale(found, "small")


def test_photos_that_would_not_be_used_are_refused(tmp_path):
    """The command's --data at a scale that has photos of its own."""
    from pair.commands.bench import _benches

    with pytest.raises(ValueError, match="--data: table1 at the scale 'small' measures on the"):
        _benches(["table1"], "small", tmp_path, {"data": ["caltech101:photos"]})
