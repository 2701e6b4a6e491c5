"""A small filter language, the same for every store, safe to take from anybody.

    label = 'cat' and (year >= 2020 or not source in ('scan', 'fax'))

Comparisons ``= != < <= > >=`` and ``in (...)`` of a declared field with literals (text in single
or double quotes, numbers, true, false), joined by ``and``, ``or``, ``not`` and parentheses. Text
is parsed here and written anew for the store, so nothing else can get into a query. A row that
lacks the field fits no comparison with it, nor the negation of one (as in SQL).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
DEPTH = 50  # nested parentheses and negations

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    |(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
    |(?P<word>[A-Za-z_]\w*)
    |(?P<mark><=|>=|!=|<>|==|[=<>(),])
    )""",
    re.X,
)
_SIGNS = {"==": "=", "<>": "!="}


@dataclass(frozen=True)
class Compare:
    field: str
    sign: str  # = != < <= > >= in
    value: Any  # a literal, or a tuple of them


@dataclass(frozen=True)
class Join:
    word: str  # and, or, not
    parts: tuple[Filter, ...]


Filter = Compare | Join


def parse(text: str, fields: Mapping[str, str]) -> Filter:
    """``fields`` maps the declared names to 'str', 'int', 'float' or 'bool'.

    Raises ``ValueError`` with the place and what was expected.
    """
    return _Parser(text, fields).parse()


def to_sql(where: Filter) -> str:
    """For LanceDB (SQL of DataFusion)."""
    return _write(where, "=", _sql, lambda items: f"({items})")


def to_milvus(where: Filter) -> str:
    """For Milvus' boolean expressions."""
    return _write(where, "==", json.dumps, lambda items: f"[{items}]")


def _sql(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return json.dumps(value)


def _write(
    where: Filter, equal: str, literal: Callable[[Any], str], group: Callable[[str], str]
) -> str:
    if isinstance(where, Join):
        parts = [_write(p, equal, literal, group) for p in where.parts]
        if where.word == "not":
            return f"(not {parts[0]})"
        return "(" + f" {where.word} ".join(parts) + ")"
    if where.sign == "in":
        return f"({where.field} in {group(', '.join(literal(v) for v in where.value))})"
    sign = equal if where.sign == "=" else where.sign
    return f"({where.field} {sign} {literal(where.value)})"


class _Parser:
    def __init__(self, text: str, fields: Mapping[str, str]):
        self.text, self.fields, self.at, self.depth = text, fields, 0, 0
        self.kind, self.token = "", ""
        self._next()

    def parse(self) -> Filter:
        tree = self._either()
        if self.kind != "end":
            self._fail("'and', 'or' or the end")
        return tree

    def _either(self) -> Filter:
        return self._chain("or", lambda: self._chain("and", self._one))

    def _chain(self, word: str, part: Callable[[], Filter]) -> Filter:
        parts = [part()]
        while self._is_word(word):
            self._next()
            parts.append(part())
        return parts[0] if len(parts) == 1 else Join(word, tuple(parts))

    def _one(self) -> Filter:
        self.depth += 1
        if self.depth > DEPTH:
            raise ValueError(f"the filter is nested more than {DEPTH} levels deep")
        try:
            if self._is_word("not"):
                self._next()
                return Join("not", (self._one(),))
            if self.token == "(" and self.kind == "mark":
                self._next()
                tree = self._either()
                self._expect(")")
                return tree
            return self._comparison()
        finally:
            self.depth -= 1

    def _comparison(self) -> Filter:
        name = self.token
        if self.kind != "word" or name not in self.fields:
            known = ", ".join(self.fields) or "none declared"
            self._fail(f"a field ({known})")
        self._next()
        if self._is_word("in"):
            self._next()
            self._expect("(")
            values = [self._literal(name)]
            while self.token == "," and self.kind == "mark":
                self._next()
                values.append(self._literal(name))
            self._expect(")")
            return Compare(name, "in", tuple(values))
        sign = _SIGNS.get(self.token, self.token)
        if self.kind != "mark" or sign not in ("=", "!=", "<", "<=", ">", ">="):
            self._fail("a comparison such as = or >=")
        self._next()
        return Compare(name, sign, self._literal(name))

    def _literal(self, field: str) -> Any:
        wanted = self.fields[field]
        value: Any = None
        if self.kind == "text":
            quote = self.token[0]
            value = self.token[1:-1].replace(quote * 2, quote)
        elif self.kind == "number":
            whole = re.fullmatch(r"[-+]?\d+", self.token)
            value = int(self.token) if whole else float(self.token)
        elif self.kind == "word" and self.token.lower() in ("true", "false"):
            value = self.token.lower() == "true"
        if wanted == "float" and type(value) is int:
            value = float(value)
        if type(value) is not TYPES[wanted]:
            self._fail(f"a value of type {wanted} for {field}")
        self._next()
        return value

    def _expect(self, mark: str) -> None:
        if self.kind != "mark" or self.token != mark:
            self._fail(f"'{mark}'")
        self._next()

    def _is_word(self, word: str) -> bool:
        return self.kind == "word" and self.token.lower() == word

    def _next(self) -> None:
        rest = self.text[self.at :]
        if not rest.strip():
            self.kind, self.token = "end", ""
            return
        match = _TOKEN.match(rest)
        if match is None:
            raise ValueError(f"the filter cannot be read from {rest.strip()[:20]!r} on")
        self.kind = str(match.lastgroup)
        self.token = match.group(self.kind)
        self.at += match.end()

    def _fail(self, expected: str) -> None:
        found = f"{self.token[:20]!r}" if self.token else "the end"
        raise ValueError(f"the filter needs {expected} where it has {found}")
