"""Lazy operations that only rename points: ranges, splats, broadcasts, transposes, reshapes, joins."""

from collections.abc import Sequence

from tilewright.codegen.cpu.lower.arith import select
from tilewright.codegen.cpu.lower.context import LAZY, Context
from tilewright.codegen.cpu.lower.lanes import ZERO, Affine, Lane, Point, Uniform, Vector, is_const, width_of
from tilewright.codegen.cpu.lower.nest import broadcast_point
from tilewright.codegen.cpu.ttir.literals import scalar_literal
from tilewright.codegen.cpu.ttir.plan import order_of
from tilewright.codegen.cpu.ttir.records import I1, I32, Op, Type, Value

_ADD, _AND, _SHIFT = (Op(name, [], [Value("", Type(I32))]) for name in ("arith.addi", "arith.andi", "arith.shrui"))
_LESS = Op("arith.cmpi", [], [Value("", Type(I1))], words=("slt",))


def _integer(ctx: Context, op: Op, a: Lane, b: Lane) -> Lane:
    return ctx.apply(op, [a, b])


def constant(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    text = op.attrs.get("value", "0")  # ub.poison may have any value
    if text.startswith("dense<"):
        text = text[len("dense<") : -1]
    if text.startswith(("[", '"')):
        raise ctx.unsupported(op, "a constant tensor with different elements")
    return Uniform(value.elem, scalar_literal(text, value.elem))


def make_range(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    start = op.int_attr("start")
    return _integer(ctx, _ADD, point[0], Uniform(I32, str(start))) if start else point[0]


def splat(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    source = op.operands[0]
    return ctx.value(source, (ZERO,) * len(source.shape))


def expand_dims(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    axis = op.int_attr("axis")
    return ctx.value(op.operands[0], point[:axis] + point[axis + 1 :])


def broadcast(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    return ctx.value(op.operands[0], broadcast_point(op.operands[0].shape, point))


def trans(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    moved: list[Lane] = [ZERO] * len(point)
    for new, old in enumerate(order_of(op)):
        moved[old] = point[new]
    return ctx.value(op.operands[0], tuple(moved))


def low_bits(ctx: Context, lane: Lane, size: int) -> Lane:
    """``lane % size``; vectors start at multiples of their width, so many of them stay contiguous."""
    if isinstance(lane, Uniform) and is_const(lane.ref):
        return Uniform(I32, str(int(lane.ref) % size))
    if isinstance(lane, Affine) and lane.stride == 1 and lane.width <= size:
        base = low_bits(ctx, Uniform(I32, lane.base), size)
        assert isinstance(base, Uniform)
        return Affine(I32, base.ref, 1, lane.width)
    return _integer(ctx, _AND, lane, Uniform(I32, str(size - 1)))


def high_bits(ctx: Context, lane: Lane, size: int) -> Lane:
    """``lane // size``."""
    if isinstance(lane, Uniform) and is_const(lane.ref):
        return Uniform(I32, str(int(lane.ref) // size))
    if isinstance(lane, Affine) and lane.stride == 1 and lane.width <= size:
        return high_bits(ctx, Uniform(I32, lane.base), size)
    return _integer(ctx, _SHIFT, lane, Uniform(I32, str(size.bit_length() - 1)))


def _linear(ctx: Context, shape: Sequence[int], point: Point) -> Lane:
    total: Lane = ZERO
    for size, index in zip(shape, point, strict=True):
        if total != ZERO:
            total = _scaled(ctx, total, size)
        total = _integer(ctx, _ADD, total, index) if index != ZERO else total
    return total


def _scaled(ctx: Context, lane: Lane, factor: int) -> Lane:
    product = ctx.b.mul(lane, Uniform(I32, str(factor)))
    if product is not None:
        return product
    width = width_of(lane)
    return Vector(I32, ctx.b.emit(f"mul <{width} x i32> {ctx.b.vector(lane, width)}, splat (i32 {factor})"), width)


def reshape(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    source = op.operands[0]
    if [s for s in source.shape if s > 1] == [s for s in value.shape if s > 1]:
        kept = iter([index for size, index in zip(value.shape, point, strict=True) if size > 1])
        return ctx.value(source, tuple(next(kept) if size > 1 else ZERO for size in source.shape))
    return ctx.value(source, unflatten(ctx, _linear(ctx, value.shape, point), source.shape))


def unflatten(ctx: Context, index: Lane, shape: Sequence[int]) -> Point:
    """Point with the number ``index`` in row-major order."""
    moved: list[Lane] = []
    for size in reversed(shape):
        moved.append(low_bits(ctx, index, size) if size > 1 else ZERO)
        index = high_bits(ctx, index, size) if size > 1 else index
    return tuple(reversed(moved))


def join(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    """Interleaves two tensors along a new last axis."""
    left, right = op.operands
    which = point[-1]
    if isinstance(which, Uniform) and is_const(which.ref):
        return ctx.value(op.operands[int(which.ref)], point[:-1])
    first = _integer(ctx, _LESS, which, Uniform(I32, "1"))
    return select(ctx.b, first, ctx.value(left, point[:-1]), ctx.value(right, point[:-1]))


def split(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    return ctx.value(op.operands[0], (*point, Uniform(I32, str(value.index))))


def cat(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    """Concatenation along the first axis."""
    left, right = op.operands
    size = left.shape[0]
    inner = (low_bits(ctx, point[0], size), *point[1:])
    first = _integer(ctx, _LESS, point[0], Uniform(I32, str(size)))
    return select(ctx.b, first, ctx.value(left, inner), ctx.value(right, inner))


def gather(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    """``tl.gather``: one index is replaced by a computed one."""
    axis = op.int_attr("axis")
    source, indices = op.operands
    index = ctx.value(indices, point)
    if index.elem != I32:
        cast = Op("arith.trunci" if index.elem.bits > 32 else "arith.extui", [], [Value("", Type(I32))])
        index = ctx.apply(cast, [index])
    # An index out of range would read outside the tile: it is undefined, so wrapping it is as good.
    index = _integer(ctx, _AND, index, Uniform(I32, str(source.shape[axis] - 1)))
    return ctx.value(source, (*point[:axis], index, *point[axis + 1 :]))


LAZY |= {
    "arith.constant": constant,
    "ub.poison": constant,
    "tt.make_range": make_range,
    "tt.splat": splat,
    "tt.unsplat": splat,
    "tt.expand_dims": expand_dims,
    "tt.broadcast": broadcast,
    "tt.trans": trans,
    "tt.reshape": reshape,
    "tt.join": join,
    "tt.split": split,
    "tt.cat": cat,
    "tt.gather": gather,
}
