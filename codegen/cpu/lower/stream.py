"""Stores around the caches (non-temporal), for launches that write more than the caches would keep.

A normal store of a line that is in no cache reads the line first, and pushes another one out; a non-temporal store of
a whole line does neither, but leaves its data in memory, far from who reads it next. So it is chosen at run time, by
the bytes that the launch writes.
"""

import math

from tilewright.codegen.cpu.lower.context import Context, Shifted
from tilewright.codegen.cpu.lower.lanes import Affine, Point
from tilewright.codegen.cpu.lower.nest import index_like, lanes_at
from tilewright.codegen.cpu.ttir.origin import Origins
from tilewright.codegen.cpu.ttir.records import Function, Op, walk

# Bytes written by one launch from which on the caches are passed by. Layer norm, with a sum over its output behind it,
# gained 13 % from 16 MB on (Emerald Rapids, in a virtual machine); at 8 MB it made no difference.
STREAM_BYTES = 24 << 20
LINE = 64
# Fences the stores of the function before the launch counts as done; they are not ordered otherwise.
FENCE = "call void @llvm.x86.sse.sfence()"
_SYNCHRONIZES = ("tt.atomic", "gpu.barrier", "ttg.barrier", "ttg.local_barrier")


def unread_stores(function: Function) -> frozenset[Op]:
    """Stores to memory of parameters that the kernel itself never reads.

    None in kernels that talk to other programs: those may look at the data before the function ends.
    """
    ops = list(walk(function.blocks))
    if any(op.name.startswith(_SYNCHRONIZES) for op in ops):
        return frozenset()
    origins = Origins(function)
    read: set[int] = set()
    for op in ops:
        if op.name == "tt.load":
            slots = origins.of(op.operands[0])
            if slots is None:
                return frozenset()
            read |= slots
    stores = [(op, origins.of(op.operands[0])) for op in ops if op.name == "tt.store"]
    return frozenset(op for op, slots in stores if slots is not None and not slots & read)


def may_stream(ctx: Context, op: Op, axis: int) -> bool:
    """Whether a store along a vector axis can be non-temporal: rows of whole lines without gaps.

    Plain index arithmetic that gives neighbours within a vector gives neighbours in the whole row, so it is enough to
    look at the alignment of a row's first element.
    """
    pointer = op.operands[0]
    binding = ctx.bindings.get(pointer)
    source = binding.origin if isinstance(binding, Shifted) else pointer
    size = _stored_bytes(op)
    if op not in ctx.unread or pointer.shape[axis] * size < LINE or min(ctx.width, pointer.shape[axis]) * size < 16:
        return False
    return index_like(ctx, source)


def streams(ctx: Context, op: Op, axis: int, point: Point, bound: str | None) -> str | None:
    """i1: whether to pass the caches by in the row at a point; None if it does not start a run of neighbours.

    Args:
        bound: i32 number of elements of a row that are stored; all when None.
    """
    b, pointer, size = ctx.b, op.operands[0], _stored_bytes(op)
    start = tuple(lanes_at(ctx, pointer.shape, axis) if a == axis else index for a, index in enumerate(point))
    lane = ctx.value(pointer, start)
    if not isinstance(lane, Affine) or lane.stride != 1:
        return None
    programs = b.emit(f"zext i32 {ctx.grid['x']} to i64")
    for other in "yz":
        programs = b.emit(f"mul i64 {programs}, {b.emit(f'zext i32 {ctx.grid[other]} to i64')}")
    rows = math.prod(pointer.shape) // pointer.shape[axis]
    length = b.emit(f"zext i32 {bound or pointer.shape[axis]} to i64")
    written = b.emit(f"mul i64 {b.emit(f'mul i64 {programs}, {rows * size}')}, {length}")
    large = b.emit(f"icmp uge i64 {written}, {STREAM_BYTES}")
    low = b.emit(f"and i64 {b.emit(f'ptrtoint ptr {lane.base} to i64')}, {LINE - 1}")
    return b.emit(f"and i1 {large}, {b.emit(f'icmp eq i64 {low}, 0')}")


def _stored_bytes(op: Op) -> int:
    return op.operands[1].elem.size
