"""FillPages: the keys and values that a graph returns go into pages instead, where a decoder's steps find them.

The graph is the source's half of an encoder-decoder (``SplitSource``), packed. It runs once a request; what it leaves
in the pages is read in every step.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.errors import CacheRefused
from tilewright.ir.facts import Origin, TensorType, copy_origin, fact, set_fact, where
from tilewright.ir.graph import InputSpec, Level, OutputSpec, info, update_info
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.sizes import BATCH, SEQ, TOKENS
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.layout.axes import positional
from tilewright.passes.rewrite import erase_dead
from tilewright.passes.steps.add_cache import page_types

tw = torch.ops.tilewright
_WHAT = "the keys of a source cannot go into pages"


@dataclass(frozen=True)
class FillPages(Pass):
    """Turns results into writes: pairs of keys [B, S, Hkv, D] and values [B, S, Hkv, Dv], computed token by token.

    The graph then has a further input, ``places`` [B, S] int32 (page * page_size + slot of each token; anything at
    masked places), and for each pair pages as of ``AddCache``. Its results are tokens that say that pages are filled.

    Attributes:
        page_size: slots of a page.
        dtype: of the pages; None for that of the keys.
    """

    name: ClassVar[str] = "fill_pages"
    requires: ClassVar[Level] = Level.PACKED
    ensures: ClassVar[Level] = Level.PACKED

    page_size: int = 32
    dtype: torch.dtype | None = None

    @property
    def token_inputs(self) -> tuple[str, ...]:
        """Inputs that are packed from the start: none, an encoder may read its masked places."""
        return ()

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites the graph in place.

        Raises:
            CacheRefused: its padding could not be removed, or a result is not computed token by token.
        """
        if not gm.graph.find_nodes(op="call_function", target=tw.pack_index.default):
            why = info(gm).reasons.get("packing", "the graph has no row index")
            raise CacheRefused(_WHAT, why=f"its padding cannot be removed: {why}")
        writer = _FillWriter(gm, self)
        count = writer.run()
        gm.graph.lint()
        gm.recompile()
        return PassResult(gm, changed=True, counts={"pages": count})


class _FillWriter:
    def __init__(self, gm: GraphModule, options: FillPages) -> None:
        self.gm, self.graph, self.options = gm, gm.graph, options
        self.first = next(node for node in self.graph.nodes if node.op == "placeholder")
        self.output = next(node for node in self.graph.nodes if node.op == "output")
        self.specs: list[InputSpec] = []

    def run(self) -> int:
        """Rewrites the graph; returns the number of pairs."""
        results: Any = self.output.args[0]
        rows = [_rows_of(result) for result in results]
        places = self._places(row_index=positional(results[0])[1])
        tokens = [
            self._fill(number, pair, places) for number, pair in enumerate(zip(rows[::2], rows[1::2], strict=True))
        ]
        self.output.args = (tuple(tokens),)
        erase_dead(self.gm)
        names = tuple(f"filled_{number}" for number in range(len(tokens)))
        # Inputs made here stand before the others, in the order they were made.
        inputs = (*self.specs, *info(self.gm).inputs)
        update_info(self.gm, inputs=inputs, output=OutputSpec(build=list, names=names))
        return len(tokens)

    def _places(self, row_index: Node) -> Node:
        places = self._input("places", TensorType((BATCH, SEQ), torch.int32), Layout(LayoutKind.PADDED, 0, 1))
        type_ = TensorType((TOKENS,), torch.int32)
        return self._call(tw.gather_rows.default, (places, row_index), type_, Layout(LayoutKind.PACKED, 0, 1), places)

    def _fill(self, number: int, pair: tuple[Node, Node], places: Node) -> Node:
        new = [fact(node, TensorType) for node in pair]
        keys, values, *scales = (
            self._input(f"{kind}_{number}", type_, Layout(LayoutKind.FREE), state=True)
            for kind, type_ in page_types(new[0], new[1], self.options.page_size, self.options.dtype).items()
        )
        args, token = (*pair, keys, values, places, *scales), TensorType((0,), torch.int32)
        return self._call(tw.append_pages.default, args, token, Layout(LayoutKind.FREE), pair[0])

    def _input(self, name: str, type_: TensorType, layout: Layout, state: bool = False) -> Node:
        with self.graph.inserting_before(self.first):
            made = self.graph.placeholder(name)
        set_fact(made, type_)
        set_fact(made, layout)
        set_fact(made, Origin(made_by=FillPages.name))
        self.specs.append(InputSpec(name, type_.dtype, type_.shape, state=state))
        return made

    def _call(self, target: Any, args: tuple[Any, ...], type_: TensorType, layout: Layout, origin: Node) -> Node:
        with self.graph.inserting_before(self.output):
            made = self.graph.call_function(target, args)
        set_fact(made, type_)
        set_fact(made, layout)
        copy_origin(origin, made, FillPages.name)
        return made


def _rows_of(result: Node) -> Node:
    """The packed rows of a result.

    Raises:
        CacheRefused: it is not computed token by token.
    """
    if result.target is not tw.scatter_rows.default:
        raise CacheRefused(_WHAT, where=where(result), why=f"'{result.name}' is not computed token by token")
    return positional(result)[0]
