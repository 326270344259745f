"""Products of few rows whose K is cut into parts as well: tiles of sums in one kernel, their totals in a second.

Where a weight has few rows, tiles of columns alone leave processors without work. Programs of the first kernel compute
a tile over one part of K each; the second adds the parts up and computes what follows. It reads a few rows, so what it
costs is a launch.
"""

from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.emit_row import emit_rows
from tilewright.codegen.index import Index, linear
from tilewright.codegen.nodes import arguments
from tilewright.codegen.region_call import Inputs
from tilewright.codegen.results import store
from tilewright.codegen.writer import KernelWriter, Register, Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, all_facts, fact, set_fact, where
from tilewright.ir.program import KernelStep, View
from tilewright.ir.sizes import contiguous_strides, product

aten = torch.ops.aten


def partial_sums(builder: ProgramBuilder, name: str, anchor: Node, parts: int, dtype: torch.dtype) -> View:
    """Memory for the sums of each part, [parts, rows, N]."""
    *rows, n = fact(anchor, TensorType).shape
    return builder.scratch(f"{name}_parts", dtype, (parts, product(rows), n))


def define_part(writer: KernelWriter, parts: int) -> Index:
    """Number of the program's part of K."""
    writer.statement("part = tl.program_id(2).to(tl.int64)")
    return writer.define(Var("part", parts))


def define_range(writer: KernelWriter, k: int, step: int, parts: int, anchor: Node) -> tuple[str, str]:
    """Begin and end of the part of 0 .. k that the program computes, as texts.

    Raises:
        CodegenError: the parts would not be whole steps.
    """
    if k % (parts * step):
        raise CodegenError(
            f"K = {k} has no {parts} equal parts", where=where(anchor), why=f"a step along K takes {step}"
        )
    writer.statement(f"first = tl.program_id(2) * {k // parts}")
    return "first", f"first + {k // parts}"


def store_part(writer: KernelWriter, sums: View, dtype: torch.dtype, part: Index, row: Index, column: Index) -> None:
    """Stores the tile ``acc`` of one part."""
    place = linear((part, row, column), contiguous_strides(sums.shape))
    store(writer, sums, dtype, place, Register("acc", dtype, row.deps | column.deps))


def emit_totals(
    graph: GraphModule,
    inputs: Inputs,
    results: Sequence[tuple[Node, View]],
    anchor: Node,
    sums: View,
    dtype: torch.dtype,
) -> tuple[KernelStep, ...]:
    """The second kernel: the region with the total of the parts, plus bias, in place of its product.

    Args:
        graph: body of the region.
        inputs: what its nodes read from memory.
        results: nodes that depend on the product, with the view each is stored to.
        anchor: the product.
        sums: of ``partial_sums``.
        dtype: element type of these.
    """
    made, copies = Graph(), dict[Node, Node]()
    kind = TensorType(fact(anchor, TensorType).shape, dtype)
    parts = [made.placeholder(f"part_{place}") for place in range(int(sums.shape[0]))]
    for part in parts:
        set_fact(part, kind)
    for node in graph.graph.nodes:
        if node is anchor:
            copies[node] = _total(made, parts, anchor, copies)
        elif node.op != "output":
            copies[node] = made.node_copy(node, copies.__getitem__)
    read = {copies[node]: value for node, value in inputs.items()}
    size, strides = product(kind.shape), contiguous_strides(kind.shape)
    for place, part in enumerate(parts):
        read[part] = (View(sums.value, kind.shape, strides, sums.offset + place * size), dtype)
    outputs = [(copies[node], view) for node, view in results]
    made.output(tuple(node for node, _ in outputs))
    return emit_rows(GraphModule(graph, made), read, outputs)


def _total(made: Graph, parts: Sequence[Node], anchor: Node, copies: dict[Node, Node]) -> Node:
    """The sum in the type of the parts; the last addition is given the type of the product, and rounds when stored."""
    bias = arguments(anchor).get("bias")
    addends = [*parts[1:], *([copies[bias]] if isinstance(bias, Node) else [])]
    total = parts[0]
    for addend in addends:
        total = made.call_function(aten.add.Tensor, (total, addend))
        set_fact(total, fact(parts[0], TensorType))
    for record in all_facts(anchor):
        set_fact(total, record)
    return total
