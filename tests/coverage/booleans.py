"""Cases of arithmetic on truth values, which the front end takes for integers of one signed bit.

So a true value is -1, and adding is an exclusive or. With a number, in sums and in comparisons, a truth value counts
as 0 or 1.
"""

from collections.abc import Callable

import numpy as np
from tests.coverage.cases import Case
from tests.coverage.values import Array

_ONLY = ("int1",)
_Number = Callable[[Array, Array, Array], Array]


def _bit(function: _Number) -> _Number:
    """The function on 0 and -1; of its result the lowest bit."""
    return lambda x, y, z: (function(-x.astype(int), -y.astype(int), -z.astype(int)) & 1).astype(bool)


def _number(function: _Number) -> _Number:
    """The function on 0 and 1."""
    return lambda x, y, z: function(x.astype(np.int32), y.astype(np.int32), z.astype(np.int32))


def _grid(x: Array) -> Array:
    return x.reshape(4, 8)


_BITS: tuple[tuple[str, str, _Number], ...] = (
    ("tensor.__add__", "x + y", lambda x, y, z: x + y),
    ("tensor.__sub__", "x - y", lambda x, y, z: x - y),
    ("tensor.__mul__", "x * y", lambda x, y, z: x * y),
    ("tensor.__neg__", "-x", lambda x, y, z: -x),
    ("tensor.__lshift__", "x << (y & False)", lambda x, y, z: x),
    ("tensor.__rshift__", "x >> (y & False)", lambda x, y, z: x),
    ("tensor.__floordiv__", "x // (y | True)", lambda x, y, z: x),
    ("tensor.__mod__", "x % (y | True)", lambda x, y, z: x * 0),
    ("tensor.logical_and", "x.logical_and(y)", lambda x, y, z: x & y),
    ("tensor.logical_or", "x.logical_or(y)", lambda x, y, z: x | y),
    ("add", "tl.add(x, y)", lambda x, y, z: x + y),
    ("sub", "tl.sub(x, y)", lambda x, y, z: x - y),
    ("mul", "tl.mul(x, y)", lambda x, y, z: x * y),
    ("abs", "tl.abs(x)", lambda x, y, z: x),
    ("cumprod", "tl.cumprod(x2, 1)", lambda x, y, z: _grid(x).cumprod(1)),
)
_NUMBERS: tuple[tuple[str, str, _Number], ...] = (
    ("tensor.__radd__", "3 + x", lambda x, y, z: 3 + x),
    ("tensor.__rsub__", "3 - x", lambda x, y, z: 3 - x),
    ("tensor.__rmul__", "3 * x", lambda x, y, z: 3 * x),
    ("tensor.__truediv__", "x / (y | True)", lambda x, y, z: x.astype(float)),
    ("tensor.__not__", "not tl.load(p)", lambda x, y, z: x[0] == 0),
    ("tensor.__rlshift__", "3 << x", lambda x, y, z: 3 << x),
    ("tensor.__rrshift__", "100 >> x", lambda x, y, z: 100 >> x),
    ("tensor.__rand__", "5 & x", lambda x, y, z: 5 & x),
    ("tensor.__ror__", "5 | x", lambda x, y, z: 5 | x),
    ("tensor.__rxor__", "5 ^ x", lambda x, y, z: 5 ^ x),
    ("tensor.__rlt__", "1 < x", lambda x, y, z: x > 1),
    ("tensor.__rle__", "1 <= x", lambda x, y, z: x >= 1),
    ("tensor.__rgt__", "1 > x", lambda x, y, z: x < 1),
    ("tensor.__rge__", "1 >= x", lambda x, y, z: x <= 1),
    ("tensor.__req__", "1 == x", lambda x, y, z: x == 1),
    ("tensor.__rne__", "1 != x", lambda x, y, z: x != 1),
    ("cdiv", "tl.cdiv(z, 3)", lambda x, y, z: (z + 2) // 3),
    ("maximum", "tl.maximum(x, y)", lambda x, y, z: np.maximum(x, y)),
    ("minimum", "tl.minimum(x, y)", lambda x, y, z: np.minimum(x, y)),
    ("map_elementwise", "tl.map_elementwise(first_of, x, y)", lambda x, y, z: x),
    ("bitonic_merge", "tl.bitonic_merge(i >= 16, descending=True)", lambda x, y, z: np.arange(32) < 16),
    ("full", "tl.full((4, 8), True, D)", lambda x, y, z: np.ones((4, 8), bool)),
    ("sum", "tl.sum(x2, 1)", lambda x, y, z: _grid(x).sum(1)),
    ("max", "tl.max(x2, 0)", lambda x, y, z: _grid(x).max(0)),
    ("min", "tl.min(x2, 1)", lambda x, y, z: _grid(x).min(1)),
    ("cumsum", "tl.cumsum(x2, 0, reverse=True)", lambda x, y, z: _grid(x)[::-1].cumsum(0)[::-1]),
    ("histogram", "tl.histogram(z.to(tl.int8), 2)", lambda x, y, z: np.bincount(z, minlength=2)),
)
CASES = [Case(name, f"out = {code}", _bit(function), _ONLY) for name, code, function in _BITS]
CASES += [Case(name, f"out = {code}", _number(function), _ONLY) for name, code, function in _NUMBERS]
