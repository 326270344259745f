"""``tl.device_assert``: a condition that does not hold for some element stops the kernel."""

from tilewright.codegen.cpu.lower.context import Context
from tilewright.codegen.cpu.lower.lanes import Lane, Mask, Uniform, width_of
from tilewright.codegen.cpu.lower.nest import nest
from tilewright.codegen.cpu.lower.stop import site_of, stop_if
from tilewright.codegen.cpu.ttir.records import Op


def lower_assert(ctx: Context, op: Op) -> None:
    """``tt.assert``; the front end has joined a mask with the condition."""
    condition = op.operands[0]
    floor = ctx.b.depth
    if not condition.type.is_tensor:
        hold(ctx, op, Uniform(condition.elem, ctx.scalar(condition)), floor)
        return
    varying = ctx.plan.axes(condition)
    shape = tuple(size if axis in varying else 1 for axis, size in enumerate(condition.shape))
    nest(ctx, shape, len(shape) - 1, lambda point, _: hold(ctx, op, ctx.value(condition, point), floor))


def hold(ctx: Context, op: Op, condition: Lane, floor: int, live: Mask | None = None) -> None:
    """Stops the kernel unless all lanes of a condition hold.

    Args:
        op: the assertion.
        condition: i1 lanes.
        floor: outermost scope level the test may move to.
        live: lanes that matter, all when None.
    """
    b = ctx.b
    lane = ctx.simplify(condition)
    width = width_of(lane)
    if not width:
        assert isinstance(lane, Uniform)
        bad = b.emit(f"xor i1 {lane.ref}, true")
    else:
        failed = b.emit(f"xor <{width} x i1> {b.vector(lane, width)}, splat (i1 true)")
        if live is not None:
            failed = b.emit(f"and <{width} x i1> {failed}, {b.vector(live, width)}")
        bad = b.emit(f"call i1 @llvm.vector.reduce.or.v{width}i1(<{width} x i1> {failed})")
    stop_if(ctx, bad, max(b.level_of(bad), floor), site_of(ctx, op, "assert", message=_message(op)))


def _message(op: Op) -> str:
    """The text as the user wrote it; MLIR escapes bytes as two hexadecimal digits."""
    text = op.attrs.get("text", '""')[1:-1]
    out, i = bytearray(), 0
    raw = text.encode()
    while i < len(raw):
        if raw[i] != ord("\\"):
            out.append(raw[i])
            i += 1
        elif raw[i + 1 : i + 2] in (b"\\", b'"'):
            out += raw[i + 1 : i + 2]
            i += 2
        else:
            out.append(int(raw[i + 1 : i + 3], 16))
            i += 3
    return out.decode(errors="replace")
