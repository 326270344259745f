"""Selection along the last axis."""

import torch
from torch import Tensor

from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits


def top_indices_reference(x: Tensor, k: int) -> Tensor:
    """Places of the ``k`` largest elements along the last axis, the largest first.

    Of equal elements the one further left comes first, and NaN counts as infinity.

    Args:
        x: [.., N] floating point, N >= k.

    Returns:
        [.., k] int64.
    """
    ranked = torch.where(torch.isnan(x), float("inf"), x)
    return ranked.argsort(dim=-1, descending=True, stable=True)[..., :k].contiguous()


top_indices = torch.library.custom_op("tilewright::top_indices", top_indices_reference, mutates_args=())


@top_indices.register_fake
def _top_indices_fake(x, k):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], k), dtype=torch.int64)


TOP_INDICES = torch.ops.tilewright.top_indices.default
register(TOP_INDICES, Traits(Flow.LAST_AXIS), top_indices_reference)
register(torch.ops.aten.gather.default, Traits(Flow.LAST_AXIS, axes_arg=1, row_args=(0, 2)))
