"""Rules of the level fused: all work is in regions, each with one anchor, none breaking the tile-dependence rule."""

import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node

from tilewright.ir.facts import find_fact
from tilewright.ir.regions import Anchor, CopyBefore, Region, RegionTag
from tilewright.ops import Flow, traits_of
from tilewright.passes.regions.anchors import computes
from tilewright.passes.spec.rules import Rule, Violation, all_nodes, bodies, regions

# Flows of which a region of this kind holds exactly one op, and those of which it holds none.
_ANCHORS = {Flow.CONTRACT, Flow.ATTENTION, Flow.APPEND, Flow.GROUPED, Flow.ROUTE}
_HOLDS = {
    Anchor.GEMM: ({Flow.CONTRACT}, {*_ANCHORS, Flow.OTHER} - {Flow.CONTRACT}),
    Anchor.EXPERTS: ({Flow.GROUPED}, {*_ANCHORS, Flow.OTHER} - {Flow.GROUPED}),
    Anchor.ROUTE: ({Flow.ROUTE}, {*_ANCHORS, Flow.OTHER} - {Flow.ROUTE}),
    Anchor.ATTENTION: ({Flow.ATTENTION}, {*_ANCHORS, Flow.OTHER} - {Flow.ATTENTION}),
    Anchor.APPEND: ({Flow.APPEND}, {*_ANCHORS, Flow.OTHER} - {Flow.APPEND}),
    Anchor.ROW: (set(), {*_ANCHORS, Flow.OTHER}),
    Anchor.INDEX: ({Flow.PACKING}, {*_ANCHORS, Flow.OTHER}),
    Anchor.OPAQUE: (set(), set()),
}


def _work_in_regions(gm: GraphModule) -> Iterator[Violation]:
    for node in gm.graph.nodes:
        if computes(node):
            yield Violation(node, f"{node.target} computes outside of every region")


def _region_known(gm: GraphModule) -> Iterator[Violation]:
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        if not isinstance(gm.get_submodule(str(node.target)), GraphModule):
            yield Violation(node, "what it calls is not a graph module")
        elif find_fact(node, Region) is None:
            yield Violation(node, "it carries no Region")


def _tags_used_up(gm: GraphModule) -> Iterator[Violation]:
    for node in all_nodes(gm):
        for kind in (RegionTag, CopyBefore):
            if find_fact(node, kind) is not None:
                yield Violation(node, f"it still carries {kind.__name__}")


def _ids_unique(gm: GraphModule) -> Iterator[Violation]:
    seen: dict[int, Node] = {}
    for node, region in regions(gm):
        if region.id in seen:
            yield Violation(node, f"region {region.id} is '{seen[region.id].name}' already")
        seen[region.id] = node


def _bodies_closed(gm: GraphModule) -> Iterator[Violation]:
    for call, body in bodies(gm):
        for node in body.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                yield Violation(call, f"its body holds {node.op} '{node.name}' instead of taking it as an operand")


def _operands_by_position(gm: GraphModule) -> Iterator[Violation]:
    for call, _ in bodies(gm):
        if call.kwargs:
            yield Violation(call, f"it passes {', '.join(call.kwargs)} by name")


def _results_read(gm: GraphModule) -> Iterator[Violation]:
    for call, body in bodies(gm):
        if (region := find_fact(call, Region)) is not None and region.anchor is Anchor.INDEX:
            continue  # a program reads T from the offsets, whoever else does
        results: Any = next(iter(reversed(body.graph.nodes))).args[0]
        read = {user.args[1] for user in call.users if user.target is operator.getitem}
        for place in range(len(results)):
            if place not in read:
                yield Violation(call, f"nothing reads its result {place}, '{results[place].name}'")


def _one_anchor(gm: GraphModule) -> Iterator[Violation]:
    for call, region in regions(gm):
        ops = [node.target for node in _body(gm, call).graph.nodes if node.op == "call_function"]
        flows = [traits_of(target).flow for target in ops if target is not operator.getitem]
        one, none = _HOLDS[region.anchor]
        for flow in one:
            if flows.count(flow) != 1:
                yield Violation(
                    call, f"a region of kind {region.anchor.value} holds {flows.count(flow)} {flow.value} ops"
                )
        for flow in none & set(flows):
            yield Violation(call, f"a region of kind {region.anchor.value} holds a {flow.value} op")


def _anchor_named(gm: GraphModule) -> Iterator[Violation]:
    for call, region in regions(gm):
        names = {node.name for node in _body(gm, call).graph.nodes if node.op == "call_function"}
        if region.anchor_node is not None and region.anchor_node not in names:
            yield Violation(call, f"its anchor '{region.anchor_node}' is not in its body")
        if region.anchor_node is None and region.anchor in (Anchor.GEMM, Anchor.EXPERTS, Anchor.ATTENTION):
            yield Violation(call, f"a region of kind {region.anchor.value} names no anchor")


def _opaque_has_reason(gm: GraphModule) -> Iterator[Violation]:
    for call, region in regions(gm):
        if region.anchor is Anchor.OPAQUE and not region.reason:
            yield Violation(call, "it runs eager without a reason")


def _tile_dependence(gm: GraphModule) -> Iterator[Violation]:
    for call, region in regions(gm):
        if region.anchor not in (Anchor.GEMM, Anchor.EXPERTS):
            continue
        after: set[Node] = set()
        for node in _body(gm, call).graph.nodes:
            flow = traits_of(node.target).flow if node.op == "call_function" else None
            if flow in (Flow.CONTRACT, Flow.GROUPED):
                after.add(node)
            elif after & set(node.all_input_nodes) and node.op == "call_function":
                after.add(node)
                if flow in (Flow.LAST_AXIS, Flow.REDUCE):
                    yield Violation(call, f"'{node.name}' needs a whole row of the product, which no one tile has")


def _body(gm: GraphModule, call: Node) -> GraphModule:
    body = gm.get_submodule(str(call.target))
    assert isinstance(body, GraphModule)
    return body


FUSED = (
    Rule("region_known", "every called module is a region with its fact", _region_known),
    Rule("work_in_regions", "every op that computes is in a region", _work_in_regions),
    Rule("tags_used_up", "no tag of the region analysis is left", _tags_used_up),
    Rule("ids_unique", "each region has its own id", _ids_unique),
    Rule("bodies_closed", "a region takes all it reads as operands", _bodies_closed),
    Rule("operands_by_position", "a region's operands are passed by position", _operands_by_position),
    Rule("results_read", "a region returns only what is read", _results_read),
    Rule("one_anchor", "a region holds the ops of its kind, and one anchor", _one_anchor),
    Rule("anchor_named", "the anchor is in the region's body", _anchor_named),
    Rule("opaque_has_reason", "a region that runs eager says why", _opaque_has_reason),
    Rule("tile_dependence", "an epilogue needs one tile of its product for each of its own", _tile_dependence),
)
