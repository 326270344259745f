"""Structural patterns over normalized calls: a pattern is a tree, and matching gives what its variables stand for."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default})
Bindings = dict[str, Any]


@dataclass(frozen=True)
class Var:
    """Any node; the same name stands for the same node throughout a pattern."""

    name: str


@dataclass(frozen=True)
class Num:
    """A number: any one if ``value`` is None, else one equal up to ``rel``, as constants are written with few digits.

    Attributes:
        name: what it is bound to; "" for not at all.
    """

    value: float | None = None
    name: str = ""
    rel: float = 1e-6


@dataclass(frozen=True)
class Call:
    """A call of ``target`` whose first arguments match ``args``; of a commutative op in either order.

    Attributes:
        name: what the call itself is bound to; "" for not at all.
    """

    target: Any
    args: tuple["Pattern", ...]
    name: str = ""


@dataclass(frozen=True)
class Either:
    """One of several patterns; the first that matches wins."""

    options: tuple["Pattern", ...]


Pattern = Var | Num | Call | Either


def call(target: Any, *args: Pattern, name: str = "") -> Call:
    """Shorthand for ``Call``."""
    return Call(target, args, name)


def either(*options: Pattern) -> Either:
    """Shorthand for ``Either``."""
    return Either(options)


def match(pattern: Pattern, value: Any) -> Bindings | None:
    """What the variables stand for when ``value`` matches, or None."""
    return next(_matches(pattern, value, {}), None)


def _matches(pattern: Pattern, value: Any, bound: Bindings) -> Iterator[Bindings]:
    if isinstance(pattern, Var):
        if isinstance(value, Node) and bound.get(pattern.name, value) is value:
            yield {**bound, pattern.name: value}
    elif isinstance(pattern, Num):
        if isinstance(value, int | float) and not isinstance(value, bool) and _equal(pattern, value):
            yield {**bound, pattern.name: value} if pattern.name else bound
    elif isinstance(pattern, Either):
        for option in pattern.options:
            yield from _matches(option, value, bound)
    elif isinstance(value, Node) and value.op == "call_function" and value.target == pattern.target:
        bound = {**bound, pattern.name: value} if pattern.name else bound
        args = value.args[: len(pattern.args)]
        if len(args) == len(pattern.args):
            yield from _sequence(pattern.args, args, bound)
            if pattern.target in COMMUTATIVE:
                yield from _sequence(pattern.args, args[::-1], bound)


def _sequence(patterns: tuple[Pattern, ...], values: tuple[Any, ...], bound: Bindings) -> Iterator[Bindings]:
    if not patterns:
        yield bound
        return
    for found in _matches(patterns[0], values[0], bound):
        yield from _sequence(patterns[1:], values[1:], found)


def _equal(pattern: Num, value: float) -> bool:
    return pattern.value is None or math.isclose(value, pattern.value, rel_tol=pattern.rel, abs_tol=0.0)
