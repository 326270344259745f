"""Lazy operations on the bits of an index: the partners of a sorting network (see ``pairs``).

Vectors start at multiples of their width, so a bit below the width says which lanes are exchanged and a bit above it
which vector.
"""

from collections.abc import Callable, Sequence
from typing import TypeGuard

from tilewright.codegen.cpu.lower.context import LAZY, Context
from tilewright.codegen.cpu.lower.lanes import Affine, Lane, Point, Uniform, Vector, is_const, type_of, width_of
from tilewright.codegen.cpu.lower.shapes import high_bits, low_bits
from tilewright.codegen.cpu.ttir.records import I32, Op, Value


def _number(ctx: Context, name: str, ref: str, amount: int) -> str:
    """``ref`` and, or, xor, shifted by a constant: an i32."""
    if is_const(ref):
        value = int(ref)
        exact: dict[str, Callable[[], int]] = {
            "and": lambda: value & amount,
            "or": lambda: value | amount,
            "xor": lambda: value ^ amount,
            "shl": lambda: value << amount,
        }
        return str(exact[name]())
    return ref if amount == 0 and name != "and" else ctx.b.emit(f"{name} i32 {ref}, {amount}")


def _numbers(ctx: Context, name: str, lane: Lane, amount: int) -> Lane:
    """The same for every lane of an index that has no simpler form."""
    if isinstance(lane, Uniform):
        return Uniform(I32, _number(ctx, name, lane.ref, amount))
    width = width_of(lane)
    return Vector(I32, ctx.b.emit(f"{name} <{width} x i32> {ctx.b.vector(lane, width)}, splat (i32 {amount})"), width)


def _aligned(lane: Lane) -> TypeGuard[Affine]:
    """Whether the lanes are the elements from a multiple of the width on."""
    return isinstance(lane, Affine) and lane.stride == 1


def _shuffled(ctx: Context, lanes: Sequence[Lane], picks: Sequence[int], width: int) -> Lane:
    """Lanes ``picks`` of one vector, or of two behind each other."""
    elem = lanes[0].elem
    if width_of(*lanes) == 0 and len(lanes) == 1:
        return lanes[0]
    type_ = type_of(elem, width)
    first = ctx.b.vector(lanes[0], width)
    second = ctx.b.vector(lanes[1], width) if len(lanes) > 1 else "poison"
    chosen = ", ".join(f"i32 {pick}" for pick in picks)
    out = ctx.b.emit(f"shufflevector {type_} {first}, {type_} {second}, <{len(picks)} x i32> <{chosen}>")
    return Vector(elem, out, len(picks))


def _source(ctx: Context, op: Op, index: Lane) -> Lane:
    return ctx.value(op.operands[0], (index,))


def exchange(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    """Element ``i ^ distance``."""
    (index,), distance = point, int(op.attrs["distance"])
    width = width_of(index)
    if _aligned(index):
        if distance >= width:
            return _source(ctx, op, Affine(I32, _number(ctx, "xor", index.base, distance), 1, width))
        return _shuffled(ctx, [_source(ctx, op, index)], [lane ^ distance for lane in range(width)], width)
    return _source(ctx, op, _numbers(ctx, "xor", index, distance))


def pick(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    """Element i with the bit ``distance`` cleared, or set if ``half`` is 1."""
    (index,), distance, half = point, int(op.attrs["distance"]), int(op.attrs["half"])
    width = width_of(index)
    if _aligned(index):
        if distance >= width:
            base = _number(ctx, "and", index.base, ~distance)
            return _source(ctx, op, Affine(I32, _number(ctx, "or", base, half * distance), 1, width))
        picks = [lane & ~distance | half * distance for lane in range(width)]
        return _shuffled(ctx, [_source(ctx, op, index)], picks, width)
    return _source(ctx, op, _numbers(ctx, "or", _numbers(ctx, "and", index, ~distance), half * distance))


def drop(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    """Element i of a tile with half as many elements: the bit ``distance`` put in as ``half``."""
    (index,), distance, half = point, int(op.attrs["distance"]), int(op.attrs["half"])
    width = width_of(index)
    if _aligned(index):
        if distance >= width:
            high = _number(ctx, "shl", _number(ctx, "and", index.base, -distance), 1)
            low = _number(ctx, "and", index.base, distance - 1)
            base = ctx.b.int_op("add", high, low, I32)
            return _source(ctx, op, Affine(I32, ctx.b.int_op("add", base, str(half * distance), I32), 1, width))
        start = _number(ctx, "shl", index.base, 1)
        second = ctx.b.int_op("add", start, str(width), I32)
        pair = [_source(ctx, op, Affine(I32, base, 1, width)) for base in (start, second)]
        picks = [(lane & -distance) * 2 + (lane & (distance - 1)) + half * distance for lane in range(width)]
        return _shuffled(ctx, pair, picks, width)
    parts = _numbers(ctx, "and", index, distance - 1), _numbers(ctx, "shl", _numbers(ctx, "and", index, -distance), 1)
    if width:
        total: Lane = Vector(I32, ctx.b.emit(_add_text(ctx, parts, width)), width)
    else:
        refs = [part.ref for part in parts if isinstance(part, Uniform)]
        total = Uniform(I32, ctx.b.int_op("add", refs[0], refs[1], I32))
    return _source(ctx, op, _numbers(ctx, "or", total, half * distance))


def _add_text(ctx: Context, parts: Sequence[Lane], width: int) -> str:
    left, right = (ctx.b.vector(part, width) for part in parts)
    return f"add <{width} x i32> {left}, {right}"


def bits(ctx: Context, op: Op, value: Value, point: Point) -> Lane:
    """Index along an axis that was merged: ``i // distance % size + start``."""
    index, distance, size = point[0], int(op.attrs["distance"]), int(op.attrs["size"])
    start = int(op.attrs["start"].split(":")[0])
    width = width_of(index)
    if _aligned(index) and distance * size <= width:
        numbers = ", ".join(f"i32 {lane // distance % size + start}" for lane in range(width))
        return Vector(I32, f"<{numbers}>", width)
    found = low_bits(ctx, high_bits(ctx, index, distance) if distance > 1 else index, size)
    if not start:
        return found
    shifted = ctx.b.add_sub("add", found, Uniform(I32, str(start)))
    return shifted or Vector(I32, ctx.b.emit(_add_text(ctx, (found, Uniform(I32, str(start))), width)), width)


LAZY |= {"tile.exchange": exchange, "tile.pick": pick, "tile.drop": drop, "tile.bits": bits}
