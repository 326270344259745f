"""Sizes as sympy expressions over the symbols of one graph: batch B, padded length S, tokens T.

A graph with a cache of keys also has rows R whose results are wanted, the width P of its page table and N pages; Ps is
the width of the table of pages that a source has.

Shapes, strides, offsets and grids are all written in these; a run evaluates them once per call.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import sympy
from sympy.printing.pycode import PythonCodePrinter

Size: TypeAlias = sympy.Expr | int

BATCH = sympy.Symbol("B", integer=True, positive=True)
SEQ = sympy.Symbol("S", integer=True, positive=True)
TOKENS = sympy.Symbol("T", integer=True, positive=True)
WANTED = sympy.Symbol("R", integer=True, positive=True)
TABLE = sympy.Symbol("P", integer=True, positive=True)
SOURCE_TABLE = sympy.Symbol("Ps", integer=True, positive=True)
PAGES = sympy.Symbol("N", integer=True, positive=True)
SYMBOLS = (BATCH, SEQ, TOKENS, WANTED, TABLE, SOURCE_TABLE, PAGES)


def product(sizes: Iterable[Size]) -> Size:
    """Product of sizes; 1 for none."""
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def contiguous_strides(shape: Sequence[Size]) -> tuple[Size, ...]:
    """Row-major strides in elements."""
    strides: list[Size] = []
    step: Size = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))


def ceil_div(size: Size, tile: int) -> Size:
    """Number of tiles that cover ``size``: ``(size + tile - 1) // tile``."""
    if isinstance(size, int):
        return -(-size // tile)
    return sympy.floor((size + tile - 1) / sympy.Integer(tile))


def at_most(size: Size, bound: int) -> Size:
    """1 where ``size``, which is positive, is at most ``bound``, else 0: a factor of shapes and grids."""
    if isinstance(size, int):
        return int(size <= bound)
    return sympy.floor(sympy.Integer(bound) / sympy.Max(size, bound))


class _Printer(PythonCodePrinter):
    """Prints size expressions as Python integer arithmetic."""

    def _print_floor(self, expr: sympy.Expr) -> str:
        numerator, denominator = sympy.fraction(sympy.together(expr.args[0]))
        return f"(({self._print(numerator)}) // ({self._print(denominator)}))"

    def _print_Pow(self, expr: sympy.Expr, rational: bool = False) -> str:
        base, exponent = expr.args
        if not (exponent.is_Integer and exponent > 0):
            raise ValueError(f"size expression has a power that is no product: {expr}")
        return f"({' * '.join([self._print(base)] * int(exponent))})"

    def _print_Rational(self, expr: sympy.Expr) -> str:
        raise ValueError(f"size expression has a fraction outside floor: {expr}")


_PRINTER = _Printer({"fully_qualified_modules": False})


def size_text(size: Size) -> str:
    """The size as Python integer arithmetic over the names of its symbols; kernels and reports print it."""
    return str(size) if isinstance(size, int) else str(_PRINTER.doprint(sympy.sympify(size)))


def compile_sizes(symbols: Sequence[sympy.Symbol], sizes: Sequence[Size]) -> Callable[..., tuple[int, ...]]:
    """One Python function that evaluates all ``sizes`` at once.

    Args:
        symbols: parameters of the function, in order.
        sizes: expressions over those symbols.

    Returns:
        ``f(*values) -> tuple[int, ...]`` in the order of ``sizes``.

    Raises:
        KeyError: a size uses a symbol that is not in ``symbols``.
    """
    unknown = {s for size in sizes for s in getattr(size, "free_symbols", ())} - set(symbols)
    if unknown:
        raise KeyError(f"sizes use unknown symbols: {sorted(map(str, unknown))}")
    body = ", ".join(size_text(s) for s in sizes)
    names = ", ".join(str(s) for s in symbols)
    namespace: dict[str, Any] = {"max": max, "min": min}
    exec(f"def sizes({names}):\n    return ({body}{',' if len(sizes) == 1 else ''})", namespace)
    function: Callable[..., tuple[int, ...]] = namespace["sizes"]
    return function
