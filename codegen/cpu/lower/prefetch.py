"""Reading ahead: loads of long runs of memory that differs from program to program touch what follows as well.

Prefetchers of processors follow a stream within a page of 4 KB and start again in the next one. A program that reads a
row and computes, and the program after it that reads the next row, are such a stream with pauses.
"""

from tilewright.codegen.cpu.lower.context import Context, Shifted
from tilewright.codegen.cpu.lower.lanes import ZERO, Affine, Lane
from tilewright.codegen.cpu.lower.nest import index_like
from tilewright.codegen.cpu.target import AHEAD, LINE
from tilewright.codegen.cpu.ttir.records import I32, Op, Value

LEAST_RUN = 1024  # bytes; what follows a shorter run is not what is read next


def read_ahead(ctx: Context, op: Op, pointer: Lane) -> None:
    """Writes the prefetches that go with reading one vector of a load, if there are any."""
    if not isinstance(pointer, Affine) or pointer.stride != 1 or not is_stream(ctx, op):
        return
    level = max(ctx.b.level_of(pointer.base), ctx.levels[op.result], ctx.relies)
    for offset in range(0, pointer.width * op.result.elem.size, LINE):
        at = ctx.b.emit(f"getelementptr i8, ptr {pointer.base}, i64 {AHEAD + offset}", level)
        if ctx.b.memoized((read_ahead, at)):
            continue
        ctx.b.memoize((read_ahead, at), True, level)
        ctx.b.effect(f"call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 3, i32 1)", level)


def is_stream(ctx: Context, op: Op) -> bool:
    """Whether a load reads memory of its program's own in a long run, or says that it will not be read again."""
    if op not in ctx.streams:
        once = op.attrs.get("evictionPolicy") == "evict_first"
        long = once or _run(ctx, op.operands[0]) * op.result.elem.size >= LEAST_RUN
        ctx.streams[op] = long and _of_program(op.operands[0])
    return ctx.streams[op]


def _of_program(value: Value) -> bool:
    """Whether a value is made from a program's number."""
    pending, seen = [value], {value}
    while pending:
        op = pending.pop().op
        if op is None:
            continue
        if op.name == "tt.get_program_id":
            return True
        pending += [operand for operand in op.operands if operand not in seen]
        seen.update(op.operands)
    return False


def _run(ctx: Context, pointer: Value) -> int:
    """Elements that a tile of pointers covers without a gap, from its first one on."""
    binding = ctx.bindings.get(pointer)
    if not index_like(ctx, binding.origin if isinstance(binding, Shifted) else pointer):
        return 0
    strides = {}
    for axis, size in enumerate(pointer.shape):
        if size > 1:
            index = Affine(I32, "0", 1, size)
            lane = ctx.value(pointer, tuple(index if a == axis else ZERO for a in range(len(pointer.shape))))
            if isinstance(lane, Affine) and isinstance(lane.stride, int):
                strides[lane.stride] = size
    run = 1
    while run in strides:
        run *= strides[run]
    return run
