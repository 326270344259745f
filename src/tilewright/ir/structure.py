"""Structural keys: regions of equal structure share one key, and so one kernel.

The key names everything a kernel's text depends on: ops, constants, types with symbolic sizes, which values are
returned, and what the caller adds (strides of the operands). Names of nodes and contents of weights are not in it, so
the layers of a model have equal keys.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from torch.fx import GraphModule, Node

from tilewright.ir.facts import SizeValue, TensorType, TupleType, find_fact
from tilewright.ir.regions import Region


def structure_text(graph: GraphModule, region: Region, extra: Iterable[object] = ()) -> str:
    """The structure as text, one node a line; two regions are of equal structure when their texts are equal.

    Args:
        graph: the region's body.
        region: its fact; of this only the anchor counts.
        extra: what else the kernel depends on, e.g. shape, strides and kind of storage of each operand; by ``str``.
    """
    number: dict[Node, str] = {node: f"%{place}" for place, node in enumerate(graph.graph.nodes)}
    lines = [region.anchor.value, *map(str, extra)]
    for node in graph.graph.nodes:
        called = str(node.target) if node.op.startswith("call_") else node.op
        arguments = "" if node.op == "placeholder" else f"{_text(node.args, number)}{_text(node.kwargs, number)}"
        lines.append(f"{number[node]} = {called}{arguments} : {_type(node)}")
    return "\n".join(lines)


def structure_key(graph: GraphModule, region: Region, extra: Iterable[object] = ()) -> str:
    """Eight hexadecimal digits of the hash of ``structure_text``."""
    return hashlib.sha256(structure_text(graph, region, extra).encode()).hexdigest()[:8]


def _text(value: Any, number: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return number[value]
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_text(item, number) for item in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}={_text(item, number)}' for key, item in sorted(value.items()))}}}"
    # 1, 1.0 and True are different constants; repr keeps them and every digit of a float apart.
    return repr(value)


def _type(node: Node) -> str:
    kinds = (find_fact(node, TensorType), find_fact(node, TupleType), find_fact(node, SizeValue))
    return str(next((kind for kind in kinds if kind), ""))
