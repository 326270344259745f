"""Loads, stores and atomic operations."""

from collections.abc import Callable
from functools import partial

from tilewright.codegen.cpu.lower.access import load_lanes, store_lanes, zero_literal
from tilewright.codegen.cpu.lower.context import LAZY, Context, Scalar
from tilewright.codegen.cpu.lower.lanes import Lane, Mask, Point, Uniform, width_of
from tilewright.codegen.cpu.lower.nest import Body, assume, best_axis, bounded, bounds_of, leaf_pointers, nest
from tilewright.codegen.cpu.lower.prefetch import read_ahead
from tilewright.codegen.cpu.lower.stream import may_stream, streams
from tilewright.codegen.cpu.ttir.records import I1, Op, Value


def _point_of(value: Value, point: Point) -> Point:
    return point if value.type.is_tensor else ()


def lazy_load(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    """``tt.load`` of a tensor at one point."""
    lanes = [ctx.value(operand, _point_of(operand, point)) for operand in op.operands]
    pointer = lanes[0]
    mask = None
    if len(lanes) > 1:
        condition = ctx.simplify(lanes[1])
        if not (isinstance(condition, Uniform) and condition.ref == "true"):
            mask = ctx.b.mask(condition, width_of(pointer, condition))
            if isinstance(condition, Uniform) and condition.ref == "false":
                return lanes[2] if len(lanes) > 2 else Uniform(value.elem, zero_literal(value.elem))
    other = lanes[2] if len(lanes) > 2 else None
    floor = max(ctx.levels[value], ctx.relies)
    if ctx.checks is not None:
        ctx.checks.access(op, pointer, mask, floor, "load")
    if mask is None or mask.all_true:
        read_ahead(ctx, op, pointer)
    return load_lanes(ctx.b, pointer, value.elem, floor, mask, other)


def scalar_load(ctx: Context, op: Op) -> None:
    """``tt.load`` of a scalar."""
    lane = lazy_load_scalar(ctx, op)
    ctx.bind(op.result, Scalar(lane.ref))


def lazy_load_scalar(ctx: Context, op: Op) -> Uniform:
    """The value read by a scalar load; memory is read where the operation stands."""
    refs = [ctx.scalar(operand) for operand in op.operands]
    mask = Mask(1, uniform=refs[1]) if len(refs) > 1 and refs[1] != "true" else None
    other = Uniform(op.result.elem, refs[2]) if len(refs) > 2 else None
    pointer = Uniform(op.operands[0].elem, refs[0])
    if ctx.checks is not None:
        ctx.checks.access(op, pointer, mask, ctx.b.depth, "load")
    lane = load_lanes(ctx.b, pointer, op.result.elem, ctx.b.depth, mask, other)
    assert isinstance(lane, Uniform)
    return lane


def lower_store(ctx: Context, op: Op) -> None:
    """``tt.store``: loops over the elements that the mask lets through."""
    pointer, value = op.operands[:2]
    mask = op.operands[2] if len(op.operands) > 2 else None
    if not pointer.type.is_tensor:
        _scalar_store(ctx, op)
        return
    parts = bounded(ctx, mask) if mask is not None else []
    axis = best_axis(ctx, pointer.shape, [pointer, pointer, *leaf_pointers(ctx, value)])

    bounds = bounds_of(ctx, parts)

    def body(point: Point, full: bool, stream: bool = False) -> None:
        assume(ctx, parts, point, full, axis)
        flags = ctx.simplify(ctx.value(mask, point)) if mask is not None else Uniform(I1, "true")
        _store_at(ctx, op, ctx.value(pointer, point), ctx.value(value, point), flags, stream)

    def row(first: Point, vectors: Callable[[Body], None]) -> None:
        def loop(stream: bool) -> list[str]:
            vectors(partial(body, stream=stream))
            return []

        flag = streams(ctx, op, axis, first, bounds.get(axis))
        if flag is None:
            loop(False)
        else:
            ctx.b.branch(flag, lambda: loop(True), lambda: loop(False))

    nest(ctx, pointer.shape, axis, body, bounds, row=row if may_stream(ctx, op, axis) else None)


def _store_at(ctx: Context, op: Op, pointer: Lane, lane: Lane, flags: Lane, stream: bool = False) -> None:
    width = width_of(pointer, lane, flags)
    mask = ctx.b.mask(flags, width)
    if ctx.checks is not None:
        ctx.checks.access(op, pointer, mask, ctx.b.depth, "store")
    if mask.uniform is not None and mask.bound is None and mask.vector is None:

        def write() -> list[str]:
            store_lanes(ctx.b, pointer, lane, stream=stream)
            return []

        ctx.b.branch(mask.uniform, write)
        return
    store_lanes(ctx.b, pointer, lane, None if mask.all_true else mask, stream)


def _scalar_store(ctx: Context, op: Op) -> None:
    refs = [ctx.scalar(operand) for operand in op.operands]
    flags = Uniform(I1, refs[2]) if len(refs) > 2 else Uniform(I1, "true")
    _store_at(ctx, op, Uniform(op.operands[0].elem, refs[0]), Uniform(op.operands[1].elem, refs[1]), flags)


LAZY["tt.load"] = lazy_load
