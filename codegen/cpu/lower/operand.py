"""Operands of ``tt.dot`` as matrices in memory: where they are when their memory allows it, else in scratch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tilewright.codegen.cpu.lower.context import Buffer, Context, Shifted
from tilewright.codegen.cpu.lower.convert import cast
from tilewright.codegen.cpu.lower.lanes import ZERO, Affine, Lane, Point, Uniform, Vector, is_const
from tilewright.codegen.cpu.lower.nest import (
    assume,
    best_axis,
    bounded,
    bounds_of,
    expression,
    index_like,
    leaf_pointers,
    nest,
    row_parts,
)
from tilewright.codegen.cpu.lower.prefetch import is_stream
from tilewright.codegen.cpu.lower.tiles import materialize
from tilewright.codegen.cpu.lower.wrap import unwrapping, wraps
from tilewright.codegen.cpu.ttir.plan import grouped_source
from tilewright.codegen.cpu.ttir.records import I8, I32, Elem, Op, Type, Value


@dataclass(frozen=True)
class Tile:
    """A matrix in memory.

    Attributes:
        ptr: address of element (0, 0).
        stride: i64 elements between successive rows, or columns if ``transposed``.
        transposed: columns are contiguous instead of rows.
        elem: element type.
        group: rows that are interleaved, ``[rows / group][columns][group]``; the stride is then that between groups.
        stream: it is where a kernel loads it from, and what follows in memory is read next.
        rows: i64 number of the rows that a mask lets through, where the others are undefined; None if all are defined.
    """

    ptr: str
    stride: str
    transposed: bool
    elem: Elem
    group: int = 1
    stream: bool = False
    rows: str | None = None

    def turned(self) -> "Tile":
        return Tile(self.ptr, self.stride, not self.transposed, self.elem)


def tile_of(ctx: Context, value: Value, elem: Elem) -> Tile:
    """The matrix ``value`` in memory as ``elem``: in place where possible, else in scratch. It is not grouped."""
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
        if value.op is not None and value.op.name == "tt.load" and binding is None:
            rows = _defined_rows(ctx, value.op)
            if rows is not None:
                return replace(_copied_rows(ctx, value), rows=rows)
    buffer = converted(ctx, value, elem)
    return Tile(buffer.ptr, str(value.shape[1]), False, elem)


def _copied_rows(ctx: Context, value: Value) -> Tile:
    """The rows of a load that its mask lets through, in scratch."""
    buffer = ctx.new_buffer(value.type, value.op)
    parts = row_parts(ctx, value, 1)

    def body(point: Point, full: bool) -> None:
        assume(ctx, parts, point, full, 1)
        ctx.write(buffer, point, ctx.value(value, point))

    with ctx.vectors_of(4 * ctx.width if value.elem == I8 else ctx.width):
        nest(ctx, value.shape, 1, body, bounds_of(ctx, parts))
    return Tile(buffer.ptr, str(value.shape[1]), False, value.elem)


def grouped_tile_of(ctx: Context, value: Value, group: int) -> Tile | None:
    """A matrix whose groups of rows are interleaved as it is loaded or computed; None if it is no such one.

    In Triton: a tile of shape [K / group, N, group], ``permute(0, 2, 1)``, ``reshape(K, N)``. It is how weights are
    laid out for processors that sum the products of a group in one lane. A tile that is computed, as one unpacked from
    fewer bits, is written to scratch in this order.
    """
    source = grouped_source(value)
    if source is None or any(v in ctx.bindings for v in _chain(value, source)[:-1]):
        return None
    load = source.op
    if load is None or load.name != "tt.load" or source in ctx.bindings:
        return _grouped_scratch(ctx, source, group)
    strides = _strides(ctx, load.operands[0])
    if strides is None or strides[1][1:] != [str(group), "1"] or load.result.shape[2] != group:
        return None
    if len(load.operands) > 1 and _all_true(ctx, load.operands[1]) != "true":
        return None
    if ctx.checks is not None:
        if not ctx.checks.can_test_tile(load):
            return None
        ctx.checks.tile(load, *strides)
    return Tile(strides[0], strides[1][0], False, value.elem, group, is_stream(ctx, load))


def grouped_bytes(ctx: Context, value: Value, group: int) -> Value | None:
    """The bytes [K / group, columns * group] that such a matrix is computed as; None if it is no such one."""
    source = grouped_source(value)
    if source is None or source.shape[2] != group or any(v in ctx.bindings for v in _chain(value, source)):
        return None
    source = _before_reshape(ctx, source)
    return source if len(source.shape) == 2 else None


def _before_reshape(ctx: Context, value: Value) -> Value:
    """A reshape keeps the order of elements: the tile in the shape it is computed in, which vectors fit."""
    while value not in ctx.bindings and value.op is not None and value.op.name == "tt.reshape":
        value = value.op.operands[0]
    return value


def _grouped_scratch(ctx: Context, source: Value, group: int) -> Tile | None:
    if source.shape[2] != group:
        return None
    stride = str(source.shape[1] * group)
    return Tile(materialize(ctx, _before_reshape(ctx, source)).ptr, stride, False, source.elem, group)


def _chain(value: Value, source: Value) -> list[Value]:
    chain = [value]
    while chain[-1] is not source:
        op = chain[-1].op
        assert op is not None  # a chain that was followed before
        chain.append(op.operands[0])
    return chain


def converted(ctx: Context, value: Value, elem: Elem) -> Buffer:
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

    An index that is kept in range by ``% n`` or ``where`` is read as it is where that turns out to change nothing.

    None if rows and columns are both apart in memory, or that is not known when the kernel is compiled.
    """
    pointer = op.operands[0]
    kept_in_range = wraps(ctx, pointer)
    flags = [_changes_nothing(ctx, value) for value in kept_in_range]
    if len(op.operands) > 1:
        flags.append(_all_true(ctx, op.operands[1]))
    with unwrapping(ctx, kept_in_range):
        strides = _strides(ctx, pointer)
    if strides is None or None in flags or (ctx.checks is not None and not ctx.checks.can_test_tile(op)):
        return None
    base, (row, column) = strides
    if "1" not in (row, column):
        return None
    in_place = Tile(base, row if column == "1" else column, column != "1", op.result.elem, stream=is_stream(ctx, op))
    complete = _both(ctx, [flag for flag in flags if flag is not None])

    def stay() -> Sequence[str]:
        if ctx.checks is not None:
            ctx.checks.tile(op, base, (row, column))
        return [in_place.ptr, in_place.stride]

    rows = _defined_rows(ctx, op)
    if complete == "true":
        stay()
        return replace(in_place, rows=rows)
    return replace(_chosen(ctx, op.result, in_place, complete, stay), rows=rows)


def _defined_rows(ctx: Context, op: Op) -> str | None:
    """Rows before the bound of a mask without ``other``, at least 1: what is loaded behind them is undefined."""
    if len(op.operands) != 2:
        return None
    bound = bounds_of(ctx, bounded(ctx, op.operands[1])).get(0)
    if bound is None:
        return None
    return ctx.b.widen_index(ctx.b.int_max(bound, "1"), I32)


def _changes_nothing(ctx: Context, wrap: Value) -> str | None:
    """i1: whether an ``UNWRAPPED`` operation gives its index back everywhere; None if that is not known so simply."""
    assert wrap.op is not None
    if wrap.op.name == "arith.select":
        condition = wrap.op.operands[0]
        return _all_true(ctx, condition) if condition.type.is_tensor else ctx.scalar(condition)
    index, divisor = wrap.op.operands
    axes = ctx.plan.axes(index)
    if len(axes) > 1 or ctx.plan.axes(divisor) or not index_like(ctx, index):
        return None
    point = tuple(Affine(I32, "0", 1, size) if axis in axes else ZERO for axis, size in enumerate(index.shape))
    lane, limit = ctx.value(index, point), ctx.value(divisor, (ZERO,) * len(divisor.shape))
    parts = ctx.b.affine_parts(lane)
    if parts is None or not isinstance(limit, Uniform) or not is_const(parts[1]) or int(parts[1]) < 0:
        return None
    span = str(int(parts[1]) * (max(index.shape) - 1))
    # Without overflow: the first index is from 0 to limit - span - 1.
    above = ctx.b.emit(f"icmp sge {index.elem.llvm} {parts[0]}, 0")
    below = ctx.b.emit(f"icmp slt {index.elem.llvm} {parts[0]}, {ctx.b.int_op('sub', limit.ref, span, index.elem)}")
    positive = ctx.b.emit(f"icmp sgt {index.elem.llvm} {limit.ref}, {span}")
    return _both(ctx, [above, below, positive])


def _chosen(ctx: Context, value: Value, in_place: Tile, complete: str, stay: Callable[[], Sequence[str]]) -> Tile:
    """The tile where it is, as ``stay`` gives it, if its mask turns out complete; else a copy in scratch memory."""
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

    ptr, stride = ctx.b.branch(complete, stay, copy, ["ptr", "i64"])
    return Tile(ptr, stride, in_place.transposed, value.elem)


def _strides(ctx: Context, pointer: Value) -> tuple[str, list[str]] | None:
    """Address of the first element and i64 strides of the axes of pointers; None if not affine."""
    if not _affine(ctx, pointer):
        return None
    rank = len(pointer.shape)
    first = ctx.value(pointer, (ZERO,) * rank)
    if not isinstance(first, Uniform):
        return None
    strides = []
    for axis in range(rank):
        size = pointer.shape[axis]
        lane = ctx.value(pointer, tuple(Affine(I32, "0", 1, size) if a == axis else ZERO for a in range(rank)))
        if isinstance(lane, Uniform):
            # A row or column that repeats has no place in memory of its own, except where there is just one.
            strides.append("0" if size > 1 else "1")
        elif isinstance(lane, Affine):
            strides.append(str(lane.stride))
        else:
            return None
    return None if "0" in strides else (first.ref, strides)


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
    return _both(ctx, flags)


def _both(ctx: Context, flags: Sequence[str]) -> str:
    """i1 conjunction."""
    if "false" in flags:
        return "false"
    result = "true"
    for flag in flags:
        if flag != "true":
            result = flag if result == "true" else ctx.b.emit(f"and i1 {result}, {flag}")
    return result
