"""A linear layer for each head: what a convolution of width 1 in as many groups is."""

import torch
from torch import Tensor

from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits


def head_linear_reference(input: Tensor, weight: Tensor) -> Tensor:
    """``input[.., h, :] @ weight_h.T`` for each head h.

    Args:
        input: [.., H, K], any strides.
        weight: [H * N, K], same float dtype; rows h * N to (h + 1) * N are those of head h.

    Returns:
        [.., H, N], contiguous, dtype of ``input``.
    """
    heads = input.shape[-2]
    return torch.einsum("...hk,hnk->...hn", input, weight.view(heads, -1, input.shape[-1])).contiguous()


head_linear = torch.library.custom_op("tilewright::head_linear", head_linear_reference, mutates_args=())


@head_linear.register_fake
def _head_linear_fake(input, weight):  # type: ignore[no-untyped-def]
    return input.new_empty((*input.shape[:-1], weight.shape[0] // input.shape[-2]))


HEAD_LINEAR = torch.ops.tilewright.head_linear.default
register(HEAD_LINEAR, Traits(Flow.CONTRACT), head_linear_reference)
