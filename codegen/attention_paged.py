"""Attention over pages of keys and values: new keys go into their pages, then queries run over all pages they see.

A program computes the query heads that share a head of keys, for a block of queries: a row of its tile is one query in
one head. So keys are read once for the whole group, and decoding, with one query a sequence, has as many rows as the
group has heads. Scores are [rows, slots], to base 2, with an online softmax over pages, as in ``attention_online``: in
their pages keys lie with the slots together, so both products read what is stored as it lies.
"""

import torch
from torch.fx import Node

from tilewright.codegen.attention_scores import LOG2_E
from tilewright.codegen.attention_tile import LEAST_DOT
from tilewright.codegen.columns import define_columns, next_power_of_2
from tilewright.codegen.emit_gemm import dot
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index, linear, reshape, same_count, variable, without_ones
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import arguments, compute_dtype, literal
from tilewright.codegen.region_call import Inputs, RegionCall
from tilewright.codegen.results import needed_nodes, peel, store
from tilewright.codegen.writer import TL_TYPES, KernelWriter, Register, Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import ceil_div, contiguous_strides

_MANY_ROWS = 32
_NEW_ROWS = 8
_NAMES = (
    *("tile", "kv_head", "sequence", "lanes", "lane_mask", "query", "head", "d", "dv", "first_seen", "first_query"),
    *("last_query", "key_last", "page", "key_slots", "value_slots", "keys", "values", "scores", "peak", "new_peak"),
    *("shift", "weights", "fade", "total", "acc", "attention", "rows", "row_mask", "place", "queries", "down"),
)


def emit_paged(
    call: RegionCall, inputs: Inputs, results: list[tuple[Node, View]], anchor: Node, variant: str
) -> tuple[KernelStep, ...]:
    """The steps: one that fills pages, one that attends, in a variant of ``ir.regions.PAGED_VARIANTS``.

    Raises:
        CodegenError: the pages' size or the heads are not fixed, or an epilogue does not follow the tiles.
    """
    problem = _Problem(call, inputs, results, anchor)
    rows = next_power_of_2(problem.group) if variant == "paged_few" else _MANY_ROWS
    return _append(problem), _attend(problem, rows)


class _Problem:
    """What one attention over pages asks for, read off its node once."""

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

    def head_axis(self, writer: KernelWriter, size: int) -> Index:
        """The variable along axis 1 over the size of a head; equal sizes have one."""
        name = writer.column_names.setdefault(size, "dv" if writer.column_names else "d")
        if name in writer.variables:
            return variable(name, size)
        return define_columns(writer, name, size, max(LEAST_DOT, next_power_of_2(size)))

    def pages(self, writer: KernelWriter, name: str) -> str:
        """Pointer to the pages of keys or of values."""
        view, dtype = self.inputs[self.given[name]]
        return writer.pointer(view, dtype, name)


def _append(problem: _Problem) -> KernelStep:
    writer, evaluator = problem.kernel()
    writer.constants["BLOCK_M"] = _NEW_ROWS
    writer.statement("rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]")
    writer.statement(f"row_mask = rows < {writer.size(problem.tokens)}")
    row = writer.define(Var("rows", problem.tokens, 0, "BLOCK_M", "row_mask"))
    writer.statement("head = tl.program_id(1)")
    head = writer.define(Var("head", problem.kv_heads))
    place = evaluator.convert(evaluator.value(problem.given["places"], (row,)), torch.int64).text
    slots, heads = problem.slots, problem.kv_heads
    writer.statement(f"page = {place} // {slots} * {heads} + head")
    written = []
    for new, pages, size in (("k", "key_pages", problem.size), ("v", "value_pages", problem.value_size)):
        column = problem.head_axis(writer, size)
        value = evaluator.number(problem.given[new], (row, head, column), problem.compute)
        mask = writer.mask(row.deps | column.deps)
        at = writer.index_text(column)
        inside = f"{at} * {slots} + {place} % {slots}" if new == "k" else f"{place} % {slots} * {size} + {at}"
        address = f"{problem.pages(writer, pages)} + page * {slots * size} + {inside}"
        rounded = evaluator.convert(value, problem.pages_dtype)
        writer.statement(f"tl.store({address}, {rounded.text}, mask={mask})")
        written.append(problem.inputs[problem.given[pages]][0])
    return finish(
        writer,
        family="append",
        summary=f"Puts new keys and values into pages of {slots} slots. A program has some tokens of one head.",
        nodes=[problem.anchor],
        variables=dict(evaluator.used),
        grid=(ceil_div(problem.tokens, _NEW_ROWS), heads, 1),
        writes=written,
    )


def _attend(problem: _Problem, rows: int) -> KernelStep:
    writer, evaluator = problem.kernel()
    given, group = problem.given, problem.group
    writer.constants.update(BLOCK_M=rows, PAGE=problem.slots)
    writer.statement("tile = tl.program_id(0) * BLOCK_M")
    writer.statement("kv_head = tl.program_id(1)")
    writer.statement("sequence = tl.program_id(2).to(tl.int64)")
    sequence = writer.define(Var("sequence", problem.batch))
    begin = evaluator.value(given["cu_seqlens_q"], (sequence,)).text
    end = evaluator.value(given["cu_seqlens_q"], (sequence + 1,)).text
    with writer.block(f"if {begin} * {group} + tile < {end} * {group}:"):
        query, head = _rows(problem, writer, begin, end)
        slots = _queries(problem, writer, evaluator, query, head, begin, end)
        _start(problem, writer, evaluator, head)
        with writer.block("for start in range(first_seen, key_last, PAGE):"):
            _visit_page(problem, writer, slots)
        writer.statement("attention = acc / tl.where(total == 0.0, 1.0, total)")
        _store(problem, writer, evaluator, query, head)
    shape = ", ".join(map(str, fact(problem.anchor, TensorType).shape))
    most = ceil_div(problem.most_queries * group, rows)
    return finish(
        writer,
        family="attention",
        summary=f"Attention -> [{shape}] over pages. A program has {rows} queries in heads that share keys.",
        nodes=needed_nodes([node for node, _ in problem.results], problem.inputs),
        variables={**evaluator.used, problem.anchor: "attention"},
        grid=(most, problem.kv_heads, problem.batch),
        writes=[view for _, view in problem.results],
        num_stages=2,
    )


def _rows(problem: _Problem, writer: KernelWriter, begin: str, end: str) -> tuple[Index, Index]:
    """The variables of the tile's queries and heads, both along axis 0."""
    group = problem.group
    writer.statement("lanes = tile + tl.arange(0, BLOCK_M)[:, None]")
    writer.statement(f"query = {begin}.to(tl.int64) + lanes // {group}")
    writer.statement(f"head = kv_head * {group} + lanes % {group}")
    writer.statement(f"lane_mask = query < {end}")
    query = writer.define(Var("query", problem.queries, 0, "BLOCK_M", "lane_mask"))
    return query, writer.define(Var("head", problem.heads, 0, "BLOCK_M", "lane_mask"))


def _queries(
    problem: _Problem, writer: KernelWriter, evaluator: Evaluator, query: Index, head: Index, begin: str, end: str
) -> str:
    """Writes the tile of queries and the range of the keys they see; returns the text of the queries' slots."""
    given, group = problem.given, problem.group
    q = evaluator.raw(given["q"], (query, head, problem.head_axis(writer, problem.size)), problem.dtype)
    scaled = f" * {literal(_factor(problem))}" if problem.dtype == problem.compute else ""
    writer.statement(f"queries = {q.text}{scaled}")
    slots = evaluator.value(given["slots_q"], (query,)).text
    writer.statement(f"last_query = tl.minimum({end}, {begin} + (tile + BLOCK_M - 1) // {group} + 1) - 1")
    last = writer.define(Var("last_query", problem.queries))
    writer.statement(f"key_last = {evaluator.value(given['slots_q'], (last,)).text} + 1")
    if given["window_left"] >= 0:
        writer.statement(f"first_query = {begin} + tile // {group}")
        first = writer.define(Var("first_query", problem.queries))
        least = f"{evaluator.value(given['slots_q'], (first,)).text} - {given['window_left']}"
        writer.statement(f"first_seen = tl.maximum(0, {least}) // PAGE * PAGE")
    else:
        writer.statement("first_seen = 0")
    return slots


def _factor(problem: _Problem) -> float:
    scale, cap = float(problem.given["scale"]), float(problem.given["softcap"])
    return scale / cap if cap > 0.0 else scale * LOG2_E


def _start(problem: _Problem, writer: KernelWriter, evaluator: Evaluator, head: Index) -> None:
    """Running maximum, sum and result; every query has seen the sink."""
    kind = problem.kind
    if isinstance(problem.given["sinks"], Node):
        sink = evaluator.number(problem.given["sinks"], (head,), problem.compute)
        writer.statement(f"peak = {sink.text} * {LOG2_E}")
        writer.statement(f'total = tl.where(peak == float("-inf"), 0.0, 1.0).to({kind})')
    else:
        writer.statement(f'peak = tl.full([BLOCK_M, 1], float("-inf"), {kind})')
        writer.statement(f"total = tl.zeros([BLOCK_M, 1], {kind})")
    problem.head_axis(writer, problem.value_size)
    block = f"BLOCK_{writer.column_names[problem.value_size].upper()}"
    writer.statement(f"acc = tl.zeros([BLOCK_M, {block}], {kind})")


def _visit_page(problem: _Problem, writer: KernelWriter, slots: str) -> None:
    given, dtype = problem.given, problem.dtype
    table, kind = problem.inputs[given["page_table"]]
    entry = f"{writer.pointer(table, kind, 'page_table')} + sequence * {writer.size(table.strides[0])} + start // PAGE"
    writer.statement(f"page = tl.load({entry}).to(tl.int64) * {problem.kv_heads} + kv_head")
    writer.statement("key_slots = start + tl.arange(0, PAGE)[None, :]")
    keys, values = _keys(problem, writer), _values(problem, writer)
    writer.statement(f"scores = {dot('queries', keys, None, dtype)}")
    if dtype != problem.compute:
        writer.statement(f"scores = scores * {literal(_factor(problem))}")
    if float(given["softcap"]) > 0.0:
        writer.statement(f"scores = tanh(scores) * {literal(float(given['softcap']) * LOG2_E)}")
    allowed = f"key_slots <= {slots}"
    if given["window_left"] >= 0:
        allowed = f"({allowed}) & (key_slots >= {slots} - {given['window_left']})"
    cast = "" if dtype == problem.compute else f".to({TL_TYPES[dtype]})"
    for line in (
        f'scores = tl.where({allowed}, scores, float("-inf"))',
        "new_peak = tl.maximum(peak, tl.max(scores, 1, keep_dims=True))",
        # A query that has seen no key yet has peak -inf, and -inf - -inf is no number.
        'shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)',
        "weights = tl.exp2(scores - shift)",
        "fade = tl.exp2(peak - shift)",
        "total = total * fade + tl.sum(weights, 1, keep_dims=True)",
        f"acc = {dot(f'weights{cast}', values, 'acc * fade', dtype)}",
        "peak = new_peak",
    ):
        writer.statement(line)


def _keys(problem: _Problem, writer: KernelWriter) -> str:
    """Text of a page's keys [D, PAGE] in the type of the products; slots that hold nothing yet may be anything."""
    name = writer.column_names[problem.size]
    block = f"BLOCK_{name.upper()}"
    writer.statement(f"down = tl.arange(0, {block})[:, None]")
    full = writer.constants[block] == problem.size
    mask = "" if full else f", mask=down < {problem.size}, other=0.0"
    address = (
        f"{problem.pages(writer, 'key_pages')} + (page * {problem.size} + down) * PAGE + tl.arange(0, PAGE)[None, :]"
    )
    writer.statement(f"keys = tl.load({address}{mask}){problem.widened}")
    return "keys"


def _values(problem: _Problem, writer: KernelWriter) -> str:
    """Text of a page's values [PAGE, Dv]; slots that hold nothing yet are 0, as 0 * NaN is NaN."""
    column = problem.head_axis(writer, problem.value_size)
    writer.statement("value_slots = tl.arange(0, PAGE)[:, None]")
    row = f"(page * PAGE + value_slots) * {problem.value_size}"
    masks = ["start + value_slots < key_last", writer.mask(column.deps)]
    mask = " & ".join(f"({mask})" for mask in masks if mask)
    address = f"{problem.pages(writer, 'value_pages')} + {row} + {writer.index_text(column)}"
    writer.statement(f"values = tl.load({address}, mask={mask}, other=0.0){problem.widened}")
    return "values"


def _store(problem: _Problem, writer: KernelWriter, evaluator: Evaluator, query: Index, head: Index) -> None:
    """Evaluates what follows the attention on its tile, and stores it."""
    shape = fact(problem.anchor, TensorType).shape
    index = (query, head, problem.head_axis(writer, problem.value_size))
    position = linear(index, contiguous_strides(shape))
    here = without_ones(index, shape)

    def attention(at: tuple[Index, ...]) -> Register:
        if linear(at, contiguous_strides(shape)) != linear(here, contiguous_strides(shape)):
            raise CodegenError("an epilogue needs elements of other tiles", where=where(problem.anchor))
        return Register("attention", problem.compute, position.deps)

    evaluator.bindings[problem.anchor] = attention
    for node, view in problem.results:
        result = peel(node, view, problem.inputs)
        if result.scatter is not None or not same_count(result.shape, shape):
            raise CodegenError("a result of an attention region has another shape", where=where(node))
        value = evaluator.value(result.node, reshape(here, result.shape, shape))
        store(writer, view, fact(result.node, TensorType).dtype, position, value)
