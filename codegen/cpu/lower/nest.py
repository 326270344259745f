"""Loops over the elements of a tile: scalar loops around one vector axis, with masks as loop bounds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tilewright.codegen.cpu.lower.context import UNWRAPPED, Context
from tilewright.codegen.cpu.lower.lanes import ZERO, Affine, Lane, Mask, Point, Uniform, is_const
from tilewright.codegen.cpu.ttir.overlap import INDEX_OPS
from tilewright.codegen.cpu.ttir.plan import MOVES, is_lazy
from tilewright.codegen.cpu.ttir.records import I32, Value

# Vectors of one loop iteration; more only lengthen the code, the processor overlaps iterations by itself.
UNROLL = 4
# Gets the point and whether all lanes lie inside the bounds.
Body = Callable[[Point, bool], None]
# Writes the vector loop of one row: gets the row's first point, and what writes the loop around a body.
Row = Callable[[Point, Callable[[Body], None]], None]


@dataclass(frozen=True)
class Conjunct:
    """One factor of a mask.

    Attributes:
        value: the factor, of a shape that broadcasts to the mask's.
        project: turns a point of the mask into one of the factor.
        axis: the mask's axis whose first elements are those for which it holds, if ``bound`` is given.
        bound: i32 number of these elements, between 0 and the size.
    """

    value: Value
    project: Callable[[Point], Point]
    axis: int = -1
    bound: str | None = None


def lanes_at(ctx: Context, shape: Sequence[int], axis: int, base: str = "0") -> Lane:
    """Index lane of the vector axis."""
    width = min(ctx.width, shape[axis])
    return Affine(I32, base, 1, width) if width > 1 else Uniform(I32, base)


def conjuncts(value: Value, project: Callable[[Point], Point] = lambda p: p) -> list[Conjunct]:
    """Factors of a mask, looking through broadcasts."""
    op = value.op
    if op is None or not value.type.is_tensor:
        return [Conjunct(value, project)]
    if op.name == "arith.andi":
        return conjuncts(op.operands[0], project) + conjuncts(op.operands[1], project)
    if op.name == "tt.broadcast":
        source = op.operands[0]
        return conjuncts(source, lambda p: broadcast_point(source.shape, project(p)))
    if op.name == "tt.expand_dims":
        axis = op.int_attr("axis")
        return conjuncts(op.operands[0], lambda p: _without(project(p), axis))
    return [Conjunct(value, project)]


def broadcast_point(shape: Sequence[int], point: Point) -> Point:
    """Point of an operand of the given shape under a broadcast."""
    return tuple(ZERO if size == 1 else index for size, index in zip(shape, point, strict=True))


def _without(point: Point, axis: int) -> Point:
    return point[:axis] + point[axis + 1 :]


def index_like(ctx: Context, value: Value) -> bool:
    """Whether a value is plain index arithmetic, cheap to evaluate anywhere."""
    return all(
        not v.type.is_tensor
        or v in ctx.unwrapped
        or (v not in ctx.bindings and v.op is not None and v.op.name in INDEX_OPS)
        for v in expression(ctx, value)
    )


def expression(ctx: Context, value: Value) -> Iterator[Value]:
    """The values that evaluating a tensor needs, each once, down to those that have a place already."""
    seen = {value}
    pending = [value]
    while pending:
        current = pending.pop()
        yield current
        operands = current.op.operands if current.op is not None else []
        if current in ctx.unwrapped and current.op is not None:
            operands = [operands[UNWRAPPED[current.op.name]]]
        elif current in ctx.bindings or current.op is None or not is_lazy(current.op):
            continue
        for operand in operands:
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)


def bounded(ctx: Context, mask: Value) -> list[Conjunct]:
    """Factors of a mask, with bounds where a factor says ``index < limit`` along one axis."""
    found = []
    for part in conjuncts(mask):
        op = part.value.op
        direct = op is not None and op.name == "arith.cmpi" and part.value not in ctx.bindings
        if direct and op is not None and all(index_like(ctx, v) for v in op.operands):
            part = _with_bound(ctx, part, mask.shape)
        found.append(part)
    return found


def _with_bound(ctx: Context, part: Conjunct, shape: tuple[int, ...]) -> Conjunct:
    marks = tuple(Uniform(I32, f"axis{axis}") for axis in range(len(shape)))
    kept = part.project(marks)
    axes = [marks.index(kept[axis]) for axis in ctx.plan.axes(part.value) if kept[axis] in marks]
    if len(axes) != 1:
        return part
    axis = axes[0]
    point = tuple(Affine(I32, "0", 1, size) if a == axis else ZERO for a, size in enumerate(shape))
    lane = ctx.value(part.value, part.project(point))
    if not isinstance(lane, Mask) or lane.bound is None or lane.uniform or lane.vector:
        return part
    size = str(shape[axis])
    return Conjunct(part.value, part.project, axis, ctx.b.int_max(ctx.b.int_min(lane.bound, size), "0"))


def assume(ctx: Context, parts: Sequence[Conjunct], point: Point, full: bool, vector_axis: int) -> None:
    """Records what the loops around ``point`` guarantee about the factors of a mask."""
    for part in parts:
        if part.bound is None or (part.axis == vector_axis and not full):
            continue
        lane = ctx.value(part.value, part.project(point))
        if isinstance(lane, Mask) and lane.bound is not None:
            ctx.b.assume(lane.bound)
        elif isinstance(lane, Uniform):
            ctx.b.assume(lane.ref)


def bounds_of(ctx: Context, parts: Sequence[Conjunct]) -> dict[int, str]:
    """Loop bound of each axis that has one."""
    bounds: dict[int, str] = {}
    for part in parts:
        if part.bound is not None:
            bounds[part.axis] = ctx.b.int_min(bounds.get(part.axis, part.bound), part.bound)
    return bounds


def nest(
    ctx: Context,
    shape: Sequence[int],
    axis: int,
    body: Body,
    bounds: dict[int, str] | None = None,
    unroll: int = UNROLL,
    starts: dict[int, str] | None = None,
    row: Row | None = None,
) -> None:
    """Runs ``body`` over a tile.

    Args:
        axis: the vector axis, innermost.
        bounds: i32 numbers of elements of axes to visit, from 0 to the size.
        starts: i32 first elements to visit of axes other than the vector axis.
        row: writes the vector loops, perhaps several that the row decides between; one of ``body`` when None.
    """
    bounds, starts = bounds or {}, starts or {}
    others = [a for a in range(len(shape)) if a != axis]

    def inner(point: list[Lane]) -> None:
        def vectors(body: Body) -> None:
            if axis in bounds:
                _bounded_vectors(ctx, shape, axis, bounds[axis], point, body)
            else:
                _vectors(ctx, shape, axis, point, body, unroll)

        if row is None:
            vectors(body)
        else:
            row(tuple(point), vectors)

    def scalar_loops(depth: int, point: list[Lane]) -> None:
        if depth == len(others):
            inner(point)
            return
        at = others[depth]
        if shape[at] == 1 and at not in bounds and at not in starts:
            scalar_loops(depth + 1, point)
            return

        def step(index: str, _: list[str]) -> list[str]:
            scalar_loops(depth + 1, [Uniform(I32, index) if a == at else lane for a, lane in enumerate(point)])
            return []

        ctx.b.loop(starts.get(at, "0"), bounds.get(at, str(shape[at])), "1", [], step)

    scalar_loops(0, [ZERO] * len(shape))


def _at(point: Sequence[Lane], axis: int, lane: Lane) -> Point:
    return tuple(lane if a == axis else index for a, index in enumerate(point))


def _vectors(ctx: Context, shape: Sequence[int], axis: int, point: list[Lane], body: Body, unroll: int) -> None:
    width = min(ctx.width, shape[axis])
    count = shape[axis] // width
    copies = min(unroll, count)

    def step(index: str, _: list[str]) -> list[str]:
        for copy in range(copies):
            base = ctx.b.int_op("add", index, str(copy * width), I32)
            body(_at(point, axis, lanes_at(ctx, shape, axis, base)), True)
        return []

    if count == copies:
        step("0", [])
    else:
        ctx.b.loop("0", str(shape[axis]), str(width * copies), [], step)


def _bounded_vectors(ctx: Context, shape: Sequence[int], axis: int, bound: str, point: list[Lane], body: Body) -> None:
    """Whole vectors up to the bound, then one vector that the masks cut off."""
    b = ctx.b
    width = min(ctx.width, shape[axis])

    def step(index: str, _: list[str]) -> list[str]:
        body(_at(point, axis, lanes_at(ctx, shape, axis, index)), True)
        return []

    def rest() -> list[str]:
        # Where there is no such vector, its lanes are beyond the tile, whatever the mask says there.
        body(_at(point, axis, lanes_at(ctx, shape, axis, b.local(whole))), False)
        return []

    whole = str(int(bound) // width * width) if is_const(bound) else b.emit(f"and i32 {bound}, {-width}")
    b.loop("0", whole, str(width), [], step)
    if width > 1:
        b.branch(b.emit(f"icmp slt i32 {whole}, {bound}"), rest)


def leaf_pointers(ctx: Context, value: Value) -> list[Value]:
    """Pointers of the loads, of the same shape, that evaluating a value runs."""
    found = []
    seen = {value}
    pending = [value]
    while pending:
        current = pending.pop()
        op = current.op
        if current in ctx.bindings or op is None or not is_lazy(op):
            continue
        if op.name == "tt.load":
            found.append(op.operands[0])
            continue
        for operand in op.operands:
            if operand.shape == value.shape and operand not in seen and op.name not in MOVES:
                seen.add(operand)
                pending.append(operand)
    return found


def best_axis(ctx: Context, shape: Sequence[int], pointers: Sequence[Value]) -> int:
    """Axis for the vectors: where most accesses are contiguous; the last one of several."""
    best, best_score = len(shape) - 1, -1.0
    for axis in reversed(range(len(shape))):
        width = min(ctx.width, shape[axis])
        contiguous = sum(1 for pointer in pointers if _is_contiguous(ctx, pointer, axis))
        # Scratch tiles are contiguous along the last axis, so it counts for half an access in any case.
        score = width * (contiguous + 0.5 * (axis == len(shape) - 1) + 0.01)
        if score > best_score:
            best, best_score = axis, score
    return best


def _is_contiguous(ctx: Context, pointer: Value, axis: int) -> bool:
    shape = pointer.shape
    if shape[axis] == 1 or axis not in ctx.plan.axes(pointer):
        return False
    point = _at([ZERO] * len(shape), axis, lanes_at(ctx, shape, axis))
    lane = ctx.value(pointer, point)
    return isinstance(lane, Affine) and lane.stride == 1


def masks_of(value: Value) -> list[Value]:
    """Masks of the value's own shape among the loads and selections it is made of."""
    found, seen, pending = [], {value}, [value]
    while pending:
        op = pending.pop().op
        if op is None or not is_lazy(op):
            continue
        if op.name == "tt.load" and len(op.operands) > 1:
            found.append(op.operands[1])
        elif op.name == "arith.select":
            found.append(op.operands[0])
        for operand in op.operands if op.name != "tt.load" else ():
            if operand.shape == value.shape and operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return [mask for mask in found if mask.shape == value.shape]


def row_parts(ctx: Context, value: Value, vector_axis: int) -> list[Conjunct]:
    """Mask factors that cut rows off: bounds along one axis that is not the vector axis."""
    parts: list[Conjunct] = []
    for mask in masks_of(value):
        for part in bounded(ctx, mask):
            same = not parts or (part.axis == parts[0].axis and all(part.value is not p.value for p in parts))
            if part.bound is not None and part.axis != vector_axis and same:
                parts.append(part)
    return parts


def scalar_nest(
    ctx: Context,
    shape: Sequence[int],
    body: Callable[[Point], None],
    bounds: dict[int, str] | None = None,
    starts: dict[int, str] | None = None,
) -> None:
    """Scalar loops over all axes, of some from ``starts`` or up to ``bounds``."""
    bounds, starts = bounds or {}, starts or {}

    def level(point: Point) -> None:
        depth = len(point)
        if depth == len(shape):
            body(point)
        elif shape[depth] == 1 and depth not in bounds and depth not in starts:
            level((*point, ZERO))
        else:

            def step(index: str, _: list[str]) -> list[str]:
                level((*point, Uniform(I32, index)))
                return []

            ctx.b.loop(starts.get(depth, "0"), bounds.get(depth, str(shape[depth])), "1", [], step)

    level(())
