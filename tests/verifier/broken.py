"""Valid graphs at every level, and helpers to break them in one place."""

import functools
from dataclasses import replace
from typing import Any

import torch
from numerics.random_graphs import Padded, copy_of
from torch.fx import GraphModule, Node

from tilewright.ir.facts import Origin, TensorType, fact, find_fact, set_fact
from tilewright.ir.graph import Level, info, update_info
from tilewright.ir.layout import Layout
from tilewright.ir.regions import Anchor, Region
from tilewright.passes.pipeline import pipeline, run_pipeline

aten = torch.ops.aten


@functools.cache
def _made(level: Level) -> GraphModule:
    g = Padded()
    x = g.encoder_layer(g.embed(g.ids, 23, 24))
    gm = g.done(x, g.call(aten.tanh.default, g.linear(g.first(x), "pooler", 24)))
    if level is Level.EXPORTED:
        update_info(gm, level=level)
        return gm
    passes = [each for each in pipeline(2, "on") if Level.NORMALIZED < each.ensures <= level]
    gm, _ = run_pipeline(gm, passes, verify=True)
    return gm


def valid(level: Level) -> GraphModule:
    """A fresh valid graph of the level: one encoder layer, per-token output and pooler."""
    return copy_of(_made(level))


def first(gm: GraphModule, target: Any) -> Node:
    """The first call of an op."""
    return next(node for node in gm.graph.nodes if node.target is target)


def last_tensor_call(gm: GraphModule) -> Node:
    """A call near the end whose result is a tensor and which reads the result of another call."""
    for node in reversed(gm.graph.nodes):
        reads_call = any(operand.op.startswith("call_") for operand in node.all_input_nodes)
        if node.op == "call_function" and find_fact(node, TensorType) is not None and reads_call:
            return node
    raise AssertionError("the graph has no such call")


def output(gm: GraphModule) -> Node:
    """The output node."""
    return next(iter(reversed(gm.graph.nodes)))


def insert(
    gm: GraphModule, target: Any, args: tuple[Any, ...], type_: Any, layout: Layout | None = None, **kwargs: Any
) -> Node:
    """A call before the output node, with facts."""
    with gm.graph.inserting_before(output(gm)):
        node = gm.graph.call_function(target, args, kwargs)
    set_fact(node, type_)
    set_fact(node, Origin(f"test.py:1 {node.name}"))
    if layout is not None:
        set_fact(node, layout)
    return node


def return_instead(gm: GraphModule, node: Node) -> Node:
    """Makes the first output that node."""
    last = output(gm)
    values: Any = last.args[0]
    last.args = ((node, *values[1:]),)
    return node


def return_also(gm: GraphModule, node: Node) -> Node:
    """Makes the node one more output."""
    last, described = output(gm), info(gm).output
    values: Any = last.args[0]
    last.args = ((*values, node),)
    update_info(gm, output=replace(described, names=(*described.names, "extra")))
    return node


def returned(gm: GraphModule) -> Node:
    """The first output's node."""
    values: Any = output(gm).args[0]
    return values[0]


def region(gm: GraphModule, anchor: Anchor) -> tuple[Node, Region]:
    """The first region of a kind."""
    for node in gm.graph.nodes:
        found = find_fact(node, Region)
        if found is not None and found.anchor is anchor:
            return node, found
    raise AssertionError(f"no region of kind {anchor}")


def body(gm: GraphModule, call: Node) -> GraphModule:
    """A region's body."""
    found = gm.get_submodule(str(call.target))
    assert isinstance(found, GraphModule)
    return found


def type_of(node: Node) -> TensorType:
    """Type of a tensor node."""
    return fact(node, TensorType)
