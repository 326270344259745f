"""Nodes of a packed graph: the row index, gathers, scatters and sizes, each with its facts."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from tilewright.ir.facts import SizeValue, TensorType, TupleType, copy_origin, fact, find_fact, set_fact
from tilewright.ir.layout import Layout, LayoutKind, rest_axes
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, Size
from tilewright.ir.views import same_size
from tilewright.passes.layout.axes import Axes, shape_of

aten = torch.ops.aten
tw = torch.ops.tilewright
MADE_BY = "remove_padding"


@dataclass(frozen=True)
class RowIndex:
    """Results of the one ``pack_index`` of a graph, as nodes."""

    row_index: Node
    slots: Node
    cu_seqlens: Node
    key_start: Node
    seqlens_k: Node
    column_rows: Node


class PackingBuilder:
    """Adds nodes with types, origins and layouts to ``graph``; ``start`` comes before any packed value."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._sizes: dict[Size, Node] = {}
        self._scattered: dict[Node, Node] = {}

    def start(self, valid: Node, columns: Sequence[int | Node]) -> None:
        """Makes the row index from ``valid`` [B, S] and reads the sizes B, S and T.

        Args:
            columns: those it keeps, of ``Packing.columns``, in the form of this graph.
        """
        self.valid = valid
        for symbol, axis in ((BATCH, 0), (SEQ, 1)):
            self._sizes[symbol] = self._size_node(aten.sym_size.int, (valid, axis), symbol)
        i32 = torch.int32
        types = (
            TensorType((TOKENS,), i32),
            TensorType((TOKENS,), i32),
            TensorType((BATCH + 1,), i32),
            TensorType((BATCH,), i32),
            TensorType((BATCH,), i32),
            TensorType((len(columns), BATCH), i32),
        )
        args = (valid, [self._column(column) for column in columns])
        packed = self.graph.create_node("call_function", tw.pack_index.default, args, {}, "pack_index")
        set_fact(packed, TupleType(types))
        copy_origin(valid, packed, MADE_BY)
        per_sequence = [Layout(LayoutKind.PER_SEQUENCE, 0)] * 3
        layouts = [*[Layout(LayoutKind.PACKED, 0, 1)] * 2, *per_sequence, Layout(LayoutKind.PER_SEQUENCE, 1)]
        names = [each.name for each in fields(RowIndex)]
        items = [
            self.call(operator.getitem, (packed, place), types[place], valid, layouts[place], name=name)
            for place, name in enumerate(names)
        ]
        self.index = RowIndex(*items)
        # All before the first packed row, so that a selection can move to wherever its operand is made.
        self._rows_of_column = [
            self.call(aten.select.int, (items[-1], 0, number), types[-2], valid, per_sequence[0])
            for number in range(len(columns))
        ]
        self._sizes[TOKENS] = self._size_node(aten.sym_size.int, (self.index.row_index, 0), TOKENS)

    def _column(self, column: int | Node) -> Node:
        """A column as a tensor [B]."""
        if isinstance(column, Node) and find_fact(column, TensorType) is not None:
            return column
        made = {"dtype": torch.int64, "device": torch.device("cpu"), "pin_memory": False}
        type_, layout = TensorType((BATCH,), torch.int64), Layout(LayoutKind.PER_SEQUENCE, 0)
        return self.call(aten.full.default, ([self.size(BATCH)], column), type_, self.valid, layout, made)

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        type_: TensorType,
        origin: Node,
        layout: Layout,
        kwargs: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> Node:
        """A call with its facts; ``origin`` is the node of either graph whose place in the model it takes."""
        made = self.graph.create_node("call_function", target, args, kwargs or {}, name)
        set_fact(made, type_)
        set_fact(made, layout)
        copy_origin(origin, made, MADE_BY)
        return made

    def packed_call(
        self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], type_: TensorType, axes: Axes
    ) -> Node:
        """The packed form of ``node``: the same op on packed operands, under the same name."""
        made = self.call(node.target, args, type_, node, Layout(LayoutKind.PACKED, *axes), kwargs, node.name)
        made.meta.update({key: value for key, value in node.meta.items() if key in ("stack_trace", "nn_module_stack")})
        return made

    def size(self, size: Size) -> int | Node:
        """A size as an argument: an int, or a node that computes it from B, S and T."""
        if isinstance(size, int) or size.is_Integer:
            return int(size)
        if size not in self._sizes:
            steps = {sympy.Mul: operator.mul, sympy.Add: operator.add}
            if type(size) not in steps:
                raise NotImplementedError(f"no node computes the size {size}")
            value: Any
            value, *others = [self.size(part) for part in size.args]
            partial, *parts = size.args
            for other, part in zip(others, parts, strict=True):
                partial = size.func(partial, part)
                value = self._size_node(steps[type(size)], (value, other), partial)
            self._sizes[size] = value
        return self._sizes[size]

    def _size_node(self, target: Any, args: tuple[Any, ...], size: Size) -> Node:
        made = self.graph.call_function(target, args)
        set_fact(made, SizeValue(size))
        copy_origin(self.valid, made, MADE_BY)
        return made

    def shape(self, shape: Sequence[Size]) -> list[int | Node]:
        """A shape as an argument."""
        return [self.size(size) for size in shape]

    # Forms of values -----------------------------------------------------------------------------------------------

    def permute(self, value: Node, order: Sequence[int], origin: Node, layout: Layout) -> Node:
        """Reorders axes; nothing where the order is the old one."""
        if list(order) == list(range(len(order))):
            return value
        type_ = fact(value, TensorType)
        shape = tuple(type_.shape[axis] for axis in order)
        return self.call(aten.permute.default, (value, list(order)), TensorType(shape, type_.dtype), origin, layout)

    def reshape(self, value: Node, shape: Sequence[Size], origin: Node, layout: Layout) -> Node:
        """Another shape; nothing where it is the old one."""
        type_ = fact(value, TensorType)
        if _same_shape(type_.shape, shape):
            return value
        new = TensorType(tuple(shape), type_.dtype)
        return self.call(aten.reshape.default, (value, self.shape(shape)), new, origin, layout)

    def expand(self, value: Node, shape: Sequence[Size], origin: Node, layout: Layout) -> Node:
        """Broadcast to ``shape``; nothing where it is the old one."""
        type_ = fact(value, TensorType)
        if _same_shape(type_.shape, shape):
            return value
        new = TensorType(tuple(shape), type_.dtype)
        return self.call(aten.expand.default, (value, self.shape(shape)), new, origin, layout)

    def squeeze(self, value: Node, dims: Sequence[int], origin: Node) -> Node:
        """Removes axes of size 1, so that a value without places broadcasts against packed rows."""
        if not dims:
            return value
        type_ = fact(value, TensorType)
        shape = tuple(size for axis, size in enumerate(type_.shape) if axis not in dims)
        old = find_fact(value, Layout) or Layout(LayoutKind.FREE)
        layout = Layout(old.kind, pad_value=old.pad_value)
        return self.call(aten.squeeze.dims, (value, sorted(dims)), TensorType(shape, type_.dtype), origin, layout)

    def insert_axes(self, value: Node, count: int, origin: Node) -> Node:
        """``count`` axes of size 1 after T, so that rows of fewer axes broadcast from the right."""
        for _ in range(count):
            type_ = fact(value, TensorType)
            new = TensorType((type_.shape[0], 1, *type_.shape[1:]), type_.dtype)
            value = self.call(aten.unsqueeze.default, (value, 1), new, origin, fact(value, Layout))
        return value

    def gather(self, value: Node, rank: int, axes: Axes, origin: Node) -> Node:
        """Packs a padded value that broadcasts, from the right, to ``rank`` axes with the token axes ``axes``."""
        batch, seq = axes
        assert batch is not None
        assert seq is not None
        layout = Layout(LayoutKind.PADDED)
        type_ = fact(value, TensorType)
        missing = rank - len(type_.shape)
        if missing > min(batch, seq):
            for count in range(missing):
                shape = (1,) * (count + 1) + type_.shape
                new = TensorType(shape, type_.dtype)
                value = self.call(aten.unsqueeze.default, (value, 0), new, origin, layout)
            missing = 0
        batch, seq = batch - missing, seq - missing
        shape = shape_of(value)
        rest = [axis for axis in range(len(shape)) if axis not in (batch, seq)]
        features = tuple(shape[axis] for axis in rest)
        value = self.permute(value, list(dict.fromkeys((batch, seq))) + rest, origin, layout)
        if batch == seq:
            value = self.reshape(value, (BATCH, SEQ, *features), origin, layout)
        value = self.expand(value, (BATCH, SEQ, *features), origin, layout)
        packed = TensorType((TOKENS, *features), type_.dtype)
        args = (value, self.index.row_index)
        name = f"packed_{origin.name}"
        return self.call(tw.gather_rows.default, args, packed, origin, Layout(LayoutKind.PACKED, *axes), name=name)

    def unpack(self, rows: Node, type_: TensorType, layout: Layout, fill: float, origin: Node) -> Node:
        """The padded form of packed rows, with ``fill`` at masked places."""
        padded = Layout(LayoutKind.PADDED, 0, 1, fill)
        rest = rest_axes(len(type_.shape), layout)
        features = tuple(type_.shape[axis] for axis in rest)
        scattered = TensorType((BATCH, SEQ, *features), type_.dtype)
        if rows not in self._scattered:
            args = (rows, self.index.row_index, self.valid)
            at_pads = Layout(LayoutKind.PADDED, 0, 1, 0.0)
            name = f"padded_{origin.name}"
            self._scattered[rows] = self.call(tw.scatter_rows.default, args, scattered, origin, at_pads, name=name)
        value = self._scattered[rows]
        if fill != 0.0:
            value = self._fill(value, fill, origin, padded)
        order: list[int] = []
        for axis in range(len(type_.shape)):
            if axis in rest:
                order.append(2 + rest.index(axis))
            elif layout.batch_axis == layout.seq_axis:
                order += [0, 1]
            else:
                order.append(0 if axis == layout.batch_axis else 1)
        final = Layout(LayoutKind.PADDED, layout.batch_axis, layout.seq_axis, fill)
        return self.reshape(self.permute(value, order, origin, final), type_.shape, origin, final)

    def _fill(self, value: Node, fill: float, origin: Node, layout: Layout) -> Node:
        masked = TensorType((BATCH, SEQ), torch.bool)
        mask = self.call(aten.eq.Scalar, (self.valid, 0), masked, origin, Layout(LayoutKind.PADDED, 0, 1, 1.0))
        type_ = fact(value, TensorType)
        for axis in range(2, len(type_.shape)):
            masked = TensorType((*masked.shape, 1), torch.bool)
            mask = self.call(aten.unsqueeze.default, (mask, axis), masked, origin, layout)
        return self.call(aten.masked_fill.Scalar, (value, mask, fill), type_, origin, layout)

    def column(
        self, rows: Node, number: int, type_: TensorType, layout: Layout, kept_axis: int | None, origin: Node
    ) -> Node:
        """The column with that number of packed rows, one row of each sequence.

        Args:
            type_, layout: of the padded form, which gives the order of axes.
            kept_axis: axis that stays, with size 1; None for none.
        """
        rest = rest_axes(len(type_.shape), layout)
        features = tuple(type_.shape[axis] for axis in rest)
        per_sequence = Layout(LayoutKind.PER_SEQUENCE, 0)
        selected = TensorType((BATCH, *features), type_.dtype)
        args = (rows, self._rows_of_column[number])
        value = self.call(tw.select_rows.default, args, selected, origin, per_sequence)
        axes = [axis for axis in range(len(type_.shape)) if axis != layout.seq_axis]
        order = [0 if axis == layout.batch_axis else 1 + rest.index(axis) for axis in axes]
        value = self.permute(value, order, origin, Layout(LayoutKind.PER_SEQUENCE, order.index(0)))
        if kept_axis is None:
            return value
        shape = tuple(1 if axis == kept_axis else size for axis, size in enumerate(type_.shape))
        kept = Layout(LayoutKind.PER_SEQUENCE, layout.batch_axis)
        return self.call(aten.unsqueeze.default, (value, kept_axis), TensorType(shape, type_.dtype), origin, kept)


def _same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))
