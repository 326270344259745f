"""The integer product of quantized linears. Scales, biases and conversions around it are ordinary pointwise ops."""

import torch
from torch import Tensor

from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits


def int8_linear_reference(input: Tensor, weight: Tensor) -> Tensor:
    """``input @ weight.T`` in whole numbers.

    Args:
        input: [.., K] int8.
        weight: [N, K] int8.

    Returns:
        [.., N] int32, exact for K below 2**17.
    """
    return (input.double() @ weight.double().t()).to(torch.int32)


int8_linear = torch.library.custom_op("tilewright::int8_linear", int8_linear_reference, mutates_args=())


@int8_linear.register_fake
def _int8_linear_fake(input, weight):  # type: ignore[no-untyped-def]
    return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=torch.int32)


INT8_LINEAR = torch.ops.tilewright.int8_linear.default
register(INT8_LINEAR, Traits(Flow.CONTRACT), int8_linear_reference)
