"""Reductions with any combine function over any axis, in registers."""

from collections.abc import Callable, Iterator, Sequence

from tilewright.codegen.cpu.lower.bounds import tail_bound, tail_literal
from tilewright.codegen.cpu.lower.combine import as_vector, combine, horizontal, horizontal_rows, ref_of
from tilewright.codegen.cpu.lower.context import Buffer, Context, Scalar
from tilewright.codegen.cpu.lower.lanes import ZERO, Affine, Lane, Point, Uniform, Vector, is_const, type_of
from tilewright.codegen.cpu.lower.literals import scalar_literal
from tilewright.codegen.cpu.lower.nest import (
    Conjunct,
    assume,
    best_axis,
    bounds_of,
    lanes_at,
    leaf_pointers,
    nest,
    row_parts,
    scalar_nest,
)
from tilewright.codegen.cpu.lower.tiles import fill_tail, materialize
from tilewright.codegen.cpu.lower.ttir import I1, I32, Block, Elem, Op, Type, Value

# Independent accumulators hide the latency of the combine operation.
ACCUMULATORS = 4
_NEUTRAL = {
    "arith.addf": "-0.0", "arith.mulf": "1.0", "arith.maximumf": "-inf", "arith.minimumf": "inf",
    "arith.maxnumf": "nan", "arith.minnumf": "nan", "arith.addi": "0", "arith.muli": "1", "arith.ori": "0",
    "arith.xori": "0", "arith.andi": "-1", "arith.maxui": "0", "arith.minui": "-1",
}  # fmt: skip


def neutral(block: Block, elem: Elem) -> str | None:
    """Neutral element of a combine function of one operation; None if it has none."""
    ops = [op for op in block.ops if op.name not in ("arith.extf", "arith.truncf")]
    if len(ops) != 2 or len(block.args) != 2:
        return None
    name = ops[0].name
    if name in ("arith.maxsi", "arith.minsi"):
        top = (1 << (elem.bits - 1)) - 1
        return str(-top - 1 if name == "arith.maxsi" else top)
    text = _NEUTRAL.get(name)
    if text is None or not elem.is_float:
        return text if text is None or elem != I1 else scalar_literal(text, I1)
    patterns = {"-inf": _infinity(elem, 1), "inf": _infinity(elem, 0), "nan": _nan(elem)}
    return scalar_literal(patterns.get(text, text), elem)


def _fields(elem: Elem) -> tuple[int, int]:
    exponent = {"f16": 5, "bf16": 8, "f32": 8, "f64": 11, "f8E5M2": 5, "f8E4M3FN": 4}[elem.name]
    return exponent, elem.bits - 1 - exponent


def _infinity(elem: Elem, sign: int) -> str:
    exponent, mantissa = _fields(elem)
    return hex((sign << (elem.bits - 1)) | (((1 << exponent) - 1) << mantissa))


def _nan(elem: Elem) -> str:
    exponent, mantissa = _fields(elem)
    return hex((((1 << exponent) - 1) << mantissa) | (1 << (mantissa - 1)))


class _Reduction:
    """One ``tt.reduce``: shapes, result memory and the loops."""

    def __init__(self, ctx: Context, op: Op) -> None:
        self.ctx, self.op = ctx, op
        self.block = op.body()
        self.along = op.int_attr("axis")
        self.shape = op.operands[0].shape
        self.elems = [v.elem for v in op.operands]
        self.vector_axis = best_axis(ctx, self.shape, leaf_pointers(ctx, op.operands[0]))
        width = min(ctx.width, self.shape[self.along])
        self.lanes = 0 if width == 1 else width
        self.kept = tuple(size for axis, size in enumerate(self.shape) if axis != self.along)
        self.buffers: list[Buffer] = []
        if self.kept:
            self.buffers = [ctx.new_buffer(Type(v.elem, self.kept), op) for v in op.results]
        starts = [neutral(self.block, elem) for elem in self.elems]
        self.start = starts[0] if len(starts) == 1 else None
        self.part = self._tail() if self.vector_axis == self.along else None
        self.carried = dict(self._carried())

    def full_point(self, kept: Point, index: Lane) -> Point:
        return (*kept[: self.along], index, *kept[self.along :])

    def _carried(self) -> Iterator[tuple[Value, Buffer]]:
        """Memory for the tiles to write on the way; those whose tails would be missed get it at once."""
        for value in self.ctx.carried.pop(self.op, []):
            if self.part is not None and tail_literal(value, self.part) is None:
                self.ctx.bind(value, materialize(self.ctx, value))
            else:
                yield value, self.ctx.new_buffer(value.type, value.op)

    def inputs(self, point: Point, width: int) -> list[Lane]:
        lanes = [as_vector(self.ctx, self.ctx.value(v, point), width) for v in self.op.operands]
        for value, buffer in self.carried.items():
            self.ctx.write(buffer, point, self.ctx.value(value, point))
        return lanes

    def write(self, kept: Point, lanes: Sequence[Lane]) -> None:
        for buffer, result, lane in zip(self.buffers, self.op.results, lanes, strict=False):
            if lane.elem != result.elem:
                raise self.ctx.unsupported(self.op, "a combine function that changes the type")
            self.ctx.write(buffer, kept, lane)

    def accumulate(self, at: Callable[[str], Point], size: int, step: int, width: int) -> list[Lane]:
        """Combines elements 0, step, 2 * step, ... below size; ``at`` gives the point of a number."""
        ctx = self.ctx
        count = size // step
        copies = min(ACCUMULATORS, count) if self.start is not None or count > 1 else 1
        while count % copies:
            copies -= 1
        if self.start is not None and count > copies:
            first = 0
            accs = [[as_vector(ctx, Uniform(self.elems[0], self.start), width)] for _ in range(copies)]
        else:
            first = copies * step
            accs = [self.inputs(at(str(copy * step)), width) for copy in range(copies)]
        if first < size:
            accs = self._loop(accs, at, first, size, step, width)
        total = accs[0]
        for acc in accs[1:]:
            total = self.registers(combine(ctx, self.block, total, acc), width)
        return total

    def registers(self, lanes: Sequence[Lane], width: int) -> list[Lane]:
        return [as_vector(self.ctx, lane, width) for lane in lanes]

    def _loop(
        self, accs: list[list[Lane]], at: Callable[[str], Point], first: int, size: int, step: int, width: int
    ) -> list[list[Lane]]:
        ctx, number = self.ctx, len(self.elems)
        init = [(type_of(lane.elem, width), ref_of(lane)) for acc in accs for lane in acc]

        def body(index: str, carried: list[str]) -> list[str]:
            out: list[str] = []
            for copy in range(len(accs)):
                acc = self._lanes(carried[copy * number : (copy + 1) * number], width)
                point = at(ctx.b.int_op("add", index, str(copy * step), I32))
                new = self.registers(combine(ctx, self.block, acc, self.inputs(point, width)), width)
                out += [ref_of(lane) for lane in new]
            return out

        done = ctx.b.loop(str(first), str(size), str(step * len(accs)), init, body)
        return [self._lanes(done[i * number : (i + 1) * number], width) for i in range(len(accs))]

    def _lanes(self, refs: Sequence[str], width: int) -> list[Lane]:
        pairs = zip(self.elems, refs, strict=True)
        return [Vector(elem, ref, width) if width else Uniform(elem, ref) for elem, ref in pairs]

    def run(self) -> None:
        """Writes the loops; results of tensors without other axes become scalars."""
        self._run()
        for value, buffer in self.carried.items():
            self.ctx.bind(value, buffer)

    def _run(self) -> None:
        if not self.kept:
            lanes = self._row(())
            for result, lane in zip(self.op.results, lanes, strict=True):
                self.ctx.bind(result, Scalar(ref_of(lane)))
            return
        if self.vector_axis == self.along:
            self._rows()
        else:
            axis = self.vector_axis - (self.vector_axis > self.along)
            nest(self.ctx, self.kept, axis, lambda kept, _: self.write(kept, self._column(kept)), unroll=1)
        for result, buffer in zip(self.op.results, self.buffers, strict=True):
            self.ctx.bind(result, buffer)

    def _rows(self) -> None:
        """Each row for itself; those that a mask lets through without testing it."""
        ctx = self.ctx
        parts = row_parts(ctx, self.op.operands[0], self.along)
        bounds = {axis - (axis > self.along): bound for axis, bound in bounds_of(ctx, parts).items()}

        def inside(kept: Point) -> None:
            assume(ctx, parts, self.full_point(kept, ZERO), True, self.along)
            self.write(kept, self._row(kept))

        if not bounds and self.lanes and min(self.kept[-1], self.lanes) > 1:
            self._grouped_rows()
            return
        if bounds:
            scalar_nest(ctx, self.kept, inside, bounds=bounds)
        scalar_nest(ctx, self.kept, lambda kept: self.write(kept, self._row(kept)), starts=bounds)

    def _grouped_rows(self) -> None:
        """Groups of neighbouring rows; the vectors that are left of each wait in scratch memory for the others."""
        ctx, size = self.ctx, min(self.kept[-1], self.lanes)
        waiting = [ctx.new_buffer(Type(elem, (size, self.lanes)), self.op) for elem in self.elems]
        vector = lanes_at(ctx, (self.lanes,), 0)

        def group(kept: Point) -> None:
            first = kept[-1]
            assert isinstance(first, Uniform)
            start = ctx.b.int_op("mul", first.ref, str(size), I32)

            def row(index: str, _: list[str]) -> list[str]:
                total = self._vectors((*kept[:-1], Uniform(I32, ctx.b.int_op("add", start, index, I32))))
                for buffer, lane in zip(waiting, total, strict=True):
                    ctx.write(buffer, (Uniform(I32, index), vector), lane)
                return []

            ctx.b.loop("0", str(size), "1", [], row)
            points = [(Uniform(I32, str(index)), vector) for index in range(size)]
            rows = [[ctx.read(buffer, point, ctx.b.depth) for buffer in waiting] for point in points]
            lanes = horizontal_rows(ctx, self.block, rows, self.lanes)
            self.write((*kept[:-1], Affine(I32, start, 1, size)), lanes)

        scalar_nest(ctx, (*self.kept[:-1], self.kept[-1] // size), group)

    def _row(self, kept: Point) -> list[Lane]:
        total = self._vectors(kept)
        return horizontal(self.ctx, self.block, total, self.lanes) if self.lanes else total

    def _vectors(self, kept: Point) -> list[Lane]:
        """A row but for the lanes of one vector, for each operand; numbers where the row has one element."""

        def at(index: str) -> Point:
            return self.full_point(kept, lanes_at(self.ctx, self.shape, self.along, index))

        if self.part is not None:
            total = self._bounded(self.part, at, self.lanes)
            self._fill_tails(self.part, kept)
            return total
        return self.accumulate(at, self.shape[self.along], max(self.lanes, 1), self.lanes)

    def _tail(self) -> Conjunct | None:
        """Mask factor that may end the loop early."""
        if self.start is None or self.shape[self.along] <= self.ctx.width:
            return None
        return tail_bound(self.ctx, self.op.operands[0], self.along, self.block.ops[0])

    def _fill_tails(self, part: Conjunct, kept: Point) -> None:
        for value, buffer in self.carried.items():
            literal = tail_literal(value, part)
            assert part.bound is not None
            assert literal is not None
            fill_tail(self.ctx, buffer, self.full_point(kept, ZERO), self.along, part.bound, literal)

    def _bounded(self, part: Conjunct, at: Callable[[str], Point], width: int) -> list[Lane]:
        """Vectors before the bound with several accumulators, one at a time, then the one the bound cuts."""
        ctx, elem = self.ctx, self.elems[0]
        b, bound = ctx.b, part.bound
        assert bound is not None
        assert self.start is not None
        # The tail holds neutral elements in its place, so one of them starts the sum: even of no elements.
        start = as_vector(ctx, Uniform(elem, self._tail_element()), width)
        type_ = type_of(elem, width)
        copies = min(ACCUMULATORS, self.shape[self.along] // width)
        grouped = _rounded_down(ctx, bound, width * copies)
        whole = _rounded_down(ctx, bound, width)

        def add(index: str, carried: Sequence[str], full: bool) -> list[str]:
            out = []
            for copy, ref in enumerate(carried):
                point = at(b.int_op("add", index, str(copy * width), I32))
                assume(ctx, [part], point, full, self.along)
                lane = combine(ctx, self.block, self._lanes([ref], width), self.inputs(point, width))[0]
                out.append(ref_of(as_vector(ctx, lane, width)))
            return out

        step = str(width * copies)
        accs = b.loop("0", grouped, step, [(type_, ref_of(start))] * copies, lambda i, refs: add(i, refs, True))
        total = self._lanes(accs[:1], width)
        for ref in accs[1:]:
            total = self.registers(combine(ctx, self.block, total, self._lanes([ref], width)), width)
        rest = b.loop(grouped, whole, str(width), [(type_, ref_of(total[0]))], lambda i, refs: add(i, refs, True))
        more = b.emit(f"icmp slt i32 {whole}, {bound}")
        last = b.branch(more, lambda: add(whole, rest, False), lambda: rest, [type_])
        return self._lanes(last, width)

    def _tail_element(self) -> str:
        """What the masked elements are: for maxima an infinity, where the neutral element is NaN."""
        name, elem = self.block.ops[0].name, self.elems[0]
        if name in ("arith.maxnumf", "arith.minnumf"):
            return scalar_literal(_infinity(elem, int(name == "arith.maxnumf")), elem)
        assert self.start is not None
        return self.start

    def _column(self, kept: Point) -> list[Lane]:
        width = max((getattr(lane, "width", 0) for lane in kept), default=0)
        return self.accumulate(
            lambda index: self.full_point(kept, Uniform(I32, index)), self.shape[self.along], 1, width
        )


def _rounded_down(ctx: Context, count: str, multiple: int) -> str:
    if is_const(count):
        return str(int(count) // multiple * multiple)
    return ctx.b.emit(f"and i32 {count}, {-multiple}")


def lower_reduce(ctx: Context, op: Op) -> None:
    """``tt.reduce``."""
    _Reduction(ctx, op).run()
