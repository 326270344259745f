"""Products of experts whose weights are whole numbers or in block formats. Their eager code here is their definition.

Shapes use E experts, N rows of each weight and K elements a row; ``experts`` and the tables are those of
``tilewright.ops.experts``, formats those of ``tilewright.ops.blocks``.
"""

import torch
from torch import Tensor

from tilewright.ops.block_linear import ROUNDED_BLOCK
from tilewright.ops.blocks import dequantize
from tilewright.ops.experts import expert_linear_reference
from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits


def expert_block_linear_reference(input: Tensor, weight: Tensor, experts: Tensor, format: str) -> Tensor:
    """``expert_linear`` with weights in a block format, computed in fp32, or fp64 for such rows.

    Args:
        input: [.., K], floating.
        weight: [E, N, bytes].
        experts: [..] int64 in [0, E).
        format: of the weight.

    Returns:
        [.., N] in the input's dtype.
    """
    compute = torch.promote_types(input.dtype, torch.float32)
    wide = _widened(weight, format).to(compute)
    return expert_linear_reference(input.to(compute), wide, experts).to(input.dtype)


def grouped_block_linear_reference(
    input: Tensor, weight: Tensor, experts: Tensor, offsets: Tensor, order: Tensor, format: str
) -> Tensor:
    """``expert_block_linear`` with the tables that ``route`` makes of ``experts``."""
    return expert_block_linear_reference(input, weight, experts, format)


def grouped_block_linear_int8_reference(
    input: Tensor,
    weight: Tensor,
    experts: Tensor,
    offsets: Tensor,
    order: Tensor,
    format: str,
    scales: Tensor,
    sums: Tensor | None,
) -> Tensor:
    """``grouped_block_linear`` for rows rounded by blocks of 32: rows = scales * input.

    Args:
        input: [.., K] int8.
        weight, experts, offsets, order, format: as of ``grouped_block_linear``.
        scales: [.., K / 32] fp32; fp64 has the product computed in it.
        sums: [.., K / 32] fp32: sums of the blocks of the rows, for formats with minimums, else None.

    Returns:
        [.., N] in the dtype of the scales.
    """
    blocks = input.unflatten(-1, (input.shape[-1] // ROUNDED_BLOCK, ROUNDED_BLOCK)).to(scales.dtype)
    rows = (blocks * scales[..., None]).flatten(-2)
    return expert_linear_reference(rows, _widened(weight, format).to(scales.dtype), experts)


def grouped_int8_linear_reference(
    input: Tensor, weight: Tensor, experts: Tensor, offsets: Tensor, order: Tensor, scale: Tensor
) -> Tensor:
    """``grouped_linear`` in whole numbers, each result times the scale of its expert's output channel.

    Args:
        input: [.., K] int8.
        weight: [E, N, K] int8.
        experts, offsets, order: as of ``grouped_linear``.
        scale: [E, N] fp32.

    Returns:
        [.., N] fp32; the sum under the scale is exact for K below 2**17.
    """
    whole = expert_linear_reference(input.double(), weight.double(), experts).to(torch.int32)
    return whole.float() * scale[experts]


def _widened(weight: Tensor, format: str) -> Tensor:
    rows = dequantize(format, weight.flatten(0, 1))
    return rows.view(*weight.shape[:2], rows.shape[-1])


expert_block_linear = torch.library.custom_op(
    "tilewright::expert_block_linear", expert_block_linear_reference, mutates_args=()
)
grouped_block_linear = torch.library.custom_op(
    "tilewright::grouped_block_linear", grouped_block_linear_reference, mutates_args=()
)
grouped_block_linear_int8 = torch.library.custom_op(
    "tilewright::grouped_block_linear_int8", grouped_block_linear_int8_reference, mutates_args=()
)
grouped_int8_linear = torch.library.custom_op(
    "tilewright::grouped_int8_linear", grouped_int8_linear_reference, mutates_args=()
)


@expert_block_linear.register_fake
def _expert_block_linear_fake(input, weight, experts, format):  # type: ignore[no-untyped-def]
    return input.new_empty((*experts.shape, weight.shape[1]))


@grouped_block_linear.register_fake
def _grouped_block_linear_fake(input, weight, experts, offsets, order, format):  # type: ignore[no-untyped-def]
    return input.new_empty((*experts.shape, weight.shape[1]))


@grouped_block_linear_int8.register_fake
def _grouped_block_linear_int8_fake(  # type: ignore[no-untyped-def]
    input, weight, experts, offsets, order, format, scales, sums
):
    return scales.new_empty((*experts.shape, weight.shape[1]))


@grouped_int8_linear.register_fake
def _grouped_int8_linear_fake(input, weight, experts, offsets, order, scale):  # type: ignore[no-untyped-def]
    return scale.new_empty((*experts.shape, weight.shape[1]))


EXPERT_BLOCK_LINEAR = torch.ops.tilewright.expert_block_linear.default
GROUPED_BLOCK_LINEAR = torch.ops.tilewright.grouped_block_linear.default
GROUPED_BLOCK_LINEAR_INT8 = torch.ops.tilewright.grouped_block_linear_int8.default
GROUPED_INT8_LINEAR = torch.ops.tilewright.grouped_int8_linear.default

register(EXPERT_BLOCK_LINEAR, Traits(Flow.GROUPED, row_args=(0, 2)), expert_block_linear_reference)
register(GROUPED_BLOCK_LINEAR, Traits(Flow.GROUPED, row_args=(0, 2)), grouped_block_linear_reference)
register(GROUPED_BLOCK_LINEAR_INT8, Traits(Flow.GROUPED, row_args=(0, 2, 6, 7)), grouped_block_linear_int8_reference)
register(GROUPED_INT8_LINEAR, Traits(Flow.GROUPED, row_args=(0, 2)), grouped_int8_linear_reference)
