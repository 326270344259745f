"""Reductions with any combine function over any axis, in registers."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tilewright.codegen.cpu.lower.bounds import tail_bound, tail_literal
from tilewright.codegen.cpu.lower.byte_dot import ByteDot, byte_terms, dot_lanes
from tilewright.codegen.cpu.lower.combine import as_vector, combine, horizontal, horizontal_rows, ref_of
from tilewright.codegen.cpu.lower.context import Buffer, Context, Scalar
from tilewright.codegen.cpu.lower.lanes import ZERO, Affine, Lane, Point, Uniform, Vector, is_const, type_of
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
from tilewright.codegen.cpu.lower.neutral import masked_element, neutral
from tilewright.codegen.cpu.lower.tiles import fill_tail, materialize
from tilewright.codegen.cpu.ttir.records import I32, Op, Type, Value, walk

# Independent accumulators hide the latency of the combine operation.
ACCUMULATORS = 4


class _Reduction:
    """One ``tt.reduce``: shapes, result memory and the loops."""

    def __init__(self, ctx: Context, op: Op) -> None:
        self.ctx, self.op = ctx, op
        self.block = op.body()
        self.along = op.int_attr("axis")
        self.shape = op.operands[0].shape
        self.elems = [v.elem for v in op.operands]
        self.vector_axis = best_axis(ctx, self.shape, leaf_pointers(ctx, op.operands[0]))
        self.kept = tuple(size for axis, size in enumerate(self.shape) if axis != self.along)
        self.buffers: list[Buffer] = []
        if self.kept:
            self.buffers = [ctx.new_buffer(Type(v.elem, self.kept), op) for v in op.results]
        starts = [neutral(self.block, elem) for elem in self.elems]
        self.start = starts[0] if len(starts) == 1 else None
        self.part = self._tail() if self.vector_axis == self.along else None
        self.carried = dict(self._carried())
        self.dot = self._byte_dot()

    def full_point(self, kept: Point, index: Lane) -> Point:
        return (*kept[: self.along], index, *kept[self.along :])

    def _carried(self) -> Iterator[tuple[Value, Buffer]]:
        """Memory for the tiles to write on the way; those whose tails would be missed get it at once."""
        for value in self.ctx.carried.pop(self.op, []):
            if self.part is not None and tail_literal(value, self.part) is None:
                self.ctx.bind(value, materialize(self.ctx, value))
            else:
                yield value, self.ctx.new_buffer(value.type, value.op)

    def _byte_dot(self) -> ByteDot | None:
        """How to sum products of bytes, if that is what this reduction does."""
        lanes = dot_lanes(self.ctx, self.shape[self.along])
        adds = [op.name for op in self.block.ops[:-1]] == ["arith.addi"]
        if not lanes or not adds or self.elems != [I32] or self.vector_axis != self.along:
            return None
        terms = byte_terms(self.ctx, self.op.operands[0])
        return ByteDot(self.ctx, terms, lanes) if terms is not None else None

    def inputs(self, point: Point, width: int) -> list[Lane]:
        lanes = [as_vector(self.ctx, self.ctx.value(v, point), width) for v in self.op.operands]
        self._write_carried(point)
        return lanes

    def _write_carried(self, point: Point) -> None:
        for value, buffer in self.carried.items():
            self.ctx.write(buffer, point, self.ctx.value(value, point))

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
            lanes = self._horizontal(self._row_lanes(()))
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

        def inside(kept: Point) -> list[Lane]:
            assume(ctx, parts, self.full_point(kept, ZERO), True, self.along)
            return self._row_lanes(kept)

        # In a group that a bound cuts, an assertion could fail for rows that are not there.
        asserts = any(op.name == "tt.assert" for op in walk(self.op.regions[0]))
        group = 1 if asserts else min(self.row_width, self.kept[-1])
        if group > 1:
            self._groups(group, bounds, inside)
        elif bounds:
            scalar_nest(ctx, self.kept, lambda kept: self.write(kept, self._horizontal(inside(kept))), bounds=bounds)
        if bounds or group == 1:
            rest = lambda kept: self.write(kept, self._horizontal(self._row_lanes(kept)))  # noqa: E731
            scalar_nest(ctx, self.kept, rest, starts=bounds)

    def _groups(self, group: int, bounds: dict[int, str], row: Callable[[Point], list[Lane]]) -> None:
        """Rows by groups: a vector of each goes to scratch, and then all lanes of a group are combined together.

        Of a group that a bound cuts, the results of the rows behind the bound are undefined.
        """
        ctx, last = self.ctx, len(self.kept) - 1
        width, end = self.row_width, bounds.get(last, str(self.kept[last]))
        lanes = [Buffer(ctx.scratch(self.op, group * width * 8), e, (group, width)) for e in self.elems]
        across = Affine(I32, "0", 1, width)

        def groups(outer: Point) -> None:
            def one(base: str, _: list[str]) -> list[str]:
                def single(index: str, _: list[str]) -> list[str]:
                    at = Uniform(I32, ctx.b.int_op("add", base, index, I32))
                    for buffer, lane in zip(lanes, row((*outer, at)), strict=True):
                        ctx.write(buffer, (Uniform(I32, index), across), lane)
                    return []

                count = str(group)
                if last in bounds:
                    count = ctx.b.int_min(count, ctx.b.int_op("sub", end, base, I32))
                ctx.b.loop("0", count, "1", [], single)
                rows = [
                    [ctx.read(buffer, (Uniform(I32, str(index)), across), ctx.b.depth) for buffer in lanes]
                    for index in range(group)
                ]
                self.write((*outer, Affine(I32, base, 1, group)), horizontal_rows(ctx, self.block, rows, width))
                return []

            ctx.b.loop("0", end, str(group), [], one)

        scalar_nest(ctx, self.kept[:last], groups, bounds=bounds)

    @property
    def row_width(self) -> int:
        """Lanes of the vector that a row becomes before its lanes are combined."""
        return self.dot.lanes // 4 if self.dot is not None else min(self.ctx.width, self.shape[self.along])

    def _horizontal(self, lanes: list[Lane]) -> list[Lane]:
        return horizontal(self.ctx, self.block, lanes, self.row_width) if self.row_width > 1 else lanes

    def _row_lanes(self, kept: Point) -> list[Lane]:
        """A row combined to one vector of ``row_width`` lanes."""
        width = min(self.ctx.width, self.shape[self.along])
        if self.dot is not None:
            total = self._dot_row(self.dot, kept)
        elif self.part is not None:
            total = self._bounded(self.part, partial(self._at, kept), width)
        else:
            size = self.shape[self.along]
            total = self.accumulate(partial(self._at, kept), size, width, width if width > 1 else 0)
        if self.part is not None:
            self._fill_tails(self.part, kept)
        return total

    def _at(self, kept: Point, index: str) -> Point:
        return self.full_point(kept, lanes_at(self.ctx, self.shape, self.along, index))

    def _dot_row(self, dot: ByteDot, kept: Point) -> list[Lane]:
        """Whole vectors of bytes with several accumulators, then, below a bound, the one that the bound cuts."""
        ctx, size, part = self.ctx, self.shape[self.along], self.part
        copies = min(ACCUMULATORS, size // dot.lanes) if part is None else 1

        def add(index: str, carried: Sequence[str], full: bool) -> list[str]:
            out = []
            for copy in range(copies):
                base = ctx.b.int_op("add", index, str(copy * dot.lanes), I32)
                point = self.full_point(kept, Affine(I32, base, 1, dot.lanes))
                assume(ctx, [part] if part is not None else [], point, full, self.along)
                out += dot.step(point, carried[copy * dot.count : (copy + 1) * dot.count])
                self._write_carried(point)
            return out

        accs: Sequence[str] = ["zeroinitializer"] * (dot.count * copies)
        whole = str(size) if part is None else rounded_down(ctx, part.bound or "0", dot.lanes)
        if whole == str(dot.lanes * copies):
            accs = add("0", accs, True)
        else:
            init = [(dot.type, ref) for ref in accs]
            accs = ctx.b.loop("0", whole, str(dot.lanes * copies), init, lambda index, refs: add(index, refs, True))
        if part is not None:
            more = ctx.b.emit(f"icmp slt i32 {whole}, {part.bound}")
            before = list(accs)
            accs = ctx.b.branch(more, lambda: add(whole, before, False), lambda: before, [dot.type] * dot.count)
        lanes = dot.lanes // 4
        totals = [Vector(I32, dot.total(accs[i : i + dot.count]), lanes) for i in range(0, len(accs), dot.count)]
        total: list[Lane] = [totals[0]]
        for other in totals[1:]:
            total = self.registers(combine(ctx, self.block, total, [other]), lanes)
        return total

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
        start = as_vector(ctx, Uniform(elem, masked_element(self.block, elem, self.start)), width)
        type_ = type_of(elem, width)
        copies = min(ACCUMULATORS, self.shape[self.along] // width)
        grouped = rounded_down(ctx, bound, width * copies)
        whole = rounded_down(ctx, bound, width)

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
        last = b.branch(more, lambda: add(b.local(whole), rest, False), lambda: rest, [type_])
        return self._lanes(last, width)

    def _column(self, kept: Point) -> list[Lane]:
        width = max((getattr(lane, "width", 0) for lane in kept), default=0)
        return self.accumulate(
            lambda index: self.full_point(kept, Uniform(I32, index)), self.shape[self.along], 1, width
        )


def rounded_down(ctx: Context, count: str, multiple: int) -> str:
    if is_const(count):
        return str(int(count) // multiple * multiple)
    return ctx.b.emit(f"and i32 {count}, {-multiple}")


def lower_reduce(ctx: Context, op: Op) -> None:
    """``tt.reduce``."""
    _Reduction(ctx, op).run()
