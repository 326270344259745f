"""Graphs as JSON and back, at any level. No pickle: reading a graph file runs no code of the file's author.

A tensor of the GraphModule is written as a key into a table of tensors, which the caller stores (safetensors).
"""

import importlib
import math
import operator
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from tilewright.errors import ArtifactError
from tilewright.ir import facts as fact_records
from tilewright.ir import layout as layout_records
from tilewright.ir import regions as region_records
from tilewright.ir.facts import set_fact
from tilewright.ir.graph import GraphInfo, InputSpec, Level, OutputSpec, get_tensor, info, set_info
from tilewright.ir.size_text import size_from_text, size_to_text

FORMAT = 1

_OPERATORS = {f"operator.{f.__name__}": f for f in (operator.getitem, operator.add, operator.sub, operator.mul)}
_OPERATORS["operator.floordiv"] = operator.floordiv
_RECORDS: dict[str, type] = {
    name: value
    for module in (fact_records, layout_records, region_records)
    for name, value in vars(module).items()
    if isinstance(value, type) and value.__module__ == module.__name__
}
_OUTPUT_MODULES = ("transformers.modeling_outputs",)


def graph_to_json(gm: GraphModule, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The graph as plain data.

    Args:
        gm: a graph module at any level, with its ``GraphInfo``.
        tensors: receives the tensors of ``get_attr`` nodes by key; a tensor used twice is stored once.
    """
    found = info(gm)
    keys = {id(tensor): key for key, tensor in tensors.items()}
    return {
        "format": FORMAT,
        "level": found.level.name.lower(),
        "name": found.name,
        "inputs": [_encode(spec) for spec in found.inputs],
        "output": {"names": list(found.output.names), "class": found.output.class_path},
        "bounds": {str(symbol): list(bound) for symbol, bound in found.bounds.items()},
        "reasons": found.reasons,
        "graph": _nodes_to_json(gm, tensors, keys),
    }


def graph_from_json(data: dict[str, Any], tensors: dict[str, torch.Tensor]) -> GraphModule:
    """Reads what ``graph_to_json`` wrote.

    Raises:
        ArtifactError: a newer format, an unknown op, fact or output class, or a missing tensor.
    """
    if data.get("format") != FORMAT:
        raise ArtifactError(
            "cannot read this graph file",
            why=f"its format is {data.get('format')!r}, this version reads {FORMAT}",
            hint="write it again with this version of tilewright",
        )
    try:
        gm = _nodes_from_json(data["graph"], tensors)
        names = tuple(data["output"]["names"])
        output = OutputSpec(output_builder(data["output"]["class"], names), names, data["output"]["class"])
        bounds = {size_from_text(symbol): tuple(bound) for symbol, bound in data["bounds"].items()}
        inputs = tuple(_decode(spec) for spec in data["inputs"])
        level = Level[data["level"].upper()]
        set_info(gm, GraphInfo(level, inputs, output, bounds, dict(data["reasons"]), data["name"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError("the graph file is incomplete or altered", why=f"{type(error).__name__}: {error}") from None
    return gm


def output_builder(class_path: str | None, names: tuple[str, ...]) -> Callable[[list[torch.Tensor]], Any]:
    """What turns flat outputs into the model's output, from their dotted names alone.

    ``hidden_states.0`` is element 0 of the field ``hidden_states``; ``output`` alone is the tensor itself, and
    ``output_0``, ``output_1`` are a tuple.

    Raises:
        ArtifactError: the class is not one of transformers' output classes.
    """
    module, _, name = (class_path or "").rpartition(".")
    if class_path is not None and module not in _OUTPUT_MODULES:
        raise ArtifactError(
            f"output class {class_path} is not allowed", why=f"only classes of {', '.join(_OUTPUT_MODULES)} are made"
        )
    cls = getattr(importlib.import_module(module), name) if class_path else None

    def build(flat: list[torch.Tensor]) -> Any:
        fields = _nested(dict(zip(names, flat, strict=True)))
        if cls is not None:
            return cls(**fields)
        if names == ("output",):
            return flat[0]
        return tuple(fields.values()) if names[0].startswith("output_") else fields

    return build


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as dicts inside dicts; where the keys are positions, tuples."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        head, _, rest = name.partition(".")
        groups.setdefault(head, {})[rest] = value
    found: dict[str, Any] = {}
    for head, inner in groups.items():
        below = inner[""] if "" in inner else _nested(inner)
        positions = isinstance(below, dict) and all(key.isdigit() for key in below)
        found[head] = tuple(below.values()) if positions else below
    return found


def _nodes_to_json(gm: GraphModule, tensors: dict[str, torch.Tensor], keys: dict[int, str]) -> list[dict[str, Any]]:
    rows = []
    for node in gm.graph.nodes:
        row: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target_name(node)}
        if node.op == "get_attr":
            row["tensor"] = _store(get_tensor(gm, node), str(node.target), tensors, keys)
        if node.op == "call_module":
            row["body"] = _nodes_to_json(gm.get_submodule(str(node.target)), tensors, keys)  # type: ignore[arg-type]
        row["args"] = [_encode(arg) for arg in node.args]
        if node.kwargs:
            row["kwargs"] = {key: _encode(value) for key, value in node.kwargs.items()}
        row["facts"] = [_encode(record) for record in fact_records.all_facts(node)]
        rows.append(row)
    return rows


def _store(tensor: torch.Tensor, wanted: str, tensors: dict[str, torch.Tensor], keys: dict[int, str]) -> str:
    if id(tensor) not in keys:
        key, count = wanted, 1
        while key in tensors:
            key, count = f"{wanted}.{count}", count + 1
        tensors[key] = tensor
        keys[id(tensor)] = key
    return keys[id(tensor)]


def _target_name(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    for name, function in _OPERATORS.items():
        if node.target is function:
            return name
    return str(node.target)


def _target(name: str) -> Any:
    if name in _OPERATORS:
        return _OPERATORS[name]
    if name.count(".") != 2:
        raise ValueError(f"{name!r} is not an op")
    namespace, op, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def _encode(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case Node():
            return {"node": value.name}
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
        case sympy.Expr():
            return {"size": size_to_text(value)}
        case Enum():
            return {"enum": type(value).__name__, "value": value.value}
        case list() | tuple():
            return {"list" if isinstance(value, list) else "tuple": [_encode(item) for item in value]}
    if is_dataclass(value) and not isinstance(value, type):
        return {"record": type(value).__name__, **{f.name: _encode(getattr(value, f.name)) for f in fields(value)}}
    raise ArtifactError(f"cannot write a {type(value).__name__} into a graph file", why=repr(value)[:80])


def _decode(value: Any, nodes: dict[str, Node] | None = None) -> Any:
    if not isinstance(value, dict):
        return value
    match value:
        case {"record": name}:
            cls = InputSpec if name == "InputSpec" else _RECORDS[name]
            return cls(**{key: _decode(item, nodes) for key, item in value.items() if key != "record"})
        case {"float": text}:
            return float(text)
        case {"node": name}:
            return (nodes or {})[name]
        case {"dtype": name}:
            return _dtype(name)
        case {"device": name}:
            return torch.device(name)
        case {"size": text}:
            return size_from_text(text)
        case {"enum": name, "value": item}:
            return _RECORDS[name](item)
        case {"list": items}:
            return [_decode(item, nodes) for item in items]
        case {"tuple": items}:
            return tuple(_decode(item, nodes) for item in items)
    raise ValueError(f"unknown encoding {value!r}")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return found


def _nodes_from_json(rows: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> GraphModule:
    root = torch.nn.Module()
    graph = Graph()
    nodes: dict[str, Node] = {}
    for row in rows:
        target: Any = row["target"]
        if row["op"] == "call_function":
            target = _target(target)
        if row["op"] == "get_attr":
            target = f"tensor_{len(nodes)}"
            root.register_buffer(target, tensors[row["tensor"]])
        if row["op"] == "call_module":
            target = row["name"]
            root.add_module(target, _nodes_from_json(row["body"], tensors))
        args = tuple(_decode(arg, nodes) for arg in row["args"])
        kwargs = {key: _decode(item, nodes) for key, item in row.get("kwargs", {}).items()}
        node = graph.create_node(row["op"], target, args, kwargs, name=row["name"])
        for record in row["facts"]:
            set_fact(node, _decode(record))
        nodes[row["name"]] = node
    return GraphModule(root, graph)
