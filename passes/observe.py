"""Observers of a pipeline: numbered files per pass, and the difference that each pass made to the graph's text.

The text has one line a node, with the type and the model's source line, and region bodies indented below their call. It
is stable: equal graphs give equal text, so it can be compared, kept as golden text and searched.
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import Origin, SizeValue, TensorType, TupleType, all_facts, find_fact
from tilewright.ir.graph import info
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.passes.base import Pass, PassRecord

_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}


def graph_text(gm: GraphModule) -> str:
    """The graph as text, one line a node.

    Example:
        ``%linear_1: f32[T, 384] packed = aten.linear.default(%norm, %weight, %bias)  # modeling.py:10 self.query(x)``
    """
    return "\n".join(_lines(gm, "")) + "\n"


def _lines(gm: GraphModule, indent: str) -> Iterator[str]:
    for node in gm.graph.nodes:
        yield indent + _line(node)
        if node.op == "call_module":
            body = gm.get_submodule(str(node.target))
            if isinstance(body, GraphModule):
                yield from _lines(body, indent + "    ")


def _line(node: Node) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    layout, origin = find_fact(node, Layout), find_fact(node, Origin)
    # A padded or free value reads as before packing, so that a diff shows what packing changed and nothing else.
    told = layout is not None and layout.kind in (LayoutKind.PACKED, LayoutKind.PER_SEQUENCE)
    kind = f" {layout.kind.value}" if layout and told else ""
    arguments = [_argument(arg) for arg in node.args]
    arguments += [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    call = f"{_target(node)}({', '.join(arguments)})" if node.op.startswith("call_") else f"{node.op} {node.target}"
    source = f"  # {origin.source}" if origin and origin.source else ""
    return f"%{node.name}: {_type(node)}{kind} = {call}{source}"


def _target(node: Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload | str) else name


def _type(node: Node) -> str:
    size, items = find_fact(node, SizeValue), find_fact(node, TupleType)
    if size is not None:
        return f"size {size.value}"
    if items is not None:
        return f"({', '.join(map(_tensor, items.items))})"
    type_ = find_fact(node, TensorType)
    return _tensor(type_) if type_ else "?"


def _tensor(type_: TensorType) -> str:
    name = _SHORT.get(type_.dtype, str(type_.dtype).removeprefix("torch."))
    return f"{name}[{', '.join(map(str, type_.shape))}]"


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_argument, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return repr(value) if isinstance(value, str | float) else str(value)


def graph_facts(gm: GraphModule) -> dict[str, Any]:
    """All facts of the graph and its nodes as plain data for JSON, region bodies included."""
    found = info(gm)
    return {
        "name": found.name,
        "level": found.level.name.lower(),
        "inputs": [_plain(spec) for spec in found.inputs],
        "outputs": list(found.output.names),
        "bounds": {str(symbol): list(bound) for symbol, bound in found.bounds.items()},
        "reasons": found.reasons,
        "nodes": _node_facts(gm),
    }


def _node_facts(gm: GraphModule) -> list[dict[str, Any]]:
    rows = []
    for node in gm.graph.nodes:
        row: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target(node)}
        row["facts"] = {type(record).__name__: _plain(record) for record in all_facts(node)}
        if node.op == "call_module":
            body = gm.get_submodule(str(node.target))
            row["body"] = _node_facts(body) if isinstance(body, GraphModule) else []
        rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, sympy.Expr | torch.dtype) or not isinstance(value, bool | int | float | str | None):
        return str(value)
    return value


def summary_line(step: int, record: PassRecord) -> str:
    """One line about a pass: number, name, time, nodes before and after, ops added and removed, what it found."""
    ops = ", ".join(f"{count:+d} {op}" for op, count in record.op_diff.items())
    counts = ", ".join(f"{topic}={count}" for topic, count in record.counts.items())
    nodes = f"{record.nodes_before} -> {record.nodes_after} nodes"
    head = f"{step:02d} {record.name}: {record.seconds * 1e3:.1f} ms, {nodes}"
    return "; ".join(part for part in (head, ops, counts) if part)


def graph_diff(before: str, after: str, name: str) -> str:
    """Unified diff of two graph texts."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), f"before {name}", f"after {name}", lineterm="", n=1
    )
    return "\n".join(lines)


@dataclass
class GraphDiffs:
    """Keeps what each pass changed.

    Attributes:
        texts: the diff of each pass, in order.
    """

    texts: list[str] = field(default_factory=list)
    _before: str = field(default="", repr=False)

    def before(self, step: int, pass_: Pass, gm: GraphModule) -> None:
        """Remembers the text."""
        self._before = graph_text(gm)

    def after(self, step: int, pass_: Pass, gm: GraphModule, record: PassRecord) -> None:
        """Compares with the text before."""
        self.texts.append(graph_diff(self._before, graph_text(gm), record.name))


@dataclass
class ArtifactWriter:
    """Writes, for each pass, ``NN_name.txt`` (graph), ``NN_name.json`` (facts and record) and a line of ``passes.txt``.

    ``00_captured.txt`` is the graph before the first pass.

    Args:
        folder: created if needed; files of an earlier run are replaced.
    """

    folder: Path

    def before(self, step: int, pass_: Pass, gm: GraphModule) -> None:
        """Writes the captured graph before the first pass."""
        if step == 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "00_captured.txt").write_text(graph_text(gm))
            (self.folder / "passes.txt").write_text("")

    def after(self, step: int, pass_: Pass, gm: GraphModule, record: PassRecord) -> None:
        """Writes the graph that the pass has left."""
        stem = self.folder / f"{step:02d}_{record.name}"
        stem.with_suffix(".txt").write_text(graph_text(gm))
        facts = {"pass": str(pass_), "record": asdict(record), **graph_facts(gm)}
        stem.with_suffix(".json").write_text(json.dumps(facts, indent=1))
        with (self.folder / "passes.txt").open("a") as file:
            file.write(summary_line(step, record) + "\n")
