"""``tt.dot``: operands read where they are when their memory allows it, else copied or packed; then a micro-kernel."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.cpu.lower.carry import reads
from tilewright.codegen.cpu.lower.context import Buffer, Context, Shifted
from tilewright.codegen.cpu.lower.convert import cast
from tilewright.codegen.cpu.lower.lanes import ZERO, Affine, Lane, Point, Uniform, Vector, is_const
from tilewright.codegen.cpu.lower.nest import (
    best_axis,
    bounded,
    expression,
    index_like,
    leaf_pointers,
    nest,
)
from tilewright.codegen.cpu.lower.tiles import materialize
from tilewright.codegen.cpu.lower.ttir import BF16, F16, F32, F64, I1, I8, I32, Elem, Op, Type, Value
from tilewright.codegen.cpu.microkernel import TileDot, packed_form, tile_dot
from tilewright.codegen.cpu.microkernel_pack import PackB, pack_b_text

_DTYPES = {"f64": "f64", "f32": "f32", "f16": "f16", "bf16": "bf16", "i8": "i8", "i16": "i16", "i32": "i32"}


@dataclass(frozen=True)
class Tile:
    """A matrix in memory.

    Attributes:
        ptr: address of element (0, 0).
        stride: i64 elements between successive rows, or columns if ``transposed``.
        transposed: columns are contiguous instead of rows.
        elem: element type.
    """

    ptr: str
    stride: str
    transposed: bool
    elem: Elem

    def turned(self) -> "Tile":
        return Tile(self.ptr, self.stride, not self.transposed, self.elem)


def tile_of(ctx: Context, value: Value, elem: Elem) -> Tile:
    """The matrix ``value`` in memory as ``elem``: in place where possible, else in scratch."""
    binding = ctx.bindings.get(value)
    if value.elem == elem:
        if isinstance(binding, Buffer):
            return Tile(binding.ptr, str(value.shape[1]), False, elem)
        if value.op is not None and value.op.name == "tt.trans" and binding is None:
            return tile_of(ctx, value.op.operands[0], elem).turned()
        if value.op is not None and value.op.name == "tt.load" and binding is None:
            loaded = _in_place(ctx, value.op)
            if loaded is not None:
                return loaded
    buffer = _converted(ctx, value, elem)
    return Tile(buffer.ptr, str(value.shape[1]), False, elem)


def _converted(ctx: Context, value: Value, elem: Elem) -> Buffer:
    """Scratch copy of a tile as another element type."""
    if value.elem == elem:
        return materialize(ctx, value)
    buffer = ctx.new_buffer(Type(elem, value.shape), value.op)
    name = "tt.fp_to_fp" if elem.is_float else "arith.extsi"

    def body(point: Point, _: bool) -> None:
        lane = ctx.value(value, point)
        width = getattr(lane, "width", 0)
        ref = ctx.b.vector(lane, width) if width else _uniform(lane)
        out = cast(ctx.b, name, ref, value.elem, elem, width)
        ctx.write(buffer, point, Vector(elem, out, width) if width else Uniform(elem, out))

    nest(ctx, value.shape, best_axis(ctx, value.shape, leaf_pointers(ctx, value)), body)
    return buffer


def _uniform(lane: Lane) -> str:
    assert isinstance(lane, Uniform)
    return lane.ref


def _separable(ctx: Context, value: Value) -> bool:
    """Whether index arithmetic is a sum of terms with one axis each."""
    return not any(
        v.op is not None and v.op.name == "arith.muli" and all(ctx.plan.axes(factor) for factor in v.op.operands)
        for v in expression(ctx, value)
        if v.type.is_tensor
    )


def _in_place(ctx: Context, op: Op) -> Tile | None:
    """A loaded tile where it is in memory, or in a scratch copy when its mask turns out not to be all true.

    None if rows and columns are both apart in memory, or that is not known when the kernel is compiled.
    """
    pointer = op.operands[0]
    strides = _strides(ctx, pointer)
    if strides is None:
        return None
    base, row, column = strides
    if "1" not in (row, column):
        return None
    in_place = Tile(base, row if column == "1" else column, column != "1", op.result.elem)
    if len(op.operands) == 1:
        return in_place
    complete = _all_true(ctx, op.operands[1])
    if complete is None:
        return None
    return in_place if complete == "true" else _chosen(ctx, op.result, in_place, complete)


def _chosen(ctx: Context, value: Value, in_place: Tile, complete: str) -> Tile:
    rows, columns = value.shape
    moved = (columns, rows) if in_place.transposed else (rows, columns)
    scratch = ctx.new_buffer(Type(value.elem, moved), value.op)

    def copy() -> Sequence[str]:
        axis = 0 if in_place.transposed else 1

        def body(point: Point, _: bool) -> None:
            target = tuple(reversed(point)) if in_place.transposed else point
            ctx.write(scratch, target, ctx.value(value, point))

        nest(ctx, value.shape, axis, body)
        return [scratch.ptr, str(moved[1])]

    ptr, stride = ctx.b.branch(complete, lambda: [in_place.ptr, in_place.stride], copy, ["ptr", "i64"])
    return Tile(ptr, stride, in_place.transposed, value.elem)


def _strides(ctx: Context, pointer: Value) -> tuple[str, str, str] | None:
    """Address of the first element and i64 strides of rows and columns of pointers; None if not affine."""
    if not _affine(ctx, pointer):
        return None
    first = ctx.value(pointer, (ZERO, ZERO))
    if not isinstance(first, Uniform):
        return None
    strides = []
    for axis in range(2):
        size = pointer.shape[axis]
        lane = ctx.value(pointer, tuple(Affine(I32, "0", 1, size) if a == axis else ZERO for a in range(2)))
        if isinstance(lane, Uniform):
            # A row or column that repeats has no place in memory of its own, except where there is just one.
            strides.append("0" if size > 1 else "1")
        elif isinstance(lane, Affine):
            strides.append(str(lane.stride))
        else:
            return None
    if "0" in strides:
        return None
    return first.ref, strides[0], strides[1]


def _affine(ctx: Context, pointer: Value) -> bool:
    binding = ctx.bindings.get(pointer)
    if isinstance(binding, Shifted):
        return _affine(ctx, binding.origin)
    op = pointer.op
    if op is not None and op.name == "tt.addptr" and pointer not in ctx.bindings:
        return _affine(ctx, op.operands[0]) and _affine_index(ctx, op.operands[1])
    if op is not None and op.name in ("tt.broadcast", "tt.expand_dims") and pointer not in ctx.bindings:
        return _affine(ctx, op.operands[0])
    return _affine_index(ctx, pointer)


def _affine_index(ctx: Context, value: Value) -> bool:
    return index_like(ctx, value) and _separable(ctx, value)


def _all_true(ctx: Context, mask: Value) -> str | None:
    """i1: whether a mask holds everywhere; None if that cannot be told without looking at every element."""
    flags: list[str] = []
    for part in bounded(ctx, mask):
        if part.bound is not None:
            size = mask.shape[part.axis]
            if is_const(part.bound):
                flags.append("true" if int(part.bound) >= size else "false")
            else:
                flags.append(ctx.b.emit(f"icmp sge i32 {part.bound}, {size}"))
        elif not ctx.plan.axes(part.value):
            lane = ctx.value(part.value, part.project((ZERO,) * len(mask.shape)))
            if not isinstance(lane, Uniform):
                return None
            flags.append(lane.ref)
        else:
            return None
    result = "true"
    for flag in flags:
        if flag == "false" or result == "true":
            result = flag if result != "false" else result
        elif flag != "true":
            result = ctx.b.emit(f"and i1 {result}, {flag}")
    return result


def _compute_elem(ctx: Context, op: Op) -> Elem:
    """Element type that the micro-kernel reads both operands as."""
    left, right = op.operands[0].elem, op.operands[1].elem
    if left == right and left in (F64, F32, F16, BF16, I8, I32):
        return left
    if left.is_float and right.is_float:
        return F64 if F64 in (left, right) else F32
    if left.is_int and right.is_int and I1 not in (left, right):
        return I32
    raise ctx.unsupported(op, f"operands of types {left.name} and {right.name}", "cast both operands to one float type")


def _accumulator(ctx: Context, op: Op, elem: Elem) -> tuple[Buffer, bool]:
    """Memory of the sum, holding the third operand, or nothing at all when that is zero."""
    start, result = op.operands[2], op.result
    used = {ptr for v in op.operands[:2] for ptr, _ in reads(ctx, v)}
    target = ctx.destinations.pop(result, None)
    binding = ctx.bindings.get(start)
    if elem != result.elem:
        return _converted(ctx, start, elem), False
    if target is None and isinstance(binding, Buffer) and binding.ptr not in used:
        owned = len(ctx.plan.users[start]) == 1 and ctx.plan.loops_around(start) == ctx.plan.loops_of(op)
        target = binding if owned else None
    if target is None or target.ptr in used:
        target = ctx.new_buffer(result.type, op)
    if isinstance(binding, Buffer) and binding.ptr == target.ptr:
        return target, False
    zero = start.op is not None and start.op.name == "arith.constant" and _is_zero(ctx, start)
    if not zero:
        materialize(ctx, start, target)
    return target, zero


def _is_zero(ctx: Context, value: Value) -> bool:
    lane = ctx.value(value, (ZERO,) * len(value.shape))
    return isinstance(lane, Uniform) and lane.ref in ("0", "0x0000000000000000", "0xH0000")


def lower_dot(ctx: Context, op: Op) -> None:
    """``tt.dot`` of 2-D tiles, or of 3-D tiles matrix by matrix.

    Every input precision is computed as ieee. The sum is f32 for floats of up to 32 bits, and i32 for integers.
    """
    if op.name != "tt.dot" or len(op.result.shape) not in (2, 3):
        raise ctx.unsupported(op, f"a result of shape {op.result.shape}")
    elem = _compute_elem(ctx, op)
    acc_elem = F64 if elem == F64 else F32 if elem.is_float else I32
    if acc_elem == I32 and op.result.elem != I32:
        raise ctx.unsupported(op, f"integer operands with a result of type {op.result.elem.name}", "out_dtype=tl.int32")
    acc, zero = _accumulator(ctx, op, acc_elem)
    if len(op.result.shape) == 2:
        left = tile_of(ctx, op.operands[0], elem)
        right = tile_of(ctx, op.operands[1], elem)
        _multiply(ctx, op, left, right, acc.ptr, zero)
    else:
        _batched(ctx, op, elem, acc, zero)
    _bind_result(ctx, op, acc)


def _bind_result(ctx: Context, op: Op, acc: Buffer) -> None:
    if acc.elem == op.result.elem:
        ctx.bind(op.result, acc)
        return
    wide = Value("", Type(acc.elem, acc.shape))
    ctx.bind(wide, acc)
    ctx.bind(op.result, _converted(ctx, wide, op.result.elem))


def _batched(ctx: Context, op: Op, elem: Elem, acc: Buffer, zero: bool) -> None:
    buffers = []
    for operand in op.operands[:2]:
        binding = ctx.bindings.get(operand)
        ready = isinstance(binding, Buffer) and operand.elem == elem
        buffers.append(binding if ready else _converted(ctx, operand, elem))

    def step(index: str, _: list[str]) -> list[str]:
        places = []
        for buffer in (*buffers, acc):
            assert isinstance(buffer, Buffer)
            offset = ctx.b.emit(f"mul i32 {index}, {buffer.strides[0] * buffer.elem.size}")
            places.append(ctx.b.emit(f"getelementptr i8, ptr {buffer.ptr}, i32 {offset}"))
        tiles = [Tile(place, str(v.shape[2]), False, elem) for place, v in zip(places, op.operands[:2], strict=False)]
        _multiply(ctx, op, tiles[0], tiles[1], places[2], zero)
        return []

    ctx.b.loop("0", str(op.result.shape[0]), "1", [], step)


def _multiply(ctx: Context, op: Op, left: Tile, right: Tile, acc: str, zero: bool) -> None:
    (m, k), n = op.operands[0].shape[-2:], op.operands[1].shape[-1]
    dtype = _DTYPES[left.elem.name]
    b_dtype, b_layout = packed_form(dtype, k, ctx.target)
    b_ptr, b_stride = right.ptr, right.stride
    if right.transposed or (b_dtype, b_layout) != (dtype, "kn"):
        pack = PackB(k, n, dtype, "nk" if right.transposed else "kn", b_dtype, b_layout)
        ctx.functions.setdefault(pack.symbol, pack_b_text(pack, ctx.target))
        b_elem = next(e for e in (F64, F32, F16, BF16, I8, I32, Elem("int", 16, "i16")) if e.name == b_dtype)
        packed = ctx.new_buffer(Type(b_elem, (k, n)), op)
        ctx.b.effect(f"call void @{pack.symbol}(ptr {packed.ptr}, ptr {right.ptr}, i64 {right.stride})")
        b_ptr, b_stride = packed.ptr, str(n * (4 // b_elem.size if b_layout == "vnni" else 1))
    acc_dtype = {"f64": "f64"}.get(dtype, "f32" if left.elem.is_float else "i32")
    layout = "km" if left.transposed else "mk"
    spec = TileDot(m, n, k, dtype, b_dtype, acc_dtype, b_layout, layout, zero)
    ctx.functions.setdefault(spec.symbol, tile_dot(spec, ctx.target))
    ctx.b.effect(f"call void @{spec.symbol}(ptr {acc}, ptr {left.ptr}, i64 {left.stride}, ptr {b_ptr}, i64 {b_stride})")
