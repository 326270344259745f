"""A GEMM by the vendor library: its linear between kernels of ours for what makes x and for what follows."""

from collections.abc import Sequence

from torch.fx import Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.emit_row import emit_rows
from tilewright.codegen.nodes import arguments
from tilewright.codegen.region_call import Inputs, RegionCall
from tilewright.codegen.results import depends_on, peel
from tilewright.errors import CodegenError
from tilewright.ir import views
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import KernelStep, VendorLinear, View
from tilewright.ir.sizes import contiguous_strides, product


def emit_vendor(
    call: RegionCall, builder: ProgramBuilder, inputs: Inputs, results: Sequence[tuple[Node, View]], anchor: Node
) -> tuple[KernelStep | VendorLinear, ...]:
    """[kernel for x] the vendor's linear [kernel for the epilogue].

    Raises:
        CodegenError: the weight is not read as it is stored.
    """
    given = arguments(anchor)
    kind = fact(anchor, TensorType)
    rows, n = product(kind.shape[:-1]), kind.shape[-1]
    steps: list[KernelStep | VendorLinear] = []
    ahead = [(node, view) for node, view in results if not depends_on(node, anchor)]
    behind = [(node, view) for node, view in results if depends_on(node, anchor)]
    x = _as_matrix(given["input"], inputs)
    if x is None:
        source = fact(given["input"], TensorType)
        made = builder.scratch(f"{call.name}_x", source.dtype, source.shape)
        ahead.append((given["input"], made))
        x = View(made.value, (rows, source.shape[-1]), (source.shape[-1], 1))
    if ahead:
        steps += emit_rows(call.graph, inputs, ahead)
    weight, bias = (_whole_weight(call, builder, inputs, given[name]) for name in ("weight", "bias"))
    if weight is None:
        raise CodegenError("the vendor's linear needs a weight", where=where(anchor))
    direct = next((view for node, view in behind if peel(node, view, inputs).node is anchor), None)
    product_view = direct or builder.scratch(f"{call.name}_product", kind.dtype, kind.shape)
    out = View(product_view.value, (rows, n), (n, 1), product_view.offset)
    laid_out = builder.weight_layout(weight, "vendor")
    reads = tuple(sorted({x.value, laid_out} | ({bias} if bias is not None else set())))
    steps.append(VendorLinear(x, laid_out, bias, out, reads, (out.value,), (anchor.name,)))
    held = {**inputs, anchor: (View(out.value, kind.shape, contiguous_strides(kind.shape), out.offset), kind.dtype)}
    rest = [(node, view) for node, view in behind if view is not direct]
    return (*steps, *(emit_rows(call.graph, held, rest) if rest else ()))


def _as_matrix(node: Node, inputs: Inputs) -> View | None:
    """x [.., K] as a view [M, K] with contiguous rows, where it is one."""
    chain: list[Node] = []
    while node not in inputs:
        if not views.has_view_rule(node.target):
            return None
        chain.append(node)
        node = node.all_input_nodes[0]
    view = inputs[node][0]
    layout: views.Strided | None = views.Strided(view.shape, view.strides, view.offset)
    for step in reversed(chain):
        layout = views.apply_view(step, layout) if layout is not None else None
    if layout is None or (stride := views.row_stride(layout)) is None:
        return None
    return View(view.value, (product(layout.shape[:-1]), layout.shape[-1]), (stride, 1), layout.offset)


def _whole_weight(call: RegionCall, builder: ProgramBuilder, inputs: Inputs, node: Node | None) -> int | None:
    if node is None:
        return None
    view = inputs[node][0] if node in inputs else None
    if view is None or not builder.is_weight(view.value) or view != builder.whole(view.value):
        raise CodegenError("the vendor's linear reads weights as they are stored", where=call.name)
    return view.value
