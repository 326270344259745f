"""Reads calls of a region's graph: arguments by name, names by structure, sizes, literals, element types."""

from typing import Any

import sympy
import torch
from torch.fx import Node

from tilewright.errors import CodegenError
from tilewright.ir.facts import SizeValue, fact
from tilewright.ir.sizes import Size
from tilewright.ops.registry import is_overload

_ROLES = {"self": "x", "input": "x", "other": "y", "indices": "ids"}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Element type in which values of a type are computed: half types in fp32, all others in their own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of a call by the names of the op's schema, defaults included."""
    if not is_overload(node.target):
        return {str(i): argument for i, argument in enumerate(node.args)}
    found: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = (
            node.args[position] if position < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        )
        found[argument.name] = given
    return found


def size_of(value: Any) -> Size:
    """A size argument: an int, an expression, or a node that yields one."""
    if isinstance(value, Node):
        return fact(value, SizeValue).value
    if isinstance(value, int | sympy.Expr):
        return value
    raise CodegenError(f"a size is neither a number nor an expression: {value!r}")


def literal(value: Any) -> str:
    """A Python number, string or None as it stands in a kernel."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return f"({text})" if text.startswith("-") else text


def op_name(node: Node) -> str:
    """Short name of the op a node calls, e.g. ``layer_norm``; ``cast`` for a change of type."""
    if node.target == torch.ops.prims.convert_element_type.default:
        return "cast"
    target = node.target
    return target._schema.name.split("::")[-1] if is_overload(target) else getattr(target, "__name__", "value")  # type: ignore[union-attr]


def role(node: Node) -> str:
    """Name of an input by what its first user does with it, so that it does not depend on where the region stands."""
    for user in node.users:
        if user.op == "output" or not is_overload(user.target):
            continue
        for name, argument in arguments(user).items():
            if argument is node:
                word = _ROLES.get(name, name)
                return f"{op_name(user)}_{word}" if word in ("weight", "bias") and op_name(user) != "linear" else word
    return "x"
