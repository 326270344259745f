"""Prefix scans with any combine function over any axis."""

from collections.abc import Sequence

from tilewright.codegen.cpu.lower.arith import select
from tilewright.codegen.cpu.lower.combine import as_vector, combine, ref_of
from tilewright.codegen.cpu.lower.context import Buffer, Context
from tilewright.codegen.cpu.lower.lanes import Affine, Lane, Mask, Point, Uniform, Vector, type_of
from tilewright.codegen.cpu.lower.nest import nest, scalar_nest
from tilewright.codegen.cpu.ttir.records import I32, Op, Type


class _Scan:
    """One ``tt.scan``."""

    def __init__(self, ctx: Context, op: Op) -> None:
        self.ctx, self.op, self.block = ctx, op, op.body()
        self.along = op.int_attr("axis")
        self.reverse = op.attrs.get("reverse", "false") == "true"
        self.shape = op.operands[0].shape
        self.size = self.shape[self.along]
        self.kept = tuple(size for axis, size in enumerate(self.shape) if axis != self.along)
        self.buffers: list[Buffer] = [ctx.new_buffer(Type(v.elem, v.shape), op) for v in op.results]

    def run(self) -> None:
        """Writes the loops."""
        if self.along == len(self.shape) - 1:
            scalar_nest(self.ctx, self.kept, self._row)
        else:
            nest(self.ctx, self.kept, len(self.kept) - 1, lambda kept, _: self._column(kept), unroll=1)
        for result, buffer in zip(self.op.results, self.buffers, strict=True):
            self.ctx.bind(result, buffer)

    def _point(self, kept: Point, index: Lane) -> Point:
        return (*kept[: self.along], index, *kept[self.along :])

    def _inputs(self, point: Point, width: int) -> list[Lane]:
        return [as_vector(self.ctx, self.ctx.value(v, point), width) for v in self.op.operands]

    def _write(self, point: Point, lanes: Sequence[Lane]) -> None:
        for buffer, lane in zip(self.buffers, lanes, strict=True):
            self.ctx.write(buffer, point, lane)

    def _position(self, index: str, step: int) -> str:
        """Where the loop stands: a reverse scan runs from the end."""
        return self.ctx.b.int_op("sub", str(self.size - step), index, I32) if self.reverse else index

    def _column(self, kept: Point) -> None:
        """One element after another, vectors along another axis."""
        width = max((getattr(lane, "width", 0) for lane in kept), default=0)
        first = self._point(kept, Uniform(I32, self._position("0", 1)))
        total = self._inputs(first, width)
        self._write(first, total)
        self._continue(kept, total, width, 1, lambda acc, x: (combine(self.ctx, self.block, acc, x),) * 2)

    def _continue(self, kept: Point, total: list[Lane], width: int, step: int, advance) -> None:  # type: ignore[no-untyped-def]
        """Remaining elements; ``advance(carry, inputs)`` gives what to write and the next carry."""
        if self.size == step:
            return
        elems = [v.elem for v in self.op.operands]
        carry_width = width if step == 1 else 0

        def body(index: str, carried: list[str]) -> list[str]:
            lanes = zip(elems, carried, strict=True)
            carry = [Vector(e, ref, carry_width) if carry_width else Uniform(e, ref) for e, ref in lanes]
            base = self._position(index, step)
            lane: Lane = Uniform(I32, base) if step == 1 else Affine(I32, base, 1, step)
            point = self._point(kept, lane)
            written, following = advance(carry, self._inputs(point, width))
            self._write(point, written)
            return [ref_of(as_vector(self.ctx, x, carry_width)) for x in following]

        init = [(type_of(lane.elem, carry_width), ref_of(lane)) for lane in total]
        self.ctx.b.loop(str(step), str(self.size), str(step), init, body)

    def _row(self, kept: Point) -> None:
        """Whole vectors: a scan inside each, then the total so far added to all its lanes."""
        width = min(self.ctx.width, self.size)
        if width == 1:
            point = self._point(kept, Uniform(I32, "0"))
            self._write(point, self._inputs(point, 0))
            return
        first = self._point(kept, Affine(I32, self._position("0", width), 1, width))
        start = self._inside(self._inputs(first, width), width)
        self._write(first, start)

        def advance(carry: list[Lane], inputs: list[Lane]) -> tuple[list[Lane], list[Lane]]:
            inner = self._inside(inputs, width)
            spread: list[Lane] = [Vector(c.elem, self.ctx.b.vector(c, width), width) for c in carry]
            out = [as_vector(self.ctx, lane, width) for lane in combine(self.ctx, self.block, spread, inner)]
            return out, self._last(out, width)

        self._continue(kept, self._last(start, width), width, width, advance)

    def _last(self, lanes: Sequence[Lane], width: int) -> list[Lane]:
        at = 0 if self.reverse else width - 1
        extract = self.ctx.b.emit
        return [
            Uniform(lane.elem, extract(f"extractelement {type_of(lane.elem, width)} {ref_of(lane)}, i32 {at}"))
            for lane in lanes
        ]

    def _inside(self, lanes: Sequence[Lane], width: int) -> list[Lane]:
        """Scan of the lanes of one vector in log2(width) steps (Hillis and Steele, 1986)."""
        current = list(lanes)
        distance = 1
        while distance < width:
            shifted = [self._shift(lane, width, distance) for lane in current]
            keep, change = (self._first_lanes(width, distance, first) for first in (True, False))
            combined = combine(self.ctx, self.block, shifted, current, change)
            current = [
                as_vector(self.ctx, select(self.ctx.b, keep, old, new), width)
                for old, new in zip(current, combined, strict=True)
            ]
            distance *= 2
        return current

    def _first_lanes(self, width: int, distance: int, first: bool) -> Mask:
        """The lanes that a step leaves alone, or the others."""
        flags = ["true" if (lane < distance) == first else "false" for lane in range(width)]
        ordered = reversed(flags) if self.reverse else flags
        return Mask(width, vector="<" + ", ".join(f"i1 {flag}" for flag in ordered) + ">")

    def _shift(self, lane: Lane, width: int, distance: int) -> Lane:
        type_ = type_of(lane.elem, width)
        moved = [i + distance if self.reverse else i - distance for i in range(width)]
        picks = ", ".join(f"i32 {i if 0 <= i < width else 0}" for i in moved)
        ref = ref_of(lane)
        return Vector(
            lane.elem, self.ctx.b.emit(f"shufflevector {type_} {ref}, {type_} poison, <{width} x i32> <{picks}>"), width
        )


def lower_scan(ctx: Context, op: Op) -> None:
    """``tt.scan``."""
    _Scan(ctx, op).run()
