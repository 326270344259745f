"""Tensors that cross control flow: memory for them, and updates in place where nothing else reads the old value."""

from collections.abc import Sequence

from tilewright.codegen.cpu.lower.context import Buffer, Context, Shifted
from tilewright.codegen.cpu.lower.tiles import materialize
from tilewright.codegen.cpu.ttir.plan import MOVES, is_lazy
from tilewright.codegen.cpu.ttir.records import Op, Type, Value


def reads(ctx: Context, value: Value) -> set[tuple[str, bool]]:
    """Scratch memory that evaluating a value reads; the flag says whether at other points than its own."""
    found: set[tuple[str, bool]] = set()
    seen = {(value, False)}
    pending = [(value, False)]
    while pending:
        current, moved = pending.pop()
        binding = ctx.bindings.get(current)
        following: list[Value] = []
        if isinstance(binding, Buffer):
            found.add((binding.ptr, moved))
        elif isinstance(binding, Shifted):
            following = [binding.origin]
        elif current.op is not None and current.type.is_tensor:
            moved = moved or current.op.name in MOVES
            following = current.op.operands
        for step in ((v, moved) for v in following):
            if step not in seen:
                seen.add(step)
                pending.append(step)
    return found


def write_all(ctx: Context, pairs: Sequence[tuple[Value, Buffer]], op: Op) -> None:
    """Assigns values to buffers as if all at once.

    A value that reads another one's target is written first; in a cycle one goes through a copy.
    """
    pending = []
    for value, target in pairs:
        binding = ctx.bindings.get(value)
        if not (isinstance(binding, Buffer) and binding.ptr == target.ptr):
            pending.append((value, target))
    copies: list[tuple[Buffer, Buffer]] = []
    while pending:
        chosen = next((pair for pair in pending if _is_free(ctx, pair, pending)), None)
        if chosen is None:
            value, target = pending.pop()
            temporary = materialize(ctx, value, op=op)
            copies.append((temporary, target))
            continue
        pending.remove(chosen)
        materialize(ctx, chosen[0], chosen[1])
    for source, target in copies:
        copy = Value("", Type(source.elem, source.shape))
        ctx.bind(copy, source)
        materialize(ctx, copy, target)


def _is_free(ctx: Context, pair: tuple[Value, Buffer], pending: Sequence[tuple[Value, Buffer]]) -> bool:
    value, target = pair
    if (target.ptr, True) in reads(ctx, value):
        return False
    others = (reads(ctx, other) for other, _ in pending if other is not value)
    return not any(ptr == target.ptr for found in others for ptr, _ in found)


def claim(ctx: Context, value: Value, buffer: Buffer, holder: Value | None) -> None:
    """Lets the operation that defines ``value`` write straight to ``buffer``.

    Args:
        holder: value now in the buffer, if any; nothing may read it after that operation.
    """
    op = value.op
    if op is None or value in ctx.bindings or (is_lazy(op) and value not in ctx.plan.materialized):
        return
    if holder is not None and not _is_last_reader(ctx, holder, value, op):
        return
    ctx.destinations[value] = buffer


def _is_last_reader(ctx: Context, holder: Value, value: Value, op: Op) -> bool:
    if ctx.plan.loops_around(holder) != ctx.plan.loops_around(value):
        return False
    if ctx.plan.last_read(holder) > ctx.plan.end(op):
        return False
    return not any(flag for root, flag in ctx.plan.roots(holder) if root is op)


def tile_for(ctx: Context, value: Value, op: Op) -> Buffer:
    """Memory for the result of an operation: the claimed one, or new."""
    return ctx.destinations.pop(value, None) or ctx.new_buffer(value.type, op)
