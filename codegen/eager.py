"""Regions that run as they were: their own body, called on tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import pad

from tilewright.codegen.region_call import RegionCall
from tilewright.ir.facts import SizeValue, TensorType, fact, find_fact
from tilewright.ir.program import EagerStep
from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import Size, compile_sizes, product


@dataclass(frozen=True)
class EagerRegion:
    """Calls a region's body.

    Attributes:
        body: its placeholders are tensors, then sizes.
        sizes: those sizes, as expressions.
        symbols: size symbols of the program, in its order.
        rows: of a row index, the places of the padded batch: results with one entry per packed row are filled up with 0
            to so many, because memory is laid out before the number of packed rows is known. None for other regions.
    """

    body: GraphModule
    sizes: tuple[Size, ...]
    symbols: tuple[sympy.Symbol, ...]
    rows: Size | None = None

    def __call__(self, *inputs: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Runs on tensors; ``sizes`` are the values of the symbols, as far as known when the step runs."""
        wanted = self.sizes if self.rows is None else (*self.sizes, self.rows)
        numbers = compile_sizes(self.symbols[: len(sizes)], wanted)(*sizes) if wanted else ()
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = self.body(*inputs, *numbers[: len(self.sizes)])
        if self.rows is None:
            return outputs
        row_index, slots, *rest = outputs
        missing = numbers[-1] - row_index.numel()
        return (pad(row_index, (0, missing)), pad(slots, (0, missing)), *rest)


def padded_rows(index: GraphModule) -> Size:
    """Places of the padded batch that the row index in the body of a region is made for."""
    anchor = next(node for node in index.graph.nodes if node.target == torch.ops.tilewright.pack_index.default)
    return product(fact(anchor.args[0], TensorType).shape)


def eager_step(call: RegionCall, reason: str, symbols: tuple[sympy.Symbol, ...]) -> EagerStep:
    """The step that runs a region eager, for the reason given, in a program with these size symbols."""
    nodes = list(call.graph.graph.nodes)
    sizes = tuple(kind.value for node in nodes if node.op == "placeholder" and (kind := find_fact(node, SizeValue)))
    return EagerStep(
        call=EagerRegion(
            call.graph, sizes, symbols, padded_rows(call.graph) if call.region.anchor is Anchor.INDEX else None
        ),
        inputs=call.inputs,
        outputs=call.outputs,
        reason=reason,
        reads=tuple(dict.fromkeys(view.value for view in call.inputs)),
        writes=tuple(dict.fromkeys(view.value for view in call.outputs)),
        origin=tuple(node.name for node in nodes if node.op == "call_function"),
    )
