"""One op, ``select_column``, for advanced indexing that reads one place of every sequence."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, fact, find_fact
from tilewright.ir.graph import Level
from tilewright.ir.views import same_size
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, argument, dtype_of, erase_dead, is_call, operand, shape_of, size_value

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
_INDEX_TYPES = (torch.int32, torch.int64)  # bool and uint8 select by condition


@dataclass(frozen=True)
class RecognizeColumns(Pass):
    """Turns ``x[arange(B), column]`` with a column [B] of integers into select_column."""

    name: ClassVar[str] = "recognize_columns"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites the graph in place."""
        rw = Rewriter(gm, self.name)
        found = 0
        for node in gm.graph.find_nodes(op="call_function", target=aten.index.Tensor):
            column = _column(node)
            if column is None:
                continue
            select = torch.ops.tilewright.select_column.default
            rw.replace(node, rw.call(node, select, operand(node), column, type=fact(node, TensorType)))
            found += 1
        dead = erase_dead(gm)
        gm.recompile()
        return PassResult(gm, bool(found or dead), {"columns": found} if found else {})


def _column(node: Node) -> Node | None:
    """The column that an indexing reads of each entry of axis 0, or None."""
    source, indices = operand(node), list(operand(node, 1))
    while indices and indices[-1] is None:
        indices.pop()
    if len(indices) != 2 or len(shape_of(source)) < 2:
        return None
    sequences, column = indices
    entries = shape_of(source)[0]
    if not _counts_up(sequences, entries) or not isinstance(column, Node):
        return None
    kind = find_fact(column, TensorType)
    if kind is None or kind.dtype not in _INDEX_TYPES or len(kind.shape) != 1 or not same_size(kind.shape[0], entries):
        return None
    return column


def _counts_up(node: Any, count: Any) -> bool:
    """Whether a value is the numbers from 0 to ``count`` - 1."""
    while is_call(node, CONVERT) and dtype_of(node) in _INDEX_TYPES:
        node = operand(node)
    if not is_call(node, aten.arange.start_step) or len(shape_of(node)) != 1:
        return False
    start, step = size_value(operand(node)), size_value(argument(node, 2, "step", 1))
    return start == 0 and step == 1 and same_size(shape_of(node)[0], count)
