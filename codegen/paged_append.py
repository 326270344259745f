"""New keys and values into their pages."""

import torch

from tilewright.codegen.kernel_text import finish
from tilewright.codegen.paged_problem import PagedProblem
from tilewright.codegen.writer import Var
from tilewright.ir.program import KernelStep
from tilewright.ir.sizes import ceil_div

_NEW_ROWS = 8


def emit_append(problem: PagedProblem) -> KernelStep:
    """The step that puts the new tokens' keys and values into their pages."""
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
    for new, pages, size, axis in (
        ("k", "key_pages", problem.size, problem.key_axis),
        ("v", "value_pages", problem.value_size, problem.value_axis),
    ):
        column = axis(writer)
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
