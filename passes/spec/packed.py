"""Rules of the level packed: one row index, each value packed and unpacked once, tokens never mixed by accident."""

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, find_fact
from tilewright.ir.graph import info
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.sizes import TOKENS
from tilewright.ir.views import same_size
from tilewright.ops import Flow, traits_of
from tilewright.passes.layout.axes import positional, shape_of, symbols_in, tensor_operands, worked_axes
from tilewright.passes.spec.rules import Rule, Violation, calls

aten = torch.ops.aten
tw = torch.ops.tilewright
# Position of each operand that comes from the row index, and which of its results it is.
_FROM_INDEX: dict[Any, dict[int, int]] = {
    tw.gather_rows.default: {1: 0},
    tw.scatter_rows.default: {1: 0},
    tw.attention_packed.default: {4: 3, 5: 4, 7: 1},
}


def _row_indices(gm: GraphModule) -> list[Node]:
    return [node for node in calls(gm) if node.target is tw.pack_index.default]


def _paged(gm: GraphModule) -> list[Node]:
    return [node for node in calls(gm) if node.target is tw.attention_paged.default]


def _is_packed(node: Node) -> bool:
    layout = find_fact(node, Layout)
    return layout is not None and layout.kind is LayoutKind.PACKED


def _is_table(node: Node) -> bool:
    layout = find_fact(node, Layout)
    return layout is not None and layout.kind is LayoutKind.TABLE


def _layout_known(gm: GraphModule) -> Iterator[Violation]:
    for node in gm.graph.nodes:
        if find_fact(node, TensorType) is not None and find_fact(node, Layout) is None:
            yield Violation(node, "it carries no Layout")


def _one_row_index(gm: GraphModule) -> Iterator[Violation]:
    for node in _row_indices(gm)[1:]:
        yield Violation(node, "it is a second row index")


def _reason_when_padded(gm: GraphModule) -> Iterator[Violation]:
    if not _row_indices(gm) and not _paged(gm) and not info(gm).reasons.get("packing"):
        yield Violation(None, "the graph is padded and GraphInfo.reasons['packing'] is empty")


def _tokens_first(gm: GraphModule) -> Iterator[Violation]:
    for node in gm.graph.nodes:
        if find_fact(node, TensorType) is None:
            continue
        shape = shape_of(node)
        if _is_packed(node) and not (shape and same_size(shape[0], TOKENS)):
            yield Violation(node, f"it is packed and has shape {tuple(map(str, shape))}")
        elif not (_is_packed(node) or _is_table(node)) and TOKENS in symbols_in(shape):
            yield Violation(node, f"it is not packed and has shape {tuple(map(str, shape))}")


def _is_result(gm: GraphModule, node: Node, place: int) -> bool:
    return bool(node.target is operator.getitem and node.args[0] in _row_indices(gm) and node.args[1] == place)


def _from_row_index(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        for position, place in _FROM_INDEX.get(node.target, {}).items():
            source = positional(node)[position]
            if not _is_result(gm, source, place):
                yield Violation(node, f"argument {position}, '{source.name}', is not result {place} of the row index")


def _queries_placed(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        if node.target is not tw.attention_packed.default:
            continue
        args = positional(node)
        offsets, slots = args[3], args[6]
        if _is_result(gm, offsets, 2) and _is_result(gm, slots, 1):
            continue
        picked = slots.target is tw.select_rows.default and _is_result(gm, slots.args[0], 1)
        if not (picked and offsets.target is aten.arange.start_step):
            yield Violation(node, f"its queries have offsets '{offsets.name}' and slots '{slots.name}'")


def _pages_once(gm: GraphModule) -> Iterator[Violation]:
    """Who appends would write over what another one appends; who only reads may share."""
    writers, readers = Counter[Node](), Counter[Node]()
    for node in _paged(gm):
        _, new, _, *given = positional(node)
        for each in (*given[:2], *(scales for scales in given[10:12] if scales is not None)):
            found = readers if new is None else writers
            found[each] += 1
            if found[each] == 2:
                yield Violation(node, f"'{each.name}' are also the pages of another attention")


def _step_given(gm: GraphModule) -> Iterator[Violation]:
    for node in _paged(gm):
        for position in (5, 6, 7, 8):
            source = positional(node)[position]
            if source is None and position == 5 and positional(node)[1] is None:
                continue
            picked = source.target is tw.take_rows.default and position == 7
            if (source.args[0] if picked else source).op != "placeholder":
                yield Violation(node, f"argument {position}, '{source.name}', is not what the step was told")


def _gathered_once(gm: GraphModule) -> Iterator[Violation]:
    yield from _once(gm, tw.gather_rows.default, "gathered")


def _scattered_once(gm: GraphModule) -> Iterator[Violation]:
    yield from _once(gm, tw.scatter_rows.default, "scattered")


def _once(gm: GraphModule, target: Any, verb: str) -> Iterator[Violation]:
    counts: Counter[Node] = Counter()
    for node in calls(gm):
        if node.target is target:
            source = positional(node)[0]
            counts[source] += 1
            if counts[source] == 2:
                yield Violation(node, f"'{source.name}' is {verb} twice")


def _stays_packed(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        if node.target is tw.gather_rows.default and positional(node)[0].target is tw.scatter_rows.default:
            yield Violation(node, f"it packs again what '{positional(node)[0].name}' has just padded")


def _attention_packed(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        if _row_indices(gm) and node.target is tw.attention.default:
            yield Violation(node, "it works on padded tensors beside a row index")


def _rows_of_columns(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        if node.target is not tw.select_rows.default:
            continue
        rows = positional(node)[1]
        if not (rows.target is aten.select.int and rows.args[1] == 0 and _is_result(gm, rows.args[0], 5)):
            yield Violation(node, f"its rows '{rows.name}' are none that the row index kept a column for")


def _tokens_not_mixed(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        packed = [operand for operand in tensor_operands(node) if _is_packed(operand)]
        if not packed or find_fact(node, TensorType) is None:
            continue
        why = _mixes(node)
        if why:
            yield Violation(node, f"{node.target} {why} of packed '{packed[0].name}'")


def _mixes(node: Node) -> str | None:
    """How the op reads across the rows of its packed operand, or None."""
    flow, args = traits_of(node.target).flow, positional(node)
    if flow is Flow.OTHER:
        return "reads unknown places"
    if flow in (Flow.LAST_AXIS, Flow.REDUCE, Flow.GROUPED) and 0 in worked_axes(node):
        return "works along the rows"
    if flow is Flow.CONTRACT and len(shape_of(args[0])) < 2:
        return "contracts over the rows"
    if node.target in (aten.slice.Tensor, aten.select.int, aten.cat.default) and args[1] == 0:
        return "cuts or joins the rows"
    if node.target is aten.permute.default and args[1][0] != 0:
        return "moves the rows"
    return None


PACKED = (
    Rule("layout_known", "every tensor node carries its Layout", _layout_known),
    Rule("one_row_index", "the graph has one row index at most", _one_row_index),
    Rule("reason_when_padded", "a graph that stays padded says why", _reason_when_padded),
    Rule("from_row_index", "offsets and indices are results of the row index", _from_row_index),
    Rule("queries_placed", "queries are all rows of the row index, or one selected row of each", _queries_placed),
    Rule("pages_once", "each attention that appends has pages of its own", _pages_once),
    Rule("step_given", "places, offsets, slots and tables of attention over pages are inputs", _step_given),
    Rule("tokens_first", "packed values, and no others but tables, have T, as their first axis", _tokens_first),
    Rule("gathered_once", "a value is gathered once", _gathered_once),
    Rule("scattered_once", "a value is scattered once", _scattered_once),
    Rule("stays_packed", "nothing is padded and packed again", _stays_packed),
    Rule("attention_packed", "in a packed graph every attention is packed", _attention_packed),
    Rule("rows_of_columns", "rows are selected at columns that the row index keeps", _rows_of_columns),
    Rule(
        "tokens_not_mixed",
        "only attention and the packing ops read across the rows of a packed value",
        _tokens_not_mixed,
    ),
)
