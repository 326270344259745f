"""Relative positions that look up a bias for each query or key in a row of numbers of its own.

DeBERTa's disentangled attention (He et al., 2021, section 3.1) adds to the score of query i and key j what q_i, times
embeddings of positions, has at the bucket of i - j, and what k_j, times others, has at that of j - i. As a bias that is
a tensor for all pairs, computed from tokens; as operands of attention it is one row of R numbers for each token, and
an index for all pairs of slots that is the same for every sequence and head.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import Reason, SizeValue, find_fact, set_fact
from tilewright.ir.graph import Level, info, update_info
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.layout.axes import positional
from tilewright.passes.normalization.recognize_attention import ATTENTION, CONVERT, addends
from tilewright.passes.rewrite import Rewriter, dtype_of, erase_dead, is_call, operand, rank_of, shape_of

aten = torch.ops.aten
_VIEWS_OF_INDEX = (aten.unsqueeze.default, aten.expand.default, aten.squeeze.dims, aten.reshape.default)


class _NotATable(Exception):
    """The term of a bias looks something up, and not as a table does; the message says why."""


@dataclass(frozen=True)
class _Found:
    """A term: ``factor * table[.., i, index[i, j]]``, for keys where ``of_keys`` with i the key."""

    table: Node
    index: Node
    factor: float
    of_keys: bool


@dataclass(frozen=True)
class RecognizeScoreTables(Pass):
    """Makes terms of a bias that are gathered along their last axis ``query_table`` and ``key_table`` of attention."""

    name: ClassVar[str] = "recognize_score_tables"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        rw = Rewriter(gm, self.name)
        counts, reasons = {"tables": 0}, {}
        for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
            if operand(node, 4) is None:
                continue
            found, why = _rewrite(rw, node)
            counts["tables"] += found
            if why:
                reasons[node.name] = why
                set_fact(node, Reason(why))
        dead = erase_dead(gm)
        if reasons:
            known = {f"tables of {name}": why for name, why in reasons.items()}
            update_info(gm, reasons=info(gm).reasons | known)
        gm.recompile()
        return PassResult(gm, bool(rw.changes or dead or reasons), counts, reasons)


def _rewrite(rw: Rewriter, node: Node) -> tuple[int, str]:
    """Takes tables out of the bias; returns their number and why a term that looks something up is none."""
    args = positional(node)
    rest: list[Node] = []
    count, why = 0, ""
    for term in addends(operand(node, 4)):
        try:
            found = _table(node, term)
            place = 11 + 2 * (found is not None and found.of_keys)
            if found is not None and args[place] is not None:
                raise _NotATable("there is another table already")
        except _NotATable as reason:
            found, why = None, f"'{term.name}' stays a bias: {reason}"
        if found is None:
            rest.append(term)
            continue
        args[place], args[place + 1] = _operands(rw, node, found)
        count += 1
    if count:
        bias = rest[0] if rest else None
        for term in rest[1:]:
            bias = rw.call(node, aten.add.Tensor, bias, term)
        args[4] = bias
        node.args = tuple(args)
        rw.changes += 1
    return count, why


def _table(attention: Node, term: Node) -> _Found | None:
    """What the term looks up; None for one that gathers nothing.

    Raises:
        _NotATable: it gathers otherwise.
    """
    node: Any = term
    factor, of_keys = 1.0, False
    while not is_call(node, aten.gather.default):
        rank = rank_of(node) if isinstance(node, Node) else 0
        if is_call(node, CONVERT) and dtype_of(node).is_floating_point:
            pass
        elif is_call(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(operand(node, 1), int | float):
            factor *= operand(node, 1) if node.target is aten.mul.Tensor else 1.0 / operand(node, 1)
        elif is_call(node, aten.permute.default) and operand(node, 1) == [*range(rank - 2), rank - 1, rank - 2]:
            of_keys = not of_keys
        elif not (is_call(node, aten.reshape.default) and shape_of(node)[-2:] == shape_of(operand(node))[-2:]):
            return None
        node = operand(node)
    table, axis, index = node.args[:3]
    rank = rank_of(table)
    if axis % rank != rank - 1 or shape_of(table)[:-1] != shape_of(index)[:-1]:
        raise _NotATable("it is not gathered along the last axis, for all rows")
    query, key = shape_of(operand(attention)), shape_of(operand(attention, 1))
    own, other = (key, query) if of_keys else (query, key)
    pairs = _for_all_heads(index)
    if pairs is None or shape_of(pairs)[-2:] != (own[2], other[2]):
        raise _NotATable("its index differs between sequences or heads")
    if _reads_inputs(pairs):
        raise _NotATable("its index is computed from inputs")
    if dtype_of(table) != dtype_of(operand(attention)) or not isinstance(shape_of(table)[-1], int):
        raise _NotATable("its rows are of another type or no fixed size")
    rows = shape_of(table)[:-1]
    if rows not in ((own[0], query[1], own[2]), (own[0] * query[1], own[2])):
        raise _NotATable(f"its rows are {tuple(map(str, rows))}, not one for each head and token")
    return _Found(table, pairs, factor, of_keys)


def _for_all_heads(index: Node) -> Node | None:
    """The index before it was made as large as the table, where that has one entry for each pair of slots."""
    while is_call(index, *_VIEWS_OF_INDEX) and shape_of(operand(index))[-2:] == shape_of(index)[-2:]:
        index = operand(index)
    return index if all(size == 1 for size in shape_of(index)[:-2]) else None


def _reads_inputs(node: Node) -> bool:
    """Whether a value depends on an input: an entry may then be beyond the table, which a kernel must not read."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or find_fact(current, SizeValue) is not None:
            continue
        if current.op == "placeholder":
            return True
        seen.add(current)
        pending += current.all_input_nodes
    return False


def _operands(rw: Rewriter, node: Node, found: _Found) -> tuple[Node, Node]:
    """The table as [B, H, S, R], with its factor, and the index as [S, Sk]."""
    table, index = found.table, found.index
    if rank_of(table) == 3:
        length = rw.size(node, shape_of(table)[1], [table])
        sizes = [-1, shape_of(operand(node))[1], length, shape_of(table)[2]]
        table = rw.call(node, aten.reshape.default, table, sizes)
    if found.factor != 1.0:
        table = rw.call(node, aten.mul.Tensor, table, found.factor)
    if rank_of(index) > 2:
        index = rw.call(node, aten.squeeze.dims, index, list(range(rank_of(index) - 2)))
    return table, index
