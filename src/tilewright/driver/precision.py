"""Half precision on processors that cannot compute in it: inside in fp32, outside as asked."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from tilewright.codegen.cpu.target import CpuTarget
from tilewright.driver.options import CompileOptions
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.graph import info, update_info
from tilewright.passes.rewrite import Rewriter
from tilewright.runtime.weights import vendor_packs

CONVERT = torch.ops.prims.convert_element_type.default
_NEEDS = {torch.bfloat16: "AVX-512 BF16 or AMX", torch.float16: "AVX-512 FP16"}


@dataclass(frozen=True)
class Precision:
    """In what a model is computed.

    Attributes:
        capture: element type that the model is converted to before it is traced; None for its own.
        results: element type that fp32 results are rounded to; None where they are returned as computed.
        reason: why it is computed in another type than it has or was asked for; "" where it is not.
    """

    capture: torch.dtype | None
    results: torch.dtype | None = None
    reason: str = ""


def precision_of(model: Any, options: CompileOptions) -> Precision:
    """Half types are kept where the processor multiplies them, and else widened: that is exact, and faster.

    Args:
        model: what is compiled; a graph that was traced elsewhere is not converted.
        options: of ``compile``.
    """
    asked = options.model_dtype
    if not isinstance(model, nn.Module) or isinstance(model, GraphModule):
        return Precision(asked)
    wanted = asked or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if wanted not in _NEEDS or _is_native(wanted):
        return Precision(asked)
    whose = "asked for" if asked is not None else "of the model"
    name = str(wanted).removeprefix("torch.")
    why = f"{name} {whose} is computed in fp32 and results are rounded to it: this processor has no {_NEEDS[wanted]}"
    return Precision(torch.float32, wanted, why)


def _is_native(dtype: torch.dtype) -> bool:
    return CpuTarget.native().bf16_dot if dtype == torch.bfloat16 else vendor_packs(dtype)


def round_results(gm: GraphModule, precision: Precision) -> None:
    """Gives the graph's fp32 results the type asked for, and puts the reason on record.

    Args:
        gm: as captured; changed in place. The conversions are ops of the graph, so they are saved with it.
        precision: of the model it was captured from.
    """
    wanted = precision.results
    if wanted is None:
        return
    rewriter = Rewriter(gm, "precision")
    output = next(node for node in gm.graph.nodes if node.op == "output")

    def rounded(value: Node) -> Node:
        kind = fact(value, TensorType)
        if kind.dtype != torch.float32:
            return value
        return rewriter.call(output, CONVERT, value, wanted, type=replace(kind, dtype=wanted))

    output.args = torch.fx.node.map_arg(output.args, rounded)
    gm.recompile()
    update_info(gm, reasons={**info(gm).reasons, "dtype": precision.reason})
