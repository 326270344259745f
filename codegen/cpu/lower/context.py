"""State of one kernel's lowering and the evaluation of tensors at points."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewright.codegen.cpu.lower.access import load_lanes, store_lanes
from tilewright.codegen.cpu.lower.arith import ELEMENTWISE, Rule, elementwise
from tilewright.codegen.cpu.lower.lanes import (
    ZERO,
    Lane,
    LaneBuilder,
    Mask,
    Point,
    Uniform,
    Vector,
    is_const,
    width_of,
)
from tilewright.codegen.cpu.lower.quotient import divide_by_shared, shared_divisor
from tilewright.codegen.cpu.mathlib.functions import MathLibrary, rules
from tilewright.codegen.cpu.mathlib.libdevice import extern_rule, symbol_of
from tilewright.codegen.cpu.microkernel_amx import TileShape
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.codegen.cpu.ttir.plan import Plan
from tilewright.codegen.cpu.ttir.records import I1, I32, Elem, Op, Type, Value
from tilewright.errors import UnsupportedOp, Where

if TYPE_CHECKING:
    from tilewright.codegen.cpu.lower.checks import Checks

# Large tiles come from the heap, once a call: stacks of threads are small, and LLVM keeps no large tile in registers.
STACK_TILE = 64 << 10
STACK_LIMIT = 1 << 20
SCRATCH_LIMIT = 256 << 20
# Operations that kernels keep an index in range with, and the operand that is the index: x % n, where(x < n, x, 0).
UNWRAPPED = {"arith.remsi": 0, "arith.remui": 0, "arith.select": 1}
_ADVICE = {
    "tt.elementwise_inline_asm": "write the assembly's meaning in tl operations, chosen for this target by "
    "tl.target_info.is_cuda(): the text of GPU instructions has no meaning on a CPU",
}


@dataclass(frozen=True)
class Scalar:
    """A value without a shape."""

    ref: str


@dataclass(frozen=True)
class Buffer:
    """A tensor in row-major scratch memory."""

    ptr: str
    elem: Elem
    shape: tuple[int, ...]

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements."""
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= size
        return tuple(reversed(strides))


@dataclass(frozen=True)
class Shifted:
    """Another tensor plus the same number everywhere (elements, for pointers)."""

    origin: Value
    offset: Uniform


Binding = Scalar | Buffer | Shifted


class Context:
    """Everything the lowering of one kernel knows.

    Attributes:
        b: writer of the function.
        bindings: where values are; a tensor without a binding is lazy.
        destinations: memory that a result not yet computed shall be written to.
        carried: tiles that a reduction writes to memory while it passes over them.
        levels: scope level a value was defined at; it must not be evaluated further out.
        unwrapped: results of ``UNWRAPPED`` operations that are taken to be the operand they are made of.
        functions: text of the functions that the kernel calls, by name.
        tile_shapes: sizes of tile registers that dot products need. One is set where the kernel is entered; where there
            are more, each product sets its own.
        relies: level of the innermost scope whose assumptions the value being evaluated rests on: there, and in scopes
            inside it, the value is right, and only there may memory be read for it.
        unread: stores that may be non-temporal: the kernel never reads what they write.
        streams: loads, and whether each reads a long run of memory of its program's own.
        table: address of the kernel's memory table, if it can stop itself.
        checks: tests of accesses, in checked mode.
    """

    def __init__(self, kernel: str, target: CpuTarget, plan: Plan) -> None:
        self.b = LaneBuilder()
        self.kernel, self.target, self.plan = kernel, target, plan
        self.width = target.lanes_f32
        self.math = MathLibrary(target)
        self.bindings: dict[Value, Binding] = {}
        self.levels: dict[Value, int] = {}
        self.destinations: dict[Value, Buffer] = {}
        self.carried: dict[Op, list[Value]] = {}
        self.unwrapped: frozenset[Value] = frozenset()
        self.relies = 0
        self.functions: dict[str, str] = {}
        self.tile_shapes: list[TileShape] = []
        self.program_ids: dict[str, str] = {}
        self.grid: dict[str, str] = {}
        self._rules: dict[str, Rule] = {
            **rules(self.math),
            "tt.extern_elementwise": extern_rule(self.math),
        }
        self.unread: frozenset[Op] = frozenset()
        self.streams: dict[Op, bool] = {}
        self.table: str | None = None
        self.checks: Checks | None = None
        self._scratch_bytes = self._stack_bytes = 0

    def unsupported(self, op: Op, why: str, hint: str = "") -> UnsupportedOp:
        """The error for an operation that cannot be lowered."""
        return UnsupportedOp(
            f"the CPU backend does not support {op.name}",
            where=Where(node=self.kernel, source=op.loc or None),
            why=why,
            hint=hint
            or _ADVICE.get(op.name)
            or "rewrite this line with other tl operations, or run the kernel on a GPU",
        )

    def scratch(self, op: Op | None, nbytes: int) -> str:
        """Scratch memory, counted against the limit.

        Raises:
            UnsupportedOp: the kernel needs more than 256 MB.
        """
        self._scratch_bytes += nbytes
        if self._scratch_bytes > SCRATCH_LIMIT:
            raise self.unsupported(
                op or Op("scratch memory", []),
                f"its tiles need more than {SCRATCH_LIMIT >> 20} MB of memory for each program",
                "use smaller block sizes",
            )
        if nbytes >= STACK_TILE or self._stack_bytes + nbytes > STACK_LIMIT:
            return self.b.allocate(nbytes)
        self._stack_bytes += nbytes
        return self.b.alloca(nbytes)

    def new_buffer(self, type_: Type, op: Op | None) -> Buffer:
        """Scratch for a tensor; the padding lets vectors narrower than a register be read whole."""
        return Buffer(self.scratch(op, type_.nbytes + 64), type_.elem, type_.shape)

    @contextmanager
    def vectors_of(self, lanes: int) -> Iterator[None]:
        """Loops written inside have vectors of that many lanes."""
        before, self.width = self.width, lanes
        yield
        self.width = before

    def bind(self, value: Value, binding: Binding) -> None:
        self.bindings[value] = binding
        self.levels[value] = self.b.depth

    def scalar(self, value: Value) -> str:
        """LLVM value of a scalar."""
        binding = self.bindings[value]
        assert isinstance(binding, Scalar), value.name
        return binding.ref

    def level(self, point: Point, value: Value) -> int:
        """Outermost level at which a value can be evaluated at a point."""
        refs = [getattr(i, "base", None) or getattr(i, "ref", None) or "0" for i in point]
        return max(self.b.level_of(*refs), self.levels.get(value, 0))

    def value(self, value: Value, point: Point) -> Lane:
        """What a value is at a point.

        Args:
            point: one index lane (i32) per axis of the value.
        """
        if value in self.unwrapped and value.op is not None:
            return self.value(value.op.operands[UNWRAPPED[value.op.name]], point)
        binding = self.bindings.get(value)
        if isinstance(binding, Scalar):
            return Uniform(value.elem, binding.ref)
        key = (value, point, self.unwrapped)
        found = self.b.memoized(key)
        if found is not None:
            lane, relies = found
            self.relies = max(self.relies, relies)
            return lane
        before, self.relies = self.relies, 0
        if isinstance(binding, Buffer):
            lane = self.read(binding, point, self.levels[value])
        elif isinstance(binding, Shifted):
            origin = self.value(binding.origin, point)
            if value.elem.is_ptr:
                lane = self.b.add_pointer(origin, binding.offset)
            else:
                lane = elementwise(self.b, _ADD, [origin, binding.offset], self._rules)
        else:
            assert value.op is not None, value.name
            lane = self._evaluate(value.op, value, point)
        self.b.memoize(key, (lane, self.relies), max(self.level(point, value), self.relies))
        self.relies = max(before, self.relies)
        return lane

    def _evaluate(self, op: Op, value: Value, point: Point) -> Lane:
        if op.name in LAZY:
            return LAZY[op.name](self, op, value, point)
        return self.apply(op, [self.value(v, point if v.type.is_tensor else ()) for v in op.operands])

    def knows(self, op: Op) -> bool:
        """Whether an operation is elementwise and known."""
        return op.name in ELEMENTWISE or op.name in self._rules

    def apply(self, op: Op, lanes: list[Lane]) -> Lane:
        """An elementwise operation on lanes.

        Raises:
            UnsupportedOp: no such operation.
        """
        if not self.knows(op):
            raise self.unsupported(op, "it is not among the operations this backend knows")
        if op.name == "arith.divf" and self.target.fma:
            divisor = shared_divisor(self.b, *lanes)
            if divisor is not None:
                return divide_by_shared(self.b, self.functions, lanes[0], divisor)
        try:
            return self.simplify(elementwise(self.b, op, [self.simplify(lane) for lane in lanes], self._rules))
        except KeyError:
            name = symbol_of(op) if "symbol" in op.attrs else op.name
            raise self.unsupported(op, f"there is no function {name} for {op.operands[0].elem.name}") from None

    def simplify(self, lane: Lane) -> Lane:
        """Drops the parts of a mask that are known to hold."""
        if isinstance(lane, Uniform) and lane.elem == I1 and self._holds(lane.ref):
            return Uniform(I1, "true")
        if not isinstance(lane, Mask):
            return lane
        uniform = None if self._holds(lane.uniform) else lane.uniform
        bound = None if self._holds(lane.bound) else lane.bound
        if bound is not None and is_const(bound) and int(bound) >= lane.width:
            bound = None
        return Mask(lane.width, uniform, bound, lane.vector)

    def _holds(self, condition: str | None) -> bool:
        level = self.b.assumed_at(condition)
        if level is not None:
            self.relies = max(self.relies, level)
        return level is not None

    def address(self, buffer: Buffer, point: Point) -> Lane:
        """Pointer lanes of a buffer at a point."""
        offset: Lane = ZERO
        for index, stride in zip(point, buffer.strides, strict=True):
            term = self.b.mul(index, Uniform(I32, str(stride)))
            if term is None:
                width = width_of(index)
                scaled = f"splat (i32 {stride})"
                term = Vector(I32, self.b.emit(f"mul <{width} x i32> {self.b.vector(index, width)}, {scaled}"), width)
            total = self.b.add_sub("add", offset, term)
            if total is None:
                width = width_of(offset, term)
                parts = [self.b.vector(lane, width) for lane in (offset, term)]
                total = Vector(I32, self.b.emit(f"add <{width} x i32> {parts[0]}, {parts[1]}"), width)
            offset = total
        return self.b.add_pointer(Uniform(Elem("ptr", 64, "ptr", buffer.elem), buffer.ptr), offset)

    def read(self, buffer: Buffer, point: Point, floor: int) -> Lane:
        """Elements of a buffer."""
        return load_lanes(self.b, self.address(buffer, point), buffer.elem, floor)

    def write(self, buffer: Buffer, point: Point, lane: Lane) -> None:
        """Stores a lane to a buffer."""
        store_lanes(self.b, self.address(buffer, point), lane)


_ADD = Op("arith.addi", [], [Value("", Type(I32))])
Evaluator = Callable[[Context, Op, Value, Point], Lane]
LAZY: dict[str, Evaluator] = {}
