"""Selection along the last axis inside a kernel: the places of the largest elements, and elements at given places."""

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from tilewright.codegen.columns import ColumnConflict, column_block, columns_in_registers
from tilewright.codegen.index import Index, variable
from tilewright.codegen.nodes import arguments, compute_dtype
from tilewright.codegen.writer import Register
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where

if TYPE_CHECKING:
    from tilewright.codegen.evaluate import Evaluator


def top_indices(ev: "Evaluator", node: Node, index: tuple[Index, ...]) -> Register:
    """``top_indices(x, k)`` at a rank that runs along the columns, or at a single one; x is held in registers."""
    given = arguments(node)
    source: Node = given["x"]
    kind = fact(source, TensorType)
    size, writer = kind.shape[-1], ev.writer
    if not isinstance(size, int) or column_block(writer, size)[1]:
        raise CodegenError(
            "the largest elements of a long axis have no kernel", where=where(node), why=f"it has {size}"
        )
    outer = frozenset(name for part in index[:-1] for name in part.deps)
    if writer.rank - 1 in writer.axes(outer):
        raise ColumnConflict("the axis to choose from has no axis of the tile to run along", where=where(node))
    column = columns_in_registers(writer, size)
    x = ev.number(source, (*index[:-1], column), compute_dtype(kind.dtype))
    deps = outer | index[-1].deps
    shape = ", ".join(writer.shape(outer | column.deps))
    values = x.text if x.deps >= outer | column.deps else f"tl.broadcast_to({x.text}, [{shape}])"
    ranks = f"({writer.index_text(index[-1])}) + tl.zeros([{', '.join(writer.shape(deps)) or '1'}], tl.int32)"
    places, axis = writer.index_text(column), writer.rank - 1
    call = f"top_places({values}, {places}, {size}, {ranks}, {given['k']}, {axis})"
    if not writer.shape(deps):
        call = f"tl.max({call}, 0)"  # one rank of a scalar row
    return Register(writer.emit("top", f"{call}.to(tl.int64)", deps), torch.int64, deps)


def gather(ev: "Evaluator", node: Node, index: tuple[Index, ...]) -> Register:
    """``gather(x, last axis, places)``; a place out of range is taken for the nearest one in it."""
    given = arguments(node)
    source: Node = given["self"]
    shape = fact(source, TensorType).shape
    axis = int(given["dim"]) % len(shape)
    if axis != len(shape) - 1:
        raise CodegenError("elements at given places of an inner axis have no kernel", where=where(node))
    place = ev.number(given["index"], index, torch.int64)
    last = ev.writer.size(shape[axis])
    inside = ev.writer.emit("place", f"tl.minimum(tl.maximum({place.text}, 0), {last} - 1)", place.deps)
    column = variable(inside, shape[axis], place.deps)
    return ev.number(source, (*index[:-1], column), compute_dtype(fact(node, TensorType).dtype))
