"""Attention over pages of keys and values: new keys go into their pages, if there are any, then queries run over all
pages they see.

A program computes the query heads that share a head of keys, for a block of queries: a row of its tile is one query in
one head. So keys are read once for the whole group, and decoding, with one query a sequence, has as many rows as the
group has heads. Where a step has few queries and many keys, programs share the keys too (``paged_split``).
"""

from torch.fx import Node

from tilewright.codegen.attention.paged_append import emit_append
from tilewright.codegen.attention.paged_problem import PagedProblem
from tilewright.codegen.attention.paged_split import SplitKeys
from tilewright.codegen.attention.paged_visit import visit_page
from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.columns import next_power_of_2
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import literal
from tilewright.codegen.region_call import Inputs, RegionCall
from tilewright.codegen.writer import KernelWriter, Var
from tilewright.ir.program import KernelStep, View
from tilewright.ir.regions import PAGED_VARIANTS
from tilewright.ir.sizes import Size, ceil_div

_MOST_ROWS = 32


def emit_paged(
    call: RegionCall,
    inputs: Inputs,
    results: list[tuple[Node, View]],
    anchor: Node,
    builder: ProgramBuilder,
    variant: str,
) -> tuple[KernelStep, ...]:
    """The steps: one that fills pages, if there are new keys, then those that attend, in one of ``PAGED_VARIANTS``.

    Raises:
        CodegenError: the pages' size or the heads are not fixed, or an epilogue does not follow the tiles.
    """
    problem = PagedProblem(call, inputs, results, anchor)
    most = PAGED_VARIANTS[variant]
    append = (emit_append(problem),) if problem.appends else ()
    if most is None:
        return (*append, _attend(problem, _MOST_ROWS))
    # Tiles of a few queries are those of many: one kernel less to build.
    rows = next_power_of_2(problem.group) if most == 1 else _MOST_ROWS
    split = SplitKeys(problem, builder, most)
    return (
        *append,
        _attend(problem, rows, 1 - split.active),
        _attend_to_parts(problem, rows, split),
        split.merge(),
    )


def _attend(problem: PagedProblem, rows: int, active: Size = 1) -> KernelStep:
    """A program goes over all keys of its queries."""
    writer, evaluator = problem.kernel()
    writer.statement("tile = tl.program_id(0) * BLOCK_M")
    begin, end = _sequence(problem, writer, evaluator, rows)
    with writer.block(f"if {begin} * {problem.group} + tile < {end} * {problem.group}:"):
        query, head, slots = _queries(problem, writer, evaluator, begin, end)
        _keys_seen(problem, writer, evaluator, begin, end)
        _load_queries(problem, writer, evaluator, query, head)
        problem.start(writer, evaluator, head)
        with writer.block("for start in range(first_seen, key_last, PAGE):"):
            visit_page(problem, writer, slots)
        problem.store(writer, evaluator, query, head)
    grid = (_tiles(problem, rows), problem.kv_heads, problem.batch * active)
    return problem.finish(writer, evaluator, grid, f"A program has {rows} queries in heads that share keys.")


def _attend_to_parts(problem: PagedProblem, rows: int, split: SplitKeys) -> KernelStep:
    """A program goes over one stretch of the keys of its queries, and leaves what it found."""
    writer, evaluator = problem.kernel()
    writer.constants["STRETCH"] = split.stretch
    count = writer.size(split.count)
    writer.statement(f"tile = tl.program_id(0) // {count} * BLOCK_M")
    writer.statement(f"part = tl.program_id(0) % {count}")
    begin, end = _sequence(problem, writer, evaluator, rows)
    with writer.block(f"if {begin} * {problem.group} + tile < {end} * {problem.group}:"):
        query, head, slots = _queries(problem, writer, evaluator, begin, end)
        _keys_seen(problem, writer, evaluator, begin, end)
        writer.statement("first_seen = tl.maximum(first_seen, part * STRETCH)")
        writer.statement("key_last = tl.minimum(key_last, (part + 1) * STRETCH)")
        with writer.block("if first_seen < key_last:"):
            _load_queries(problem, writer, evaluator, query, head)
            problem.start(writer, evaluator, None)
            with writer.block("for start in range(first_seen, key_last, PAGE):"):
                visit_page(problem, writer, slots)
            split.write(writer, query, head)
    return finish(
        writer,
        family="part",
        summary=f"Attention over stretches of {split.stretch} slots. A program has {rows} queries over one of them.",
        nodes=[problem.anchor],
        variables=dict(evaluator.used),
        grid=(_tiles(problem, rows) * split.count, problem.kv_heads, problem.batch * split.active),
        writes=split.written,
        num_stages=2,
    )


def _tiles(problem: PagedProblem, rows: int) -> Size:
    """Tiles of the sequence with the most queries."""
    return ceil_div(problem.most_queries * problem.group, rows)


def _sequence(problem: PagedProblem, writer: KernelWriter, evaluator: Evaluator, rows: int) -> tuple[str, str]:
    """Writes the program's sequence and head of keys; returns the texts of the bounds of the sequence's queries."""
    writer.constants.update(BLOCK_M=rows, PAGE=problem.slots)
    writer.statement("kv_head = tl.program_id(1)")
    writer.statement("sequence = tl.program_id(2).to(tl.int64)")
    sequence = writer.define(Var("sequence", problem.batch))
    begin, end = (evaluator.value(problem.given["cu_seqlens_q"], (at,)).text for at in (sequence, sequence + 1))
    return begin, end


def _queries(
    problem: PagedProblem, writer: KernelWriter, evaluator: Evaluator, begin: str, end: str
) -> tuple[Index, Index, str]:
    """The variables of the tile's queries and heads, both along axis 0, and the text of the queries' slots."""
    group = problem.group
    writer.statement("lanes = tile + tl.arange(0, BLOCK_M)[:, None]")
    writer.statement(f"query = {begin}.to(tl.int64) + lanes // {group}")
    writer.statement(f"head = kv_head * {group} + lanes % {group}")
    writer.statement(f"lane_mask = query < {end}")
    query = writer.define(Var("query", problem.queries, 0, "BLOCK_M", "lane_mask"))
    head = writer.define(Var("head", problem.heads, 0, "BLOCK_M", "lane_mask"))
    return query, head, evaluator.value(problem.given["slots_q"], (query,)).text


def _keys_seen(problem: PagedProblem, writer: KernelWriter, evaluator: Evaluator, begin: str, end: str) -> None:
    """Writes the range of the keys that the tile's queries see: from ``first_seen``, on a page's edge, to
    ``key_last``."""
    given, group = problem.given, problem.group
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


def _load_queries(problem: PagedProblem, writer: KernelWriter, evaluator: Evaluator, query: Index, head: Index) -> None:
    """Writes the tile of queries."""
    q = evaluator.raw(problem.given["q"], (query, head, problem.key_axis(writer)), problem.dtype)
    scaled = f" * {literal(problem.factor)}" if problem.scaled_queries else ""
    writer.statement(f"queries = {q.text}{scaled}")
