"""Regions to kernels: chooses the emitter by the region's anchor."""

from tilewright.codegen.attention.paged_append import emit_fill
from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.emit_attention import emit_attention
from tilewright.codegen.emit_experts import emit_experts
from tilewright.codegen.emit_gemm import emit_gemm
from tilewright.codegen.emit_index import emit_index
from tilewright.codegen.emit_route import emit_route
from tilewright.codegen.emit_row import emit_rows
from tilewright.codegen.region_call import RegionCall
from tilewright.errors import CodegenError
from tilewright.ir.program import KernelStep, VendorLinear
from tilewright.ir.regions import Anchor

__all__ = ["RegionCall", "emit_region"]


def emit_region(
    call: RegionCall, builder: ProgramBuilder, variant: str | None = None
) -> tuple[KernelStep | VendorLinear, ...]:
    """The steps that compute a region.

    Args:
        call: the region and its views.
        builder: the program; takes scratch values and weight layouts.
        variant: for a GEMM region one of ``GEMM_VARIANTS``, for attention one of ``ATTENTION_VARIANTS``; None for the
            one that takes all sizes.

    Raises:
        CodegenError: no kernel can be made; the message names the node and the reason.
    """
    anchor = call.region.anchor
    if anchor is Anchor.GEMM:
        return emit_gemm(call, builder, variant or "triton")
    if anchor is Anchor.EXPERTS:
        return emit_experts(call, builder)
    if anchor is Anchor.ROUTE:
        return emit_route(call, builder)
    if anchor is Anchor.ATTENTION:
        return emit_attention(call, builder, variant or "online")
    if anchor is Anchor.APPEND:
        return emit_fill(call, builder)
    if anchor is Anchor.INDEX:
        return emit_index(call, builder)
    if anchor is Anchor.OPAQUE:
        raise CodegenError("an opaque region has no kernel", where=call.name, why=call.region.reason)
    return tuple(emit_rows(call.graph, call.read(builder), list(call.results())))
