"""Values that are filled part by part as concatenations of the parts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, fact
from tilewright.ir.graph import Level
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.normalization.rule_table import RuleTable
from tilewright.passes.rewrite import Rewriter, argument, dtype_of, is_call, operand, rank_of, shape_of

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
_MOST_PLACES = 16  # of a row that a number is written to; each is a comparison of the whole row
_TABLE = RuleTable()
_rule = _TABLE.rule


@dataclass(frozen=True)
class NormalizeWrites(Pass):
    """Turns ``copy`` into what is copied, ``slice_scatter`` into ``cat`` and ``scatter`` of a number into comparisons.

    ``x[..., :8] = a; x[..., 8:] = b`` arrives as two writes to slices, each of which yields all of x anew. Nothing is
    left of an x that is written over as a whole.
    """

    name: ClassVar[str] = "normalize_writes"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        return _TABLE.apply(gm, self.name, "writes")


def _cut(rw: Rewriter, at: Node, source: Node, axis: int, start: int, end: int) -> list[Node]:
    """``source[start:end]`` along an axis, end to end; of a concatenation the parts that lie inside, whole or cut."""
    if start >= end:
        return []
    sizes = [shape_of(part)[axis] for part in operand(source)] if is_call(source, aten.cat.default) else []
    if not sizes or operand(source, 1) != axis or not all(isinstance(size, int) for size in sizes):
        whole = start == 0 and end == shape_of(source)[axis]
        return [source if whole else rw.call(at, aten.slice.Tensor, source, axis, start, end, 1)]
    found, place = [], 0
    for part, size in zip(operand(source), sizes, strict=True):
        found += _cut(rw, at, part, axis, max(0, start - place), min(int(size), end - place))
        place += int(size)
    return found


@_rule(aten.copy.default)
def _copy(rw: Rewriter, node: Node) -> Node | None:
    """The second operand, in the shape and dtype of the first, of which nothing else is left."""
    source, type_ = operand(node, 1), fact(node, TensorType)
    if dtype_of(source) != type_.dtype:
        source = rw.call(node, CONVERT, source, type_.dtype)
    if shape_of(source) == type_.shape:
        return source
    kept = (None,) * (len(type_.shape) - rank_of(source)) + shape_of(source)
    pairs = zip(type_.shape, kept, strict=True)
    sizes = [
        -1 if new == old else new if isinstance(new, int) else rw.size(node, new, [operand(node)]) for new, old in pairs
    ]
    return rw.call(node, aten.expand.default, source, sizes, type=type_)


@_rule(aten.slice_scatter.default)
def _slice_scatter(rw: Rewriter, node: Node) -> Node | None:
    """A part written over: what is before it, it, and what is behind it, end to end."""
    source, part = operand(node), operand(node, 1)
    axis, step = int(argument(node, 2, "dim", 0)) % rank_of(source), argument(node, 5, "step", 1)
    size, length = shape_of(source)[axis], shape_of(part)[axis]
    start = argument(node, 3, "start") or 0
    if step != 1 or not all(isinstance(number, int) for number in (size, length, start)):
        return None
    start = max(0, start + size) if start < 0 else start
    before, behind = _cut(rw, node, source, axis, 0, start), _cut(rw, node, source, axis, start + length, size)
    parts = [*before, *([part] if length else []), *behind]
    return parts[0] if len(parts) == 1 else rw.call(node, aten.cat.default, parts, axis, type=fact(node, TensorType))


@_rule(aten.scatter.value)
def _scatter_value(rw: Rewriter, node: Node) -> Node | None:
    """A number written to some places of each row, as routers mark chosen groups: every place compared with each."""
    source, index, value = operand(node), operand(node, 2), operand(node, 3)
    *lead, width = shape_of(source)
    last = len(lead)
    if last == 0 or operand(node, 1) % (last + 1) != last or list(shape_of(index)[:-1]) != lead:
        return None
    places = shape_of(index)[-1]
    if not isinstance(width, int) or not isinstance(places, int) or places > _MOST_PLACES:
        return None
    own = rw.call(node, aten.arange.start_step, 0, width, 1, dtype=torch.int64)
    for place in range(places):
        one = rw.call(node, aten.slice.Tensor, index, last, place, place + 1, 1)
        here = rw.call(node, aten.eq.Tensor, own, one)
        if is_call(source, aten.full.default):  # one number, whose own rows would be those of the padded batch
            numbers = (
                rw.call(node, aten.full.default, [], n, dtype=dtype_of(node)) for n in (value, operand(source, 1))
            )
            source = rw.call(node, aten.where.self, here, *numbers)
        else:
            source = rw.call(node, aten.masked_fill.Scalar, source, here, value)
    return source
