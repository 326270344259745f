"""SliceRows: where only some rows of a packed value are read, what makes the value computes just those.

A head that reads one token of each sequence needs the last layer for that token alone: its attention has one query a
sequence, and everything behind the attention one row. Keys and values still come from all tokens.

The analysis is a backward slice over rows. A *selection* is an op that picks rows of a packed value, with the operands
that say which. It commutes with whatever computes each row from the same row of its operands, so it moves towards the
inputs, one op at a time, as long as nothing else reads the value. At an attention it moves on to the queries.
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import SizeValue, TensorType, copy_origin, fact, find_fact, set_fact
from tilewright.ir.graph import Level
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.sizes import BATCH, TOKENS, WANTED, Size
from tilewright.ops import Flow, traits_of
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.layout.axes import positional, symbols_in
from tilewright.passes.rewrite import erase_dead

aten = torch.ops.aten
tw = torch.ops.tilewright
# These compute row t of their result from row t of their packed operands: the verifier's rule ``tokens_not_mixed``.
_ROW_WISE = {Flow.POINTWISE, Flow.LAST_AXIS, Flow.CONTRACT, Flow.GROUPED, Flow.LOOKUP, Flow.REDUCE, Flow.VIEW}
# What picks rows of a packed value: how many, and the layout of the result.
_PICKS: dict[Any, tuple[Size, Layout]] = {
    tw.select_rows.default: (BATCH, Layout(LayoutKind.PER_SEQUENCE, 0)),
    tw.take_rows.default: (WANTED, Layout(LayoutKind.SELECTED, 0)),
}


@dataclass(frozen=True)
class SliceRows(Pass):
    """Moves selections of rows towards the inputs, past everything that works row by row, attention included.

    The report counts the ops that now compute selected rows only ("sliced") and the attentions among them; it has a
    reason for each of these attentions, and for each selection that could not move.
    """

    name: ClassVar[str] = "slice_rows"
    requires: ClassVar[Level] = Level.PACKED
    ensures: ClassVar[Level] = Level.PACKED

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites the graph in place."""
        dead = erase_dead(gm)  # what nothing reads must not count as a reader
        slicer = _Slicer(gm)
        # Users come before producers, so that all that reads a value has been moved when its turn comes.
        for node in reversed(list(gm.graph.nodes)):
            slicer.visit(node)
        erase_dead(gm)  # offsets and sizes that nothing but the whole attention read
        gm.graph.lint()
        gm.recompile()
        counts = {"sliced": slicer.sliced, "attention": slicer.attentions}
        return PassResult(
            gm, bool(slicer.sliced or dead), {topic: n for topic, n in counts.items() if n}, slicer.reasons
        )


@dataclass(frozen=True)
class _Selection:
    """Which rows: the op that picks them, and its operands besides the value."""

    target: Any
    args: tuple[Any, ...]

    @property
    def count(self) -> Size:
        """Number of rows."""
        return _PICKS[self.target][0]

    def of(self, node: Node) -> TensorType:
        """Type of these rows of a value."""
        old = fact(node, TensorType)
        return TensorType((self.count, *old.shape[1:]), old.dtype)


def _selection_of(node: Node) -> _Selection | None:
    return _Selection(node.target, tuple(node.args[1:])) if node.target in _PICKS else None


def _is_packed(node: Node) -> bool:
    """Packed values, and no others, have T as their first axis: a rule of the level."""
    kind = find_fact(node, TensorType)
    return kind is not None and bool(kind.shape) and kind.shape[0] == TOKENS


class _Slicer:
    def __init__(self, gm: GraphModule) -> None:
        self.graph = gm.graph
        self.sliced = 0
        self.attentions = 0
        self.reasons: dict[str, str] = {}
        self._selected: dict[tuple[Node, _Selection], Node] = {}

    def visit(self, node: Node) -> None:
        """Computes the selected rows alone if nothing reads others."""
        selections = dict.fromkeys(_selection_of(user) for user in node.users)
        selection = next((each for each in selections if each is not None), None)
        if selection is None or not _is_packed(node):
            return
        why = _why_all_rows(node, len(selections))
        if why is None:
            self._move(node, selection)
        elif (node, selection) not in self._selected:
            # As the model wrote it; where one has moved until here, it is the attention on its way that counts.
            self.reasons.update({user.name: why for user in node.users if _selection_of(user) is not None})

    def _move(self, node: Node, selection: _Selection) -> None:
        made = self._sliced(node, selection)
        for user in list(node.users):
            user.replace_all_uses_with(made)
            self.graph.erase_node(user)
        self.graph.erase_node(node)
        self.sliced += 1
        if traits_of(node.target).flow is Flow.ATTENTION:
            self.attentions += 1
            which = "one query of each sequence" if selection.count == BATCH else "queries of the wanted rows"
            why = f"{which}, not all tokens: nothing but {selection.target} reads its result"
            self.reasons[made.name] = why

    def _sliced(self, node: Node, selection: _Selection) -> Node:
        """The op on the selected rows of its packed operands."""
        if traits_of(node.target).flow is Flow.ATTENTION:
            rewrite = self._over_pages if node.target is tw.attention_paged.default else self._attention
            return self._call(node, node.target, rewrite(node, selection), {}, selection)
        rows = {arg: self._select(arg, selection) for arg in node.all_input_nodes if _is_packed(arg)}
        # What is the same in every row has no packed operand: there are as many rows as are selected.
        count = next(iter(rows.values()), selection.args[0])

        def replaced(arg: Node) -> Node:
            size = find_fact(arg, SizeValue)
            if size is not None and size.value == TOKENS:
                return self._size(node, aten.sym_size.int, (count, 0), SizeValue(selection.count))
            return rows.get(arg, arg)

        given: tuple[Any, Any] = (node.args, node.kwargs)
        args, kwargs = torch.fx.node.map_arg(given, replaced)
        return self._call(node, node.target, args, kwargs, selection)

    def _over_pages(self, node: Node, selection: _Selection) -> tuple[Any, ...]:
        """The wanted queries; all new keys go into their pages."""
        q, k, v, keys, values, places, _, slots_q, *rest = positional(node)
        _, cu_rows = selection.args
        queries, slots = self._select(q, selection), self._select(slots_q, selection)
        return (queries, k, v, keys, values, places, cu_rows, slots, *rest)

    def _attention(self, node: Node, selection: _Selection) -> tuple[Any, ...]:
        """One query of each sequence: their offsets count sequences, their slots are those of the selected rows."""
        q, k, v, _, key_start, seqlens_k, slots_q, slots_k, bias, sinks, _, *rest = positional(node)
        *options, query_table, query_index, key_table, key_index, uniform = rest
        table = None if query_table is None else self._select(query_table, selection)
        rest = [*options, table, query_index, key_table, key_index, uniform]
        queries, slots = self._select(q, selection), self._select(slots_q, selection)
        batch = self._size(node, aten.sym_size.int, (queries, 0), SizeValue(BATCH))
        end = self._size(node, operator.add, (batch, 1), SizeValue(BATCH + 1))
        made = {"dtype": torch.int32, "device": torch.device("cpu"), "pin_memory": False}
        offsets = self._insert(node, aten.arange.start_step, (0, end, 1), made)
        set_fact(offsets, TensorType((BATCH + 1,), torch.int32))
        set_fact(offsets, Layout(LayoutKind.PER_SEQUENCE, 0))
        return (queries, k, v, offsets, key_start, seqlens_k, slots, slots_k, bias, sinks, 1, *rest)

    def _select(self, value: Node, selection: _Selection) -> Node:
        key = (value, selection)
        if key not in self._selected:
            args = (value, *selection.args)
            self._selected[key] = self._call(value, selection.target, args, {}, selection)
        return self._selected[key]

    def _call(self, origin: Node, target: Any, args: Any, kwargs: dict[str, Any], selection: _Selection) -> Node:
        """A call that gives the selected rows of ``origin``."""
        made = self._insert(origin, target, args, kwargs)
        set_fact(made, selection.of(origin))
        set_fact(made, _PICKS[selection.target][1])
        return made

    def _size(self, origin: Node, target: Any, args: Any, size: SizeValue) -> Node:
        made = self._insert(origin, target, args, {})
        set_fact(made, size)
        return made

    def _insert(self, origin: Node, target: Any, args: Any, kwargs: dict[str, Any]) -> Node:
        """A call behind the last of its operands, where whatever may read it comes later."""
        operands: list[Node] = []
        torch.fx.node.map_arg((args, kwargs), operands.append)
        with self.graph.inserting_after(max(operands)):
            name = f"{origin.name}_rows" if target is origin.target else None
            made = self.graph.create_node("call_function", target, args, kwargs, name)
        copy_origin(origin, made, SliceRows.name)
        return made


def _why_all_rows(node: Node, kinds_of_users: int) -> str | None:
    """Why all rows of a value are computed, of which some user reads selected rows, or None."""
    others = [user.name for user in node.users if _selection_of(user) is None]
    if others:
        return f"all rows of '{node.name}' are read by {', '.join(map(repr, others[:3]))}"
    if kinds_of_users > 1:
        return f"'{node.name}' is read at different rows"
    if traits_of(node.target).flow not in _ROW_WISE | {Flow.ATTENTION}:
        return f"'{node.name}' is not computed row by row: {node.target}"
    sizes = [size.value for arg in node.all_input_nodes if (size := find_fact(arg, SizeValue))]
    if any(size != TOKENS and TOKENS in symbols_in((size,)) for size in sizes):
        return f"'{node.name}' is made from a size that counts all tokens"
    return None
