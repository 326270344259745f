"""Turns tagged regions into sub-GraphModules called from the outer graph."""

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from tilewright.ir.facts import (
    Origin,
    SizeValue,
    TensorType,
    TupleType,
    copy_origin,
    drop_fact,
    fact,
    find_fact,
    set_fact,
)
from tilewright.ir.graph import Level
from tilewright.ir.regions import Anchor, CopyBefore, Region, RegionTag
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.regions.order import in_running_order


@dataclass(frozen=True)
class OutlineRegions(Pass):
    """Moves each region that ``find_regions`` tagged into a GraphModule ``region_<id>``; see ``tilewright.ir.regions``.

    Operands tagged ``CopyBefore`` are copied by a region of their own first.
    """

    name: ClassVar[str] = "outline_regions"
    requires: ClassVar[Level] = Level.PACKED
    ensures: ClassVar[Level] = Level.FUSED

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites ``gm`` in place."""
        copies = _insert_copies(gm)
        nodes = list(gm.graph.nodes)
        members: dict[int, list[Node]] = {}
        for node in nodes:
            tag = find_fact(node, RegionTag)
            if tag is not None:
                members.setdefault(tag.region, []).append(node)
        units = {number: tuple(group) for number, group in members.items()}

        def unit_of(node: Node) -> tuple[Node, ...]:
            tag = find_fact(node, RegionTag)
            return units[tag.region] if tag else (node,)

        outer = _Outer(gm)
        for unit in in_running_order(nodes, unit_of):
            if find_fact(unit[0], RegionTag) is not None:
                outer.call_region(unit)
            elif unit[0].op != "output":
                outer.copy(unit[0])
        outer.finish(nodes[-1])
        return PassResult(gm, True, {"regions": len(units), "copies": copies})


def _insert_copies(gm: GraphModule) -> int:
    """Puts a clone, tagged as a region of its own, before each operand that needs one; equal copies are shared."""
    clones: dict[Node, Node] = {}
    number = 1 + max((tag.region for node in gm.graph.nodes if (tag := find_fact(node, RegionTag))), default=-1)
    for node in list(gm.graph.nodes):
        copy = find_fact(node, CopyBefore)
        if copy is None:
            continue
        operands = [node.all_input_nodes[place] for place in copy.operands]
        for source in operands:
            if source not in clones:
                with gm.graph.inserting_before(node):
                    clone = gm.graph.call_function(torch.ops.aten.clone.default, (source,))
                set_fact(clone, fact(source, TensorType))
                copy_origin(source, clone, OutlineRegions.name)
                record = Region(number, Anchor.ROW, None, refused=((node.name, copy.why),))
                set_fact(clone, RegionTag(number, record))
                clones[source] = clone
                number += 1
            node.replace_input_with(source, clones[source])
        drop_fact(node, CopyBefore)
    return len(clones)


class _Outer:
    """Builds the new outer graph unit by unit."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.graph = Graph()
        self.new: dict[Node, Node] = {}
        self.count = 0

    def copy(self, node: Node) -> None:
        """Takes over a node that stays outside."""
        self.new[node] = _copy_node(self.graph, node, self.new)

    def call_region(self, unit: tuple[Node, ...]) -> None:
        """Outlines one region and calls it."""
        tag = next(tag for node in unit if (tag := find_fact(node, RegionTag)) and tag.record)
        record = tag.record or Region(tag.region, Anchor.ROW, None)
        body = _Body(unit)
        results = body.results(record)
        name = f"region_{self.count}"
        self.gm.add_module(name, GraphModule(self.gm, body.finish(results), class_name=name))
        call = self.graph.call_module(name, tuple(self.new[source] for source in body.sources))
        anchor = next((node for node in unit if node.name == record.anchor_node), unit[-1])
        inner = body.new[anchor].name if record.anchor_node else None
        set_fact(call, replace(record, id=self.count, anchor_node=inner))
        set_fact(call, TupleType(tuple(fact(node, TensorType) for node in results)))
        copy_origin(anchor, call, OutlineRegions.name)
        self.count += 1
        for place, (inside, outside) in enumerate(results.items()):
            if outside is None:
                continue
            # Named as before, so that readers, reasons and programs know it by the same name.
            item = self.graph.create_node("call_function", operator.getitem, (call, place), name=outside.name)
            set_fact(item, fact(inside, TensorType))
            copy_origin(outside, item, OutlineRegions.name)
            self.new[outside] = item

    def finish(self, output: Node) -> None:
        """Installs the new graph."""
        _copy_node(self.graph, output, self.new)
        self.gm.graph = self.graph
        self.gm.recompile()


class _Body:
    """The graph inside one region.

    Attributes:
        sources: outer nodes that the placeholders stand for: tensors first, then sizes.
        new: the inner node of each member and source.
    """

    def __init__(self, unit: tuple[Node, ...]) -> None:
        self.unit = unit
        self.graph = Graph()
        self.new: dict[Node, Node] = {}
        inside = set(unit)
        read = dict.fromkeys(source for node in unit for source in node.all_input_nodes if source not in inside)
        sizes = [source for source in read if find_fact(source, SizeValue)]
        self.sources = [source for source in read if source not in sizes] + sizes
        for source in self.sources:
            placeholder = self.graph.placeholder(source.name)
            kind: Any = find_fact(source, SizeValue) or fact(source, TensorType)
            set_fact(placeholder, kind)
            set_fact(placeholder, find_fact(source, Origin) or Origin())
            self.new[source] = placeholder
        for node in unit:
            self.new[node] = _copy_node(self.graph, node, self.new)
            drop_fact(self.new[node], RegionTag)

    def results(self, record: Region) -> dict[Node, Node | None]:
        """Inner nodes that the region returns, each with the outer node it stands for, or None when nobody reads it."""
        inside = set(self.unit)
        if record.anchor is not Anchor.INDEX:
            read = (node for node in self.unit if any(user not in inside for user in node.users))
            return {self.new[node]: node for node in read}
        head = next(node for node in self.unit if find_fact(node, TupleType))
        found: dict[Any, Node] = {node.args[1]: node for node in self.unit if node.args[:1] == (head,)}
        results: dict[Node, Node | None] = {}
        for place, kind in enumerate(fact(head, TupleType).items):
            outside = found.get(place)
            if 0 in kind.shape:  # rows of no column
                continue
            if outside is not None:
                results[self.new[outside]] = outside
                continue
            item = self.graph.call_function(operator.getitem, (self.new[head], place))
            set_fact(item, kind)
            copy_origin(head, item, OutlineRegions.name)
            results[item] = None
        return results

    def finish(self, results: dict[Node, Node | None]) -> Graph:
        """Adds the output node."""
        self.graph.output(tuple(results))
        return self.graph


def _copy_node(graph: Graph, node: Node, new: dict[Node, Node]) -> Node:
    """Copies a node with facts of its own, so that later changes do not reach the original."""
    copied = graph.node_copy(node, lambda source: new[source])
    copied.meta = {key: dict(value) if isinstance(value, dict) else value for key, value in node.meta.items()}
    return copied
