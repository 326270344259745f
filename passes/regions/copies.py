"""Which operands must be copied to contiguous memory: of reshapes without strides, of GEMMs, and returned views."""

from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, find_fact
from tilewright.ir.regions import CopyBefore
from tilewright.ir.sizes import Size, product
from tilewright.ir.views import Strided, apply_view, contiguous, is_contiguous, row_stride, same_size, same_sizes
from tilewright.ops import Flow, traits_of
from tilewright.ops.head_linear import HEAD_LINEAR
from tilewright.passes.regions.anchors import is_view


def find_copies(gm: GraphModule, in_regions: set[Node]) -> dict[Node, CopyBefore]:
    """The copies needed when the nodes of ``in_regions`` run inside regions and all other views stay outside."""
    layouts: dict[Node, Strided] = {}
    copies: dict[Node, CopyBefore] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            _find_returned_views(node, layouts, in_regions, copies)
        kind = find_fact(node, TensorType)
        if kind is None:
            continue
        layouts[node] = contiguous(kind.shape)
        if is_view(node) and node not in in_regions:
            moved = apply_view(node, layouts[node.all_input_nodes[0]])
            if moved is None:
                copies[node] = CopyBefore((0,), "no strides over the elements as they lie have this shape")
            layouts[node] = moved or layouts[node]
        elif traits_of(node.target).flow is Flow.CONTRACT and node.args[0] not in in_regions:
            x = node.args[0]
            if node.target is HEAD_LINEAR:
                continue  # no vendor's form, and our kernel reads any strides
            if isinstance(x, Node) and row_stride(layouts[x]) is None:
                why = "the rows of a GEMM's operand must lie at one distance from one another"
                copies[node] = CopyBefore((node.all_input_nodes.index(x),), why)
    return copies


def _find_returned_views(
    output: Node, layouts: dict[Node, Strided], in_regions: set[Node], copies: dict[Node, CopyBefore]
) -> None:
    """A returned tensor owns its memory: a view may be returned only as all of a region's result, under one shape."""
    shapes: dict[Node, tuple[Size, ...]] = {}
    copied: list[int] = []
    for place, node in enumerate(output.all_input_nodes):
        base = node
        while is_view(base) and base not in in_regions and base not in copies:
            base = base.all_input_nodes[0]
        owned = base in in_regions or base in copies
        if base is node and not owned:
            continue
        shape = layouts[node].shape
        whole = owned and _is_all_of(layouts[node], layouts[base])
        if not whole or not same_sizes(shapes.setdefault(base, shape), shape):
            copied.append(place)
    if copied:
        copies[output] = CopyBefore(tuple(copied), "a returned tensor has memory of its own")


def _is_all_of(layout: Strided, base: Strided) -> bool:
    same_elements = same_size(product(layout.shape), product(base.shape)) and same_size(layout.offset, 0)
    return same_elements and is_contiguous(layout)
