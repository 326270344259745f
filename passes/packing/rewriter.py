"""Writes the packed graph that a layout analysis has found legal.

Each value of the old graph has up to two forms in the new one: ``plain`` (the shape it had) and ``rows`` (packed: T
first, then the axes that are neither batch nor sequence). Each form is made at most once, when it is first needed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tilewright.ir.facts import SizeValue, TensorType, fact, find_fact, set_fact
from tilewright.ir.layout import Layout, LayoutKind, packed_type, rest_axes
from tilewright.ir.sizes import SEQ
from tilewright.ir.views import same_size
from tilewright.ops import Flow, traits_of
from tilewright.passes.layout.analysis import Packing
from tilewright.passes.layout.axes import Axes, positional, shape_of, tensor_operands, worked_axes
from tilewright.passes.layout.validity import keys_are_given
from tilewright.passes.packing.builder import PackingBuilder
from tilewright.passes.packing.views import packed_view

aten = torch.ops.aten
tw = torch.ops.tilewright


class PackingRewriter:
    """Rewrites ``gm`` in place. One object serves one run.

    Args:
        gm: the graph the analysis looked at.
        packing: its result; ``validity`` is not None.
    """

    def __init__(self, gm: GraphModule, packing: Packing) -> None:
        assert packing.validity is not None
        self.gm = gm
        self.packing = packing
        self.layouts = packing.layouts
        self.build = PackingBuilder(Graph(gm))
        self._plain: dict[Node, Node] = {}
        self._rows: dict[Node, Node] = {}
        self._gathered: dict[tuple[Node, int, Axes], Node] = {}
        self._scattered: dict[tuple[Node, float], Node] = {}

    def run(self) -> dict[str, int]:
        """Writes the new graph; returns counts for the pass record."""
        nodes = list(self.gm.graph.nodes)
        for node in nodes:
            if node.op == "placeholder":
                self.plain(node)
        assert self.packing.validity is not None
        valid = self.plain(self.packing.validity.node)
        columns = {node: self._column(column) for node, column in self.packing.columns.items()}
        kept = list(dict.fromkeys(columns.values()))
        self._column_number = {node: kept.index(column) for node, column in columns.items()}
        self.build.start(valid, kept)
        for node in nodes:
            if node.op == "output":
                self._output(node)
            elif node in self.layouts and self.layouts[node].kind is LayoutKind.PACKED:
                if node.op != "placeholder":
                    self.rows(node)
            else:
                self.plain(node)
        graph = self.build.graph
        graph.eliminate_dead_code()
        graph.lint()
        self.gm.graph = graph
        return self._counts(graph)

    def _counts(self, graph: Graph) -> dict[str, int]:
        named = {
            "attention": tw.attention_packed.default,
            "gather": tw.gather_rows.default,
            "scatter": tw.scatter_rows.default,
            "select_rows": tw.select_rows.default,
        }
        counts = {name: sum(node.target is target for node in graph.nodes) for name, target in named.items()}
        packed = sum(layout.kind is LayoutKind.PACKED for layout in self.layouts.values())
        return {"packed": packed, **counts}

    def _output(self, node: Node) -> None:
        values: Any = node.args[0]
        results = tuple(self._result(value) for value in values)
        made = self.build.graph.output(results)
        made.meta = dict(node.meta)

    def _result(self, node: Node) -> Node:
        if node.op == "placeholder" or self.layouts[node].kind is not LayoutKind.PACKED:
            return self.plain(node)
        return self._padded_again(node, 0.0)

    # Plain form ----------------------------------------------------------------------------------------------------

    def plain(self, node: Node) -> Node:
        """The value in the shape it had in the old graph."""
        if node not in self._plain:
            self._plain[node] = self._make_plain(node)
        return self._plain[node]

    def _make_plain(self, node: Node) -> Node:
        size = find_fact(node, SizeValue)
        reads_packed = any(self._is_packed(operand) for operand in node.all_input_nodes)
        if size is not None and reads_packed:
            made = self.build.size(size.value)
            assert isinstance(made, Node)
            return made
        if node in self.packing.columns:
            return self._rows_at_column(node)
        if self._is_packed(node):
            return self._padded_again(node, self.layouts[node].pad_value or 0.0)
        copy = self.build.graph.node_copy(node, self.plain)
        if node in self.layouts:
            kind = LayoutKind.PADDED if node.op == "placeholder" and self._has_rows(node) else self.layouts[node].kind
            layout = self.layouts[node]
            set_fact(copy, Layout(kind, layout.batch_axis, layout.seq_axis, layout.pad_value))
        return copy

    def _has_rows(self, node: Node) -> bool:
        return node in self.layouts and self.layouts[node].kind is LayoutKind.PACKED

    def _is_packed(self, node: Node) -> bool:
        return node.op != "placeholder" and self._has_rows(node)

    def _padded_again(self, node: Node, fill: float) -> Node:
        key = (node, fill)
        if key not in self._scattered:
            type_, layout = fact(node, TensorType), self.layouts[node]
            self._scattered[key] = self.build.unpack(self.rows(node), type_, layout, fill, node)
        return self._scattered[key]

    def _column(self, column: int | Node) -> int | Node:
        return self.plain(column) if isinstance(column, Node) else column

    def _rows_at_column(self, node: Node) -> Node:
        source, number = tensor_operands(node)[0], self._column_number[node]
        layout = self.layouts[source]
        kept_axis = layout.seq_axis if node.target is aten.slice.Tensor else None
        return self.build.column(self.rows(source), number, fact(source, TensorType), layout, kept_axis, node)

    # Packed form ---------------------------------------------------------------------------------------------------

    def rows(self, node: Node) -> Node:
        """The packed form of a value that has both token axes."""
        if node not in self._rows:
            layout = self.layouts[node]
            self._rows[node] = self._make_rows(node, layout) or self._gather(
                node, len(shape_of(node)), (layout.batch_axis, layout.seq_axis)
            )
        return self._rows[node]

    def _make_rows(self, node: Node, layout: Layout) -> Node | None:
        """Computes the packed form from packed operands; None where a gather must make it."""
        if node.op != "call_function":
            return None
        flow = traits_of(node.target).flow
        makers: dict[Flow, Callable[[Node, Layout], Node | None]] = {
            Flow.POINTWISE: self._pointwise,
            Flow.LAST_AXIS: self._row_wise,
            Flow.CONTRACT: self._row_wise,
            Flow.GROUPED: self._row_wise,
            Flow.LOOKUP: self._row_wise,
            Flow.REDUCE: self._row_wise,
            Flow.VIEW: self._view,
            Flow.ATTENTION: self._attention,
        }
        if layout.kind is not LayoutKind.PACKED and not self._worth_packing(node, layout):
            return None
        return makers[flow](node, layout)

    def _worth_packing(self, node: Node, layout: Layout) -> bool:
        """Whether a padded value is better made from gathered operands: the gather then moves less."""
        operands = tensor_operands(node)
        if layout.kind is not LayoutKind.PADDED or len(operands) != 1:
            return False
        if node.target is aten.expand.default:
            return True
        return traits_of(node.target).flow in (Flow.VIEW, Flow.POINTWISE) and self.layouts[operands[0]].per_token

    def operand(self, node: Node, rank: int, layout: Layout) -> Node:
        """A packed op's operand: what right-aligned broadcasting to ``rank`` axes with these token axes needs."""
        axes = (layout.batch_axis, layout.seq_axis)
        shift = rank - len(shape_of(node))
        own = self.layouts[node]
        batch, seq = own.batch_axis, own.seq_axis
        aligned = batch is not None and seq is not None and (batch + shift, seq + shift) == axes
        if aligned and own.kind in (LayoutKind.PACKED, LayoutKind.PADDED):
            made, rest = self.rows(node), len(rest_axes(len(shape_of(node)), own))
        else:
            present = [axis - shift for axis in layout.token_axes if axis >= shift]
            if all(same_size(shape_of(node)[axis], 1) for axis in present):
                return self.build.squeeze(self.plain(node), present, node)
            return self._looked_up(node, rank, axes) or self._gather(node, rank, axes)
        return self.build.insert_axes(made, rank - len(layout.token_axes) - rest, node)

    def _looked_up(self, node: Node, rank: int, axes: Axes) -> Node | None:
        """Rows of a table at column values: gathering the indices moves less than gathering the rows."""
        if node.op != "call_function" or traits_of(node.target).flow is not Flow.LOOKUP:
            return None
        table, ids = positional(node)[:2]
        batch, seq = axes
        if len(shape_of(node)) != rank or batch is None or seq is None or max(batch, seq) >= rank - 1:
            return None
        made = self._gather(ids, rank - 1, axes)
        type_ = TensorType((*shape_of(made), shape_of(node)[-1]), fact(node, TensorType).dtype)
        return self.build.packed_call(node, (self.plain(table), made), {}, type_, axes)

    def _gather(self, node: Node, rank: int, axes: Axes) -> Node:
        """Gathers a plain value, broadcast to one row for each place; once for each value and alignment."""
        shift = rank - len(shape_of(node))
        key = (node, shift, axes)
        if key not in self._gathered:
            self._gathered[key] = self.build.gather(self.plain(node), rank, axes, node)
        return self._gathered[key]

    def _emit(self, node: Node, args: Sequence[Any], kwargs: dict[str, Any], layout: Layout) -> Node:
        type_ = packed_type(fact(node, TensorType), layout)
        return self.build.packed_call(node, tuple(args), kwargs, type_, (layout.batch_axis, layout.seq_axis))

    def _pointwise(self, node: Node, layout: Layout) -> Node:
        rank = len(shape_of(node))

        def replace(arg: Node) -> Node:
            return self.operand(arg, rank, layout) if arg in self.layouts else self.plain(arg)

        given: tuple[Any, Any] = (node.args, node.kwargs)
        args, kwargs = torch.fx.node.map_arg(given, replace)
        return self._emit(node, args, kwargs, layout)

    def _row_wise(self, node: Node, layout: Layout) -> Node:
        """Norms, products with a weight, reductions, look-ups: some operands have rows, the others stay as they are."""
        given = positional(node)
        traits = traits_of(node.target)
        sources = [given[at] for at in ((1,) if traits.flow is Flow.LOOKUP else traits.row_args)]

        def replace(arg: Node) -> Node:
            return self.rows(arg) if arg in sources else self.plain(arg)

        bound = {parameter.name for parameter in node.target._schema.arguments[: len(given)]}  # type: ignore[union-attr]
        extra = {name: value for name, value in node.kwargs.items() if name not in bound}
        call: tuple[Any, Any] = (tuple(given), extra)
        args, kwargs = torch.fx.node.map_arg(call, replace)
        if traits.axes_arg is not None:
            args = self._with_axes(node, args, traits.axes_arg)
        return self._emit(node, args, kwargs, layout)

    def _with_axes(self, node: Node, args: Sequence[Any], position: int) -> tuple[Any, ...]:
        """The arguments with the axes worked on renumbered for the packed operand."""
        source = tensor_operands(node)[0]
        rest = rest_axes(len(shape_of(source)), self.layouts[source])
        axes = sorted(1 + rest.index(axis) for axis in worked_axes(node))
        new = list(args)
        new[position] = axes[0] if isinstance(positional(node)[position], int) else axes
        return tuple(new)

    def _view(self, node: Node, layout: Layout) -> Node:
        sources = tensor_operands(node)
        if node.target is aten.cat.default:
            rows = [self.operand(part, len(shape_of(node)), layout) for part in positional(node)[0]]
        elif node.target is aten.expand.default:
            rows = [self.operand(sources[0], len(shape_of(node)), layout)]
        else:
            rows = [self.rows(sources[0])]
        return packed_view(self.build, node, rows, self.layouts[sources[0]], layout, self.plain)

    def _attention(self, node: Node, layout: Layout) -> Node:
        q, k, v, valid, bias, sinks, *options = positional(node)
        *options, query_table, query_index, key_table, key_index, uniform = options
        operand_layout = Layout(LayoutKind.PACKED, 0, 2)

        def rows_of(x: Node | None) -> Node | None:
            return None if x is None else self.operand(x, 4, operand_layout)

        def plain(x: Node | None) -> Node | None:
            return None if x is None else self.plain(x)

        type_, packed = packed_type(fact(node, TensorType), layout), Layout(LayoutKind.PACKED, 0, 1)
        if keys_are_given(node):
            given = (rows_of(q), plain(k), plain(v), plain(valid), self.build.index.cu_seqlens, options[0], options[4])
            return self.build.call(tw.cross_attention.default, given, type_, node, packed, name=node.name)
        rows = [rows_of(x) for x in (q, k, v)]
        tables = (rows_of(query_table), plain(query_index), rows_of(key_table), plain(key_index))
        # Where no column is kept for its place, no query is padding.
        rest = (*options, *tables, uniform and bool(self.packing.columns))
        index = self.build.index
        offsets = (index.cu_seqlens, index.key_start, index.seqlens_k, index.slots, index.slots)
        args = (*rows, *offsets, plain(bias), plain(sinks), self.build.size(SEQ), self.build.size(SEQ), *rest)
        return self.build.call(tw.attention_packed.default, args, type_, node, packed, name=node.name)
