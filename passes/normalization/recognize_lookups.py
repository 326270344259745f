"""Rows of a table that an input names, however the model spells it, as ``aten.embedding``."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, fact
from tilewright.ir.graph import InputSpec, Level, get_tensor, info, update_info
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, dtype_of, erase_dead, is_call, operand, rank_of, shape_of

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
_INTEGERS = (torch.int32, torch.int64)  # bool and uint8 select by condition
_SAME_VALUES = (
    aten.unsqueeze.default, aten.squeeze.dims, aten.reshape.default, aten.permute.default, aten.expand.default,
    aten.slice.Tensor, aten.select.int, CONVERT,
)  # fmt: skip


@dataclass(frozen=True)
class RecognizeLookups(Pass):
    """Turns ``table[ids]``, ``index_select`` and a ``gather`` of whole rows into an embedding where ids are an input.

    A number may have been added to them.

    What an input names is checked at each call, so that no kernel reads beyond the table. Indices that are computed
    stay as they are, for nothing is known of them.
    """

    name: ClassVar[str] = "recognize_lookups"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites the graph in place."""
        rw = Rewriter(gm, self.name)
        found = 0
        for node in list(gm.graph.nodes):
            if is_call(node, aten.index.Tensor):
                found += _indexed(rw, node)
            elif is_call(node, aten.gather.default):
                found += _gathered(rw, node)
            elif is_call(node, aten.index_select.default):
                found += _selected(rw, node)
        dead = erase_dead(gm)
        gm.recompile()
        return PassResult(gm, bool(found or dead), {"lookups": found} if found else {})


def _indexed(rw: Rewriter, node: Node) -> bool:
    """``table[ids]``, where an id may count from the end."""
    table, indices = operand(node), operand(node, 1)
    if table.op != "get_attr" or rank_of(table) != 2 or len(indices) != 1:
        return False
    ids, rows = indices[0], int(shape_of(table)[0])
    named = _input(rw, ids)
    if named is None:
        return False
    spec, offset = named
    if spec.vocab is None or spec.lowest + offset < 0:
        last = rw.call(node, aten.add.Tensor, ids, rows)
        ids = rw.call(node, aten.where.self, rw.call(node, aten.lt.Scalar, ids, 0), last, ids)
    _look_up(rw, node, table, ids, _limited(spec, -rows - offset, rows - offset))
    return True


def _selected(rw: Rewriter, node: Node) -> bool:
    """``index_select`` of rows."""
    table, axis, ids = operand(node), int(operand(node, 1)), operand(node, 2)
    named = _input(rw, ids)
    if table.op != "get_attr" or rank_of(table) != 2 or axis % 2 != 0 or named is None:
        return False
    spec, offset = named
    _look_up(rw, node, table, ids, _limited(spec, -offset, int(shape_of(table)[0]) - offset))
    return True


def _gathered(rw: Rewriter, node: Node) -> bool:
    """A gather along the axis of rows of a table that is the same for all of the batch, of each row as a whole."""
    source, axis, index = operand(node), int(operand(node, 1)), operand(node, 2)
    rank = rank_of(source)
    table = operand(source) if is_call(source, aten.expand.default) else source
    if table.op != "get_attr" or axis % rank != rank - 2 or not is_call(index, aten.expand.default):
        return False
    leading, (rows, width) = shape_of(table)[:-2], shape_of(source)[-2:]
    ids = operand(index)
    same_row = rank_of(ids) == rank and shape_of(ids)[-1] == 1 and shape_of(index) == (*shape_of(ids)[:-1], width)
    if any(size != 1 for size in leading) or shape_of(table)[-2:] != (rows, width) or not same_row:
        return False
    named = _input(rw, ids)
    if named is None:
        return False
    spec, offset = named
    if leading:
        table = rw.constant(node, get_tensor(rw.gm, table).reshape(rows, width))
    ids = rw.call(node, aten.squeeze.dims, ids, [rank - 1])
    _look_up(rw, node, table, ids, _limited(spec, -offset, int(rows) - offset))
    return True


def _input(rw: Rewriter, ids: Node) -> tuple[InputSpec, int] | None:
    """The input that holds all these numbers, and what has been added to them; None for other numbers."""
    offset = 0
    while dtype_of(ids) in _INTEGERS:
        if is_call(ids, *_SAME_VALUES):
            ids = operand(ids)
        elif is_call(ids, aten.add.Tensor) and isinstance(operand(ids, 1), int):
            ids, offset = operand(ids), offset + operand(ids, 1)
        else:
            specs = (spec for spec in info(rw.gm).inputs if ids.op == "placeholder" and spec.name == ids.target)
            return next(((spec, offset) for spec in specs), None)
    return None


def _limited(spec: InputSpec, lowest: int, vocab: int) -> InputSpec:
    """With values from ``lowest`` on and below ``vocab``, and what it was limited to before."""
    if spec.vocab is None:
        return replace(spec, lowest=lowest, vocab=vocab)
    return replace(spec, lowest=max(spec.lowest, lowest), vocab=min(spec.vocab, vocab))


def _look_up(rw: Rewriter, node: Node, table: Node, ids: Node, spec: InputSpec) -> None:
    """Replaces ``node``; from now on the input is checked against this table too."""
    specs = tuple(spec if each.name == spec.name else each for each in info(rw.gm).inputs)
    update_info(rw.gm, inputs=specs)
    rw.replace(node, rw.call(node, aten.embedding.default, table, ids, type=fact(node, TensorType)))
