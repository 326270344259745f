"""Rules that hold at every level."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tilewright.errors import TilewrightError
from tilewright.ir.facts import Origin, SizeValue, TensorType, TupleType, find_fact
from tilewright.ir.graph import Level, get_tensor, info
from tilewright.ir.regions import Region
from tilewright.ir.sizes import BATCH, SEQ, SYMBOLS
from tilewright.passes.layout.axes import positional, symbols_in
from tilewright.passes.spec.rules import Rule, Violation, all_nodes, bodies, calls, graphs
from tilewright.passes.spec.types import types_hold

_OPS = {"placeholder", "get_attr", "call_function", "output"}


def _known_nodes(gm: GraphModule) -> Iterator[Violation]:
    allowed = _OPS | ({"call_module"} if info(gm).level >= Level.FUSED else set())
    for node in all_nodes(gm):
        if node.op not in allowed:
            yield Violation(node, f"it is a {node.op} node")


def _ordered(gm: GraphModule) -> Iterator[Violation]:
    for each in graphs(gm):
        seen: set[Node] = set()
        for node in each.graph.nodes:
            late = [operand.name for operand in node.all_input_nodes if operand not in seen]
            if late:
                yield Violation(node, f"it reads {', '.join(late)}, which comes after it")
            seen.add(node)


def _inputs_described(gm: GraphModule) -> Iterator[Violation]:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    specs = info(gm).inputs
    if len(placeholders) != len(specs):
        yield Violation(None, f"{len(placeholders)} placeholders, {len(specs)} described inputs")
        return
    for node, spec in zip(placeholders, specs, strict=True):
        type_ = find_fact(node, TensorType)
        if node.target != spec.name:
            yield Violation(node, f"input described here is '{spec.name}'")
        elif type_ is not None and type_ != TensorType(tuple(spec.shape), spec.dtype):
            yield Violation(node, f"its type is {type_}, the input is described as {spec.dtype} {spec.shape}")


def _output_flat(gm: GraphModule) -> Iterator[Violation]:
    last = next(iter(reversed(gm.graph.nodes)))
    if last.op != "output":
        yield Violation(last, "the graph does not end in an output node")
        return
    values: Any = last.args[0]
    if not isinstance(values, tuple) or not all(isinstance(value, Node) for value in values):
        yield Violation(last, "it does not return a flat tuple of nodes")
    elif any(find_fact(value, TensorType) is None for value in values):
        yield Violation(last, "it returns a node that is not a tensor")
    elif len(values) != len(info(gm).output.names):
        yield Violation(last, f"it returns {len(values)} tensors, {len(info(gm).output.names)} outputs are described")


def _typed(gm: GraphModule) -> Iterator[Violation]:
    for node in all_nodes(gm):
        if node.op == "output":
            continue
        if not any(find_fact(node, kind) for kind in (TensorType, TupleType, SizeValue)):
            yield Violation(node, "it carries no TensorType, TupleType or SizeValue")


def _origin_known(gm: GraphModule) -> Iterator[Violation]:
    for node in all_nodes(gm):
        if node.op.startswith("call_") and find_fact(node, Origin) is None:
            yield Violation(node, "it carries no Origin")


def _weights_resolve(gm: GraphModule) -> Iterator[Violation]:
    for each in graphs(gm):
        for node in each.graph.nodes:
            if node.op != "get_attr":
                continue
            try:
                tensor = get_tensor(each, node)
            except (AttributeError, TilewrightError):
                yield Violation(node, f"'{node.target}' is not a tensor of the graph module")
                continue
            type_ = find_fact(node, TensorType)
            if type_ is not None and type_ != TensorType(tuple(tensor.shape), tensor.dtype):
                yield Violation(node, f"its type is {type_}, the tensor is {tensor.dtype} {tuple(tensor.shape)}")


def _states(gm: GraphModule) -> set[Node]:
    """Placeholders that stand for memory of the caller, of the graph and of its regions."""
    names = {spec.name for spec in info(gm).inputs if spec.state}
    found = {node for node in gm.graph.nodes if node.op == "placeholder" and node.target in names}
    for call, body in bodies(gm):
        inside = (node for node in body.graph.nodes if node.op == "placeholder")
        found |= {inner for inner, outer in zip(inside, call.args, strict=False) if outer in found}
    return found


def _functional(gm: GraphModule) -> Iterator[Violation]:
    states = _states(gm)
    for node in calls(gm):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        for parameter, operand in zip(schema.arguments, positional(node), strict=False):
            written = parameter.alias_info is not None and parameter.alias_info.is_write
            if written and operand is not None and operand not in states:
                yield Violation(node, f"{node.target} writes to '{operand}', which is no memory of the caller")


def _no_random(gm: GraphModule) -> Iterator[Violation]:
    for node in calls(gm):
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _switched_off(node):
            yield Violation(node, f"{node.target} draws random numbers")


def _switched_off(node: Node) -> bool:
    """A dropout in evaluation mode, and attention with no dropout, draw nothing."""
    names = [parameter.name for parameter in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, positional(node), strict=False))
    no_dropout = "dropout_p" in names and not given.get("dropout_p")
    return no_dropout or given.get("train", given.get("training")) is False


def _no_dead_nodes(gm: GraphModule) -> Iterator[Violation]:
    for node in all_nodes(gm):
        if node.op not in ("placeholder", "output") and not node.users:
            yield Violation(node, "nothing reads it")


def _known_symbols(gm: GraphModule) -> Iterator[Violation]:
    level = info(gm).level
    known = set(SYMBOLS) if level >= Level.PACKED else {BATCH, SEQ}
    for node in all_nodes(gm):
        unknown = symbols_in(_sizes(node)) - known
        if unknown:
            names = ", ".join(sorted(map(str, unknown)))
            yield Violation(node, f"its size depends on {names}, which this level does not know")


def _sizes(node: Node) -> list[Any]:
    size, type_, items = find_fact(node, SizeValue), find_fact(node, TensorType), find_fact(node, TupleType)
    if size is not None:
        return [size.value]
    types = items.items if items is not None else (type_,) if type_ is not None else ()
    return [each for one in types for each in one.shape]


def _results_by_item(gm: GraphModule) -> Iterator[Violation]:
    for node in all_nodes(gm):
        if find_fact(node, TupleType) is None:
            continue
        for user in node.users:
            if user.target is not operator.getitem:
                yield Violation(user, f"it reads '{node.name}', which has several results, without choosing one")


def _facts_fit(gm: GraphModule) -> Iterator[Violation]:
    for node in all_nodes(gm):
        if find_fact(node, Region) is not None and node.op != "call_module":
            yield Violation(node, "it carries Region but calls no region")


COMMON = (
    Rule("known_nodes", "nodes are inputs, weights, calls and the output", _known_nodes),
    Rule("ordered", "every node comes after what it reads", _ordered),
    Rule("typed", "every node carries the type of its result", _typed),
    Rule("inputs_described", "placeholders are the inputs of GraphInfo, in order", _inputs_described),
    Rule("output_flat", "the output node returns a flat tuple of tensors, one for each described output", _output_flat),
    Rule("origin_known", "every call carries its Origin", _origin_known),
    Rule(
        "weights_resolve", "every get_attr node is a tensor of the graph module, of the type it says", _weights_resolve
    ),
    Rule("functional", "no op writes to an operand", _functional),
    Rule("no_random", "no op draws random numbers", _no_random),
    Rule("no_dead_nodes", "every node is read or is the output", _no_dead_nodes),
    Rule("known_symbols", "sizes are made of B and S, and of T from the packed level on", _known_symbols),
    Rule("results_by_item", "several results are read through getitem", _results_by_item),
    Rule("facts_fit", "facts about regions are on region calls", _facts_fit),
    Rule("types_hold", "each op, run on operands of its operands' types, gives its own type", types_hold),
)
