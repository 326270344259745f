"""What attention over pages, or filling them, asks for, read off the node once: operands, sizes, element types."""

import torch
from torch.fx import Node

from tilewright.codegen.attention.heads import head_axis, head_block, store_attention
from tilewright.codegen.attention.softmax import finish_softmax, start_softmax
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import arguments, compute_dtype
from tilewright.codegen.region_call import Inputs, RegionCall
from tilewright.codegen.results import needed_nodes
from tilewright.codegen.writer import TL_TYPES, KernelWriter
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import TOKENS, Size

_NAMES = (
    *("tile", "kv_head", "sequence", "lanes", "lane_mask", "query", "head", "d", "dv", "first_seen", "first_query"),
    *("last_query", "key_last", "page", "key_slots", "value_slots", "keys", "values", "scores", "peak", "new_peak"),
    *("shift", "weights", "fade", "total", "acc", "attention", "rows", "row_mask", "place", "queries", "down"),
    *("part", "part_peak", "part_total", "part_acc", "key_scales", "value_scales"),
    *("key_magnitude", "value_magnitude", "columns"),
)


class NewRows:
    """Keys and values that a region puts into pages.

    Attributes:
        call, inputs: the region, and what stands behind its placeholders.
        anchor, given: the op's node and its arguments by name.
        kv_heads: of keys and values.
        slots: of a page.
        size, value_size: of a head, of keys and of values.
        compute: in what values are evaluated.
        pages_dtype: element type of the pages.
        scaled: whether they hold whole numbers of steps, whose sizes lie beside them.
    """

    def __init__(self, call: RegionCall, inputs: Inputs, anchor: Node, dtype: torch.dtype) -> None:
        self.call, self.inputs, self.anchor = call, inputs, anchor
        self.given = arguments(anchor)
        pages, values = (fact(self.given[name], TensorType) for name in ("key_pages", "value_pages"))
        fixed = (*values.shape[1:], pages.shape[2])
        if not all(isinstance(size, int) for size in fixed):
            raise CodegenError("pages need fixed heads and sizes", where=where(anchor))
        self.kv_heads, self.slots, self.value_size, self.size = map(int, fixed)
        self.compute, self.pages_dtype = compute_dtype(dtype), pages.dtype
        self.scaled = isinstance(self.given["key_scales"], Node)

    def kernel(self) -> tuple[KernelWriter, Evaluator]:
        """A kernel to write."""
        writer = KernelWriter(2)
        writer.reserve(*_NAMES)
        return writer, Evaluator(self.call.graph, writer, self.inputs)

    def key_axis(self, writer: KernelWriter) -> Index:
        """The variable along axis 1 over the size of a key."""
        return head_axis(writer, "d", self.size)

    def value_axis(self, writer: KernelWriter) -> Index:
        """The variable along axis 1 over the size of a value."""
        return head_axis(writer, "dv", self.value_size)

    def view(self, name: str) -> View:
        """Where an operand lies."""
        return self.inputs[self.given[name]][0]

    def pages(self, writer: KernelWriter, name: str) -> str:
        """Pointer to the pages of keys or of values, or to their scales."""
        view, dtype = self.inputs[self.given[name]]
        return writer.pointer(view, dtype, name)


class PagedProblem(NewRows):
    """The attention of a region; new rows are there if ``appends``.

    Attributes:
        results: what is stored.
        heads, group: of queries, and query heads that share a head of keys.
        queries, batch, table: query rows, sequences, width of the page table.
        most_queries: of one sequence; each has one of the step's tokens at least.
        dtype: element type of the operands of products; ``compute`` is that of scores and sums, ``kind`` its name in a
            kernel.
    """

    def __init__(self, call: RegionCall, inputs: Inputs, results: list[tuple[Node, View]], anchor: Node) -> None:
        query = fact(arguments(anchor)["q"], TensorType)
        super().__init__(call, inputs, anchor, query.dtype)
        if not isinstance(query.shape[1], int):
            raise CodegenError("attention over pages needs fixed heads and sizes", where=where(anchor))
        self.results, self.dtype = results, query.dtype
        self.heads = query.shape[1]
        self.group = self.heads // self.kv_heads
        self.queries = query.shape[0]
        self.batch, self.table = fact(self.given["page_table"], TensorType).shape
        self.kind = TL_TYPES[self.compute]
        self.most_queries = TOKENS - self.batch + 1

    @property
    def appends(self) -> bool:
        """Whether there are new keys and values to be put into pages first."""
        return isinstance(self.given["k"], Node)

    @property
    def widened(self) -> str:
        """What turns the type of the pages into that of the products."""
        return "" if self.pages_dtype == self.dtype else f".to({TL_TYPES[self.dtype]})"

    @property
    def factor(self) -> float:
        """What products of queries and keys are multiplied by."""
        scale, cap = float(self.given["scale"]), float(self.given["softcap"])
        return scale / cap if cap > 0.0 else scale

    @property
    def scaled_queries(self) -> bool:
        """Whether the scale is in the queries, where that rounds nothing away."""
        return self.dtype == self.compute

    def start(self, writer: KernelWriter, evaluator: Evaluator, sink_of: Index | None) -> None:
        """Writes the softmax's state before the first key; with the sinks of these heads, where there are some."""
        sink = None
        if sink_of is not None and isinstance(self.given["sinks"], Node):
            sink = evaluator.number(self.given["sinks"], (sink_of,), self.compute).text
        self.value_axis(writer)
        acc = f"[BLOCK_M, {head_block(writer, self.value_size)}]"
        start_softmax(writer, self.kind, "[BLOCK_M, 1]", acc, sink)

    def store(self, writer: KernelWriter, evaluator: Evaluator, query: Index, head: Index) -> None:
        """Writes the result out of the softmax's state, and stores what follows it."""
        finish_softmax(writer)
        index = (query, head, self.value_axis(writer))
        store_attention(evaluator, self.anchor, self.results, self.inputs, self.compute, index)

    def finish(
        self, writer: KernelWriter, evaluator: Evaluator, grid: tuple[Size, Size, Size], what: str
    ) -> KernelStep:
        """The step that stores the results."""
        shape = ", ".join(map(str, fact(self.anchor, TensorType).shape))
        return finish(
            writer,
            family="attention",
            summary=f"Attention -> [{shape}] over pages. {what}",
            nodes=needed_nodes([node for node, _ in self.results], self.inputs),
            variables={**evaluator.used, self.anchor: "attention"},
            grid=grid,
            writes=[view for _, view in self.results],
            num_stages=2,
        )
