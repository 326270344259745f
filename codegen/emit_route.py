"""Tables of the rows of each expert: a counting sort in two kernels, with work that grows with the number of rows.

The first counts the rows of each expert in chunks of rows. In the second each program adds up what all chunks and those
before its own have, by a prefix sum over experts finds where its first row of each expert goes, and places its rows one
by one. Rows of one expert stay in order, so the tables do not depend on how programs are run.
"""

import operator

import torch
from torch.fx import Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.columns import define_columns, next_power_of_2
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index, unravel
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import arguments
from tilewright.codegen.region_call import RegionCall
from tilewright.codegen.results import needed_nodes
from tilewright.codegen.writer import KernelWriter, Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import ceil_div, product
from tilewright.ops.experts import ROUTE

_CHUNK = 1024
_RESULTS = ("offsets", "order")


def emit_route(call: RegionCall, builder: ProgramBuilder) -> tuple[KernelStep, ...]:
    """The two kernels of a ``route``.

    Raises:
        CodegenError: the region has another result than those of its ``route``.
    """
    anchors = [node for node in call.graph.graph.nodes if node.target == ROUTE]
    if len(anchors) != 1:
        raise CodegenError("a routing region needs exactly one route", where=call.name, why=f"it has {len(anchors)}")
    views: dict[str, View] = {}
    for node, view in call.results():
        if node.target is not operator.getitem or node.args[0] is not anchors[0]:
            raise CodegenError("a result of a routing region is not one of route", where=where(node))
        views[_RESULTS[int(node.args[1])]] = view  # type: ignore[arg-type]
    if missing := [name for name in _RESULTS if name not in views]:
        raise CodegenError("a table of experts is not read", where=call.name, why=f"nothing reads its {missing[0]}")
    return _Tables(call, anchors[0], builder, views).steps()


class _Tables:
    def __init__(self, call: RegionCall, anchor: Node, builder: ProgramBuilder, views: dict[str, View]) -> None:
        self.anchor, self.views = anchor, views
        self.graph, self.inputs = call.graph, call.read(builder)
        self.experts: Node = arguments(anchor)["experts"]
        self.shape = fact(self.experts, TensorType).shape
        self.count = int(arguments(anchor)["count"])
        self.rows = product(self.shape)
        self.chunks = ceil_div(self.rows + 1, _CHUNK)  # one also where there are no rows, so that the table says so
        shape = (self.chunks, self.count)
        self.counts, self.next = (
            builder.scratch(f"{call.name}_{name}", torch.int32, shape) for name in ("counts", "next")
        )

    def steps(self) -> tuple[KernelStep, ...]:
        return self._count(), self._place()

    def _begin(self) -> tuple[KernelWriter, Evaluator]:
        writer = KernelWriter(1, register_columns=0, loop_columns=_CHUNK)
        writer.reserve("chunk", "experts", "bins", "bins_mask", "counts", "totals", "before", "starts", "own", "each")
        writer.reserve("rows", "row", "last", "expert", "at", "other")
        writer.statement("chunk = tl.program_id(0)")
        return writer, Evaluator(self.graph, writer, self.inputs)

    def _expert_at(self, evaluator: Evaluator, place: Index) -> str:
        """The expert of a row. Out of range, the nearest: nothing but the tables is written."""
        expert = evaluator.number(self.experts, unravel(place, self.shape), torch.int32)
        return f"tl.minimum(tl.maximum({expert.text}, 0), {self.count - 1})"

    def _define_bins(self, writer: KernelWriter) -> str:
        """The experts as a vector; returns the mask as an argument of loads and stores."""
        define_columns(writer, "bins", self.count, next_power_of_2(self.count))
        return ", mask=bins_mask" if writer.variables["bins"].mask else ""

    def _count(self) -> KernelStep:
        writer, evaluator = self._begin()
        counts = writer.pointer(self.counts, torch.int32, "counts")
        place = define_columns(writer, "rows", self.rows, _CHUNK, "chunk.to(tl.int64) * BLOCK_ROWS")
        writer.statement(f"experts = {self._expert_at(evaluator, place)}")
        mask = self._define_bins(writer)
        counted = f", mask={inside}" if (inside := writer.variables["rows"].mask) else ""
        writer.statement(f"own = tl.histogram(experts, BLOCK_BINS{counted})")
        writer.statement(f"tl.store({counts} + chunk * {self.count} + bins, own{mask})")
        summary = "Counts the rows of each expert. A program counts one chunk of rows."
        return self._finish(writer, evaluator, "route_count", summary, [self.counts])

    def _place(self) -> KernelStep:
        writer, evaluator = self._begin()
        counts, following = (
            writer.pointer(v, torch.int32, n) for v, n in ((self.counts, "counts"), (self.next, "next"))
        )
        offsets, order = (writer.pointer(self.views[name], torch.int32, name) for name in _RESULTS)
        writer.constants["CHUNK"] = _CHUNK
        mask = self._define_bins(writer)
        rows = writer.size(self.rows)
        writer.statement("totals = tl.zeros([BLOCK_BINS], tl.int32)")
        writer.statement("before = tl.zeros([BLOCK_BINS], tl.int32)")
        with writer.block("for other in range(0, tl.num_programs(0)):"):
            writer.statement(
                f"each = tl.load({counts} + other * {self.count} + bins{mask}{', other=0' if mask else ''})"
            )
            writer.statement("totals += each")
            writer.statement("before += tl.where(other < chunk, each, 0)")
        writer.statement("starts = tl.cumsum(totals, 0) - totals")
        with writer.block("if chunk == 0:"):
            writer.statement(f"tl.store({offsets} + bins, starts{mask})")
            writer.statement(f"tl.store({offsets} + {self.count}, {rows})")
        writer.statement(f"tl.store({following} + chunk * {self.count} + bins, starts + before{mask})")
        # Its rows are placed by all threads of a program on a GPU, which must see what it has just stored.
        writer.statement("tl.debug_barrier()")
        writer.statement(f"last = tl.minimum(chunk * CHUNK + CHUNK, {rows})")
        with writer.block("for row in range(chunk * CHUNK, last):"):
            place = writer.define(Var("row", self.rows))
            writer.statement(f"expert = {self._expert_at(evaluator, place)}")
            writer.statement(f'at = tl.atomic_add({following} + chunk * {self.count} + expert, 1, sem="relaxed")')
            writer.statement(f"tl.store({order} + at, row)")
        summary = "Places the rows of each expert one after another. A program places one chunk of rows."
        written = [self.next, *self.views.values()]
        return self._finish(writer, evaluator, "route_place", summary, written)

    def _finish(
        self, writer: KernelWriter, evaluator: Evaluator, family: str, summary: str, writes: list[View]
    ) -> KernelStep:
        return finish(
            writer,
            family=family,
            summary=summary,
            nodes=needed_nodes([self.anchor], evaluator.inputs),
            variables=evaluator.used,
            grid=(self.chunks, 1, 1),
            writes=writes,
        )
