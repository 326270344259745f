"""Scattering packed rows back to padded places, with zeros at every other place.

One program a packed row: it stores its row at its place, and zeros at the places between the row before and itself. A
last program stores the zeros behind the last row. A row that is no key, which comes before those of its sequence, is
stored nowhere, and counts as the start of its sequence. So each place is written exactly once, nothing is cleared
beforehand, and nothing is read from places that hold no token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.fx import Node

from tilewright.codegen.columns import column_block, columns_name, define_columns
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index, constant, linear, variable
from tilewright.codegen.nodes import arguments
from tilewright.codegen.writer import Register, Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import View
from tilewright.ir.sizes import Size, contiguous_strides, product


@contextmanager
def open_scatter(evaluator: Evaluator, node: Node, view: View, rows: Size) -> Iterator[Index]:
    """Stores the zeros before this program's row; the block it opens runs where there is such a row.

    Args:
        node: the call of ``scatter_rows``.
        view: the padded result.
        rows: number of packed rows; the kernel is launched with one program more.

    Yields:
        The index of the program's row.
    """
    writer = evaluator.writer
    writer.reserve("program", "before", "first", "place", "last", "pad", "row")
    given = arguments(node)
    shape = fact(node, TensorType).shape
    if given["row_index"] not in evaluator.inputs:
        raise CodegenError("the row index of a scatter must be in memory", where=where(node))
    places = writer.pointer(*evaluator.inputs[given["row_index"]], "row_index")
    out = writer.pointer(view, fact(node, TensorType).dtype, "out")
    count, end = writer.size(rows), writer.size(shape[0] * shape[1])

    writer.statement("program = tl.program_id(0).to(tl.int64)")
    writer.statement(f"before = tl.load({places} + program - 1, mask=program > 0, other=0).to(tl.int64)")
    writer.statement(f"place = tl.load({places} + program, mask=program < {count}, other=0).to(tl.int64)")
    key_before, key = (_is_key(evaluator, node, place) for place in ("before", "place"))
    length = writer.size(shape[1])
    writer.statement(f"first = tl.where({key_before}, before + 1, before // {length} * {length})")
    writer.statement(f"last = tl.where({key}, place, place // {length} * {length})")
    with writer.block(f"for pad in range(tl.where(program > 0, first, 0), tl.where(program < {count}, last, {end})):"):
        _store_zeros(evaluator, out, product(shape[2:]))
    with writer.block(f"if program < {count}:"):
        writer.statement("row = program")
        writer.row_deps = frozenset(("row",))
        yield writer.define(Var("row", rows))


def _is_key(evaluator: Evaluator, node: Node, place: str) -> str:
    """Text of whether a token is at the place of the batch that the variable ``place`` names."""
    given, shape = arguments(node), fact(node, TensorType).shape
    at = evaluator.writer.define(Var(place, shape[0] * shape[1]))
    return evaluator.number(given["valid"], (at // shape[1], at % shape[1]), torch.bool).text


def _store_zeros(evaluator: Evaluator, out: str, width: Size) -> None:
    writer = evaluator.writer
    if width == 1:
        writer.statement(f"tl.store({out} + pad, 0)")
        return
    name = "pad_" + columns_name(writer, width)
    block, looped = column_block(writer, width)
    if looped:
        with writer.block(f"for start in range(0, {writer.size(width)}, BLOCK_{name.upper()}):"):
            column = define_columns(writer, name, width, block, "start")
            _zero(evaluator, out, column, width)
    else:
        column = define_columns(writer, name, width, block)
        _zero(evaluator, out, column, width)


def _zero(evaluator: Evaluator, out: str, column: Index, width: Size) -> None:
    writer = evaluator.writer
    mask = writer.mask(column.deps)
    zeros = f"tl.zeros([{', '.join(writer.shape(column.deps))}], {out}.dtype.element_ty)"
    address = f"{out} + pad * {writer.size(width)} + {writer.index_text(column)}"
    writer.statement(f"tl.store({address}, {zeros}{f', mask={mask}' if mask else ''})")


def store_scattered(evaluator: Evaluator, node: Node, view: View, index: tuple[Index, ...], value: Register) -> None:
    """Stores a packed row's values at its place, if it is a key."""
    writer = evaluator.writer
    shape = fact(node, TensorType).shape
    place = variable("place", shape[0] * shape[1])
    inner = linear(index[1:], contiguous_strides(shape[2:]))
    out = writer.pointer(view, fact(node, TensorType).dtype, "out")
    address = f"{out} + {writer.index_text(place * product(shape[2:]) + inner)}"
    mask = writer.mask(inner.deps) if inner != constant(0) else None
    kept = " & ".join(filter(None, (mask, _is_key(evaluator, node, "place"))))
    writer.statement(f"tl.store({address}, {value.text}, mask={kept})")
