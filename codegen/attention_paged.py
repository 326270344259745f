"""Attention over pages of keys and values: new keys go into their pages, if there are any, then queries run over all
pages they see.

A program computes the query heads that share a head of keys, for a block of queries: a row of its tile is one query in
one head. So keys are read once for the whole group, and decoding, with one query a sequence, has as many rows as the
group has heads.
"""

from torch.fx import Node

from tilewright.codegen.attention_heads import head_block, store_attention
from tilewright.codegen.attention_scores import LOG2_E
from tilewright.codegen.attention_softmax import start_softmax
from tilewright.codegen.columns import next_power_of_2
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import literal
from tilewright.codegen.paged_append import emit_append
from tilewright.codegen.paged_problem import PagedProblem
from tilewright.codegen.paged_visit import visit_page
from tilewright.codegen.region_call import Inputs, RegionCall
from tilewright.codegen.results import needed_nodes
from tilewright.codegen.writer import KernelWriter, Var
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import ceil_div

_MANY_ROWS = 32


def emit_paged(
    call: RegionCall, inputs: Inputs, results: list[tuple[Node, View]], anchor: Node, variant: str
) -> tuple[KernelStep, ...]:
    """The steps: one that fills pages, if there are new keys, and one that attends, in one of ``PAGED_VARIANTS``.

    Raises:
        CodegenError: the pages' size or the heads are not fixed, or an epilogue does not follow the tiles.
    """
    problem = PagedProblem(call, inputs, results, anchor)
    rows = next_power_of_2(problem.group) if variant == "paged_few" else _MANY_ROWS
    return (*((emit_append(problem),) if problem.appends else ()), _attend(problem, rows))


def _attend(problem: PagedProblem, rows: int) -> KernelStep:
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
            visit_page(problem, writer, slots)
        writer.statement("attention = acc / tl.where(total == 0.0, 1.0, total)")
        index = (query, head, problem.value_axis(writer))
        store_attention(evaluator, problem.anchor, problem.results, problem.inputs, problem.compute, index)
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


def _rows(problem: PagedProblem, writer: KernelWriter, begin: str, end: str) -> tuple[Index, Index]:
    """The variables of the tile's queries and heads, both along axis 0."""
    group = problem.group
    writer.statement("lanes = tile + tl.arange(0, BLOCK_M)[:, None]")
    writer.statement(f"query = {begin}.to(tl.int64) + lanes // {group}")
    writer.statement(f"head = kv_head * {group} + lanes % {group}")
    writer.statement(f"lane_mask = query < {end}")
    query = writer.define(Var("query", problem.queries, 0, "BLOCK_M", "lane_mask"))
    return query, writer.define(Var("head", problem.heads, 0, "BLOCK_M", "lane_mask"))


def _queries(
    problem: PagedProblem, writer: KernelWriter, evaluator: Evaluator, query: Index, head: Index, begin: str, end: str
) -> str:
    """Writes the tile of queries and the range of the keys they see; returns the text of the queries' slots."""
    given, group = problem.given, problem.group
    q = evaluator.raw(given["q"], (query, head, problem.key_axis(writer)), problem.dtype)
    scaled = f" * {literal(problem.factor)}" if problem.scaled_queries else ""
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


def _start(problem: PagedProblem, writer: KernelWriter, evaluator: Evaluator, head: Index) -> None:
    sink = None
    if isinstance(problem.given["sinks"], Node):
        sink = f"{evaluator.number(problem.given['sinks'], (head,), problem.compute).text} * {LOG2_E}"
    problem.value_axis(writer)
    acc = f"[BLOCK_M, {head_block(writer, problem.value_size)}]"
    start_softmax(writer, problem.kind, "[BLOCK_M, 1]", acc, sink)
