"""From the placed graph to a program: values, views as strides, and the steps of each region in order."""

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.eager import eager_step, padded_rows
from tilewright.codegen.emit import emit_region
from tilewright.codegen.region_call import RegionCall
from tilewright.errors import CodegenError
from tilewright.ir.facts import SizeValue, TensorType, TupleType, fact, find_fact, where
from tilewright.ir.graph import get_tensor, info
from tilewright.ir.program import Choice, KernelStep, ProgramSpec, ReadTokens, Step, Storage, VendorLinear, View
from tilewright.ir.regions import Anchor, AttentionTable, GemmTable, Region
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, Size, contiguous_strides
from tilewright.ir.views import Strided, apply_view, has_view_rule

Emit = Callable[[RegionCall, ProgramBuilder, str | None], tuple[KernelStep | VendorLinear, ...]]

_CU_SEQLENS = 2  # place among the results of pack_index


def assemble(
    gm: GraphModule, emit: Emit = emit_region, interleaved: Mapping[torch.dtype, int] | None = None
) -> ProgramSpec:
    """Turns a placed graph into a program.

    A region for which no kernel can be made runs eager, with the emitter's reason; ``notes["eager"]`` lists these by
    the name of the region.

    Args:
        gm: graph at level placed.
        emit: makes the steps of one region in a variant.
        interleaved: how weights of products are laid out, as of ``ProgramBuilder``.

    Raises:
        CodegenError: the graph breaks its level's spec.
    """
    assembler = _Assembler(gm, emit, ProgramBuilder(interleaved))
    for node in gm.graph.nodes:
        assembler.add(node)
    return assembler.spec()


class _Assembler:
    """Walks the outer graph; ``views`` holds where each tensor node lies."""

    def __init__(self, gm: GraphModule, emit: Emit, builder: ProgramBuilder) -> None:
        self.gm = gm
        self.emit = emit
        self.builder = builder
        self.views: dict[Node, View] = {}
        self.steps: list[Step] = []
        self.eager: dict[str, str] = {}
        self.returned = _returned_results(gm)
        self.given = info(gm).inputs
        self.bind = _bind(gm)
        self.symbols = (*(symbol for symbol, _, _ in self.bind), *([TOKENS] if _has_row_index(gm) else []))
        self.outputs: tuple[int, ...] = ()
        self.weight_keys: dict[int, str] = {}

    def add(self, node: Node) -> None:
        """Handles one node of the outer graph."""
        if node.op == "placeholder":
            self._input(node)
        elif node.op == "get_attr":
            self._weight(node)
        elif node.op == "call_module":
            self._region(node)
        elif node.op == "output":
            self.outputs = tuple(self.views[item].value for item in node.args[0])  # type: ignore[union-attr,index]
        elif has_view_rule(node.target):
            self._view(node)
        elif find_fact(node, SizeValue) is None and node not in self.views:
            raise CodegenError(
                f"op {node.target} is outside of all regions",
                where=where(node),
                why="at the placed level every call that computes is in a region",
                hint="set TILEWRIGHT_VERIFY=1 to see which pass left it out",
            )

    def _input(self, node: Node) -> None:
        kind = fact(node, TensorType)
        position = sum(value.storage is Storage.INPUT for value in self.builder.values)
        state = self.given[position].state
        index = self.builder.new_value(str(node.target), Storage.INPUT, kind.dtype, kind.shape, position, state)
        self.views[node] = self.builder.whole(index)

    def _weight(self, node: Node) -> None:
        tensor = get_tensor(self.gm, node)
        key = self.weight_keys.setdefault(id(tensor), str(node.target))
        self.views[node] = self.builder.whole(self.builder.new_weight(key, tensor))

    def _view(self, node: Node) -> None:
        source = self.views[node.all_input_nodes[0]]
        moved = apply_view(node, Strided(source.shape, source.strides, source.offset))
        if moved is None:
            raise CodegenError(
                "a view needs a copy that no pass made",
                where=where(node),
                why=f"its operand has strides {source.strides}",
            )
        self.views[node] = View(source.value, moved.shape, moved.strides, moved.offset)

    def _region(self, node: Node) -> None:
        body = self.gm.get_submodule(str(node.target))
        if not isinstance(body, GraphModule):
            raise CodegenError(f"'{node.target}' is no region", where=where(node))
        inputs = tuple(self.views[source] for source in node.args if source in self.views)  # type: ignore[index]
        call = RegionCall(node.name, body, fact(node, Region), inputs, self._results(node, body))
        self.steps += self._steps_of(call, find_fact(node, GemmTable) or find_fact(node, AttentionTable))
        for user in node.users:
            result, shape = call.outputs[int(user.args[1])], fact(user, TensorType).shape  # type: ignore[arg-type]
            self.views[user] = View(result.value, shape, contiguous_strides(shape))
        if call.region.anchor is Anchor.INDEX:
            self._read_tokens(call)

    def _results(self, node: Node, body: GraphModule) -> tuple[View, ...]:
        """A new value for each result of a region: in the arena, or fresh when the graph returns it."""
        names = {int(user.args[1]): user.name for user in node.users}  # type: ignore[arg-type]
        views = []
        for place, kind in enumerate(fact(node, TupleType).items):
            returned = self.returned.get((node, place))
            storage = Storage.ARENA if returned is None else Storage.OUTPUT
            shape = kind.shape
            if fact(node, Region).anchor is Anchor.INDEX:
                # Memory is laid out before T is read, so what has T rows gets room for all B * S.
                shape = tuple(padded_rows(body) if size == TOKENS else size for size in shape)
            name = names.get(place, f"{node.name}_{place}")
            index = self.builder.new_value(name, storage, kind.dtype, shape if returned is None else returned)
            views.append(View(index, shape, contiguous_strides(shape)))
        return tuple(views)

    def _steps_of(self, call: RegionCall, table: GemmTable | AttentionTable | None) -> list[Step]:
        if call.region.anchor is Anchor.OPAQUE:
            return [self._eager(call, call.region.reason)]
        mark = self.builder.checkpoint()
        try:
            if table is None:
                return list(self.emit(call, self.builder, None))
            entries = [(upper, variant, self.emit(call, self.builder, variant)) for upper, variant in table.entries]
        except CodegenError as error:
            self.builder.rollback(mark)
            return [self._eager(call, f"{error.what} ({error.why})" if error.why else error.what)]
        if len(entries) == 1:
            return list(entries[0][2])
        steps = [step for _, _, inner in entries for step in inner]
        scratch = {value.index for value in self.builder.values[mark:] if value.storage is Storage.ARENA}
        reads = dict.fromkeys(index for step in steps for index in step.reads if index not in scratch)
        writes = dict.fromkeys(index for step in steps for index in step.writes if index not in scratch)
        origin = tuple(dict.fromkeys(name for step in steps for name in step.origin))
        # What an entry reads back of its own result is no operand of the table.
        own = [index for index in reads if index not in writes]
        return [Choice(table.size, tuple(entries), tuple(own), tuple(writes), origin)]

    def _eager(self, call: RegionCall, reason: str) -> Step:
        self.eager[call.name] = reason
        return eager_step(call, reason, self.symbols)

    def _read_tokens(self, call: RegionCall) -> None:
        cu_seqlens = call.outputs[_CU_SEQLENS]
        last = View(cu_seqlens.value, (1,), (1,), cu_seqlens.shape[0] - 1)
        self.steps.append(ReadTokens(last, TOKENS, padded_rows(call.graph), (cu_seqlens.value,)))

    def spec(self) -> ProgramSpec:
        """The program of all nodes added."""
        return ProgramSpec(
            symbols=self.symbols,
            bind=self.bind,
            inputs=tuple(value.name for value in self.builder.values if value.storage is Storage.INPUT),
            values=tuple(self.builder.values),
            weights=dict(self.builder.weights),
            steps=tuple(self.steps),
            outputs=self.outputs,
            notes={"model": info(self.gm).name, "eager": dict(self.eager)},
        )


Bind = tuple[tuple[sympy.Symbol, int, int], ...]


def _bind(gm: GraphModule) -> Bind:
    """For each size symbol of the inputs, where it is read: B, then S, then others by name."""
    found: dict[sympy.Symbol, tuple[sympy.Symbol, int, int]] = {}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for position, node in enumerate(placeholders):
        for dim, size in enumerate(fact(node, TensorType).shape):
            if isinstance(size, sympy.Symbol):
                found.setdefault(size, (size, position, dim))
    first = {BATCH: 0, SEQ: 1}
    return tuple(found[symbol] for symbol in sorted(found, key=lambda symbol: (first.get(symbol, 2), symbol.name)))


def _has_row_index(gm: GraphModule) -> bool:
    regions = (find_fact(node, Region) for node in gm.graph.nodes)
    return any(region is not None and region.anchor is Anchor.INDEX for region in regions)


def _returned_results(gm: GraphModule) -> dict[tuple[Node, int], tuple[Size, ...]]:
    """Region results that the graph returns, as (call node, place), with the shape they are returned under."""
    output = next(node for node in gm.graph.nodes if node.op == "output")
    found: dict[tuple[Node, int], tuple[Size, ...]] = {}
    for returned in output.args[0]:
        node: Any = returned
        while has_view_rule(node.target):
            node = node.all_input_nodes[0]
        if node.op == "call_function" and find_fact(node.args[0], TupleType) is not None:
            found[(node.args[0], int(node.args[1]))] = fact(returned, TensorType).shape
    return found
