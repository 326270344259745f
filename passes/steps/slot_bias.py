"""A bias of attention as a table over slots: what a step reads of a bias that was made for a whole batch.

Over whole sequences a bias is a formula of sequence, head, query and key. A step has no batch to compute it for, but
all its tokens are real. Where the formula is then one of the key's slot alone (ALiBi, also of models that count real
tokens), or of how far the key is from the query (relative positions), all numbers that any step can need are a table
of one row a head, and the ops that made the bias make it.

Proof and construction are one walk from the bias towards what it is computed from. It carries the index of the one
element that is asked for: views change the index, iotas turn it into an integer, and where an op is done that is more
than arithmetic on integers, each integer must be one of the key's slot, or of the distance, and becomes a range.
"""

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from tilewright.ir.facts import SizeValue, TensorType, find_fact, set_fact
from tilewright.ir.graph import info
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.sizes import TABLE, Size
from tilewright.ops import Flow, traits_of
from tilewright.passes.normalization.elements import (
    Element,
    Elements,
    Index,
    Integer,
    Number,
    Unknown,
    arithmetic,
    follow_view,
)
from tilewright.passes.normalization.mask_proof import B, H, K, Q
from tilewright.passes.rewrite import Rewriter, dtype_of, operand, rank_of, shape_of

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default
_ARITHMETIC = {aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul", aten.neg.default: "neg"}
_SUMMED = sympy.Symbol("j", integer=True, nonnegative=True)
_DISTANCE = sympy.Symbol("d", integer=True, nonnegative=True)


@dataclass(frozen=True)
class _Table:
    """A node [H or 1, L or 1]: one row a head, one column a slot or a distance."""

    node: Node


class SlotBiases:
    """Makes tables of the biases of one packed graph; what several share is made once.

    Args:
        rw: of the pass that needs them.
        page_table: [B, P] int32, input of the step.
        page_size: slots of a page; a table has L = P * page_size columns.
    """

    def __init__(self, rw: Rewriter, page_table: Node, page_size: int) -> None:
        self._walks = {by: _Walk(rw, page_table, page_size, by) for by in ("key", "distance")}

    def of(self, bias: Node, heads: int, before: Node) -> tuple[Node, str]:
        """The table [heads, L] of a bias that broadcasts to [B, heads, S, S], and its ``bias_by``.

        New nodes are put before ``before``. Table and name are operands of ``tilewright::attention_paged``.

        Raises:
            Unknown: the bias is not proved to be such a table; the message says what stands in the way.
        """
        whys: dict[str, None] = {}
        for by, walk in self._walks.items():
            try:
                return walk.of(bias, heads, before), by
            except Unknown as why:
                whys[str(why)] = None
        raise Unknown("; ".join(whys))


class _Walk(Elements):
    """The walk to tables by key, or to those by distance."""

    def __init__(self, rw: Rewriter, page_table: Node, page_size: int, by: str) -> None:
        super().__init__(rw.gm)
        self._rw, self._page_table, self._by = rw, page_table, by
        self._length: Size = TABLE * page_size
        self._validities = {spec.name for spec in info(rw.gm).inputs if spec.validity}
        self._before = page_table

    def of(self, bias: Node, heads: int, before: Node) -> Node:
        """The table of a bias."""
        self._before = before
        found = self.at(bias, self.aligned(bias, (B, H, Q, K)[4 - rank_of(bias) :]))
        table = self._numbers(found, dtype_of(bias))
        if table.target is aten.permute.default:
            table = self._call(aten.clone.default, table)  # the kernel reads it along slots
        wanted = (heads, self._length)
        if shape_of(table) == wanted:
            return table
        type_ = TensorType(wanted, dtype_of(bias))
        return self._call(aten.expand.default, table, [heads, self._size(self._length)], type=type_)

    # Elements

    def _at(self, node: Node, index: Index) -> Any:
        if node.op == "placeholder":
            return self._input(node, index)
        if node.op == "get_attr":
            return self._weight(node, index)
        if node.op != "call_function":
            raise Unknown(f"{node.op} {node.target}")
        flow = traits_of(node.target).flow
        if flow in (Flow.VIEW, Flow.CREATE):
            return follow_view(self, node, index)
        if node.target is aten.cumsum.default:
            return self._running_sum(node, index)
        if node.target is aten.embedding.default:
            return self._rows_of(operand(node), (None, index[-1]), self.at(operand(node, 1), index[:-1]), 0)
        if flow is Flow.POINTWISE:
            return self._pointwise(node, index)
        raise Unknown(f"{node.target} is not followed")

    def _input(self, node: Node, index: Index) -> Element:
        """Every token of a step is real; what else is known of tokens differs from sequence to sequence."""
        if str(node.target) in self._validities and len(index) == 2 and index[1] in (Q, K, _SUMMED):
            return Integer(sympy.Integer(1))
        raise Unknown(f"it depends on input '{node.target}'")

    def _weight(self, node: Node, index: Index) -> _Table:
        varying = [axis for axis, place in enumerate(index) if place.free_symbols & {Q, K}]
        if len(varying) > 1:
            raise Unknown(f"it looks up '{node.target}' by query and key")
        if varying:
            (axis,) = varying
            return self._rows_of(node, (*index[:axis], None, *index[axis + 1 :]), Integer(index[axis]), axis)
        table = self._at_heads(node, index)
        return _Table(self._call(aten.reshape.default, table, [*([1] if rank_of(table) == 0 else shape_of(table)), 1]))

    def _at_heads(self, node: Node, index: Index) -> Node:
        """A constant at fixed places: its axes that are left are those with H, or with None, as their index."""
        for axis in reversed(range(len(index))):
            place = index[axis]
            if place is None or place == H:
                continue
            if not place.is_Integer:
                raise Unknown(f"it reads '{node.name}' at {place}")
            node = self._call(aten.select.int, node, axis, int(place))
        return node

    def _rows_of(self, table: Node, index: tuple[Any, ...], rows: Any, axis: int) -> _Table:
        """A constant looked up along one axis, at whose place the index has None."""
        if table.op != "get_attr":
            raise Unknown(f"'{table.name}', in which it looks up, is no constant")
        count = shape_of(table)[axis]
        table = self._at_heads(table, index)
        if rank_of(table) == 1:
            table = self._call(aten.unsqueeze.default, table, 1)
        elif index.index(None) > index.index(H):
            table = self._call(aten.permute.default, table, [1, 0])
        ids = self._numbers(rows, torch.int64)
        if shape_of(ids)[0] != 1:
            raise Unknown("it looks up other places for each head")
        # A step's table may be longer than any sequence that the model takes.
        ids = self._call(aten.clamp.default, self._call(aten.squeeze.dims, ids, [0]), 0, int(count) - 1)
        return _Table(self._call(aten.permute.default, self._call(aten.embedding.default, table, ids), [1, 0]))

    def _running_sum(self, node: Node, index: Index) -> Integer:
        axis = operand(node, 1) % len(index)
        part = self.at(operand(node), (*index[:axis], _SUMMED, *index[axis + 1 :]))
        if not isinstance(part, Integer) or _SUMMED in part.value.free_symbols:
            raise Unknown("a running sum of what differs from slot to slot")
        return Integer(sympy.expand(part.value * (index[axis] + 1)))

    def _pointwise(self, node: Node, index: Index) -> Any:
        parts: dict[Any, Any] = {arg: self.at(arg, self.aligned(arg, index)) for arg in node.all_input_nodes}
        if not dtype_of(node).is_floating_point and all(isinstance(part, Integer) for part in parts.values()):
            if node.target is _CONVERT and dtype_of(node) != torch.bool:
                return parts[operand(node)]
            if node.target in _ARITHMETIC:
                values = [parts[arg] if arg in parts else Integer(sympy.Integer(arg)) for arg in node.args]
                return arithmetic(_ARITHMETIC[node.target], values)

        def number(arg: Node) -> Node:
            return self._numbers(parts[arg], dtype_of(arg) if find_fact(arg, TensorType) else torch.int64)

        given: tuple[Any, Any] = (node.args, node.kwargs)
        args, kwargs = torch.fx.node.map_arg(given, number)
        return _Table(self._call(node.target, *args, **kwargs))

    # Nodes

    def _numbers(self, part: Any, dtype: torch.dtype) -> Node:
        """The node of a part, which is a range where it is an integer that varies.

        Raises:
            Unknown: it varies with something else than the slot or the distance.
        """
        if isinstance(part, _Table):
            return part.node
        if isinstance(part, Number):
            return self._call(aten.full.default, [1, 1], part.value, dtype=dtype, device=self._rw.types.device)
        if not isinstance(part, Integer):
            raise Unknown("it has elements that are no numbers")
        along = K if self._by == "key" else _DISTANCE
        value = sympy.expand(part.value if self._by == "key" else part.value.subs(Q, K + _DISTANCE))
        factor, rest = value.coeff(along), sympy.expand(value - value.coeff(along) * along)
        if not (factor.is_Integer and rest.is_Integer):
            raise Unknown(f"{part.value} is no formula of {'the slot of the key' if along == K else 'the distance'}")
        if factor == 0:
            return self._call(aten.full.default, [1, 1], int(rest), dtype=dtype, device=self._rw.types.device)
        length = self._length
        # The last column is distance 0, so that the columns of rising keys rise.
        start, step = (rest, factor) if along == K else (rest + factor * (length - 1), -factor)
        ends = (self._size(start), self._size(start + step * length), int(step))
        options = {"dtype": torch.int64, "device": self._rw.types.device}
        made = self._call(aten.arange.start_step, *ends, type=TensorType((length,), torch.int64), **options)
        made = self._call(aten.unsqueeze.default, made, 0)
        return made if dtype == torch.int64 else self._call(_CONVERT, made, dtype)

    def _size(self, wanted: Size) -> int | Node:
        """A size that is affine in the width of the page table, as an argument."""
        wanted = sympy.expand(wanted)
        factor, rest = wanted.coeff(TABLE), wanted.subs(TABLE, 0)
        if factor == 0:
            return int(rest)
        made = self._call(aten.sym_size.int, self._page_table, 1, type=SizeValue(TABLE))
        for target, number, value in ((operator.mul, factor, factor * TABLE), (operator.add, rest, wanted)):
            if number != (1 if target is operator.mul else 0):
                made = self._call(target, made, int(number), type=SizeValue(value))
        return made

    def _call(self, target: Any, *args: Any, **options: Any) -> Node:
        made = self._rw.call(self._before, target, *args, **options)
        if find_fact(made, SizeValue) is None:
            set_fact(made, Layout(LayoutKind.FREE))
        return made
