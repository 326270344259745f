"""Products and look-ups with weights in block formats. Their eager code here is their definition.

Shapes use N rows of the weight and K elements a row; a weight is data [N, bytes of a row] uint8 in one of the formats
of ``tilewright.ops.blocks``.
"""

import torch
from torch import Tensor

from tilewright.ops.blocks import block_format, dequantize
from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits

ROUNDED_BLOCK = 32
"""Neighbours along K that share a scale where rows are rounded to whole numbers of 8 bits."""


def block_linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None, format: str) -> Tensor:
    """``input @ dequantize(weight).T + bias``, computed in fp32, or fp64 for such rows.

    Args:
        input: [.., K], floating.
        weight: [N, bytes].
        bias: [N] or None.
        format: of the weight.

    Returns:
        [.., N] in the input's dtype.
    """
    compute = torch.promote_types(input.dtype, torch.float32)
    product = input.to(compute) @ dequantize(format, weight).to(compute).t()
    return (product if bias is None else product + bias).to(input.dtype)


def block_linear_int8_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, format: str, scales: Tensor, sums: Tensor | None
) -> Tensor:
    """``rows @ dequantize(weight).T + bias`` for rows rounded by blocks of 32: rows = scales * input.

    Args:
        input: [.., K] int8.
        weight: [N, bytes].
        bias: [N] or None.
        format: of the weight.
        scales: [.., K / 32] fp32; fp64 has the product computed in it.
        sums: [.., K / 32] fp32: sums of the blocks of the rows, which kernels multiply with minimums; None where the
            format has none. They say nothing that ``input`` and ``scales`` do not.

    Returns:
        [.., N] in the dtype of the scales.
    """
    blocks = input.unflatten(-1, (input.shape[-1] // ROUNDED_BLOCK, ROUNDED_BLOCK)).to(scales.dtype)
    product = (blocks * scales[..., None]).flatten(-2) @ dequantize(format, weight).to(scales.dtype).t()
    return product if bias is None else product + bias


def block_embedding_reference(weight: Tensor, indices: Tensor, format: str) -> Tensor:
    """Rows of the weight by their numbers; no other row is widened.

    Args:
        weight: [N, bytes].
        indices: [..] int64 or int32, each in [0, N).
        format: of the weight.

    Returns:
        [.., K] fp32.
    """
    rows = dequantize(format, weight[indices.flatten()])
    return rows.view(*indices.shape, rows.shape[-1])


block_linear = torch.library.custom_op("tilewright::block_linear", block_linear_reference, mutates_args=())
block_linear_int8 = torch.library.custom_op(
    "tilewright::block_linear_int8", block_linear_int8_reference, mutates_args=()
)
block_embedding = torch.library.custom_op("tilewright::block_embedding", block_embedding_reference, mutates_args=())


@block_linear.register_fake
def _block_linear_fake(input, weight, bias, format):  # type: ignore[no-untyped-def]
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@block_linear_int8.register_fake
def _block_linear_int8_fake(input, weight, bias, format, scales, sums):  # type: ignore[no-untyped-def]
    return scales.new_empty((*input.shape[:-1], weight.shape[0]))


@block_embedding.register_fake
def _block_embedding_fake(weight, indices, format):  # type: ignore[no-untyped-def]
    columns = block_format(format).columns(int(weight.shape[1]))
    return weight.new_empty((*indices.shape, columns), dtype=torch.float32)


BLOCK_LINEAR = torch.ops.tilewright.block_linear.default
BLOCK_LINEAR_INT8 = torch.ops.tilewright.block_linear_int8.default
BLOCK_EMBEDDING = torch.ops.tilewright.block_embedding.default
register(BLOCK_LINEAR, Traits(Flow.CONTRACT), block_linear_reference)
register(BLOCK_LINEAR_INT8, Traits(Flow.CONTRACT), block_linear_int8_reference)
register(BLOCK_EMBEDDING, Traits(Flow.LOOKUP), block_embedding_reference)
