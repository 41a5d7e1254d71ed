"""Enough of PromQL to see whether an alert would fire: two scrapes, the first at the beginning of every range.

Not the language: selectors, rate, increase, absent, sum and max by labels, arithmetic, comparisons, and, or. What is
beyond it raises SyntaxError, so that an expression is never half understood.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

#: labels -> value
Vector = dict[frozenset[tuple[str, str]], float]
Value = Vector | float

_TOKEN = re.compile(r'\s*([A-Za-z_:][\w:]*|\d+(?:\.\d+)?[smhd]?|"[^"]*"|=~|!~|!=|==|>=|<=|[-+*/(){}\[\],=<>])')
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_COMPARED: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_COUNTED: dict[str, Callable[[float, float], float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul,
    # as Prometheus has it: 0 / 0 is no number, and compares as such
    "/": lambda a, b: a / b if b else float("nan") if not a else float("inf"),
}  # fmt: skip
_SUMMED: dict[str, Callable[[Sequence[float]], float]] = {"sum": sum, "max": max}


class Scrape:
    """The samples of a rendered text, with the labels that Prometheus adds."""

    def __init__(self, text: str, **added: str) -> None:
        self._samples: dict[str, Vector] = {"up": {frozenset(added.items()): 1.0}}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = frozenset({**sample.labels, **added}.items())
                self._samples.setdefault(sample.name, {})[labels] = sample.value

    def select(self, name: str, matches: Callable[[Mapping[str, str]], bool]) -> Vector:
        return {labels: value for labels, value in self._samples.get(name, {}).items() if matches(dict(labels))}


def evaluate(expression: str, before: Scrape, now: Scrape) -> Vector:
    """What the expression selects; an alert fires when there is anything."""
    found = _Parser(expression, before, now).whole()
    assert isinstance(found, dict), "an alert is a vector"
    return found


class _Parser:
    def __init__(self, text: str, before: Scrape, now: Scrape) -> None:
        self._tokens, self._at, self._before, self._now = _tokens(text), 0, before, now

    def whole(self) -> Value:
        found = self._or()
        if self._at != len(self._tokens):
            raise SyntaxError(f"unexpected {self._tokens[self._at]!r}")
        return found

    # -- tokens

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, wanted: str = "") -> str:
        token = self._peek()
        if not token or (wanted and token != wanted):
            raise SyntaxError(f"{wanted or 'something'} expected, not {token!r}")
        self._at += 1
        return token

    def _takes(self, *wanted: str) -> str:
        return self._take() if self._peek() in wanted else ""

    # -- operators, the loosest first

    def _or(self) -> Value:
        left = self._and()
        while self._takes("or"):
            right = self._and()
            left = {**_vector(right), **_vector(left)}
        return left

    def _and(self) -> Value:
        left = self._compared()
        while self._takes("and"):
            right = _vector(self._compared())
            left = {labels: value for labels, value in _vector(left).items() if labels in right}
        return left

    def _compared(self) -> Value:
        left = self._counted(("+", "-"), lambda: self._counted(("*", "/"), self._unary))
        if word := self._takes(*_COMPARED):
            right = self._counted(("+", "-"), lambda: self._counted(("*", "/"), self._unary))
            holds = _COMPARED[word]
            return {labels: a for labels, a, b in _pairs(left, right) if holds(a, b)}
        return left

    def _counted(self, words: tuple[str, ...], part: Callable[[], Value]) -> Value:
        left = part()
        while word := self._takes(*words):
            right = part()
            left = {labels: _COUNTED[word](a, b) for labels, a, b in _pairs(left, right)}
        return left

    def _unary(self) -> Value:
        token = self._take()
        if token == "(":
            found = self._or()
            self._take(")")
            return found
        if token[0].isdigit():
            return float(token)
        if token in _SUMMED:
            return self._summed(token)
        if token in ("rate", "increase"):
            return self._risen(token)
        if token == "absent":
            self._take("(")
            found = self._selected(self._take())[1]
            self._take(")")
            return {} if found else {frozenset(): 1.0}
        return self._selected(token)[1]

    def _summed(self, how: str) -> Vector:
        self._take("by")
        kept = self._names()
        self._take("(")
        inner = _vector(self._or())
        self._take(")")
        groups: dict[frozenset[tuple[str, str]], list[float]] = {}
        for labels, value in inner.items():
            groups.setdefault(frozenset(pair for pair in labels if pair[0] in kept), []).append(value)
        return {labels: _SUMMED[how](values) for labels, values in groups.items()}

    def _names(self) -> set[str]:
        self._take("(")
        names = {self._take()}
        while self._takes(","):
            names.add(self._take())
        self._take(")")
        return names

    def _risen(self, how: str) -> Vector:
        self._take("(")
        before, now = self._selected(self._take())
        self._take("[")
        span = self._take()
        self._take("]")
        self._take(")")
        seconds = int(span[:-1]) * _SECONDS[span[-1]]
        return {
            labels: (value - before[labels]) / (seconds if how == "rate" else 1)
            for labels, value in now.items()
            if labels in before
        }

    def _selected(self, name: str) -> tuple[Vector, Vector]:
        matchers: list[tuple[str, str, str]] = []
        if self._takes("{"):
            while not self._takes("}"):
                matchers.append((self._take(), self._take(), self._take().strip('"')))
                self._takes(",")

        def matches(labels: Mapping[str, str]) -> bool:
            return all(_matches(labels.get(label, ""), word, wanted) for label, word, wanted in matchers)

        return self._before.select(name, matches), self._now.select(name, matches)


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    text = text.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise SyntaxError(f"not understood: {text[at : at + 20]!r}")
        found.append(match[1])
        at = match.end()
    return found


def _matches(value: str, word: str, wanted: str) -> bool:
    is_same = re.fullmatch(wanted, value) is not None if word in ("=~", "!~") else value == wanted
    return is_same == (word in ("=", "=~"))


def _vector(value: Value) -> Vector:
    if not isinstance(value, dict):
        raise SyntaxError("a vector is needed, not a number")
    return value


def _pairs(left: Value, right: Value) -> list[tuple[Any, float, float]]:
    """What belongs together: the same labels, or a number with each."""
    if not isinstance(left, dict):
        raise SyntaxError("a vector is needed on the left")
    if not isinstance(right, dict):
        return [(labels, value, right) for labels, value in left.items()]
    return [(labels, value, right[labels]) for labels, value in left.items() if labels in right]
