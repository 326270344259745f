"""What a value holds at masked places, where that can be proven.

A value that is one known constant at every masked place can be padded again without loss, so whatever an op then does
along the sequence is exact: pooling over ``h * mask``, a maximum over ``masked_fill(h, mask == 0, -1e9)``, and so on.
The constant is found by running the op itself on constants, so a new pointwise op needs no rule.
"""

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, fact, find_fact
from tilewright.ir.graph import get_tensor
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ops import Flow, traits_of
from tilewright.passes.layout.axes import positional, shape_of, tensor_operands, worked_axes

aten = torch.ops.aten


def constant_of(gm: GraphModule, node: Node) -> float | None:
    """The one value of a one-element constant; None for parameters and anything larger."""
    tensor = get_tensor(gm, node)
    if isinstance(tensor, torch.nn.Parameter) or tensor.numel() != 1 or tensor.is_meta:
        return None
    return float(tensor.item())


def pad_value(node: Node, layout: Layout, layouts: dict[Node, Layout]) -> float | None:
    """The value ``node`` has at every masked place, given the layouts of its operands; None when not proven."""
    flow = traits_of(node.target).flow
    if flow is Flow.POINTWISE:
        return _pointwise(node, layout, layouts)
    if flow is Flow.VIEW:
        held = {_held(source, node, layout, layouts, aligned=False) for source in tensor_operands(node)}
        return held.pop() if len(held) == 1 else None
    if flow is Flow.CONTRACT:
        args = positional(node)
        no_bias = len(args) < 3 or args[2] is None
        return 0.0 if no_bias and layout.per_token and layouts[args[0]].pad_value == 0.0 else None
    if flow is Flow.REDUCE:
        return _reduced(node, layouts)
    if flow is Flow.CREATE and node.target is aten.full.default:
        value = positional(node)[1]
        return float(value) if isinstance(value, int | float) else None
    return None


def _held(source: Node, node: Node, layout: Layout, layouts: dict[Node, Layout], *, aligned: bool) -> float | None:
    """The constant that ``source`` brings to the masked places of ``node``."""
    given = layouts[source]
    if given.pad_value is None or given.kind is LayoutKind.FREE:
        return given.pad_value
    if not (given.per_token and layout.per_token):
        return None
    if not aligned:
        return given.pad_value
    shift = len(shape_of(node)) - len(shape_of(source))
    same = (given.batch_axis, given.seq_axis) == (_minus(layout.batch_axis, shift), _minus(layout.seq_axis, shift))
    return given.pad_value if same else None


def _minus(axis: int | None, shift: int) -> int | None:
    return None if axis is None else axis - shift


def _pointwise(node: Node, layout: Layout, layouts: dict[Node, Layout]) -> float | None:
    def held(arg: Any) -> Any:
        if isinstance(arg, Node):
            is_tensor = find_fact(arg, TensorType) is not None
            return _held(arg, node, layout, layouts, aligned=True) if is_tensor else None
        return arg

    traits, args = traits_of(node.target), positional(node)
    if traits.absorbs_zero and any(isinstance(arg, Node) and held(arg) == 0.0 for arg in args):
        return 0.0
    if traits.choose is not None:
        condition, chosen, other = (held(args[position]) for position in traits.choose)
        if condition is None:
            return None
        value = chosen if condition else other
        return float(value) if isinstance(value, int | float) else None
    operands = tensor_operands(node)
    constants = {operand: held(operand) for operand in operands}
    if any(value is None for value in constants.values()):
        return None

    def constant(arg: Node) -> Any:
        return torch.tensor(constants[arg]).to(fact(arg, TensorType).dtype)

    if any(source not in constants for source in node.all_input_nodes):
        return None
    new_args = torch.fx.node.map_arg(node.args, constant)
    result = node.target(*new_args, **torch.fx.node.map_arg(node.kwargs, constant))  # type: ignore[operator]
    value = float(result.item())
    return None if math.isnan(value) else value


def _reduced(node: Node, layouts: dict[Node, Layout]) -> float | None:
    source = tensor_operands(node)[0]
    given = layouts[source]
    if given.pad_value is None or set(given.token_axes) & worked_axes(node) or not given.per_token:
        return None
    if given.pad_value == 0.0 or traits_of(node.target).reduce in ("mean", "max", "min", "any", "all"):
        return given.pad_value
    return None
