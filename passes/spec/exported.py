"""Rules of the level exported: functional ATen as ``torch.export`` gives it."""

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule

from tilewright.ir.facts import SizeValue, find_fact
from tilewright.ops import Flow, is_overload, traits_of
from tilewright.passes.spec.rules import Rule, Violation, calls


def dispatcher_ops(gm: GraphModule) -> Iterator[Violation]:
    """Calls are ops of the dispatcher, operators on sizes, or choices of a result."""
    for node in calls(gm):
        on_sizes = find_fact(node, SizeValue) is not None
        if not (is_overload(node.target) or node.target is operator.getitem or on_sizes):
            yield Violation(node, f"{node.target} is a Python function")


def no_packing(gm: GraphModule) -> Iterator[Violation]:
    """No op of the packed levels."""
    for node in calls(gm):
        packed = node.target is torch.ops.tilewright.attention_packed.default
        if packed or traits_of(node.target).flow is Flow.PACKING:
            yield Violation(node, f"{node.target} belongs to the packed level")


EXPORTED = (
    Rule("dispatcher_ops", "every call is an op of the dispatcher, or an operator on sizes", dispatcher_ops),
    Rule("no_packing", "nothing is packed yet", no_packing),
)
