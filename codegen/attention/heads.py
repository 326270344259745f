"""Tiles that are as wide as a head: their axis, and the store of an attention's result."""

from collections.abc import Sequence

import torch
from torch.fx import Node

from tilewright.codegen.columns import define_columns, next_power_of_2
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index, linear, reshape, same_count, variable, without_ones
from tilewright.codegen.region_call import Inputs
from tilewright.codegen.results import peel, store
from tilewright.codegen.writer import KernelWriter, Register
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import View
from tilewright.ir.sizes import contiguous_strides

LEAST_DOT = 16
"""Smallest side of a tile of ``tl.dot``."""


def head_axis(writer: KernelWriter, name: str, size: int) -> Index:
    """The variable along axis 1 over the size of a head: "d" of keys, "dv" of values; equal sizes share it."""
    name = writer.column_names.setdefault(size, name)
    if name in writer.variables:
        return variable(name, size)
    return define_columns(writer, name, size, max(LEAST_DOT, next_power_of_2(size)))


def head_block(writer: KernelWriter, size: int) -> str:
    """Name of the constant that is the width of a tile of heads of this size."""
    return f"BLOCK_{writer.column_names[size].upper()}"


def store_attention(
    evaluator: Evaluator,
    anchor: Node,
    results: Sequence[tuple[Node, View]],
    inputs: Inputs,
    compute: torch.dtype,
    index: tuple[Index, ...],
) -> None:
    """Evaluates what follows the attention on its tile, ``attention`` in the text, and stores it.

    Args:
        anchor: the attention.
        results: of its region.
        inputs: what stands behind the region's placeholders.
        compute: element type of the tile.
        index: of the tile's elements in the result of ``anchor``.

    Raises:
        CodegenError: what follows needs other elements.
    """
    shape = fact(anchor, TensorType).shape
    strides = contiguous_strides(shape)
    position, here = linear(index, strides), without_ones(index, shape)

    def attention(at: tuple[Index, ...]) -> Register:
        if linear(at, strides) != linear(here, strides):
            raise CodegenError("an epilogue needs elements of other tiles", where=where(anchor))
        return Register("attention", compute, position.deps)

    evaluator.bindings[anchor] = attention
    for node, view in results:
        result = peel(node, view, inputs)
        if result.scatter is not None or not same_count(result.shape, shape):
            raise CodegenError("a result of an attention region has another shape", where=where(node))
        value = evaluator.value(result.node, reshape(here, result.shape, shape))
        store(evaluator.writer, view, fact(result.node, TensorType).dtype, position, value)
