"""Which kernel family an op belongs to, and why an op can have no kernel."""

import torch
from torch.fx import Node

from tilewright.ir.facts import SizeValue, TensorType, TupleType, find_fact
from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import Size
from tilewright.ir.views import argument, has_view_rule
from tilewright.ops import Flow, traits_of
from tilewright.passes.regions.tile_dependence import reduced_axes, shape_of

aten = torch.ops.aten
packing = torch.ops.tilewright

_FAMILY = {
    Flow.CONTRACT: Anchor.GEMM,
    Flow.GROUPED: Anchor.EXPERTS,
    Flow.ROUTE: Anchor.ROUTE,
    Flow.ATTENTION: Anchor.ATTENTION,
    Flow.APPEND: Anchor.APPEND,
    Flow.POINTWISE: Anchor.ROW,
    Flow.LAST_AXIS: Anchor.ROW,
    Flow.REDUCE: Anchor.ROW,
    Flow.LOOKUP: Anchor.ROW,
    Flow.COLUMN: Anchor.ROW,
    Flow.CREATE: Anchor.ROW,
    Flow.PACKING: Anchor.ROW,
    Flow.VIEW: Anchor.ROW,
    Flow.OTHER: Anchor.OPAQUE,
}


def is_view(node: Node) -> bool:
    """Whether the op only renames places of its operand, so that it may stay outside regions."""
    return node.op == "call_function" and has_view_rule(node.target)


def computes(node: Node) -> bool:
    """Whether the node is work that a region must hold; views, sizes and reads of several results are not."""
    if node.op != "call_function" or is_view(node):
        return False
    return find_fact(node, SizeValue) is None and not is_result(node)


def is_result(node: Node) -> bool:
    """Whether the node reads one of several results of another."""
    source = node.args[0] if node.args else None
    return node.op == "call_function" and isinstance(source, Node) and find_fact(source, TupleType) is not None


def family(node: Node) -> tuple[Anchor, str]:
    """Kernel family of a computing node; for OPAQUE with the reason."""
    reason = _why_no_kernel(node)
    if reason:
        return Anchor.OPAQUE, reason
    if node.target is packing.pack_index.default:
        return Anchor.INDEX, ""
    return _FAMILY[traits_of(node.target).flow], ""


def _why_no_kernel(node: Node) -> str:
    traits = traits_of(node.target)
    if traits.flow is Flow.OTHER:
        return traits.why_not or f"{node.target} has no declared traits"
    kind = find_fact(node, TensorType)
    if kind is not None and kind.dtype.is_complex:
        return f"its result has dtype {kind.dtype}, for which there are no kernels"
    if traits.flow is Flow.POINTWISE and traits.triton is None:
        return f"{node.target} declares no Triton expression"
    if traits.flow is Flow.VIEW and node.target is not aten.cat.default:
        return f"{node.target} is declared a view, but how it moves elements is not known"
    if traits.flow is Flow.CONTRACT:
        return _why_no_gemm(node)
    if traits.flow is Flow.GROUPED:
        weight = node.args[1]
        computed = isinstance(weight, Node) and weight.op != "get_attr"
        return f"its weight '{weight.name}' is computed, not a parameter" if computed else ""  # type: ignore[union-attr]
    rank = _rank(node.args[0])
    if traits.flow is Flow.LAST_AXIS:
        return _why_not_last_axis(node, rank)
    if traits.flow is Flow.REDUCE and len(reduced_axes(node)) != 1:
        return f"it reduces axes {reduced_axes(node)} of {rank}; kernels reduce one axis"
    return ""


def _rank(operand: object) -> int:
    shape: tuple[Size, ...] | None = shape_of(operand) if isinstance(operand, Node) else None
    return len(shape or ())


def _why_no_gemm(node: Node) -> str:
    for operand, what in ((node.args[1], "weight"), (argument(node, 2, "bias"), "bias")):
        if isinstance(operand, Node) and operand.op != "get_attr":
            return f"its {what} '{operand.name}' is computed, not a parameter"
    return ""


def _why_not_last_axis(node: Node, rank: int) -> str:
    arg_names = [arg.name for arg in node.target._schema.arguments]  # type: ignore[union-attr]
    if "normalized_shape" in arg_names:
        shape = argument(node, arg_names.index("normalized_shape"), "normalized_shape")
        return "" if len(shape) == 1 else f"it normalizes over the last {len(shape)} axes; kernels normalize over one"
    if "dim" in arg_names:
        axis = int(argument(node, arg_names.index("dim"), "dim")) % max(rank, 1)
        return "" if axis == rank - 1 else f"it works along axis {axis} of {rank}; kernels work along the last one"
    return ""
