"""Builds region bodies for tests, and runs the steps emitted for them next to the body itself in fp64."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.cpu.build import build
from tilewright.codegen.cpu.launch import launcher
from tilewright.codegen.emit import RegionCall, emit_region
from tilewright.ir.facts import Origin, TensorType, fact, set_fact
from tilewright.ir.program import KernelStep, Pointer, Scalar, Storage, VendorLinear, View
from tilewright.ir.regions import Anchor, Region
from tilewright.ir.sizes import BATCH, PAGES, SEQ, TABLE, TOKENS, Size, contiguous_strides
from tilewright.ir.stop_errors import Memory as Block
from tilewright.ir.stop_errors import stop_error
from tilewright.ir.stops import MemoryTable, StopRecord
from tilewright.ops.block_panels import panel_bytes, to_panels

SYMBOLS = (BATCH, SEQ, TOKENS)
# Shapes are inferred on the meta device with a prime for each symbol, and the primes are read back from the result.
_PRIMES = {BATCH: 10007, SEQ: 10009, TOKENS: 10037, TABLE: 10039, PAGES: 10061}


def symbolic(size: int) -> Size:
    """The size over symbols that a concrete size on primes stands for."""
    for extra in (0, 1):
        rest, found = size - extra, sympy.Integer(1)
        for symbol, prime in _PRIMES.items():
            while rest % prime == 0 and rest:
                rest, found = rest // prime, found * symbol
        if found != 1:
            return found * rest + extra
    return size


def concrete(size: Size, values: dict[sympy.Symbol, int]) -> int:
    """The size for values of the symbols."""
    return int(sympy.sympify(size).subs(values))


class Body:
    """A region body under construction."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.inputs: list[Node] = []

    def input(self, shape: Sequence[Size], dtype: torch.dtype = torch.float32) -> Node:
        """A placeholder."""
        node = self.graph.placeholder(f"arg{len(self.inputs)}")
        set_fact(node, TensorType(tuple(shape), dtype))
        self.inputs.append(node)
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        """A call, its type inferred by running it without data."""
        node = self.graph.call_function(op, args, kwargs)
        meta = torch.fx.node.map_arg((args, kwargs), _meta)
        sized = torch.fx.node.map_aggregate(meta, _prime)
        result = op(*sized[0], **sized[1])
        set_fact(node, TensorType(tuple(symbolic(int(s)) for s in result.shape), result.dtype))
        set_fact(node, Origin(f"model.py:{len(self.graph.nodes)} line of {op}", "encoder.layer.0"))
        return node

    def module(self, *outputs: Node) -> GraphModule:
        """The finished body."""
        self.graph.output(tuple(outputs))
        return GraphModule(torch.nn.Module(), self.graph)


def _meta(node: Node) -> torch.Tensor:
    kind = fact(node, TensorType)
    return torch.empty([concrete(s, _PRIMES) for s in kind.shape], dtype=kind.dtype, device="meta")


def _prime(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return concrete(value, _PRIMES) if isinstance(value, sympy.Expr) else value


def emit(
    gm: GraphModule,
    anchor: Anchor = Anchor.ROW,
    variant: str | None = None,
    views: dict[int, Callable[[int], View]] | None = None,
    weights: dict[int, torch.Tensor] | None = None,
    interleaved: dict[torch.dtype, int] | None = None,
) -> tuple[tuple[Any, ...], ProgramBuilder, RegionCall]:
    """Emits a body; inputs are contiguous, except where ``views`` says otherwise, or the weights of ``weights``."""
    builder = ProgramBuilder(interleaved)
    inputs = []
    for position, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        kind = fact(node, TensorType)
        if weights and position in weights:
            inputs.append(builder.whole(builder.new_weight(f"w{position}", weights[position])))
            continue
        value = builder.new_value(node.name, Storage.INPUT, kind.dtype, kind.shape, position)
        view = views[position](value) if views and position in views else None
        inputs.append(view or View(value, kind.shape, contiguous_strides(kind.shape)))
    outputs = []
    for node in next(n for n in gm.graph.nodes if n.op == "output").args[0]:
        kind = fact(node, TensorType)
        outputs.append(builder.whole(builder.new_value("out", Storage.OUTPUT, kind.dtype, kind.shape)))
    region = Region(0, anchor, None)
    call = RegionCall("region_0", gm, region, tuple(inputs), tuple(outputs))
    return emit_region(call, builder, variant), builder, call


class Memory:
    """Tensors behind the values of a program; outputs and scratch start as garbage."""

    def __init__(
        self, builder: ProgramBuilder, tensors: dict[int, torch.Tensor], sizes: dict[sympy.Symbol, int]
    ) -> None:
        self.sizes = sizes
        self.tensors = dict(tensors)
        for value in builder.values:
            if value.index in self.tensors:
                continue
            if value.storage is Storage.WEIGHT:
                weight = builder.weights[str(value.source)]
                self.tensors[value.index] = lay_out(weight.tensor, weight.layout)
                continue
            shape = [concrete(size, sizes) for size in value.shape]
            tensor = torch.empty(shape, dtype=value.dtype)
            tensor.fill_(float("nan") if value.dtype.is_floating_point else 1)
            self.tensors[value.index] = tensor

    def address(self, view: View) -> int:
        """Address of a view's first element."""
        tensor = self.tensors[view.value]
        return tensor.data_ptr() + concrete(view.offset, self.sizes) * tensor.element_size()

    def block(self, name: str, view: View) -> Block:
        """The memory that an argument ``name`` with this view may touch."""
        tensor = self.tensors[view.value]
        storage = tensor.untyped_storage()
        return Block(name, storage.data_ptr(), storage.nbytes(), tensor.element_size(), f"value {view.value}")

    def tensor(self, view: View) -> torch.Tensor:
        """A view as a tensor."""
        shape = [concrete(s, self.sizes) for s in view.shape]
        strides = [concrete(s, self.sizes) for s in view.strides]
        return self.tensors[view.value].as_strided(shape, strides, concrete(view.offset, self.sizes))


def lay_out(weight: torch.Tensor, layout: str) -> torch.Tensor:
    """A weight [N, K], or weights [E, N, K], in a load-time layout, written out plainly."""
    if weight.dim() == 3 and layout != "as_is":
        return torch.stack([lay_out(each, layout) for each in weight])
    name, _, form = layout.partition(":")
    width, _, group = form.partition(":")
    if name == "kn":
        return weight.t().contiguous()
    if name == "blocks":
        out = torch.empty(panel_bytes(width, tuple(weight.shape), int(group)), dtype=torch.uint8)
        to_panels(width, weight, int(group), out)
        return out
    if name == "panels":
        size = int(width)
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % size))
        panels = padded.view(-1, size, weight.shape[1]).transpose(1, 2)
        return (panels.unflatten(1, (-1, int(group))).transpose(2, 3) if group else panels).contiguous()
    return weight


def launch(step: KernelStep | VendorLinear, memory: Memory) -> None:
    """Builds and runs one step, natively; in checked mode each argument may touch the storage of its own value."""
    if isinstance(step, VendorLinear):
        bias = None if step.bias is None else memory.tensors[step.bias]
        x, weight = memory.tensor(step.x), memory.tensors[step.weight]
        memory.tensor(step.out).copy_(torch.nn.functional.linear(x, weight, bias))
        return
    grid = tuple(concrete(size, memory.sizes) for size in step.grid)
    kernel = build(step.kernel)
    slots = (ctypes.c_int64 * (len(step.args) + 1))()
    record = StopRecord()
    table = MemoryTable(record, len(step.args))
    slots[len(step.args)] = table.address
    blocks: dict[int, Block] = {}
    for position, argument in enumerate(step.args):
        if isinstance(argument, Pointer):
            slots[position] = memory.address(argument.view)
            blocks[position] = memory.block(kernel.params[position], argument.view)
            table.set(position, blocks[position].start, blocks[position].nbytes)
        else:
            assert isinstance(argument, Scalar)
            slots[position] = concrete(argument.value, memory.sizes)
    launcher().run_kernel(kernel.address, ctypes.addressof(slots), *grid, 2)
    if record.stopped:
        raise stop_error(record.read(), blocks)


def run(
    gm: GraphModule,
    tensors: Sequence[torch.Tensor],
    sizes: dict[sympy.Symbol, int],
    anchor: Anchor = Anchor.ROW,
    variant: str | None = None,
    views: dict[int, Callable[[int], View]] | None = None,
    weights: dict[int, torch.Tensor] | None = None,
    interleaved: dict[torch.dtype, int] | None = None,
) -> list[torch.Tensor]:
    """Outputs of the emitted steps."""
    steps, builder, call = emit(gm, anchor, variant, views, weights, interleaved)
    held = {
        view.value: tensor
        for view, tensor in zip(call.inputs, tensors, strict=True)
        if not builder.is_weight(view.value)
    }
    memory = Memory(builder, held, sizes)
    for step in steps:
        launch(step, memory)
    return [memory.tensor(view) for view in call.outputs]


def reference(gm: GraphModule, tensors: Sequence[torch.Tensor], sizes: dict[sympy.Symbol, int]) -> list[torch.Tensor]:
    """Outputs of the body itself, floating-point tensors and types widened to fp64."""
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    return [*_Wide(gm, sizes).run(*wide)]


class _Wide(torch.fx.Interpreter):
    def __init__(self, gm: GraphModule, sizes: dict[sympy.Symbol, int]) -> None:
        super().__init__(gm)
        self.sizes = sizes

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        def fix(value: Any) -> Any:
            if isinstance(value, sympy.Expr):
                return concrete(value, self.sizes)
            half = isinstance(value, torch.dtype) and value.is_floating_point
            return torch.float64 if half else value

        args, kwargs = torch.fx.node.map_aggregate((args, kwargs), fix)
        return target(*args, **kwargs)


def assert_matches(
    gm: GraphModule, tensors: Sequence[torch.Tensor], sizes: dict[sympy.Symbol, int], tolerance: float, **options: Any
) -> list[torch.Tensor]:
    """Runs a body both ways; errors are bounded relative to the largest value of each output."""
    found = run(gm, tensors, sizes, **options)
    for got, want in zip(found, reference(gm, tensors, sizes), strict=True):
        assert got.shape == want.shape
        if not got.dtype.is_floating_point:
            assert torch.equal(got, want)
            continue
        assert torch.equal(got.isnan(), want.isnan())
        scale = want.nan_to_num().abs().max().clamp(min=1.0) if want.numel() else 1.0
        error = (
            ((got.double() - want).nan_to_num(posinf=0, neginf=0).abs() / scale).max().item() if want.numel() else 0.0
        )
        assert error <= tolerance, f"error {error:.2e}"
    return found
