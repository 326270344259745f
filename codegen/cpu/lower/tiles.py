"""Tiles in scratch memory: evaluating a tensor into one, in loops of its own or in those of a reduction."""

from collections.abc import Sequence

from tilewright.codegen.cpu.lower.bounds import constant_tail
from tilewright.codegen.cpu.lower.context import Buffer, Context
from tilewright.codegen.cpu.lower.lanes import Point, Uniform, Vector, is_const
from tilewright.codegen.cpu.lower.nest import (
    assume,
    best_axis,
    bounds_of,
    expression,
    lanes_at,
    leaf_pointers,
    nest,
    row_parts,
    scalar_nest,
)
from tilewright.codegen.cpu.ttir.plan import MOVES, is_lazy
from tilewright.codegen.cpu.ttir.records import I8, Op, Type, Value

# Operations that may stand between a tile and the reduction that takes it along, besides lazy and scalar ones.
_NO_EFFECT = ("arith.", "math.", "tt.get_program_id", "tt.get_num_programs", "tt.splat")


def materialize(ctx: Context, value: Value, buffer: Buffer | None = None, op: Op | None = None) -> Buffer:
    """Evaluates a whole tile into scratch memory (a new buffer unless one is given)."""
    target = buffer or ctx.new_buffer(Type(value.elem, value.shape), op or value.op)
    with ctx.vectors_of(4 * ctx.width if _is_bytes(ctx, value) else ctx.width):
        _write_tile(ctx, value, target)
    return target


def _is_bytes(ctx: Context, value: Value) -> bool:
    """Whether a tile is of bytes made of bytes: then vectors hold four times as many elements."""
    loads = [v for v in expression(ctx, value) if v.op is not None and v.op.name == "tt.load" and v.type.is_tensor]
    return value.elem == I8 and all(v.elem == I8 for v in loads)


def _write_tile(ctx: Context, value: Value, target: Buffer) -> None:
    axis = best_axis(ctx, value.shape, leaf_pointers(ctx, value))
    parts = row_parts(ctx, value, axis)
    tail = constant_tail(ctx, value, axis) if value.shape[axis] > ctx.width else None
    ends = [tail.part] if tail is not None else []

    def write(point: Point, full: bool) -> None:
        assume(ctx, ends, point, full, axis)
        ctx.write(target, point, ctx.value(value, point))

    def write_inside(point: Point, full: bool) -> None:
        assume(ctx, parts, point, full, axis)
        write(point, full)

    # Rows that a mask lets through are written without testing it.
    rows = bounds_of(ctx, parts)
    if rows:
        nest(ctx, value.shape, axis, write_inside, rows | bounds_of(ctx, ends))
    nest(ctx, value.shape, axis, write, bounds_of(ctx, ends), starts=rows)
    if tail is not None:
        single = tuple(1 if a == axis else size for a, size in enumerate(value.shape))
        scalar_nest(ctx, single, lambda row: fill_tail(ctx, target, row, axis, tail.bound, tail.literal))


def fill_tail(ctx: Context, buffer: Buffer, row: Point, axis: int, bound: str, literal: str) -> None:
    """Writes one number to the vectors of a row that begin at the bound or after it."""
    width, size = min(ctx.width, buffer.shape[axis]), buffer.shape[axis]
    number = Vector(buffer.elem, ctx.b.vector(Uniform(buffer.elem, literal), width), width)
    first = rounded_up(ctx, bound, width)

    def step(index: str, _: list[str]) -> list[str]:
        at = lanes_at(ctx, buffer.shape, axis, index)
        ctx.write(buffer, tuple(at if a == axis else lane for a, lane in enumerate(row)), number)
        return []

    ctx.b.loop(first, str(size), str(width), [], step)


def rounded_up(ctx: Context, count: str, multiple: int) -> str:
    """An i32 count rounded up to a multiple of a power of two."""
    if is_const(count):
        return str(-(-int(count) // multiple) * multiple)
    return ctx.b.emit(f"and i32 {ctx.b.emit(f'add i32 {count}, {multiple - 1}')}, {-multiple}")


def carrier(ctx: Context, value: Value, following: Sequence[Op]) -> Op | None:
    """The reduction that can write a tile to memory as it passes over it.

    It has to be the first operation after the tile's definition that reads it, element by element, and nothing before
    it may write memory.

    Args:
        following: operations after the definition, in the same block.
    """
    for op in following:
        if op.name == "tt.reduce":
            return op if any(_reads_in_place(ctx, operand, value) for operand in op.operands) else None
        scalar = not is_lazy(op) and op.name.startswith(_NO_EFFECT)
        if not scalar and not is_lazy(op):
            return None
        if any(result in ctx.plan.materialized for result in op.results) and _needs(ctx, op, value):
            return None
    return None


def _needs(ctx: Context, op: Op, value: Value) -> bool:
    return any(value in expression(ctx, operand) for operand in op.operands)


def _reads_in_place(ctx: Context, operand: Value, value: Value) -> bool:
    """Whether evaluating an operand needs a value of its shape at the same point, and at no other."""
    if operand.shape != value.shape:
        return False
    pending, seen, found = [operand], {operand}, False
    while pending:
        current = pending.pop()
        if current is value:
            found = True
            continue
        op = current.op
        if current in ctx.bindings or op is None or not is_lazy(op):
            continue
        same = op.name not in MOVES
        for source in op.operands:
            if same and source.shape == value.shape:
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
            elif source.type.is_tensor and value in expression(ctx, source):
                return False
    return found
