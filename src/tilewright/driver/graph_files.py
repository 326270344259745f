"""Graph export for viewers: JSON, DOT and GraphML of a graph at any level, through networkx."""

import json
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch.fx import GraphModule

from tilewright.errors import OptionError
from tilewright.ir.facts import Origin, SizeValue, TensorType, TupleType, find_fact
from tilewright.ir.regions import AttentionTable, GemmTable, Placement, Region
from tilewright.ir.serialize import graph_to_json

FORMATS = ("json", "dot", "graphml")


def to_networkx(gm: GraphModule) -> "nx.DiGraph[str]":
    """The graph as a networkx DiGraph: one node a graph node, regions as one node each; values flow along the edges.

    Node attributes are strings: op, type, origin, and what regions carry.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in gm.graph.nodes:
        graph.add_node(node.name, **_attributes(gm, node))
        for position, source in enumerate(node.all_input_nodes):
            graph.add_edge(source.name, node.name, position=str(position))
    return graph


def _attributes(gm: GraphModule, node: torch.fx.Node) -> dict[str, str]:
    found = {"op": node.op, "target": str(node.target)}
    if value := find_fact(node, TensorType):
        found["type"] = _type_text(value)
    if values := find_fact(node, TupleType):
        found["type"] = ", ".join(map(_type_text, values.items))
    if size := find_fact(node, SizeValue):
        found["type"] = f"size {size.value}"
    if (origin := find_fact(node, Origin)) and origin.source:
        found["source"] = origin.source
    if region := find_fact(node, Region):
        body = gm.get_submodule(str(node.target))
        found["anchor"] = region.anchor.value
        found["nodes"] = ", ".join(n.name for n in body.graph.nodes if n.op == "call_function")  # type: ignore[union-attr]
    if table := find_fact(node, GemmTable) or find_fact(node, AttentionTable):
        found["table"] = ", ".join(f"<={bound or 'any'}: {variant}" for bound, variant in table.entries)
    if place := find_fact(node, Placement):
        found["place"] = f"{place.device}, stage {place.stage}, weights on {place.weight_tier}"
    return found


def _type_text(value: TensorType) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def write_graph(gm: GraphModule, path: Path, file_format: str) -> None:
    """Writes the graph for a viewer. ``json`` is the lossless form without the weights' values.

    Raises:
        OptionError: the format is not one of ``FORMATS``.
    """
    if file_format == "json":
        path.write_text(json.dumps(graph_to_json(gm, {}), indent=1))
    elif file_format == "graphml":
        nx.write_graphml(to_networkx(gm), path)
    elif file_format == "dot":
        path.write_text(_dot(to_networkx(gm)))
    else:
        raise OptionError(f"format {file_format!r} is not a choice", hint=f"choose one of {', '.join(FORMATS)}, onnx")


def _dot(graph: "nx.DiGraph[str]") -> str:
    lines = ["digraph tilewright {", "  node [shape=box, fontname=monospace];"]
    for name, data in graph.nodes(data=True):
        label: list[Any] = [name, data.get("anchor") or data["target"], data.get("type", "")]
        text = "\\n".join(str(part).replace('"', "'") for part in label if part)
        lines.append(f'  "{name}" [label="{text}"];')
    lines += [f'  "{source}" -> "{target}";' for source, target in graph.edges]
    return "\n".join([*lines, "}", ""])
