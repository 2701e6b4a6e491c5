"""The filter language against an evaluation by Python itself, and against bad input."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pair.guard import filters

FIELDS = {"s": "str", "n": "int", "f": "float", "b": "bool"}


def test_what_is_written_for_lancedb():
    where = filters.parse("s = 'it''s' AND (n>=-3 or not b == TRUE) and f in (1, 2.5)", FIELDS)
    assert filters.to_sql(where) == (
        "((s = 'it''s') and ((n >= -3) or (not (b = true))) and (f in (1.0, 2.5)))"
    )
    assert filters.to_sql(filters.parse('s <> "a""b\'"', FIELDS)) == "(s != 'a\"b''')"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a field"),
        ("x = 1", "a field"),
        ("n", "a comparison"),
        ("n = 'a'", "a value of type int"),
        ("n = 1.5", "a value of type int"),
        ("s = 1", "a value of type str"),
        ("b = 1", "a value of type bool"),
        ("n = true", "a value of type int"),
        ("n in ()", "a value of type int"),
        ("n in (1", "')'"),
        ("(n = 1", "')'"),
        ("n = 1 n = 2", "'and', 'or' or the end"),
        ("n = 1; drop table images", "cannot be read"),
        ("n = 1 -- x", "cannot be read"),
        ("s = 'a' or '1' = '1'", "a field"),
        ("s = 'open", "cannot be read"),
        ("n = 1 and", "a field"),
        ("(" * 60 + "n = 1" + ")" * 60, "nested"),
        ("not " * 60 + "n = 1", "nested"),
    ],
)
def test_bad_filters_are_one_sentence(text, says):
    with pytest.raises(ValueError, match="filter") as caught:
        filters.parse(text, FIELDS)
    assert says in str(caught.value) and "\n" not in str(caught.value)


LITERALS = st.one_of(
    st.tuples(st.just("s"), st.text(max_size=6).filter(lambda t: "\x00" not in t)),
    st.tuples(st.just("n"), st.integers(-5, 5)),
    st.tuples(st.just("f"), st.floats(-5, 5, allow_nan=False).map(lambda v: round(v, 3))),
    st.tuples(st.just("b"), st.booleans()),
)


def comparison(pair, sign, quote):
    """Text of a comparison, and the same as a Python function."""
    name, value = pair
    text = str(value).lower() if isinstance(value, bool) else f"{value}"
    if isinstance(value, str):
        text = quote + value.replace(quote, quote * 2) + quote
    python = {"=": "==", "<>": "!="}.get(sign, sign)
    return f"{name} {sign} {text}", lambda row: eval(f"a {python} b", {"a": row[name], "b": value})


TREES = st.recursive(
    st.builds(comparison, LITERALS, st.sampled_from(["=", "==", "!=", "<>", "<", "<=", ">", ">="]),
              st.sampled_from("'\"")),
    lambda parts: st.one_of(
        st.tuples(parts, parts, st.sampled_from(["and", "OR"])).map(
            lambda t: (
                f"({t[0][0]}) {t[2]} ({t[1][0]})",
                lambda row: all((t[0][1](row), t[1][1](row)))
                if t[2] == "and"
                else any((t[0][1](row), t[1][1](row))),
            )
        ),
        parts.map(lambda t: (f"not ({t[0]})", lambda row: not t[1](row))),
    ),
    max_leaves=6,
)  # fmt: skip


def truth(where, row) -> bool:
    """The meaning of a parsed filter, by its two kinds of nodes."""
    if isinstance(where, filters.Join):
        parts = [truth(p, row) for p in where.parts]
        return not parts[0] if where.word == "not" else {"and": all, "or": any}[where.word](parts)
    sign = "==" if where.sign == "=" else where.sign
    return eval(f"a {sign} b", {"a": row[where.field], "b": where.value})


@settings(deadline=None, max_examples=60)
@given(TREES, st.lists(LITERALS, max_size=4))
def test_parsed_filters_mean_what_they_say(tree, pairs):
    text, meaning = tree
    row = {"s": "", "n": 0, "f": 0.0, "b": False, **dict(pairs)}
    where = filters.parse(text, FIELDS)
    assert truth(where, row) == meaning(row)
    # What is written for a store is a filter of the same meaning.
    assert truth(filters.parse(filters.to_sql(where), FIELDS), row) == meaning(row)
