"""Sizes and values a captured graph cannot exceed: vocabularies of its inputs, and lengths its position tables allow.

An embedding table of N rows takes indices below N. Where the index is an input, N is that input's vocabulary. Where
it is a position, the greatest position follows from how it was computed, as an expression over B and S, and N bounds
the sizes.
"""

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import SizeValue, TensorType, fact, find_fact
from tilewright.ir.graph import get_tensor
from tilewright.ir.sizes import SEQ, Size
from tilewright.ops import Flow, traits_of

aten = torch.ops.aten
_SAME_VALUES = {
    "slice.Tensor", "view.default", "reshape.default", "expand.default", "unsqueeze.default", "squeeze.dim", "to.dtype",
    "_to_copy.default", "to.device", "to.dtype_layout", "type_as.default", "clone.default", "contiguous.default",
    "alias.default", "select.int", "permute.default", "transpose.int", "convert_element_type.default", "long.default",
    "squeeze.dims", "gather.default", "lift_fresh_copy.default", "detach_.default", "detach.default",
}  # fmt: skip


def vocabularies(gm: GraphModule) -> dict[str, int]:
    """Exclusive upper bound of each integer input that indexes embedding tables, by input name."""
    found: dict[str, int] = {}
    for table, source in _embeddings(gm):
        rows = fact(table, TensorType).shape[0]
        while isinstance(source, Node) and _name(source) in _SAME_VALUES and _name(source) != "gather.default":
            source = source.args[0]
        if isinstance(source, Node) and source.op == "placeholder" and isinstance(rows, int):
            found[source.name] = min(rows, found.get(source.name, rows))
    return found


def find_bounds(gm: GraphModule, ranges: Mapping[sympy.Symbol, int]) -> dict[sympy.Symbol, tuple[int, int | None, str]]:
    """Inclusive bounds of S with their reasons.

    Args:
        gm: a graph with types.
        ranges: upper bounds the tracer proved, e.g. by slicing a table of positions to the length.
    """
    limits: list[tuple[int, str]] = []
    if SEQ in ranges:
        limits.append((ranges[SEQ], f"a table of the model has {ranges[SEQ]} entries along the length"))
    for table, positions in _embeddings(gm):
        rows = fact(table, TensorType).shape[0]
        highest = greatest(gm, positions, {})
        if isinstance(rows, int) and isinstance(highest, sympy.Expr) and highest.free_symbols == {SEQ}:
            slope = sympy.diff(highest, SEQ)
            if slope == 1:
                limits.append((int(rows - 1 - (highest - SEQ)), f"position table '{table.target}' has {rows} rows"))
    limits += _meetings(gm)
    if not limits:
        return {}
    high, reason = min(limits)
    return {SEQ: (1, high, reason)}


def _meetings(gm: GraphModule) -> list[tuple[int, str]]:
    """Limits of S where a table cut to the length, of size min(S, n), meets a value of length S element by element."""
    limits = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or traits_of(node.target).flow is not Flow.POINTWISE:
            continue
        shape = fact(node, TensorType).shape
        for operand in node.all_input_nodes:
            found = find_fact(operand, TensorType)
            for size, met in zip(found.shape[::-1] if found else (), shape[::-1], strict=False):
                if met == SEQ and isinstance(size, sympy.Expr) and size.free_symbols == {SEQ} and size != SEQ:
                    reason = f"'{node.name}' meets a table that ends there"
                    limits += [(int(n), reason) for n in size.atoms(sympy.Integer) if _agree_up_to(size, int(n))]
    return limits


def _agree_up_to(size: sympy.Expr, length: int) -> bool:
    """Whether the size is S for S from 1 to this length, and not beyond; a size of one kink at most."""
    return [int(size.subs(SEQ, at)) - at for at in (1, length)] == [0, 0] and int(size.subs(SEQ, length + 1)) <= length


def greatest(gm: GraphModule, node: Any, known: dict[Node, Size | None]) -> Size | None:
    """An upper bound of the integer values of a node, over B and S; None when none is known."""
    if isinstance(node, int):
        return node
    if not isinstance(node, Node):
        return None
    if node not in known:
        known[node] = _greatest(gm, node, known)
    return known[node]


def _greatest(gm: GraphModule, node: Node, known: dict[Node, Size | None]) -> Size | None:
    size = find_fact(node, SizeValue)
    if size is not None:
        return size.value
    if node.op == "get_attr":
        return _greatest_of_buffer(gm, node)
    kind = fact(node, TensorType).dtype if find_fact(node, TensorType) else None
    if kind == torch.bool:
        return 1
    name = _name(node)
    given: Any = node.args
    args: list[Any] = [greatest(gm, a, known) for a in node.args[:3]] if node.op == "call_function" else []
    if name == "slice.Tensor" and given[0].op == "get_attr":
        return _greatest_of_slice(gm, node, args)
    if name in _SAME_VALUES:
        return args[0]
    if name in ("arange.default", "arange.start", "arange.start_step"):
        end = args[0] if name == "arange.default" else args[1]
        return None if end is None or (name == "arange.start_step" and args[2] not in (None, 1)) else end - 1
    if name in ("add.Tensor", "add.Scalar") and None not in args[:2]:
        return args[0] + args[1]
    if name == "mul.Tensor" and None not in args[:2]:
        # Positions times a 0/1 mask: the greatest position stays.
        return args[0] if args[1] == 1 else args[1] if args[0] == 1 else None
    if name == "cumsum.default" and args[0] is not None:
        return args[0] * fact(node, TensorType).shape[given[1]]
    return None


def _greatest_of_buffer(gm: GraphModule, node: Node) -> Size | None:
    tensor = get_tensor(gm, node)
    if tensor.dtype.is_floating_point or tensor.numel() == 0 or tensor.numel() > 2**20:
        return None
    return int(tensor.max())


def _greatest_of_slice(gm: GraphModule, node: Node, args: list[Size | None]) -> Size | None:
    """A buffer of consecutive positions sliced to [0, end) holds values up to end - 1."""
    tensor = get_tensor(gm, node.args[0])  # type: ignore[arg-type]
    axis, start = (*node.args[1:], 0, 0)[:2]
    end = greatest(gm, node.args[3], {}) if len(node.args) > 3 else None
    rising = torch.arange(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    if axis in (-1, tensor.dim() - 1) and start == 0 and isinstance(end, sympy.Expr) and torch.equal(tensor, rising):
        return end - 1
    return args[0]


def _embeddings(gm: GraphModule) -> list[tuple[Node, Any]]:
    """(table, indices) of each lookup in a constant table."""
    nodes = gm.graph.find_nodes(op="call_function", target=aten.embedding.default)
    return [n.args[:2] for n in nodes if isinstance(n.args[0], Node) and n.args[0].op == "get_attr"]


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").removeprefix("prims.") if node.op == "call_function" else ""
