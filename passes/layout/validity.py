"""Which tokens are real: the one [B, S] value that every attention of the graph takes its key validity from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tilewright.errors import Where
from tilewright.ir.facts import TensorType, fact, find_fact, where
from tilewright.ir.sizes import BATCH, SEQ
from tilewright.ops import Flow, traits_of
from tilewright.passes.layout.axes import positional, shape_of

aten = torch.ops.aten


class NotPackable(Exception):
    """Packing the graph is not legal.

    Attributes:
        rule: name of the legality rule.
        where: the node and line that break it; None when it is the graph as a whole.
        why: the reason, in a sentence.
    """

    def __init__(self, rule: str, where: Where | None, why: str) -> None:
        self.rule = rule
        self.where = where
        self.why = why
        super().__init__(f"{rule}: {why}")


@dataclass(frozen=True)
class Validity:
    """The validity of keys.

    Attributes:
        node: [B, S] bool or integer, nonzero at real tokens.
        key: what it computes, so that two nodes that compute the same are recognized.
    """

    node: Node
    key: Any


def find_validity(gm: GraphModule) -> Validity:
    """The validity that all attentions share.

    Raises:
        NotPackable: there is no attention, one takes no validity or one of another shape, or two differ.
    """
    found: Validity | None = None
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if traits_of(node.target).flow is Flow.PACKING:
            raise NotPackable("packed_once", where(node), "the graph is packed already")
        if traits_of(node.target).flow is not Flow.ATTENTION:
            continue
        if node.target is not torch.ops.tilewright.attention.default:
            raise NotPackable("known_attention", where(node), f"{node.target} has no packed form")
        if keys_are_given(node):
            continue
        this = _validity_of(node)
        if found is not None and this.key != found.key:
            why = f"it masks keys by '{this.node.name}', an attention before it by '{found.node.name}'"
            raise NotPackable("one_validity", where(node), why)
        found = found or this
    if found is None:
        raise NotPackable("has_attention", None, "the graph has no attention that says which tokens are real")
    return found


def keys_are_given(attention: Node) -> bool:
    """Whether keys and values are inputs: what they belong to is not the text that this graph would pack."""
    return all(operand.op == "placeholder" for operand in positional(attention)[1:3])


def is_valid_like(node: Node, validity: Validity) -> bool:
    """Whether the node computes exactly the validity value, so that it is 0 at masked places."""
    return node is validity.node or (
        node.op == validity.node.op and node.target == validity.node.target and _key(node) == validity.key
    )


def _validity_of(attention: Node) -> Validity:
    valid = positional(attention)[3]
    if valid is None:
        why = "every key is attended to, so masked places cannot be told from real ones"
        raise NotPackable("has_validity", where(attention), why)
    type_ = fact(valid, TensorType)
    if tuple(type_.shape) != (BATCH, SEQ):
        why = f"its key validity has shape {tuple(map(str, type_.shape))}, not (B, S) with both sizes open"
        raise NotPackable("validity_is_batch_by_sequence", where(attention), why)
    if type_.dtype.is_floating_point or type_.dtype.is_complex:
        why = f"its key validity is {type_.dtype}, not bool or integer"
        raise NotPackable("validity_is_boolean", where(attention), why)
    root = _root(valid)
    return Validity(root, _key(root))


def _root(node: Node) -> Node:
    """The value that is nonzero exactly where ``node`` is: tests against zero and conversions are looked through."""
    while node.op == "call_function":
        args = positional(node)
        tests_zero = node.target in (aten.ne.Scalar, aten.ne.Tensor) and isinstance(args[1], int) and args[1] == 0
        converts = node.target is torch.ops.prims.convert_element_type.default and args[1] is torch.bool
        source = args[0] if args else None
        if not (tests_zero or converts) or not isinstance(source, Node) or find_fact(source, TensorType) is None:
            return node
        if fact(source, TensorType).dtype.is_floating_point or shape_of(source) != shape_of(node):
            return node
        node = source
    return node


def _key(value: Any) -> Any:
    if isinstance(value, Node):
        if value.op != "call_function":
            return value.op, str(value.target)
        return value.target, _key(tuple(value.args)), _key(tuple(sorted(value.kwargs.items())))
    if isinstance(value, list | tuple):
        return tuple(_key(item) for item in value)
    return value
