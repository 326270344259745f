"""Regions that run as they were: their own body, called on tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import pad

from tilewright.codegen.region_call import RegionCall
from tilewright.ir.facts import SizeValue, find_fact
from tilewright.ir.program import EagerStep
from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import Size, compile_sizes


@dataclass(frozen=True)
class EagerRegion:
    """Calls a region's body.

    Attributes:
        body: its placeholders are tensors, then sizes.
        sizes: those sizes, as expressions.
        symbols: size symbols of the program, in its order.
        fills_rows: results with one entry per packed row are filled up with 0 to one per padded place, because memory
            for the row index is laid out before the number of packed rows is known.
    """

    body: GraphModule
    sizes: tuple[Size, ...]
    symbols: tuple[sympy.Symbol, ...]
    fills_rows: bool = False

    def __call__(self, *inputs: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Runs on tensors; ``sizes`` are the values of the symbols, as far as known when the step runs."""
        numbers = compile_sizes(self.symbols[: len(sizes)], self.sizes)(*sizes) if self.sizes else ()
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = self.body(*inputs, *numbers)
        if not self.fills_rows:
            return outputs
        row_index, slots, *rest = outputs
        missing = inputs[0].numel() - row_index.numel()
        return (pad(row_index, (0, missing)), pad(slots, (0, missing)), *rest)


def eager_step(call: RegionCall, reason: str, symbols: tuple[sympy.Symbol, ...]) -> EagerStep:
    """The step that runs a region eager, for the reason given, in a program with these size symbols."""
    nodes = list(call.graph.graph.nodes)
    sizes = tuple(kind.value for node in nodes if node.op == "placeholder" and (kind := find_fact(node, SizeValue)))
    return EagerStep(
        call=EagerRegion(call.graph, sizes, symbols, call.region.anchor is Anchor.INDEX),
        inputs=call.inputs,
        outputs=call.outputs,
        reason=reason,
        reads=tuple(dict.fromkeys(view.value for view in call.inputs)),
        writes=tuple(dict.fromkeys(view.value for view in call.outputs)),
        origin=tuple(node.name for node in nodes if node.op == "call_function"),
    )
