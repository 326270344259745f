"""Groups of nodes that may become regions, and the question whether two of them may be one."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from tilewright.ir.facts import TensorType, fact
from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import Size
from tilewright.ir.views import same_size, same_sizes
from tilewright.ops import Flow, traits_of
from tilewright.passes.regions.anchors import is_result, is_view
from tilewright.passes.regions.tile_dependence import (
    Access,
    OperandRead,
    operand_reads,
    reduces_last,
    shape_of,
    why_not_one_tile,
)

aten = torch.ops.aten
packing = torch.ops.tilewright


PRODUCTS = (Anchor.GEMM, Anchor.EXPERTS)
"""Anchors whose kernels compute tiles of a product with weights, and pointwise work behind it on the tile."""


@dataclass
class Group:
    """Nodes that will be one region.

    Attributes:
        anchor: kernel family.
        members: computing nodes, views absorbed between them and reads of several results, by node, in graph order.
        repeated: members whose elements each tile computes where it needs them, see ``may_repeat``.
        reason: for OPAQUE, why no kernel is made.
    """

    anchor: Anchor
    members: dict[Node, None]
    repeated: set[Node] = field(default_factory=set)
    reason: str = ""

    def first(self, flow: Flow) -> Node | None:
        """The first member whose op has that flow."""
        return next((node for node in self.members if traits_of(node.target).flow is flow), None)

    def product(self) -> Node | None:
        """The product with weights that the group is built around."""
        return self.first(Flow.CONTRACT) or self.first(Flow.GROUPED)

    def work(self) -> Iterator[Node]:
        """Members other than views and reads of several results."""
        return (node for node in self.members if not is_view(node) and not is_result(node))


def why_not_joined(producer: Group, consumer: Group, between: Iterable[Node]) -> str | None:
    """Whether two groups may be one region as far as their tiles go.

    Args:
        producer, consumer: the groups; some member of ``consumer`` reads a member of ``producer``.
        between: views on the way from one to the other, which would join too.

    Returns:
        None, or a sentence with the reason.
    """
    if Anchor.OPAQUE in (producer.anchor, consumer.anchor):
        return _why_not_opaque(producer, consumer)
    for group in (producer, consumer):
        scatter = next((node.name for node in group.members if node.target == packing.scatter_rows.default), None)
        if scatter is not None:
            return f"'{scatter}' also fills places that no packed row stands for, in a kernel of its own"
        head = next(iter(group.members)).name
        if group.anchor is Anchor.INDEX:
            return f"the row index '{head}' must be complete before any packed row is known"
        if group.anchor is Anchor.ROUTE:
            return f"the table '{head}' of the rows of each expert is made from all rows"
        if group.anchor is Anchor.APPEND:
            return f"'{head}' puts rows into pages in a kernel of its own"
        if group.anchor is Anchor.ATTENTION and group is consumer:
            return f"the attention kernel '{head}' would compute it again for every block of queries"
        if group.anchor is Anchor.ATTENTION:
            return f"the attention kernel '{head}' computes attention alone"
    if producer.anchor in PRODUCTS or consumer.anchor in PRODUCTS:
        return _why_not_epilogue(producer, consumer, tuple(between))
    return _why_not_rows(producer, consumer, tuple(between))


def _why_not_opaque(producer: Group, consumer: Group) -> str | None:
    if producer.anchor is consumer.anchor:
        return None
    opaque = producer if producer.anchor is Anchor.OPAQUE else consumer
    return f"'{next(iter(opaque.members)).name}' runs eager: {opaque.reason}"


def _edges(consumers: Iterable[Node], producers: Iterable[Node]) -> Iterator[tuple[Node, OperandRead]]:
    wanted = set(producers)
    for node in consumers:
        if wanted.intersection(node.all_input_nodes):
            yield from ((node, read) for read in operand_reads(node) if read.operand in wanted)


def _why_not_epilogue(producer: Group, consumer: Group, between: tuple[Node, ...]) -> str | None:
    if consumer.anchor in PRODUCTS:
        anchor, name = consumer.product(), next(reversed(producer.members)).name
        gemm = anchor.name if anchor else ""
        if producer.anchor in PRODUCTS:
            split = len(shape_of(producer.product()) or ())
            why = _first_reason(_edges(consumer.members, producer.members), split)
            return why or f"a region holds one GEMM, and that of '{name}' is another than '{gemm}'"
        return f"'{name}' would be computed again for each tile of the GEMM '{gemm}'; it is computed once and stored"
    out = shape_of(producer.product()) or ()
    if between:
        return f"the view '{between[0].name}' lies between the GEMM and its consumer"
    if len(consumer.members) > 1:
        return f"'{next(iter(consumer.members)).name}' is in a region of its own already"
    (node,) = consumer.members
    if traits_of(node.target).flow is not Flow.POINTWISE:
        return _first_reason(((node, read) for _, read in _edges([node], producer.members)), len(out)) or (
            f"'{node.name}' is no pointwise work on the GEMM's tile"
        )
    if not same_sizes(shape_of(node) or (), out):
        return f"'{node.name}' has another shape than the GEMM's result"
    for read in operand_reads(node):
        if read.operand not in producer.members and not _fits_epilogue(read, out):
            return f"operand '{read.operand.name}' of '{node.name}' is neither full, a row, a column nor a number"
    return _first_reason(_edges([node], producer.members), len(out))


def _fits_epilogue(read: OperandRead, out: tuple[Size, ...]) -> bool:
    """Whether an operand is full, a row [N], a column [.., M, 1] or one number in terms of the GEMM's result."""
    shape = shape_of(read.operand) or ()
    if all(same_size(size, 1) for size in shape[:-1]):
        return True
    return len(shape) == len(out) and all(how.access is Access.SAME for how in read.axes[:-1])


def _first_reason(edges: Iterable[tuple[Node, OperandRead]], split: int) -> str | None:
    return next((why for node, read in edges if (why := why_not_one_tile(node, read, split))), None)


def _why_not_rows(producer: Group, consumer: Group, between: tuple[Node, ...]) -> str | None:
    nodes = [*producer.members, *between, *consumer.members]
    repeated = producer.repeated | consumer.repeated
    main = [node for node in nodes if node not in repeated and shape_of(node) is not None]
    splits = row_axes(main)
    if not splits:
        return _why_no_common_rows(producer, consumer, between)
    edges = [edge for edge in _edges(nodes, nodes) if edge[1].operand not in repeated]
    reasons = []
    for split in splits:
        why = _first_reason(edges, split)
        if why is None:
            return None
        reasons.append(why)
    return reasons[0]


def _why_no_common_rows(producer: Group, consumer: Group, between: tuple[Node, ...]) -> str:
    for view in between:
        for read in operand_reads(view):
            why = why_not_one_tile(view, read, max(len(read.axes) - 1, 0))
            if why is not None:
                return why
    ours, theirs = next(iter(consumer.members)), next(reversed(producer.members))
    return (
        f"'{ours.name}' works on {_text(shape_of(ours))} and '{theirs.name}' on {_text(shape_of(theirs))}, "
        "which divide into different rows or columns"
    )


def _text(shape: tuple[Size, ...] | None) -> str:
    return f"[{', '.join(map(str, shape or ()))}]"


def row_axes(nodes: Collection[Node]) -> list[int]:
    """Numbers of leading axes that can be the rows of a region of these nodes, most first.

    With r such axes each node has the shape rows + [columns] or rows alone. All have the same number of columns, or 1,
    unless some node needs whole rows, which then are never divided.
    """
    shapes = [shape_of(node) or () for node in nodes]
    allowed = set.intersection(*({*_row_axes_of(node)} for node in nodes)) if shapes else set()
    whole = any(traits_of(node.target).flow is Flow.LAST_AXIS for node in nodes)
    return sorted((r for r in allowed if _rows_agree(shapes, r, whole)), reverse=True)


def _row_axes_of(node: Node) -> tuple[int, ...]:
    rank = len(shape_of(node) or ())
    flow = traits_of(node.target).flow
    if flow is Flow.REDUCE and reduces_last(node):
        x = node.args[0]
        return (len(shape_of(x) or ()) - 1,) if isinstance(x, Node) else ()
    if flow is Flow.REDUCE:
        return (rank - 1,) if rank else ()
    if flow in (Flow.LAST_AXIS, Flow.LOOKUP):
        return (rank - 1,)
    return (rank - 1, rank) if rank else (0,)


def _rows_agree(shapes: list[tuple[Size, ...]], r: int, whole: bool) -> bool:
    rows = shapes[0][:r]
    if not all(len(shape) in (r, r + 1) and same_sizes(shape[:r], rows) for shape in shapes):
        return False
    if whole:
        return True
    widths = [shape[r] for shape in shapes if len(shape) > r and not same_size(shape[r], 1)]
    return all(same_size(width, widths[0]) for width in widths)


def may_repeat(producer: Group, consumer: Group, between: tuple[Node, ...]) -> bool:
    """Whether each tile of the consumer may itself compute what it needs of a producer, whichever tiles that is.

    So it is when nobody else reads the producer, no axis of it is needed whole, and computing an element costs no more
    than reading it: look-ups, indices and conversions. Any pointwise work may be, where it is only concatenated: then
    each element is needed once.
    """
    if producer.anchor is not Anchor.ROW or consumer.anchor not in (Anchor.ROW, Anchor.INDEX):
        return False
    inner = {*producer.members, *between}
    if any(user not in inner and user not in consumer.members for node in inner for user in node.users):
        return False
    if any(source in consumer.members for node in inner for source in node.all_input_nodes):
        return False
    edges = list(_edges([*between, *consumer.members], inner))
    if any(how.access is Access.WHOLE for _, read in edges for how in read.axes):
        return False
    if all(node.target == aten.cat.default for node, _ in edges if node in consumer.members):
        each_element_alone = (Flow.POINTWISE, Flow.CREATE, Flow.LOOKUP)
        return all(traits_of(node.target).flow in each_element_alone for node in producer.work())
    return all(_is_cheap(node) for node in producer.work())


def _is_cheap(node: Node) -> bool:
    """Whether computing an element costs no more than reading it from memory: look-ups, indices, conversions."""
    flow = traits_of(node.target).flow
    if flow in (Flow.LOOKUP, Flow.CREATE) or node.target is torch.ops.prims.convert_element_type.default:
        return True
    return flow is Flow.POINTWISE and not fact(node, TensorType).dtype.is_floating_point
