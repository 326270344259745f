"""Routers of mixtures of experts stay in floating point where other products are quantized."""

from torch.fx import Node

from tilewright.ops import Flow, traits_of
from tilewright.ops.experts import ROUTE

_ROW_WISE = (Flow.POINTWISE, Flow.LAST_AXIS, Flow.REDUCE, Flow.VIEW, Flow.LOOKUP)


def why_router(node: Node) -> str | None:
    """Why a product stays as it is: on its way through row-wise ops, it decides which experts a row goes to.

    Another expert is another function, so rounding would change results by more than half a step; and what a router
    multiplies by is small beside the weights of its experts.
    """
    pending, seen = list(node.users), set(node.users)
    while pending:
        user = pending.pop()
        if user.op != "call_function":
            continue
        if user.target == ROUTE:
            return "it chooses experts, and rounding would choose others"
        if traits_of(user.target).flow in _ROW_WISE:
            pending += [after for after in user.users if after not in seen]
            seen.update(user.users)
    return None
