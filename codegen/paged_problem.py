"""What one attention over pages asks for, read off its node once: operands, sizes, groups of heads, element types."""

from torch.fx import Node

from tilewright.codegen.attention_heads import head_axis
from tilewright.codegen.attention_scores import LOG2_E
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index
from tilewright.codegen.nodes import arguments, compute_dtype
from tilewright.codegen.region_call import Inputs, RegionCall
from tilewright.codegen.writer import TL_TYPES, KernelWriter
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import View

_NAMES = (
    *("tile", "kv_head", "sequence", "lanes", "lane_mask", "query", "head", "d", "dv", "first_seen", "first_query"),
    *("last_query", "key_last", "page", "key_slots", "value_slots", "keys", "values", "scores", "peak", "new_peak"),
    *("shift", "weights", "fade", "total", "acc", "attention", "rows", "row_mask", "place", "queries", "down"),
)


class PagedProblem:
    """The attention of a region.

    Attributes:
        call, inputs, results: the region, what stands behind its placeholders, and what is stored.
        anchor, given: the attention's node and its arguments by name.
        heads, kv_heads, group: of queries, of keys, and query heads that share a head of keys.
        slots: of a page.
        size, value_size: of a head, of queries and keys and of values.
        tokens, queries, batch: new tokens, query rows, sequences.
        most_queries: of one sequence.
        dtype, compute: element type of the operands of products, and that of scores and sums; ``kind`` is the latter
            in a kernel.
        pages_dtype: element type of the pages.
    """

    def __init__(self, call: RegionCall, inputs: Inputs, results: list[tuple[Node, View]], anchor: Node) -> None:
        self.call, self.inputs, self.results, self.anchor = call, inputs, results, anchor
        self.given = arguments(anchor)
        query, pages, values = (fact(self.given[name], TensorType) for name in ("q", "key_pages", "value_pages"))
        fixed = (query.shape[1], *values.shape[1:], pages.shape[2])
        if not all(isinstance(size, int) for size in fixed):
            raise CodegenError("attention over pages needs fixed heads and sizes", where=where(anchor))
        self.heads, self.kv_heads, self.slots, self.value_size, self.size = map(int, fixed)
        self.group = self.heads // self.kv_heads
        self.queries, self.tokens = query.shape[0], fact(self.given["k"], TensorType).shape[0]
        self.batch = fact(self.given["page_table"], TensorType).shape[0]
        self.dtype, self.pages_dtype = query.dtype, pages.dtype
        self.compute = compute_dtype(self.dtype)
        self.kind = TL_TYPES[self.compute]
        self.most_queries = self.tokens - self.batch + 1

    @property
    def widened(self) -> str:
        """What turns the type of the pages into that of the products."""
        return "" if self.pages_dtype == self.dtype else f".to({TL_TYPES[self.dtype]})"

    def kernel(self) -> tuple[KernelWriter, Evaluator]:
        """A kernel to write."""
        writer = KernelWriter(2)
        writer.reserve(*_NAMES)
        return writer, Evaluator(self.call.graph, writer, self.inputs)

    @property
    def factor(self) -> float:
        """What products of queries and keys are multiplied by."""
        scale, cap = float(self.given["scale"]), float(self.given["softcap"])
        return scale / cap if cap > 0.0 else scale * LOG2_E

    @property
    def scaled_queries(self) -> bool:
        """Whether the scale is in the queries, where that rounds nothing away."""
        return self.dtype == self.compute

    def key_axis(self, writer: KernelWriter) -> Index:
        """The variable along axis 1 over the size of a key."""
        return head_axis(writer, "d", self.size)

    def value_axis(self, writer: KernelWriter) -> Index:
        """The variable along axis 1 over the size of a value."""
        return head_axis(writer, "dv", self.value_size)

    def pages(self, writer: KernelWriter, name: str) -> str:
        """Pointer to the pages of keys or of values."""
        view, dtype = self.inputs[self.given[name]]
        return writer.pointer(view, dtype, name)
