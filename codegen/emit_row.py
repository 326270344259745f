"""Row kernels: pointwise work, reductions and norms, lookups, gathers and scatters.

A program computes one row (or a block of short rows) of the result with all its columns, so a reduction along the
columns stays inside it. Without a reduction columns are tiled over programs too; where all operands have the shape of
the result, the result is one flat row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from tilewright.codegen.columns import (
    ColumnConflict,
    column_block,
    columns_in_registers,
    columns_name,
    define_columns,
    next_power_of_2,
)
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index, constant, linear, same_size, unravel, variable
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import op_name
from tilewright.codegen.reductions import reduced_axes
from tilewright.codegen.region_call import Inputs
from tilewright.codegen.results import Result, needed_nodes, peel, store
from tilewright.codegen.scatter import open_scatter, store_scattered
from tilewright.codegen.writer import KernelWriter, Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import Size, ceil_div, contiguous_strides, product
from tilewright.ops import Flow, traits_of

_SHORT_ROW = 128
_TILE = 1024
_FLAT_BLOCK = 1024


@dataclass(frozen=True)
class Plan:
    """How the elements of results are shared out.

    Attributes:
        kind: "flat": all elements are columns of one row, tiled. "tiles": the last axis is tiled. "rows": the last axis
            is inside one program. "scalars": every axis is a row, results have no columns.
        rank: rank of tiles.
        loop_places: reductions may loop over single places.
    """

    kind: str
    rank: int = 1
    loop_places: bool = False


def emit_rows(graph: GraphModule, inputs: Inputs, results: Sequence[tuple[Node, View]]) -> tuple[KernelStep, ...]:
    """Kernels that compute ``results`` from ``inputs``; one, unless results differ in their rows.

    Args:
        graph: body of the region.
        inputs: what is in memory: placeholders, and any node computed by an earlier step.
        results: nodes to compute, with the contiguous view to store each to.

    Raises:
        CodegenError: some op cannot be computed row by row.
    """
    outputs = [peel(node, view, inputs) for node, view in results]
    steps: list[KernelStep] = []
    for group in _groups(outputs):
        try:
            steps.append(_first_that_fits(graph, inputs, group))
        except ColumnConflict:
            if len(group) == 1:
                raise
            steps += [_first_that_fits(graph, inputs, [output]) for output in group]
    return tuple(steps)


def _groups(outputs: list[Result]) -> list[list[Result]]:
    """Results that can share a kernel: the same number of rows, at most one of them scattered."""
    groups: list[list[Result]] = []
    for output in outputs:
        for group in groups:
            scattered = [member for member in group if member.scatter]
            if _row_shape(group[0]) == _row_shape(output) and not (scattered and output.scatter):
                group.append(output)
                break
        else:
            groups.append([output])
    return groups


def _row_shape(output: Result) -> tuple[Size, ...]:
    return output.shape[:1] if output.scatter else output.shape[:-1]


def _first_that_fits(graph: GraphModule, inputs: Inputs, outputs: list[Result]) -> KernelStep:
    conflict: ColumnConflict | None = None
    for plan in _plans(outputs, inputs):
        try:
            step, divides = _write(graph, inputs, outputs, plan)
        except ColumnConflict as error:
            conflict = error
            continue
        if plan.kind != "flat" or not divides:
            return step
    raise conflict or CodegenError("no way to share out the elements of a region", where=outputs[0].node.name)


def _plans(outputs: list[Result], inputs: Inputs) -> list[Plan]:
    """Ways to share out the elements, best first."""
    reducing = [n for n in _computed(outputs, inputs) if traits_of(n.target).flow in (Flow.REDUCE, Flow.LAST_AXIS)]
    last = [output.shape[-1] if output.shape else 1 for output in outputs]
    widths = last + [fact(n.all_input_nodes[0], TensorType).shape[-1] for n in reducing]
    short = all(isinstance(width, int) and width <= _SHORT_ROW for width in widths)
    if any(output.scatter for output in outputs):
        return [Plan("rows"), Plan("rows", loop_places=True)]
    rank = 2 if short else 1
    if reducing:
        plans = [Plan("scalars", rank), Plan("rows", rank, loop_places=True)]
        return [Plan("rows", rank), *(plans if all(_reduces_last(node) for node in reducing) else plans[::-1])]
    one_size = len({product(output.shape) for output in outputs}) == 1
    one_width = len(set(last)) == 1
    plans = [Plan("flat")] if one_size else []
    return [*plans, Plan("rows" if short or not one_width else "tiles", rank)]


def _reduces_last(node: Node) -> bool:
    """Whether the last axis is among those a node reduces, so that its elements lie next to one another."""
    if traits_of(node.target).flow is not Flow.REDUCE:
        return True
    return len(fact(node.all_input_nodes[0], TensorType).shape) - 1 in reduced_axes(node)


def _computed(outputs: list[Result], inputs: Inputs) -> list[Node]:
    return needed_nodes([n for output in outputs for n in (output.node, output.scatter) if n is not None], inputs)


def _write(graph: GraphModule, inputs: Inputs, outputs: list[Result], plan: Plan) -> tuple[KernelStep, bool]:
    writer = KernelWriter(plan.rank)
    writer.loop_places = plan.loop_places
    evaluator = Evaluator(graph, writer, inputs)
    scattered = next((output for output in outputs if output.scatter), None)
    rows = product(_row_shape(outputs[0]) if plan.kind in ("rows", "tiles") else ())
    grid: tuple[Size, Size, Size] = (rows, 1, 1)
    if scattered is not None and scattered.scatter is not None:
        grid = (rows + 1, 1, 1)
        with open_scatter(evaluator, scattered.scatter, scattered.view, rows) as row:
            _store_all(evaluator, outputs, row, plan)
    elif plan.kind == "flat":
        grid = (ceil_div(product(outputs[0].shape), _FLAT_BLOCK), 1, 1)
        _store_all(evaluator, outputs, constant(0), plan)
    else:
        if plan.kind == "scalars":
            rows = product(outputs[0].shape)
            if not all(same_size(product(output.shape), rows) for output in outputs):
                raise ColumnConflict("results differ in their number of elements")
        row, block = _define_rows(writer, rows, outputs)
        tiles = ceil_div(outputs[0].shape[-1], _tile_columns(outputs[0].shape[-1])) if plan.kind == "tiles" else 1
        grid = (ceil_div(rows, block), tiles, 1)
        _store_all(evaluator, outputs, row, plan)
    step = finish(
        writer,
        family="row",
        summary=_summary(outputs, plan),
        nodes=_computed(outputs, inputs),
        variables=evaluator.used,
        grid=grid,
        writes=[output.view for output in outputs],
        num_warps=8 if max(writer.constants.values(), default=1) >= 2048 else 4,
    )
    return step, writer.divides


def _define_rows(writer: KernelWriter, rows: Size, outputs: list[Result]) -> tuple[Index, int]:
    """Defines the row variable: a scalar, or a block of short rows. Rows are 64-bit: offsets may pass 2^31."""
    if writer.rank == 1:
        writer.statement("row = tl.program_id(0).to(tl.int64)")
        writer.row_deps = frozenset(("row",))
        return writer.define(Var("row", rows)), 1
    width = max(
        int(output.shape[-1]) if output.shape and isinstance(output.shape[-1], int) else 1 for output in outputs
    )
    block = max(1, _TILE // max(16, next_power_of_2(width)))
    writer.constants["BLOCK_M"] = block
    writer.statement("rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]")
    writer.statement(f"row_mask = rows < {writer.size(rows)}")
    writer.row_deps = frozenset(("rows",))
    return writer.define(Var("rows", rows, 0, "BLOCK_M", "row_mask")), block


def _tile_columns(size: Size) -> int:
    return next_power_of_2(size) if isinstance(size, int) and size <= 4 * _TILE else _TILE


def _store_all(evaluator: Evaluator, outputs: list[Result], row: Index, plan: Plan) -> None:
    for output in outputs:
        _store(evaluator, output, row, plan)


def _store(evaluator: Evaluator, output: Result, row: Index, plan: Plan) -> None:
    """Evaluates one output at its row and columns, and stores it."""
    writer = evaluator.writer
    shape = output.shape
    if plan.kind == "flat":
        size = product(shape)
        start = f"tl.program_id(0).to(tl.int64) * {_FLAT_BLOCK}"
        column = _column_once(writer, size, _FLAT_BLOCK, start)
        return _put(evaluator, output, unravel(column, shape))
    if plan.kind == "scalars" or not shape:
        return _put(evaluator, output, unravel(row, shape))
    width = shape[-1] if output.scatter is None else product(shape[1:])
    outer = shape[:-1] if output.scatter is None else shape[:1]

    def at(column: Index) -> tuple[Index, ...]:
        inner = (column,) if output.scatter is None else unravel(column, shape[1:])
        return (*unravel(row, outer), *inner)

    if width == 1:
        return _put(evaluator, output, at(constant(0)))
    if plan.kind == "tiles":
        block = _tile_columns(width)
        return _put(evaluator, output, at(_column_once(writer, width, block, f"tl.program_id(1) * {block}")))
    block, looped = column_block(writer, width)
    if not looped:
        return _put(evaluator, output, at(columns_in_registers(writer, width)))
    name = columns_name(writer, width)
    with writer.block(f"for start in range(0, {writer.size(width)}, BLOCK_{name.upper()}):"):
        _put(evaluator, output, at(define_columns(writer, name, width, block, "start")))
    return None


def _column_once(writer: KernelWriter, size: Size, block: int, start: str) -> Index:
    """The column variable of a kernel whose programs tile the columns."""
    name = columns_name(writer, size)
    if name in writer.variables:
        return variable(name, size)
    return define_columns(writer, name, size, block, start)


def _put(evaluator: Evaluator, output: Result, index: tuple[Index, ...]) -> None:
    value = evaluator.value(output.node, index)
    if output.scatter is not None:
        store_scattered(evaluator, output.scatter, output.view, index, value)
        return
    place = linear(index, contiguous_strides(output.shape))
    store(evaluator.writer, output.view, fact(output.node, TensorType).dtype, place, value)


def _summary(outputs: list[Result], plan: Plan) -> str:
    shapes = ", ".join(
        f"{op_name(o.scatter or o.node) if o.node.op != 'placeholder' else 'copy'} {_text(o)}" for o in outputs
    )
    how = {
        "flat": "All elements as one row, in tiles.",
        "tiles": "A program computes one tile of columns of a row.",
        "rows": "A program computes whole rows.",
        "scalars": "A program computes one number for each of its rows.",
    }[plan.kind]
    return f"Stores {shapes}. {how}"


def _text(output: Result) -> str:
    shape = fact(output.scatter or output.node, TensorType).shape
    return f"[{', '.join(map(str, shape))}]"
