"""Rules of the level normalized: one spelling for each meaning. The spelling also holds at every later level."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import Reason, TensorType, fact, find_fact
from tilewright.ir.sizes import BATCH
from tilewright.ir.views import same_size
from tilewright.ops import Flow, traits_of
from tilewright.passes.layout.axes import positional, shape_of, symbols_in
from tilewright.passes.spec.exported import dispatcher_ops, no_packing
from tilewright.passes.spec.rules import Rule, Violation, calls

aten = torch.ops.aten
attention = torch.ops.tilewright.attention.default


def _named(*names: str) -> frozenset[Any]:
    """Overloads by name; a name that this torch does not have is left out."""
    found = set()
    for name in names:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet, None), overload or "default", None)
        found |= {op} if op is not None else set()
    return frozenset(found)


_OTHER_VIEWS = _named(
    *("view", "_unsafe_view", "transpose.int", "t", "numpy_T", "flatten.using_ints", "unflatten.int", "contiguous"),
    *("alias", "detach", "squeeze", "squeeze.dim", "movedim.int", "narrow", "chunk", "split.Tensor", "unbind.int"),
    *("split_with_sizes", "expand_as", "view_as", "reshape_as", "swapaxes", "lift_fresh_copy"),
)
_SCALAR_FORMS = _named(
    "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "rsub.Scalar", "rsub.Tensor", "subtract.Tensor"
)
_OTHER_CASTS = _named("_to_copy", "to.dtype", "to.device", "to.dtype_layout", "type_as")
_IDLE = _named(
    *("dropout", "native_dropout", "feature_dropout", "_assert_async", "_assert_async.msg", "_assert_scalar"),
    *("_assert_tensor_metadata", "sym_constrain_range_for_size", "sym_constrain_range"),
)
_PRODUCTS = _named("mm", "matmul", "addmm", "bmm", "baddbmm", "addbmm")
_OTHER_ATTENTIONS = _named("scaled_dot_product_attention")
_AXES_AT = {
    aten.permute.default: 1,
    aten.unsqueeze.default: 1,
    aten.squeeze.dims: 1,
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    aten.cat.default: 1,
}


def _forbid(gm: GraphModule, targets: frozenset[Any], instead: str) -> Iterator[Violation]:
    for node in calls(gm):
        if node.target in targets:
            yield Violation(node, f"{node.target} is spelled {instead} at this level")


def _one_view_spelling(gm: GraphModule) -> Iterator[Violation]:
    return _forbid(gm, _OTHER_VIEWS, "reshape, permute, unsqueeze, squeeze.dims, expand, slice, select.int or cat")


def _operators_take_tensors_or_numbers(gm: GraphModule) -> Iterator[Violation]:
    yield from _forbid(gm, _SCALAR_FORMS, "as the .Tensor form with a number")
    for node in calls(gm):
        if node.kwargs.get("alpha", 1) != 1 or _positional_alpha(node):
            yield Violation(node, "alpha is not multiplied out")


def _positional_alpha(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    names = [parameter.name for parameter in schema.arguments] if schema is not None else []
    at = names.index("alpha") if "alpha" in names else len(node.args)
    return at < len(node.args) and bool(node.args[at] != 1)


def _one_cast(gm: GraphModule) -> Iterator[Violation]:
    return _forbid(gm, _OTHER_CASTS, "prims.convert_element_type")


def _nothing_idle(gm: GraphModule) -> Iterator[Violation]:
    yield from _forbid(gm, _IDLE, "as nothing")
    for node in calls(gm):
        if node.target in (aten.slice.Tensor, aten.expand.default, torch.ops.prims.convert_element_type.default):
            source = positional(node)[0]
            if find_fact(node, TensorType) == find_fact(source, TensorType):
                yield Violation(node, f"{node.target} changes nothing")


def _weights_through_linear(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        weights = [operand for operand in node.all_input_nodes if operand.op == "get_attr"]
        if node.target in _PRODUCTS and any(len(shape_of(weight)) < 3 for weight in weights):
            yield Violation(node, f"{node.target} multiplies by a weight; that is spelled aten.linear at this level")


def _linear_weight(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        if traits_of(node.target).flow is Flow.CONTRACT:
            weight = positional(node)[1]
            if len(shape_of(weight)) != 2:
                yield Violation(node, f"its weight '{weight.name}' has {len(shape_of(weight))} axes, not [N, K]")


def _expert_weights(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        if traits_of(node.target).flow is Flow.GROUPED:
            x, weight, experts = positional(node)[:3]
            if len(shape_of(weight)) != 3:
                yield Violation(node, f"its weight '{weight.name}' has {len(shape_of(weight))} axes, not [E, N, K]")
            if len(shape_of(x)) != len(shape_of(experts)) + 1:
                yield Violation(node, f"it has {len(shape_of(experts))} axes of experts, its rows have another number")


def _axes_from_zero(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        if node.target in _AXES_AT:
            axes = positional(node)[_AXES_AT[node.target]]
            if any(axis < 0 for axis in (axes if isinstance(axes, list | tuple) else [axes])):
                yield Violation(node, f"it counts axis {axes} from the end")


def _one_attention(gm: GraphModule) -> Iterator[Violation]:
    found = _forbid(gm, _OTHER_ATTENTIONS, "tilewright::attention")
    yield from (each for each in found if each.node is None or find_fact(each.node, Reason) is None)
    for node in calls(gm):
        if node.target is not attention:
            continue
        q, k, v = positional(node)[:3]
        heads, kv_heads = shape_of(q)[1], shape_of(k)[1]
        if heads != kv_heads and not (isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0):
            yield Violation(node, f"{heads} query heads are not a multiple of {kv_heads} key heads")
        elif not same_size(shape_of(k)[2], shape_of(v)[2]):
            yield Violation(node, f"{shape_of(k)[2]} keys but {shape_of(v)[2]} values")


def _score_tables(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        if node.target is not attention:
            continue
        q, k, *_ = args = positional(node)
        for own, other, table, index in ((q, k, *args[11:13]), (k, q, *args[13:15])):
            if (table is None) != (index is None):
                yield Violation(node, "it has a table without an index, or an index without a table")
            elif table is not None:
                rows = (shape_of(q)[0], shape_of(q)[1], shape_of(own)[2])
                pairs = (shape_of(own)[2], shape_of(other)[2])
                if shape_of(table)[:-1] != rows or shape_of(index) != pairs:
                    yield Violation(node, f"its table is {shape_of(table)}, its index {shape_of(index)}")
                elif fact(index, TensorType).dtype.is_floating_point:
                    yield Violation(node, f"its index '{index.name}' is {fact(index, TensorType).dtype}")
        if args[15] and (args[3] is None or args[5] is not None or args[7] or max(args[8:10]) >= 0):
            yield Violation(node, "its pads are uniform beside an order, a window or sinks, or without a validity")


def _validity_of_keys(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        valid = positional(node)[3] if node.target is attention else None
        if valid is None:
            continue
        type_, keys = fact(valid, TensorType), shape_of(positional(node)[1])
        if len(type_.shape) != 2 or not same_size(type_.shape[0], keys[0]) or not same_size(type_.shape[1], keys[2]):
            yield Violation(node, f"its validity has shape {type_.shape}, not [{keys[0]}, {keys[2]}]")
        elif type_.dtype.is_floating_point or type_.dtype.is_complex:
            yield Violation(node, f"its validity is {type_.dtype}, not bool or integer")
        elif (mixing := _not_elementwise(valid)) is not None:
            yield Violation(node, f"its validity '{valid.name}' is not computed elementwise: '{mixing.name}' is not")


def _not_elementwise(valid: Node) -> Node | None:
    """The nearest node that the validity passes through and that is neither elementwise nor a view."""
    pending = [valid]
    while pending:
        node = pending.pop()
        if node.op == "call_function" and BATCH in symbols_in(shape_of(node)):
            if traits_of(node.target).flow not in (Flow.POINTWISE, Flow.VIEW, Flow.CREATE):
                return node
            pending += [operand for operand in node.all_input_nodes if find_fact(operand, TensorType) is not None]
    return None


SPELLING = (
    Rule("dispatcher_ops", "every call is an op of the dispatcher, or an operator on sizes", dispatcher_ops),
    Rule("one_view_spelling", "a view has one spelling", _one_view_spelling),
    Rule("axes_from_zero", "views count axes from 0", _axes_from_zero),
    Rule("tensors_or_numbers", "operators take tensors or Python numbers", _operators_take_tensors_or_numbers),
    Rule("one_cast", "a change of dtype is prims.convert_element_type", _one_cast),
    Rule("nothing_idle", "no op does nothing", _nothing_idle),
    Rule("weights_through_linear", "every product with one matrix as weight is aten.linear", _weights_through_linear),
    Rule("linear_weight", "the weight of a linear is [N, K]", _linear_weight),
    Rule("expert_weights", "a product of experts has a weight [E, N, K] and an expert a row", _expert_weights),
    Rule("one_attention", "attention is tilewright::attention or says why not, its heads fit", _one_attention),
)
NORMALIZED = (
    Rule("no_packing", "nothing is packed yet", no_packing),
    Rule("score_tables", "a table has a row for each head and token, its index an entry for each pair", _score_tables),
    Rule("validity_of_keys", "key validity is [B, S], bool or integer, computed elementwise", _validity_of_keys),
)
