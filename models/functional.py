"""In-place ops of a traced graph as functional ones, where that is provably the same."""

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tilewright.errors import CaptureError


def mutates(node: Node) -> bool:
    """True for a call that writes to one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def make_functional(gm: GraphModule) -> None:
    """Replaces each ``op_(x, ...)`` by ``op(x, ...)`` and later uses of x by its result.

    The same only if nothing else sees the memory of x: x must be the fresh result of a call, and no view of x, made
    before, may be read after.

    Raises:
        CaptureError: another value shares memory with x, x is an input, or the op has no functional form.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        if not mutates(node):
            continue
        target = _functional(node)
        source: Any = node.args[0] if node.args else None
        if target is None or not isinstance(source, Node):
            raise CaptureError("an op writes in place", where=node.name, why=f"{node.target} has no functional form")
        _check_unshared(node, source, order)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(target, node.args, node.kwargs)
        new.meta = dict(node.meta)
        order[new] = order[node]
        for user in [user for user in source.users if user is not new and order[user] > order[node]]:
            user.replace_input_with(source, new)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.recompile()


def _functional(node: Node) -> Any:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``."""
    namespace, name = node.target._schema.name.split("::")  # type: ignore[union-attr]
    overload = node.target._schema.overload_name or "default"  # type: ignore[union-attr]
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    found = getattr(packet, overload, None) if packet is not None else None
    return found if found is not None and not found._schema.is_mutable else None


def _check_unshared(node: Node, source: Node, order: dict[Node, int]) -> None:
    why = ""
    if source.op != "call_function" or _is_view(source):
        why = f"it writes to '{source.name}', which is an input or shares memory with another value"
    views = [user for user in source.users if _is_view(user) and order[user] < order[node]]
    for view in views:  # grows while it is read: views of views share the memory too
        if any(order[user] > order[node] for user in view.users):
            why = f"'{view.name}', a view of what it writes to, is read afterwards"
        views += [user for user in view.users if _is_view(user) and order[user] < order[node]]
    if why:
        raise CaptureError("an op writes in place", where=node.name, why=why, hint="the model runs as it was")


def _is_view(node: Node) -> bool:
    """True when the result may share memory with an operand."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    may_alias = ("reshape", "contiguous", "to", "flatten", "expand_as", "view_as", "type_as")
    return schema is not None and (
        any(r.alias_info is not None for r in schema.returns) or schema.name.split("::")[1] in may_alias
    )
