"""New keys and values into their pages."""

from collections.abc import Sequence

import torch

from tilewright.codegen.attention.paged_problem import NewRows
from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import arguments
from tilewright.codegen.region_call import RegionCall
from tilewright.codegen.writer import KernelWriter, Register, Var
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import ceil_div
from tilewright.ops import Flow, traits_of
from tilewright.ops.cache import LEAST_MAGNITUDE, STEPS

_NEW_ROWS = 8


def emit_fill(call: RegionCall, builder: ProgramBuilder) -> tuple[KernelStep, ...]:
    """The step of a region that does nothing but put rows into pages.

    Raises:
        CodegenError: the pages' size or the heads are not fixed.
    """
    (anchor,) = (node for node in call.graph.graph.nodes if traits_of(node.target).flow is Flow.APPEND)
    new = fact(arguments(anchor)["k"], TensorType)
    tokens = [view for _, view in call.results()]  # without elements; the step is what makes them
    return (emit_append(NewRows(call, call.read(builder), anchor, new.dtype), tokens),)


def emit_append(problem: NewRows, results: Sequence[View] = ()) -> KernelStep:
    """The step that puts the new tokens' keys and values into their pages; ``results`` are there once it has run."""
    writer, evaluator = problem.kernel()
    tokens = fact(problem.given["k"], TensorType).shape[0]
    writer.constants["BLOCK_M"] = _NEW_ROWS
    writer.statement("rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]")
    writer.statement(f"row_mask = rows < {writer.size(tokens)}")
    row = writer.define(Var("rows", tokens, 0, "BLOCK_M", "row_mask"))
    writer.statement("head = tl.program_id(1)")
    head = writer.define(Var("head", problem.kv_heads))
    place = evaluator.convert(evaluator.value(problem.given["places"], (row,)), torch.int64).text
    slots, heads = problem.slots, problem.kv_heads
    writer.statement(f"page = {place} // {slots} * {heads} + head")
    written = [*results]
    for new, kind, size, axis in (
        ("k", "key", problem.size, problem.key_axis),
        ("v", "value", problem.value_size, problem.value_axis),
    ):
        column = axis(writer)
        value = evaluator.number(problem.given[new], (row, head, column), problem.compute)
        mask = writer.mask(row.deps | column.deps)
        at = writer.index_text(column)
        inside = f"{at} * {slots} + {place} % {slots}" if new == "k" else f"{place} % {slots} * {size} + {at}"
        address = f"{problem.pages(writer, f'{kind}_pages')} + page * {slots * size} + {inside}"
        written.append(problem.view(f"{kind}_pages"))
        if problem.scaled:
            value = _steps(writer, value, mask, f"{kind}_magnitude")
            scale = f"{problem.pages(writer, f'{kind}_scales')} + page * {slots} + {place} % {slots}"
            writer.statement(f"tl.store({scale}, {kind}_magnitude / {STEPS}, mask=row_mask)")
            written.append(problem.view(f"{kind}_scales"))
        rounded = evaluator.convert(value, problem.pages_dtype)
        writer.statement(f"tl.store({address}, {rounded.text}, mask={mask})")
    return finish(
        writer,
        family="append",
        summary=f"Puts new keys and values into pages of {slots} slots. A program has some tokens of one head.",
        nodes=[problem.anchor],
        variables=dict(evaluator.used),
        grid=(ceil_div(tokens, _NEW_ROWS), heads, 1),
        writes=written,
    )


def _steps(writer: KernelWriter, value: Register, mask: str | None, magnitude: str) -> Register:
    """Whole numbers of steps [rows, size]; writes the rows' largest magnitude, ``STEPS`` steps, under that name."""
    known = f"tl.where({mask}, {value.text}, 0.0)" if mask else value.text
    writer.statement(f"{magnitude} = tl.maximum(tl.max(tl.abs({known}), 1, keep_dims=True), {LEAST_MAGNITUDE})")
    text = f"tl.floor({value.text} * ({STEPS}.0 / {magnitude}) + 0.5)"
    return Register(writer.emit(f"{value.text}_steps", text, value.deps), value.dtype, value.deps)
