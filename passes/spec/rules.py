"""What a rule of a level's spec is, and how rules walk a graph."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from tilewright.ir.facts import find_fact
from tilewright.ir.regions import Region


@dataclass(frozen=True)
class Violation:
    """A place where a rule is broken.

    Attributes:
        node: the node; None where it is the graph as a whole.
        why: the reason, with the offending value.
    """

    node: Node | None
    why: str


@dataclass(frozen=True)
class Rule:
    """One promise of a level.

    Attributes:
        name: unique in the level's spec, snake case.
        statement: the promise in one sentence.
        check: yields where it is broken.
    """

    name: str
    statement: str
    check: Callable[[GraphModule], Iterator[Violation]]


def bodies(gm: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """Region calls of the graph with their bodies."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            body = gm.get_submodule(str(node.target))
            if isinstance(body, GraphModule):
                yield node, body


def graphs(gm: GraphModule) -> Iterator[GraphModule]:
    """The graph, then the body of each region."""
    yield gm
    for _, body in bodies(gm):
        yield body


def all_nodes(gm: GraphModule) -> Iterator[Node]:
    """Nodes of the graph and of all region bodies."""
    for each in graphs(gm):
        yield from each.graph.nodes


def calls(gm: GraphModule) -> Iterator[Node]:
    """Op calls of the graph and of all region bodies."""
    for node in all_nodes(gm):
        if node.op == "call_function":
            yield node


def regions(gm: GraphModule) -> Iterator[tuple[Node, Region]]:
    """Region calls that carry their fact."""
    for node, _ in bodies(gm):
        region = find_fact(node, Region)
        if region is not None:
            yield node, region
