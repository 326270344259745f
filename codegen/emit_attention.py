"""Attention regions to kernels, in one of the forms of ``ir.regions.ATTENTION_VARIANTS``."""

from tilewright.codegen.attention.long import emit_long
from tilewright.codegen.attention.online import emit_online
from tilewright.codegen.attention.paged import emit_paged
from tilewright.codegen.attention.problem import AttentionProblem
from tilewright.codegen.attention.short import emit_short
from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.emit_row import emit_rows
from tilewright.codegen.region_call import RegionCall
from tilewright.codegen.results import depends_on
from tilewright.errors import CodegenError
from tilewright.ir.facts import where
from tilewright.ir.program import KernelStep
from tilewright.ir.regions import ATTENTION_VARIANTS, PAGED_VARIANTS
from tilewright.ops import Flow, traits_of


def emit_attention(call: RegionCall, builder: ProgramBuilder, variant: str) -> tuple[KernelStep, ...]:
    """The steps of a region with one attention; results that do not depend on it get kernels of their own.

    Raises:
        CodegenError: the region has no or several attentions, an epilogue that does not follow its tiles, or the
            variant is none of ``ATTENTION_VARIANTS``.
    """
    inputs = call.read(builder)
    results = list(call.results())
    anchors = [node for node in call.graph.graph.nodes if traits_of(node.target).flow is Flow.ATTENTION]
    if len(anchors) != 1:
        raise CodegenError(
            "an attention region needs exactly one attention", where=call.name, why=f"it has {len(anchors)}"
        )
    if variant not in (*ATTENTION_VARIANTS, *PAGED_VARIANTS):
        raise CodegenError(f"no attention variant '{variant}'", where=call.name, hint=", ".join(ATTENTION_VARIANTS))
    ahead = [(node, view) for node, view in results if not depends_on(node, anchors[0])]
    behind = [(node, view) for node, view in results if depends_on(node, anchors[0])]
    steps = emit_rows(call.graph, inputs, ahead) if ahead else ()
    if variant in PAGED_VARIANTS:
        return (*steps, *emit_paged(call, inputs, behind, anchors[0], builder, variant))
    problem = AttentionProblem(call, inputs, behind, anchors[0])
    longest = ATTENTION_VARIANTS[variant]
    if longest is None:
        return (*steps, *emit_online(problem, 16 if variant == "online_16" else 32))
    if variant == "long":
        if problem.given["uniform_pads"]:
            raise CodegenError("the long form has no queries that are padding", where=where(anchors[0]))
        return (*steps, *emit_long(problem, builder, longest))
    return (*steps, *emit_short(problem, longest))
