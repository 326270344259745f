"""What passes use to change a graph: new nodes get their type and origin where they are made."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import SizeValue, TensorType, copy_origin, fact, find_fact, set_fact
from tilewright.ir.graph import info
from tilewright.ir.infer import TypeInference
from tilewright.ir.sizes import Size

aten = torch.ops.aten
Arg = Any


class Rewriter:
    """Makes and replaces nodes of one graph for one pass.

    Args:
        gm: the graph module, changed in place.
        name: name of the pass, for ``Origin.made_by``.
    """

    def __init__(self, gm: GraphModule, name: str) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.name = name
        self.types = TypeInference(info(gm).bounds)
        self.changes = 0
        self._constants = 0

    def call(self, like: Node, target: Any, *args: Arg, type: TensorType | None = None, **kwargs: Arg) -> Node:
        """A new call before ``like``, with the origin of ``like``.

        Args:
            type: its type where the caller knows it, which saves inferring it.
        """
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args, kwargs)
        set_fact(node, type if type is not None else self.types.result_type(target, args, kwargs))
        copy_origin(like, node, self.name)
        self.changes += 1
        return node

    def constant(self, like: Node, tensor: torch.Tensor, name: str = "folded") -> Node:
        """A ``get_attr`` node on a new tensor of the graph module; a number is put behind the name."""
        while hasattr(self.gm, f"{name}_{self._constants}"):
            self._constants += 1
        key = f"{name}_{self._constants}"
        self.gm.register_buffer(key, tensor.detach())
        with self.graph.inserting_before(like):
            node = self.graph.get_attr(key)
        set_fact(node, TensorType(tuple(tensor.shape), tensor.dtype))
        self.changes += 1
        return node

    def replace(self, node: Node, new: Node) -> None:
        """Uses ``new`` wherever ``node`` was used, and removes ``node``."""
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.changes += 1

    def size(self, like: Node, wanted: Size, sources: Sequence[Node]) -> int | Node:
        """The size as an argument: an int, or a ``sym_size`` node of what has it as an axis.

        That is one of ``sources`` where there is one, else an input of the graph.

        Raises:
            KeyError: nothing has such an axis.
        """
        if isinstance(wanted, int):
            return wanted
        for source in (*sources, *self.graph.find_nodes(op="placeholder")):
            shape = fact(source, TensorType).shape
            if wanted in shape:
                return self.call(like, aten.sym_size.int, source, shape.index(wanted))
        raise KeyError(f"no operand and no input has an axis of size {wanted}")


def shape_of(node: Node) -> tuple[Size, ...]:
    """Shape of the tensor the node yields."""
    return fact(node, TensorType).shape


def dtype_of(node: Node) -> torch.dtype:
    """Element type of the tensor the node yields."""
    return fact(node, TensorType).dtype


def rank_of(node: Node) -> int:
    """Number of axes of the tensor the node yields."""
    return len(fact(node, TensorType).shape)


def size_value(arg: Arg) -> Size | None:
    """The size an argument stands for: an int, or a node with a SizeValue; None for anything else."""
    if isinstance(arg, Node):
        found = find_fact(arg, SizeValue)
        return found.value if found else None
    return arg if isinstance(arg, int) and not isinstance(arg, bool) else None


def is_call(node: Any, *targets: Any) -> bool:
    """True for a call of one of the targets."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def operand(node: Node, position: int = 0) -> Any:
    """A positional argument; typed freely, as fx's own type covers every nesting."""
    return node.args[position]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def erase_dead(gm: GraphModule) -> int:
    """Removes calls and attributes nothing uses; returns how many."""
    count = 0
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            gm.graph.erase_node(node)
            count += 1
    return count
