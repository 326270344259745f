"""Results of a region: which node holds their elements, what has to be computed for them, and how they are stored."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from tilewright.codegen.index import Index
from tilewright.codegen.nodes import arguments
from tilewright.codegen.region_call import Inputs
from tilewright.codegen.writer import KernelWriter, Register
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.program import View
from tilewright.ir.sizes import Size

packing = torch.ops.tilewright
aten = torch.ops.aten

_PURE_VIEWS = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dims)


@dataclass(frozen=True)
class Result:
    """A result: the node whose elements, in row-major order, are the elements of ``view``."""

    node: Node
    view: View
    scatter: Node | None = None

    @property
    def shape(self) -> tuple[Size, ...]:
        """Shape of the node."""
        return fact(self.node, TensorType).shape


def peel(node: Node, view: View, inputs: Inputs) -> Result:
    """Follows views that keep the order of elements: the store is the same without them."""
    while node not in inputs and node.target in _PURE_VIEWS:
        node = arguments(node)["self"]
    if node not in inputs and node.target == packing.scatter_rows.default:
        return Result(arguments(node)["x"], view, node)
    return Result(node, view)


def needed_nodes(nodes: Sequence[Node], inputs: Inputs) -> list[Node]:
    """Nodes that have to be computed for ``nodes``, in the order of the graph."""
    needed: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in needed and node not in inputs and node.op != "placeholder":
            needed.add(node)
            pending += node.all_input_nodes
    return [node for node in next(iter(needed)).graph.nodes if node in needed] if needed else []


def depends_on(node: Node, other: Node) -> bool:
    """Whether a node is ``other`` or computed from it."""
    return other in needed_nodes([node], {})


def store(writer: KernelWriter, view: View, dtype: torch.dtype, place: Index, value: Register) -> None:
    """Stores a value at a place of a contiguous view, where the index variables of the place count."""
    pointer = writer.pointer(view, dtype, "out")
    mask = writer.mask(place.deps)
    address = f"{pointer} + {writer.index_text(place)}"
    writer.statement(f"tl.store({address}, {value.text}{f', mask={mask}' if mask else ''})")
