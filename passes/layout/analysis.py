"""The layout analysis behind ``RemovePadding``: which values can be packed, and whether the graph as a whole may be.

The analysis walks the graph once. A value is packed when each of its rows belongs to one place (b, s) of the padded
batch and is computed from that place alone, from the keys that attention lets it see, or from values without a place.
Packing drops the masked places, so it is legal only if nothing reads them: an op that mixes along the sequence may read
a value only if it is known what it holds at masked places (``layout_pads``); it then gets the value padded again.

Everything is decided from the axes of values and the traits of ops. What is not known to be legal is refused, with the
rule that it breaks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tilewright.errors import Where
from tilewright.ir.facts import SizeValue, TensorType, fact, find_fact, where
from tilewright.ir.layout import Layout, LayoutKind, packed_type
from tilewright.ir.sizes import BATCH, SEQ
from tilewright.ir.views import same_size
from tilewright.ops import Flow, traits_of
from tilewright.passes.layout.axes import (
    NO_AXES,
    Axes,
    axes_by_shape,
    carried_axes,
    positional,
    shape_of,
    symbols_in,
    tensor_operands,
    without,
    worked_axes,
)
from tilewright.passes.layout.pads import constant_of, pad_value
from tilewright.passes.layout.pads_alike import check_pads_alike
from tilewright.passes.layout.validity import NotPackable, Validity, is_valid_like, keys_are_given

aten = torch.ops.aten
_PADDED, _PACKED = LayoutKind.PADDED, LayoutKind.PACKED


@dataclass(frozen=True)
class Packing:
    """What the analysis found.

    Attributes:
        layouts: layout of every tensor node.
        validity: the [B, S] value whose nonzero entries mark real tokens; None when nothing is packed.
        padded_again: packed values that an op also needs with padding.
        columns: nodes that read one column of a packed value, and which: a number, the node of a size, or the node of
            an integer tensor [B], counted from the end where negative.
    """

    layouts: dict[Node, Layout]
    validity: Validity | None
    padded_again: frozenset[Node]
    columns: dict[Node, int | Node]


class _Mixes(Exception):
    """The op reads its packed operands across places, so it needs them padded; the message says why."""

    def __init__(self, rule: str, why: str) -> None:
        self.rule = rule
        super().__init__(why)


def analyze(gm: GraphModule, validity: Validity | None, token_inputs: frozenset[str] = frozenset()) -> Packing:
    """Layouts of all values, with packing by ``validity``, or without packing when it is None.

    ``token_inputs`` names integer inputs [B, S] to be packed from the start.

    Raises:
        NotPackable: packing by ``validity`` is not legal; says which rule, which node and why.
    """
    return _Analysis(gm, validity, token_inputs).run()


class _Analysis:
    def __init__(self, gm: GraphModule, validity: Validity | None, token_inputs: frozenset[str]) -> None:
        self.gm = gm
        self.token_inputs = token_inputs
        self.validity = validity
        self.layouts: dict[Node, Layout] = {}
        self.padded_again: set[Node] = set()
        self.columns: dict[Node, int | Node] = {}
        self.rules: dict[Flow, Callable[[Node], Layout]] = {
            Flow.POINTWISE: self._pointwise,
            Flow.LAST_AXIS: self._last_axis,
            Flow.CONTRACT: self._contract,
            Flow.GROUPED: self._joint_rows,
            Flow.LOOKUP: self._lookup,
            Flow.REDUCE: self._reduce,
            Flow.VIEW: self._view,
            Flow.COLUMN: self._column,
            Flow.ATTENTION: self._attention,
            Flow.CREATE: lambda node: self._unpacked(node, axes_by_shape(shape_of(node))),
        }

    def run(self) -> Packing:
        for node in self.gm.graph.nodes:
            if find_fact(node, TensorType) is not None:
                layout = self._layout(node)
                if self.validity is not None and is_valid_like(node, self.validity):
                    layout = replace(layout, pad_value=0.0)
                self.layouts[node] = layout
            elif node.op != "output" and find_fact(node, SizeValue) is None:
                self._needs_padded(node, self._packed_operands(node), _unknown(node))
        if self.validity is not None and (tokens := self._tokens_behind(self.validity.node)) is not None:
            why = "the validity of keys is computed from the tokens it would pack"
            raise NotPackable("validity_from_tokens", where(tokens), why)
        if self.columns:
            check_pads_alike(self.gm, self.layouts, self.columns)
        return Packing(self.layouts, self.validity, frozenset(self.padded_again), self.columns)

    def _layout(self, node: Node) -> Layout:
        if node.op == "get_attr":
            return Layout(LayoutKind.FREE, pad_value=constant_of(self.gm, node))
        if node.op == "placeholder":
            return self._placeholder(node)
        rule = self.rules.get(traits_of(node.target).flow)
        packed = self._packed_operands(node)
        try:
            if rule is None:
                raise _unknown(node)
            layout = rule(node)
        except _Mixes as mixes:
            self._needs_padded(node, packed, mixes)
            layout = self._unpacked(node, self._mixed_axes(node))
        if layout.kind is _PACKED:
            self._check_sizes(node, layout)
        return replace(layout, pad_value=pad_value(node, layout, self.layouts))

    def _placeholder(self, node: Node) -> Layout:
        type_ = fact(node, TensorType)
        axes = axes_by_shape(type_.shape)
        # Token features given by the caller: one gather at the very start packs all that follows.
        features = type_.dtype.is_floating_point and len(type_.shape) > 2
        packed = None not in axes and (features or node.target in self.token_inputs)
        layout = Layout(_PACKED, *axes)
        if not packed or self.validity is None or symbols_in(packed_type(type_, layout).shape[1:]):
            return self._unpacked(node, axes)
        return layout

    # Helpers -------------------------------------------------------------------------------------------------------

    def _packed_operands(self, node: Node) -> list[Node]:
        return [operand for operand in tensor_operands(node) if self.layouts[operand].kind is _PACKED]

    def _axes(self, node: Node) -> Axes:
        return self.layouts[node].batch_axis, self.layouts[node].seq_axis

    def _mixed_axes(self, node: Node) -> Axes:
        """Axes of a result whose op mixes places but keeps them where they are, such as a running sum."""
        if traits_of(node.target).flow is Flow.LAST_AXIS:
            return self._axes(tensor_operands(node)[0])
        if traits_of(node.target).flow is Flow.REDUCE:
            return self._reduced_axes(node)
        if traits_of(node.target).flow is Flow.VIEW:
            source = tensor_operands(node)[0]
            return carried_axes(node, source, self._axes(source)) or NO_AXES
        return NO_AXES

    def _unpacked(self, node: Node, axes: Axes) -> Layout:
        symbols = symbols_in(shape_of(node))
        free = all(self.layouts[operand].kind is LayoutKind.FREE for operand in tensor_operands(node))
        if free and BATCH not in symbols and (node.op != "placeholder" or SEQ not in symbols):
            return Layout(LayoutKind.FREE, *axes)
        if axes[0] is not None and SEQ not in symbols:
            return Layout(LayoutKind.PER_SEQUENCE, *axes)
        return Layout(_PADDED, *axes)

    def _packs(self, node: Node, source: Node) -> bool:
        """Whether a row-wise op packs: its operand is packed, or padded with both axes known."""
        if self.validity is None:
            return False
        layout = self.layouts[source]
        return layout.kind is _PACKED or (layout.kind is _PADDED and layout.per_token)

    def _needs_padded(self, node: Node, operands: list[Node], mixes: _Mixes) -> None:
        for operand in operands:
            if operand.op == "placeholder":
                continue
            if self.layouts[operand].pad_value is None:
                raise NotPackable(
                    mixes.rule, where(node), f"{mixes}, and '{operand.name}' is not constant at masked places"
                )
            self.padded_again.add(operand)

    def _check_sizes(self, node: Node, layout: Layout) -> None:
        symbols = symbols_in(packed_type(fact(node, TensorType), layout).shape[1:])
        if symbols:
            names = ", ".join(sorted(map(str, symbols)))
            raise NotPackable("fixed_features", where(node), f"the size of a token's features depends on {names}")

    def _tokens_behind(self, node: Node) -> Node | None:
        """A packed value that ``node`` is or is computed from: the row index, which comes first, cannot wait for it."""
        pending, seen = [node], set()
        while pending:
            current = pending.pop()
            if current in seen or find_fact(current, TensorType) is None:
                continue
            seen.add(current)
            if self.layouts[current].kind is _PACKED:
                return current
            pending.extend(current.all_input_nodes)
        return None

    def _check_weights(self, node: Node, weights: list[Any]) -> None:
        for weight in weights:
            if isinstance(weight, Node) and find_fact(weight, TensorType) is not None and symbols_in(shape_of(weight)):
                why = f"its operand '{weight.name}' has a size that depends on the batch, where a weight is expected"
                raise _Mixes("weights_are_fixed", why)

    # Rules by flow -------------------------------------------------------------------------------------------------

    def _pointwise(self, node: Node) -> Layout:
        rank = len(shape_of(node))
        places: dict[Node, Axes] = {}
        for operand in tensor_operands(node):
            shift = rank - len(shape_of(operand))
            batch, seq = self._axes(operand)
            places[operand] = (None if batch is None else batch + shift, None if seq is None else seq + shift)
        packed = {places[operand] for operand in self._packed_operands(node)}
        if len(packed) == 1:
            return Layout(_PACKED, *packed.pop())
        if packed:
            raise _Mixes("same_token_axes", "its operands have their tokens on different axes")
        merged = []
        for which in (0, 1):
            known = {axes[which] for axes in places.values()} - {None}
            merged.append(known.pop() if len(known) == 1 else None)
        return self._unpacked(node, (merged[0], merged[1]))

    def _joint_rows(self, node: Node) -> Layout:
        """Several operands have a row for each row of the result: all of them must have their tokens on its axes."""
        given = positional(node)
        rows = [given[position] for position in traits_of(node.target).row_args]
        packed = [operand for operand in rows if self.layouts[operand].kind is _PACKED]
        if not packed:
            self._none_packed(node, tensor_operands(node))
            return self._unpacked(node, self._axes(rows[0]))
        axes = self._axes(packed[0])
        if any(self._axes(operand) != axes for operand in rows):
            raise _Mixes("same_token_axes", "its operands have their tokens on different axes")
        if worked_axes(node) & set(axes):
            raise _Mixes("no_mixing_of_places", "it works along an axis of the batch or the sequence")
        self._check_weights(node, [operand for operand in tensor_operands(node) if operand not in rows])
        return Layout(_PACKED, *axes)

    def _last_axis(self, node: Node) -> Layout:
        if len(traits_of(node.target).row_args) > 1:
            return self._joint_rows(node)
        source = tensor_operands(node)[0]
        layout = self.layouts[source]
        features = fact(source, TensorType).dtype.is_floating_point and len(shape_of(source)) > 2
        if layout.kind is not _PACKED and not (features and self._packs(node, source)):
            return self._unpacked(node, self._axes(source))
        if worked_axes(node) & set(layout.token_axes):
            raise _Mixes("no_mixing_of_places", "it works along an axis of the batch or the sequence")
        self._check_weights(node, [operand for operand in tensor_operands(node) if operand is not source])
        return Layout(_PACKED, *self._axes(source))

    def _contract(self, node: Node) -> Layout:
        source, *weights = positional(node)
        if not self._packs(node, source):
            self._none_packed(node, weights)
            last = len(shape_of(source)) - 1
            batch, seq = self._axes(source)
            return self._unpacked(node, (None if batch == last else batch, None if seq == last else seq))
        if len(shape_of(source)) - 1 in self.layouts[source].token_axes:
            raise _Mixes("no_mixing_of_places", "it contracts over an axis of the batch or the sequence")
        self._check_weights(node, weights)
        return Layout(_PACKED, *self._axes(source))

    def _lookup(self, node: Node) -> Layout:
        table, ids, *_ = positional(node)
        if not self._packs(node, ids):
            self._none_packed(node, [table])
            return self._unpacked(node, self._axes(ids))
        self._check_weights(node, [table])
        return Layout(_PACKED, *self._axes(ids))

    def _none_packed(self, node: Node, operands: list[Any]) -> None:
        if any(isinstance(operand, Node) and operand in self._packed_operands(node) for operand in operands):
            raise _Mixes("weights_are_fixed", "a packed value stands where a weight is expected")

    def _reduced_axes(self, node: Node) -> Axes:
        source = tensor_operands(node)[0]
        keeps_rank = len(shape_of(node)) == len(shape_of(source))
        removed = worked_axes(node)
        if not keeps_rank:
            return without(self._axes(source), removed)
        batch, seq = self._axes(source)
        return (None if batch in removed else batch), (None if seq in removed else seq)

    def _reduce(self, node: Node) -> Layout:
        source = tensor_operands(node)[0]
        layout, axes = self.layouts[source], self._reduced_axes(node)
        if layout.kind is not _PACKED:
            return self._unpacked(node, axes)
        if None in axes:
            raise _Mixes("no_mixing_of_places", "it reduces over an axis of the batch or the sequence")
        return Layout(_PACKED, *axes)

    def _view(self, node: Node) -> Layout:
        packed = self._packed_operands(node)
        source = packed[0] if packed else tensor_operands(node)[0]
        axes = carried_axes(node, source, self._axes(source))
        if axes is None:
            raise _Mixes("known_view", f"nothing is known of where {node.target} moves elements")
        if not packed:
            return self._unpacked(node, axes)
        if None not in axes and len({self._axes(operand) for operand in packed}) == 1:
            return Layout(_PACKED, *axes)
        column = self._column_cut_out(node)
        if column is not None:
            self.columns[node] = column
            batch, _ = axes
            return Layout(LayoutKind.PER_SEQUENCE, batch, None)
        raise _Mixes("no_mixing_of_places", "it cuts or merges an axis of the batch or the sequence")

    def _column_cut_out(self, node: Node) -> int | Node | None:
        """The one column that a select or a slice leaves of its operand, or None."""
        source, layout = tensor_operands(node)[0], self.layouts[tensor_operands(node)[0]]
        args = positional(node)
        if layout.batch_axis == layout.seq_axis or node.target not in (aten.select.int, aten.slice.Tensor):
            return None
        if int(args[1]) % len(shape_of(source)) != layout.seq_axis:
            return None
        if node.target is aten.slice.Tensor and not same_size(shape_of(node)[layout.seq_axis], 1):
            return None
        column: int | Node | None = args[2]
        return 0 if column is None else column

    def _column(self, node: Node) -> Layout:
        """A column that is known at run time only; it has to be known before there are packed rows."""
        source, column = tensor_operands(node)[0], positional(node)[1]
        if self.layouts[source].kind is not _PACKED:
            return self._unpacked(node, without(self._axes(source), {1}))
        tokens = self._tokens_behind(column)
        if tokens is not None:
            raise _Mixes(
                "column_from_tokens", f"the column it reads is computed from the packed tokens '{tokens.name}'"
            )
        if self._axes(source) != (0, 1):
            raise _Mixes("no_mixing_of_places", "it reads one place along an axis that is not that of the sequence")
        self.columns[node] = column
        return Layout(LayoutKind.PER_SEQUENCE, 0, None)

    def _attention(self, node: Node) -> Layout:
        if self.validity is None:
            return self._unpacked(node, (0, 1))
        q, k, v, _, bias, sinks, *_, query_table, _, key_table, _, _ = positional(node)
        if keys_are_given(node):
            return self._over_given_keys(node)
        tables = (("table of queries", query_table), ("table of keys", key_table))
        for name, operand in (("queries", q), ("keys", k), ("values", v), *tables):
            if operand is None:
                continue
            shape = shape_of(operand)
            # Features of packed values have fixed sizes, so these two sizes also say where their tokens are.
            if not (same_size(shape[0], BATCH) and same_size(shape[2], SEQ)):
                why = f"its {name} have shape {tuple(map(str, shape))}, not one row for each place of [B, S]"
                raise NotPackable("attention_over_itself", where(node), why)
        if sinks is not None and (self.layouts[sinks].kind is _PACKED or symbols_in(shape_of(sinks))):
            raise NotPackable("sinks_are_fixed", where(node), f"its sinks '{sinks.name}' differ between sequences")
        if bias is not None and self.layouts[bias].kind is _PACKED and bias.op != "placeholder":
            # A bias stays padded, and is read at kept queries and real keys alone: other places may hold any number.
            self.padded_again.add(bias)
        return Layout(_PACKED, 0, 1)

    def _over_given_keys(self, node: Node) -> Layout:
        """Queries are packed; keys and values stay as they are, one set a sequence."""
        q, _, _, _, bias, sinks, _, causal, left, right, _, *tables = positional(node)
        if self._axes(q) != (0, 2) or not self._packs(node, q):
            raise NotPackable("attention_over_itself", where(node), f"its queries '{q.name}' are no rows of [B, S]")
        if causal or max(left, right) >= 0 or any(each is not None for each in (bias, sinks, *tables[:4])):
            why = "its keys are given, and it has an order, a window, a bias or sinks"
            raise NotPackable("known_attention", where(node), why)
        return Layout(_PACKED, 0, 1)


def _unknown(node: Node) -> _Mixes:
    why = traits_of(node.target).why_not or f"nothing is known of how {node.target} reads its operands"
    return _Mixes("known_flow", why)


def describe(refused: NotPackable) -> str:
    """The refusal as one sentence for ``GraphInfo.reasons``."""
    place = f" ({refused.where})" if isinstance(refused.where, Where) and str(refused.where) else ""
    return f"{refused.rule}: {refused.why}{place}"
