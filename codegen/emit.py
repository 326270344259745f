"""Regions to kernels: chooses the emitter by the region's anchor."""

from torch.fx import GraphModule

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.emit_row import emit_rows
from tilewright.codegen.region_call import RegionCall
from tilewright.errors import CodegenError, TilewrightError, Where
from tilewright.ir.program import KernelStep, VendorLinear
from tilewright.ir.regions import Anchor
from tilewright.ops import Flow, traits_of

__all__ = ["RegionCall", "can_emit", "emit_region"]


def emit_region(
    call: RegionCall, builder: ProgramBuilder, variant: str = "triton"
) -> tuple[KernelStep | VendorLinear, ...]:
    """The steps that compute a region.

    Args:
        call: the region and its views.
        builder: the program; takes scratch values and weight layouts.
        variant: for a GEMM region "triton" or "vendor"; else ignored.

    Raises:
        CodegenError: no kernel can be made; the message names the node and the reason.
    """
    return tuple(emit_rows(call.graph, call.read(builder), list(call.results())))
