"""Combining values with the function of a reduction or scan: two lanes, lanes of a vector, vectors of several rows."""

from collections.abc import Sequence

from tilewright.codegen.cpu.lower.context import Context
from tilewright.codegen.cpu.lower.lanes import Lane, Mask, Uniform, Vector, type_of
from tilewright.codegen.cpu.lower.region import evaluate
from tilewright.codegen.cpu.ttir.records import I1, Block


def combine(
    ctx: Context, block: Block, left: Sequence[Lane], right: Sequence[Lane], live: Mask | None = None
) -> list[Lane]:
    """Runs a combine function on two tuples of lanes.

    Args:
        live: lanes whose result is used, all when None; only in these may an assertion fail.
    """
    return evaluate(ctx, [block], [*left, *right], live)


def as_vector(ctx: Context, lane: Lane, width: int) -> Lane:
    """The lane as a register, so that it can be carried by a loop."""
    if not width:
        return Uniform(I1, "true") if isinstance(lane, Mask) else lane
    return Vector(lane.elem, ctx.b.vector(lane, width), width)


def ref_of(lane: Lane) -> str:
    """Register of a uniform or vector lane."""
    assert isinstance(lane, Uniform | Vector)
    return lane.ref


def horizontal(ctx: Context, block: Block, lanes: Sequence[Lane], width: int) -> list[Lane]:
    """Combines the lanes of vectors with each other, halving them; the order of the elements is kept."""
    current = list(lanes)
    while width > 1:
        pairs = [[], []]  # type: list[list[Lane]]
        for lane in current:
            for half in range(2):
                pairs[half].append(_every_second(ctx, lane, width, half))
        width //= 2
        current = combine(ctx, block, pairs[0], pairs[1])
        current = [as_vector(ctx, lane, width if width > 1 else 0) for lane in current]
    return current


def _every_second(ctx: Context, lane: Lane, width: int, start: int) -> Lane:
    type_ = type_of(lane.elem, width)
    ref = ref_of(lane)
    if width == 2:
        return Uniform(lane.elem, ctx.b.emit(f"extractelement {type_} {ref}, i32 {start}"))
    picks = ", ".join(f"i32 {i}" for i in range(start, width, 2))
    out = ctx.b.emit(f"shufflevector {type_} {ref}, {type_} poison, <{width // 2} x i32> <{picks}>")
    return Vector(lane.elem, out, width // 2)


def horizontal_rows(ctx: Context, block: Block, rows: Sequence[Sequence[Lane]], width: int) -> list[Lane]:
    """What ``horizontal`` gives for each of several rows, as lanes of one vector for each operand.

    Two rows are halved by one operation, so ``width`` rows take ``width - 1`` of them instead of ``log2(width)`` each.

    Args:
        rows: for each row its vectors of ``width`` lanes, one an operand; a power of two of them, at most ``width``.
    """
    current = [list(row) for row in rows]
    while len(current) > 1:
        pairs = zip(current[::2], current[1::2], strict=True)
        current = [_halved(ctx, block, first, second, width) for first, second in pairs]
    lanes = current[0]
    for size in _halvings(width, len(rows)):
        even, odd = ([_every_second(ctx, lane, size, half) for lane in lanes] for half in range(2))
        lanes = [as_vector(ctx, lane, size // 2) for lane in combine(ctx, block, even, odd)]
    return lanes


def _halvings(width: int, rows: int) -> list[int]:
    """Widths from ``width`` down to the one before ``rows``."""
    return [width >> step for step in range((width // rows).bit_length() - 1)]


def _halved(ctx: Context, block: Block, first: Sequence[Lane], second: Sequence[Lane], width: int) -> list[Lane]:
    """Combines neighbouring lanes of two rows; the results of the first one come first."""
    halves: list[list[Lane]] = [[], []]
    for left, right in zip(first, second, strict=True):
        type_ = type_of(left.elem, width)
        for half in range(2):
            picks = ", ".join(f"i32 {i}" for i in range(half, 2 * width, 2))
            pair = f"{type_} {ref_of(left)}, {type_} {ref_of(right)}"
            out = ctx.b.emit(f"shufflevector {pair}, <{width} x i32> <{picks}>")
            halves[half].append(Vector(left.elem, out, width))
    return [as_vector(ctx, lane, width) for lane in combine(ctx, block, halves[0], halves[1])]
