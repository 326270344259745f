"""Sizes as text and back, for graph files. Reading evaluates nothing: the text is parsed, never executed."""

import ast

import sympy

from tilewright.errors import ArtifactError
from tilewright.ir.sizes import SYMBOLS, Size

_SYMBOLS = {str(symbol): symbol for symbol in SYMBOLS}
_FUNCTIONS = {"floor": sympy.floor, "Max": sympy.Max, "Min": sympy.Min}


def size_to_text(size: Size) -> int | str:
    """An int stays an int; an expression becomes text such as ``B*S`` or ``floor((T + 63)/64)``."""
    return int(size) if isinstance(size, int | sympy.Integer) else str(size)


def size_from_text(text: int | str) -> Size:
    """Reads what ``size_to_text`` wrote.

    Raises:
        ArtifactError: the text is anything but integers, known symbols, ``+ - * / **``, floor, Max and Min.
    """
    if isinstance(text, int):
        return text
    try:
        return _expression(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, KeyError, RecursionError) as error:
        raise ArtifactError(
            f"cannot read the size {text!r}", why=str(error), hint="the graph file was altered"
        ) from None


def _expression(node: ast.expr) -> sympy.Expr:
    match node:
        case ast.Constant(value=int() as value):
            return sympy.Integer(value)
        case ast.Name(id=name):
            return _SYMBOLS[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_expression(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _expression(left) + _expression(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _expression(left) - _expression(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _expression(left) * _expression(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _expression(left) / _expression(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if power <= 8:
            return _expression(left) ** power
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _FUNCTIONS[name](*map(_expression, args))
    raise ValueError(f"{ast.unparse(node)!r} is not a size expression")
