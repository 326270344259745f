"""Mixture of experts: products whose weight each row chooses, and the tables that let them run expert by expert.

``expert_linear`` is what a model says: it computes each row from the same row of its operands. ``RouteExperts`` turns
it into ``grouped_linear``, the same product with tables of the rows that each expert has (``route``). No row is
dropped, and no mask of tokens by experts is made. Source: DeepSpeed-MoE, section V.C, whose tables these are.
"""

import torch
from torch import Tensor

from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits


def expert_linear_reference(input: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """``input[..., :] @ weight[experts[...]].T``: a linear layer whose weight each row chooses.

    Args:
        input: [.., K], with as many axes as the result; its leading axes are those of ``experts``, or of size 1.
        weight: [E, N, K].
        experts: [..] int64 in [0, E), one for each row of the result.

    Returns:
        [.., N], contiguous.
    """
    count, n, k = weight.shape
    rows, chosen = input.expand(*experts.shape, k).reshape(-1, k), experts.reshape(-1)
    out = input.new_zeros((rows.shape[0], n))
    for expert in range(count):
        own = torch.nonzero(chosen == expert).reshape(-1)
        out = out.index_put((own,), rows[own] @ weight[expert].t())
    return out.reshape(*experts.shape, n)


expert_linear = torch.library.custom_op("tilewright::expert_linear", expert_linear_reference, mutates_args=())


@expert_linear.register_fake
def _expert_linear_fake(input, weight, experts):  # type: ignore[no-untyped-def]
    return input.new_empty((*experts.shape, weight.shape[1]))


def route_reference(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which rows each expert has.

    Args:
        experts: [..] int64 in [0, count): the expert of each row, rows numbered in row-major order.
        count: number of experts, E.

    Returns:
        offsets [E + 1] int32, prefix sum of the rows of each expert;
        order, of the shape of ``experts``, int32: in row-major order, rows by expert and rising for each, so that
        expert e has rows ``order[offsets[e]:offsets[e + 1]]``.
    """
    flat = experts.reshape(-1)
    numbers = torch.arange(count, device=experts.device)
    # Not bincount, whose result has a size that depends on data where it is traced.
    counts = torch.zeros_like(numbers).index_add(0, flat, torch.ones_like(flat))
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return offsets.to(torch.int32), flat.argsort(stable=True).to(torch.int32).reshape(experts.shape)


route = torch.library.custom_op("tilewright::route", route_reference, mutates_args=())


@route.register_fake
def _route_fake(experts, count):  # type: ignore[no-untyped-def]
    return experts.new_empty((count + 1,), dtype=torch.int32), torch.empty_like(experts, dtype=torch.int32)


def grouped_linear_reference(input: Tensor, weight: Tensor, experts: Tensor, offsets: Tensor, order: Tensor) -> Tensor:
    """``expert_linear`` with the tables that ``route`` makes of ``experts``. Rows stay where they are.

    Args:
        input, weight, experts: as of ``expert_linear``.
        offsets: [E + 1] int32.
        order: of the shape of ``experts``, int32.

    Returns:
        [.., N], contiguous.
    """
    return expert_linear_reference(input, weight, experts)


grouped_linear = torch.library.custom_op("tilewright::grouped_linear", grouped_linear_reference, mutates_args=())


@grouped_linear.register_fake
def _grouped_linear_fake(input, weight, experts, offsets, order):  # type: ignore[no-untyped-def]
    return _expert_linear_fake(input, weight, experts)


EXPERT_LINEAR = torch.ops.tilewright.expert_linear.default
GROUPED_LINEAR = torch.ops.tilewright.grouped_linear.default
ROUTE = torch.ops.tilewright.route.default

register(EXPERT_LINEAR, Traits(Flow.GROUPED, row_args=(0, 2)), expert_linear_reference)
register(GROUPED_LINEAR, Traits(Flow.GROUPED, row_args=(0, 2)), grouped_linear_reference)
register(ROUTE, Traits(Flow.ROUTE), route_reference)
