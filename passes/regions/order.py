"""An order in which units of nodes can run, each unit as a whole."""

from collections.abc import Callable, Iterable

from torch.fx import Node


def in_running_order(nodes: Iterable[Node], unit_of: Callable[[Node], tuple[Node, ...]]) -> list[tuple[Node, ...]]:
    """Units so ordered that each comes after the units it reads, otherwise as early as its first node.

    Args:
        nodes: the graph's nodes, in order.
        unit_of: the nodes that run together with a node, itself included; always the same tuple of nodes for each.
    """
    done: dict[Node, tuple[Node, ...]] = {}
    entered: set[Node] = set()
    for start in nodes:
        # Depth-first over producers with a stack of its own: graphs are deeper than Python's recursion limit.
        stack = [(start, False)]
        while stack:
            node, inputs_done = stack.pop()
            unit = unit_of(node)
            if inputs_done:
                done.setdefault(unit[0], unit)
            elif unit[0] not in entered:
                entered.add(unit[0])
                stack.append((node, True))
                inputs = [source for member in unit for source in member.all_input_nodes]
                stack += [(source, False) for source in reversed(inputs) if unit_of(source)[0] not in entered]
    return list(done.values())
