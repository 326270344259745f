"""Row index of packing: two kernels, one program a sequence each.

The first counts a sequence's valid and kept places. In the second each program adds up the counts of the sequences
before it, which gives its first packed row, and numbers its own places by prefix sums, block by block: one over the
keys, one over the places that are kept for a column that is read and are no keys, which come first.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.columns import define_columns
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import arguments
from tilewright.codegen.region_call import RegionCall
from tilewright.codegen.results import needed_nodes
from tilewright.codegen.writer import KernelWriter, Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import Size

packing = torch.ops.tilewright

_PLACES = 256
_SEQUENCES = 256
_RESULTS = ("row_index", "slots", "cu_seqlens", "key_start", "seqlens_k", "column_rows")


@dataclass(frozen=True)
class _Parts:
    """The call and the views of its results, by name; results that nobody reads are scratch."""

    call: RegionCall
    anchor: Node
    views: dict[str, View]
    batch: Size
    length: Size

    @property
    def columns(self) -> Sequence[Node]:
        """The columns that are kept, a tensor [B] each."""
        return tuple(arguments(self.anchor)["columns"])


def emit_index(call: RegionCall, builder: ProgramBuilder) -> tuple[KernelStep, ...]:
    """The two kernels of a ``pack_index``; what makes ``valid`` and the columns elementwise is computed on the way in.

    Raises:
        CodegenError: the region has another result than those of its ``pack_index``.
    """
    anchors = [node for node in call.graph.graph.nodes if node.target == packing.pack_index.default]
    if len(anchors) != 1:
        raise CodegenError(
            "an index region needs exactly one pack_index", where=call.name, why=f"it has {len(anchors)}"
        )
    anchor = anchors[0]
    batch, length = fact(arguments(anchor)["valid"], TensorType).shape
    views: dict[str, View] = {}
    for node, view in call.results():
        place = node.args[1] if node.target is operator.getitem and node.args[0] is anchor else None
        if not isinstance(place, int):
            raise CodegenError("a result of an index region is not one of pack_index", where=where(node))
        views[_RESULTS[place]] = view
    shapes: dict[str, tuple[Size, ...]] = {
        "row_index": (batch * length,),
        "slots": (batch * length,),
        "cu_seqlens": (batch + 1,),
    }
    shapes["column_rows"] = (len(arguments(anchor)["columns"]), batch)
    for name in _RESULTS:
        if name not in views and 0 not in shapes.get(name, ()):
            views[name] = builder.scratch(f"{call.name}_{name}", torch.int32, shapes.get(name, (batch,)))
    kept = builder.scratch(f"{call.name}_kept", torch.int32, (batch,))
    parts = _Parts(call, anchor, views, batch, length)
    return _count(parts, builder, kept), _number(parts, builder, kept)


def _begin(parts: _Parts, builder: ProgramBuilder) -> tuple[KernelWriter, Evaluator, Index]:
    writer = KernelWriter(1, register_columns=0, loop_columns=_PLACES)
    evaluator = Evaluator(parts.call.graph, writer, parts.call.read(builder))
    writer.reserve("sequence", "places", "real", "kept", "extra", "row", "key_row", "rows", "before")
    writer.reserve("kept_count", "real_count", *(f"column_row_{number}" for number in range(len(parts.columns))))
    writer.statement("sequence = tl.program_id(0)")
    writer.row_deps = frozenset(("sequence",))
    return writer, evaluator, writer.define(Var("sequence", parts.batch))


def _places(parts: _Parts, evaluator: Evaluator, sequence: Index) -> list[str]:
    """Statements for one block of places: which are real tokens, and which are kept.

    Returns:
        For each column, the text of which place it is.
    """
    writer = evaluator.writer
    place = define_columns(writer, "places", parts.length, _PLACES, "start")
    given = arguments(parts.anchor)
    valid = evaluator.number(given["valid"], (sequence, place), torch.bool)
    mask = writer.mask(place.deps)
    inside = f" & {mask}" if mask else ""
    writer.statement(f"real = {valid.text}{inside}")
    at = [evaluator.column_place(column, (sequence,), parts.length) for column in parts.columns]
    chosen = [f"(places == {writer.index_text(column)})" for column in at]
    writer.statement(f"kept = {' | '.join(['real', *chosen])}")
    return chosen


def _count(parts: _Parts, builder: ProgramBuilder, kept: View) -> KernelStep:
    writer, evaluator, sequence = _begin(parts, builder)
    kept_ptr = writer.pointer(kept, torch.int32, "kept")
    real_ptr = writer.pointer(parts.views["seqlens_k"], torch.int32, "seqlens_k")
    for name in ("kept_count", "real_count"):
        writer.statement(f"{name} = tl.full([], 0, tl.int32)")
    with writer.block(f"for start in range(0, {writer.size(parts.length)}, BLOCK_PLACES):"):
        _places(parts, evaluator, sequence)
        writer.statement("kept_count += tl.sum(kept.to(tl.int32), 0)")
        writer.statement("real_count += tl.sum(real.to(tl.int32), 0)")
    writer.statement(f"tl.store({kept_ptr} + sequence, kept_count)")
    writer.statement(f"tl.store({real_ptr} + sequence, real_count)")
    summary = "Counts the kept places and the valid keys of each sequence. A program counts one sequence."
    return _finish(parts, writer, evaluator, "index_count", summary, [kept, parts.views["seqlens_k"]])


def _number(parts: _Parts, builder: ProgramBuilder, kept: View) -> KernelStep:
    writer, evaluator, sequence = _begin(parts, builder)
    pointers = {name: writer.pointer(view, torch.int32, name) for name, view in parts.views.items()}
    kept_ptr = writer.pointer(kept, torch.int32, "kept")
    writer.constants["BLOCK_SEQUENCES"] = _SEQUENCES
    writer.statement("row = tl.full([], 0, tl.int32)")
    with writer.block("for start in range(0, sequence, BLOCK_SEQUENCES):"):
        writer.statement("before = start + tl.arange(0, BLOCK_SEQUENCES)")
        writer.statement(f"row += tl.sum(tl.load({kept_ptr} + before, mask=before < sequence, other=0), 0)")
    writer.statement(f"kept_count = tl.load({kept_ptr} + sequence)")
    with writer.block("if sequence == 0:"):
        writer.statement(f"tl.store({pointers['cu_seqlens']}, 0)")
    writer.statement(f"tl.store({pointers['cu_seqlens']} + sequence + 1, row + kept_count)")
    # Kept places that are no keys come first.
    writer.statement(f"key_row = row + kept_count - tl.load({pointers['seqlens_k']} + sequence)")
    writer.statement(f"tl.store({pointers['key_start']} + sequence, key_row)")
    length = writer.size(parts.length)
    for number in range(len(parts.columns)):
        writer.statement(f"column_row_{number} = tl.full([], 0, tl.int32)")
    with writer.block(f"for start in range(0, {length}, BLOCK_PLACES):"):
        chosen = _places(parts, evaluator, sequence)
        writer.statement("rows = key_row + tl.cumsum(real.to(tl.int32), 0) - 1")
        writer.statement("key_row += tl.sum(real.to(tl.int32), 0)")
        if chosen:
            writer.statement("extra = (kept & (real == 0)).to(tl.int32)")
            writer.statement("rows = tl.where(real, rows, row + tl.cumsum(extra, 0) - 1)")
            writer.statement("row += tl.sum(extra, 0)")
        for number, is_column in enumerate(chosen):
            writer.statement(f"column_row_{number} += tl.sum(tl.where({is_column}, rows, 0), 0)")
        writer.statement(f"tl.store({pointers['row_index']} + rows, sequence * {length} + places, mask=kept)")
        writer.statement(f"tl.store({pointers['slots']} + rows, places, mask=kept)")
    for number in range(len(parts.columns)):
        place = f"{pointers['column_rows']} + {number} * {writer.size(parts.batch)} + sequence"
        writer.statement(f"tl.store({place}, column_row_{number})")
    summary = "Numbers the kept places of all sequences in order. A program numbers one sequence."
    written = [view for name, view in parts.views.items() if name != "seqlens_k"]
    return _finish(parts, writer, evaluator, "index_number", summary, written)


def _finish(
    parts: _Parts, writer: KernelWriter, evaluator: Evaluator, family: str, summary: str, writes: list[View]
) -> KernelStep:
    return finish(
        writer,
        family=family,
        summary=summary,
        nodes=needed_nodes([parts.anchor], evaluator.inputs),
        variables=evaluator.used,
        grid=(parts.batch, 1, 1),
        writes=writes,
    )
