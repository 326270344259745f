"""One region with the views it reads and writes: what an emitter is given."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.ir.facts import TensorType, find_fact
from tilewright.ir.program import View
from tilewright.ir.regions import Region

Inputs = dict[Node, tuple[View, torch.dtype]]


@dataclass(frozen=True)
class RegionCall:
    """A region as it is called.

    Attributes:
        name: name of the call in the outer graph; scratch values are named after it.
        graph: the region's body: placeholders, registered ops, a tuple of tensors as output.
        region: the fact on the call.
        inputs: one view per placeholder that is a tensor; sizes come after them and are in the facts.
        outputs: one contiguous view per element of the output.
    """

    name: str
    graph: GraphModule
    region: Region
    inputs: tuple[View, ...]
    outputs: tuple[View, ...]

    def read(self, builder: ProgramBuilder) -> Inputs:
        """View and element type behind each placeholder that is a tensor; the others are sizes."""
        placeholders = (node for node in self.graph.graph.nodes if node.op == "placeholder")
        nodes = [node for node in placeholders if find_fact(node, TensorType)]
        return {node: (view, builder.dtype(view)) for node, view in zip(nodes, self.inputs, strict=True)}

    def results(self) -> Iterator[tuple[Node, View]]:
        """Each node of the output with the view it is stored to."""
        output = next(node for node in self.graph.graph.nodes if node.op == "output")
        yield from zip(output.args[0], self.outputs, strict=True)
