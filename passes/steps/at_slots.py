"""Values that depend on the place in a sequence alone, computed for the slots of a step's tokens.

A model that counts its positions itself does so over the columns of the padded batch: an iota, pointwise work on it,
and rows of a table looked up by it. A step has no columns; it has the slot of each token, so the same is done there.
"""

from typing import Any

import torch
from torch.fx import Node

from tilewright.ir.facts import TensorType, copy_origin, fact, find_fact, set_fact
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, Size
from tilewright.ops import Flow, traits_of
from tilewright.passes.layout.axes import positional, shape_of, tensor_operands

aten = torch.ops.aten
convert = torch.ops.prims.convert_element_type.default
_SPREADING = (aten.expand.default, aten.unsqueeze.default, aten.reshape.default, aten.squeeze.dims)


class AtSlots:
    """Makes such values of a graph anew, each once.

    Args:
        slots: [T] int32, the slot of each token.
        made_by: name of the pass.
    """

    def __init__(self, slots: Node, made_by: str) -> None:
        self._slots = slots
        self._made_by = made_by
        self._made: dict[Node, Node | None] = {}

    def of(self, node: Node, before: Node) -> Node | None:
        """[T, ...] of a value [S, ...] or [B, S, ...] that is the same in all sequences; None if it is none.

        Args:
            node: of the graph over the padded batch.
            before: what is computed is put before this node.
        """
        if node not in self._made:
            self._made[node] = self._make(node, before)
        return self._made[node]

    def _make(self, node: Node, before: Node) -> Node | None:
        features = _features(node)
        if node.op != "call_function" or features is None:
            return None
        if node.target is aten.arange.start_step:
            return self._iota(node, before)
        operands = tensor_operands(node)
        flow = traits_of(node.target).flow
        if flow is Flow.LOOKUP and operands[0].op == "get_attr":
            rows = self.of(operands[1], before)
            return rows and self._again(node, before, {operands[0]: operands[0], operands[1]: rows})
        if any(_features(each) != features for each in operands):
            return None
        made = {each: self.of(each, before) for each in operands}
        if None in made.values():
            return None
        if node.target in _SPREADING:
            return made[operands[0]]
        return self._again(node, before, made) if flow is Flow.POINTWISE else None

    def _iota(self, node: Node, before: Node) -> Node | None:
        start, _, step = positional(node)[:3]
        if step != 1 or not isinstance(start, int):
            return None
        made = self._call(node, before, convert, (self._slots, fact(node, TensorType).dtype), {})
        return self._call(node, before, aten.add.Tensor, (made, start), {}) if start else made

    def _again(self, node: Node, before: Node, operands: dict[Node, Any]) -> Node:
        given: tuple[Any, Any] = (node.args, node.kwargs)
        args, kwargs = torch.fx.node.map_arg(given, lambda each: operands[each])
        return self._call(node, before, node.target, args, kwargs)

    def _call(self, origin: Node, before: Node, target: Any, args: Any, kwargs: Any) -> Node:
        with before.graph.inserting_before(before):
            made = before.graph.create_node("call_function", target, args, kwargs, f"{origin.name}_at_slots")
        set_fact(made, TensorType((TOKENS, *(_features(origin) or ())), fact(origin, TensorType).dtype))
        set_fact(made, Layout(LayoutKind.PACKED, 0, 1))
        copy_origin(origin, made, self._made_by)
        return made


def _features(node: Node) -> tuple[Size, ...] | None:
    """Sizes behind the axis of columns, of a value whose axes before it run over the batch or have size 1."""
    shape = shape_of(node) if find_fact(node, TensorType) is not None else ()
    if SEQ not in shape:
        return None
    at = shape.index(SEQ)
    ahead, behind = shape[:at], shape[at + 1 :]
    fixed = all(isinstance(size, int) for size in behind)
    return behind if fixed and all(size in (1, BATCH) for size in ahead) else None
