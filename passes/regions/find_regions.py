"""Analysis: which nodes form a fusion region. Only tags; ``outline_regions`` acts."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from tilewright.ir.facts import set_fact
from tilewright.ir.graph import Level
from tilewright.ir.regions import Anchor, Region, RegionTag
from tilewright.ops import Flow
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.regions.anchors import computes, family, is_result, is_view
from tilewright.passes.regions.copies import find_copies
from tilewright.passes.regions.groups import PRODUCTS, Group, may_repeat, why_not_joined
from tilewright.passes.regions.order import in_running_order

_FUSION_OFF = "fusion is off at this optimization level"


@dataclass(frozen=True)
class FindRegions(Pass):
    """Tags each computing node with its region (``RegionTag``), and operands that need a copy (``CopyBefore``).

    A node joins the region of a producer when the tile-dependence rule allows it and the regions stay convex: none
    waits for a value that itself waits for the region. The epilogue of a GEMM comes first, then rows; among producers
    the latest comes first. Each neighbour that did not join is recorded with the reason.

    Attributes:
        fuse: False puts every op into a region of its own.
    """

    name: ClassVar[str] = "find_regions"
    requires: ClassVar[Level] = Level.PACKED
    ensures: ClassVar[Level] = Level.PACKED
    fuse: bool = True

    def run(self, gm: GraphModule) -> PassResult:
        """Sets the tags; the graph itself stays as it is."""
        finder = _Finder(list(gm.graph.nodes), self.fuse)
        finder.find()
        ordered = finder.ordered()
        refused = finder.refusals()
        for number, group in enumerate(ordered):
            record = _record(number, group, refused.get(id(group), {}))
            for place, node in enumerate(group.members):
                set_fact(node, RegionTag(number, record if place == 0 else None))
        copies = find_copies(gm, set(finder.group_of))
        for node, copy in copies.items():
            set_fact(node, copy)
        counts = {anchor.value: sum(group.anchor is anchor for group in ordered) for anchor in Anchor}
        counts["copies"] = sum(len(copy.operands) for copy in copies.values())
        reasons = {next(iter(g.members)).name: g.reason for g in ordered if g.anchor is Anchor.OPAQUE}
        return PassResult(gm, True, {topic: count for topic, count in counts.items() if count}, reasons)


def _record(number: int, group: Group, refused: dict[str, str]) -> Region:
    anchor = next((node for flow in _ANCHOR_FLOWS[group.anchor] if (node := group.first(flow))), None)
    return Region(number, group.anchor, anchor.name if anchor else None, group.reason, tuple(sorted(refused.items())))


_ANCHOR_FLOWS = {
    Anchor.GEMM: (Flow.CONTRACT,),
    Anchor.EXPERTS: (Flow.GROUPED,),
    Anchor.ROUTE: (Flow.ROUTE,),
    Anchor.ATTENTION: (Flow.ATTENTION,),
    Anchor.APPEND: (Flow.APPEND,),
    Anchor.ROW: (Flow.LAST_AXIS, Flow.REDUCE, Flow.PACKING, Flow.COLUMN, Flow.LOOKUP),
    Anchor.INDEX: (Flow.PACKING,),
    Anchor.OPAQUE: (),
}


class _Finder:
    """Grows groups over the nodes in graph order; later nodes are not in any group yet, which bounds each search."""

    def __init__(self, nodes: list[Node], fuse: bool) -> None:
        self.nodes = nodes
        self.fuse = fuse
        self.position = {node: place for place, node in enumerate(nodes)}
        self.group_of: dict[Node, Group] = {}
        self.whys: dict[tuple[Node, Node], str] = {}

    def find(self) -> None:
        """Gives every computing node a group."""
        for node in self.nodes:
            if is_result(node):
                producer = node.all_input_nodes[0]
                if producer in self.group_of:
                    self._add(self.group_of[producer], node)
            elif computes(node):
                self._place(node)

    def _add(self, group: Group, node: Node) -> None:
        group.members[node] = None
        self.group_of[node] = group

    def _place(self, node: Node) -> None:
        anchor, reason = family(node)
        self._add(Group(anchor, {}, reason=reason), node)
        sources = [source for operand in node.all_input_nodes if (source := self._source(operand))]
        for producer, views in sorted(sources, key=self._preference):
            group = self.group_of[node]
            if producer in group.members:
                continue
            why = self._try_join(self.group_of[producer], group, views) if self.fuse else _FUSION_OFF
            if why:
                self.whys[(producer, node)] = why

    def _source(self, operand: Node) -> tuple[Node, tuple[Node, ...]] | None:
        """The grouped node that an operand comes from, and the free views in between."""
        views: list[Node] = []
        while operand not in self.group_of and is_view(operand):
            views.append(operand)
            operand = operand.all_input_nodes[0]
        return (operand, tuple(reversed(views))) if operand in self.group_of else None

    def _preference(self, source: tuple[Node, tuple[Node, ...]]) -> tuple[bool, int]:
        return self.group_of[source[0]].anchor not in PRODUCTS, -self.position[source[0]]

    def _try_join(self, producer: Group, consumer: Group, views: tuple[Node, ...]) -> str | None:
        """Joins two groups and the views between, or returns the reason why not."""
        members = [*producer.members, *views, *consumer.members]
        why = why_not_joined(producer, consumer, views)
        repeated = producer.repeated | consumer.repeated
        if why is not None and may_repeat(producer, consumer, views):
            why, repeated = None, repeated | {*producer.members, *views}
        why = why or self._why_not_convex(members)
        if why is not None:
            return why
        anchor = producer.anchor if producer.anchor in PRODUCTS else consumer.anchor
        reason = "; ".join(dict.fromkeys(text for text in (producer.reason, consumer.reason) if text))
        ordered = sorted(members, key=self.position.__getitem__)
        group = Group(anchor, dict.fromkeys(ordered), repeated, reason)
        self.group_of.update(dict.fromkeys(ordered, group))
        return None

    def _unit(self, node: Node) -> tuple[Node, ...]:
        """The nodes that run together with this one."""
        return tuple(self.group_of[node].members) if node in self.group_of else (node,)

    def _why_not_convex(self, members: list[Node]) -> str | None:
        """Looks for a path that leaves the members and comes back, through other groups as a whole."""
        inside = set(members)
        limit = max(self.position[node] for node in members)
        seen: set[Node] = set()
        stack = [(user, user) for node in members for user in node.users if user not in inside]
        while stack:
            node, first = stack.pop()
            if node in inside:
                return f"'{first.name}' lies between: the region would have to wait for its own result"
            if node in seen or self.position[node] > limit:
                continue
            unit = self._unit(node)
            seen.update(unit)
            stack += [(user, first) for member in unit for user in member.users if user not in seen]
        return None

    def ordered(self) -> list[Group]:
        """The groups in an order in which they can run."""
        units = in_running_order(self.nodes, self._unit)
        groups = {id(group): group for unit in units if (group := self.group_of.get(unit[0]))}
        return list(groups.values())

    def refusals(self) -> dict[int, dict[str, str]]:
        """For each group (by id), the neighbours that did not join it, with the reason."""
        found: dict[int, dict[str, str]] = {}
        for (producer, consumer), why in self.whys.items():
            one, other = self.group_of[producer], self.group_of[consumer]
            if one is not other:
                found.setdefault(id(one), {})[consumer.name] = why
                found.setdefault(id(other), {})[producer.name] = why
        return found
