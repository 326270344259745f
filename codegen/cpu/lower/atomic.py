"""Operations that go through a tile element by element: atomics and histograms."""

from collections.abc import Sequence

from tilewright.codegen.cpu.lower.context import Buffer, Context, Scalar
from tilewright.codegen.cpu.lower.convert import narrow, widen
from tilewright.codegen.cpu.lower.lanes import Lane, Mask, Point, Uniform
from tilewright.codegen.cpu.lower.nest import scalar_nest
from tilewright.codegen.cpu.ttir.records import Elem, Op

_KINDS = {
    "add": "add", "fadd": "fadd", "max": "max", "min": "min", "umax": "umax", "umin": "umin", "and": "and",
    "or": "or", "xor": "xor", "exch": "xchg",
}  # fmt: skip
_ORDERS = {"acq_rel": "acq_rel", "acquire": "acquire", "release": "release", "relaxed": "monotonic"}


def _ref(lane: Lane) -> str:
    if isinstance(lane, Mask) and lane.all_true:
        return "true"
    assert isinstance(lane, Uniform), lane
    return lane.ref


def _operands(ctx: Context, op: Op, point: Point) -> list[str]:
    return [_ref(ctx.simplify(ctx.value(v, point if v.type.is_tensor else ()))) for v in op.operands]


def _each(ctx: Context, op: Op, run: str) -> None:
    """Runs an atomic operation for every element; the old values become its result."""
    result = op.result
    step = {"rmw": _rmw, "cas": _cas}[run]
    if not result.type.is_tensor:
        ctx.bind(result, Scalar(step(ctx, op, _operands(ctx, op, ()))))
        return
    old = ctx.new_buffer(result.type, op) if ctx.plan.users.get(result) else None

    def body(point: Point) -> None:
        ref = step(ctx, op, _operands(ctx, op, point))
        if old is not None:
            ctx.write(old, point, Uniform(result.elem, ref))

    scalar_nest(ctx, result.shape, body)
    if old is not None:
        ctx.bind(result, old)


def _rmw(ctx: Context, op: Op, refs: Sequence[str]) -> str:
    """One atomic read-modify-write under its mask; 0 where the mask is false."""
    elem = op.operands[1].elem
    kind, order = _KINDS.get(op.words[0]), _ORDERS.get(op.words[1], "seq_cst")
    if kind is None:
        raise ctx.unsupported(op, f"an atomic operation of kind {op.words[0]}")

    if ctx.checks is not None:
        mask = Mask(1, uniform=refs[2]) if len(refs) > 2 and refs[2] != "true" else None
        ctx.checks.access(op, Uniform(op.operands[0].elem, refs[0]), mask, ctx.b.depth, "atomic")

    def run() -> list[str]:
        if elem.kind in ("bfloat", "fp8"):
            return [_float_loop(ctx, op, refs[0], refs[1], elem, order)]
        # Only the bits of a float can be combined by logic.
        bits = f"i{elem.bits}" if elem.is_float and kind in ("and", "or", "xor") else elem.llvm
        value = _as_bits(ctx, refs[1], elem, bits)
        old = ctx.b.effect_value(f"atomicrmw {kind} ptr {refs[0]}, {bits} {value} {order}")
        return [old if bits == elem.llvm else ctx.b.effect_value(f"bitcast {bits} {old} to {elem.llvm}")]

    if len(refs) < 3 or refs[2] == "true":
        return run()[0]
    zero = "0" if elem.llvm.startswith("i") else "0.0" if elem.name != "f16" else "0xH0000"
    return ctx.b.branch(refs[2], run, lambda: [zero], [elem.llvm])[0]


def _float_loop(ctx: Context, op: Op, pointer: str, value: str, elem: Elem, order: str) -> str:
    """Addition of a type that LLVM has no atomic instruction for, by compare and exchange."""
    if op.words[0] != "fadd":
        raise ctx.unsupported(op, f"{op.words[0]} on {elem.name}")
    b, llvm = ctx.b, elem.llvm
    first = b.effect_value(f"load atomic {llvm}, ptr {pointer} monotonic, align {elem.size}")

    def attempt(carried: list[str]) -> tuple[str, list[tuple[str, str]]]:
        total = b.emit(f"fadd float {widen(b, carried[0], elem, 0)}, {widen(b, value, elem, 0)}")
        new = narrow(b, total, elem, 0)
        pair = b.effect_value(f"cmpxchg ptr {pointer}, {llvm} {carried[0]}, {llvm} {new} {order} monotonic")
        found = b.effect_value(f"extractvalue {{{llvm}, i1}} {pair}, 0")
        failed = b.effect_value(f"icmp ne {llvm} {found}, {carried[0]}")
        return failed, [(llvm, found)]

    return b.while_loop([(llvm, first)], attempt, lambda found: found)[0]


def _cas(ctx: Context, op: Op, refs: Sequence[str]) -> str:
    """Compare and exchange of the bits."""
    elem = op.operands[1].elem
    order = _ORDERS.get(op.words[0], "seq_cst")
    bits = elem.llvm if elem.llvm.startswith("i") else f"i{elem.bits}"
    if ctx.checks is not None:
        ctx.checks.access(op, Uniform(op.operands[0].elem, refs[0]), None, ctx.b.depth, "atomic")
    expected, new = (_as_bits(ctx, ref, elem, bits) for ref in refs[1:3])
    failure = {"acq_rel": "acquire", "release": "monotonic"}.get(order, order)
    pair = ctx.b.effect_value(f"cmpxchg ptr {refs[0]}, {bits} {expected}, {bits} {new} {order} {failure}")
    found = ctx.b.effect_value(f"extractvalue {{{bits}, i1}} {pair}, 0")
    return found if bits == elem.llvm else ctx.b.effect_value(f"bitcast {bits} {found} to {elem.llvm}")


def _as_bits(ctx: Context, ref: str, elem: Elem, bits: str) -> str:
    return ref if bits == elem.llvm else ctx.b.emit(f"bitcast {elem.llvm} {ref} to {bits}")


def lower_atomic_rmw(ctx: Context, op: Op) -> None:
    """``tt.atomic_rmw``."""
    _each(ctx, op, "rmw")


def lower_atomic_cas(ctx: Context, op: Op) -> None:
    """``tt.atomic_cas``."""
    _each(ctx, op, "cas")


def lower_histogram(ctx: Context, op: Op) -> None:
    """``tt.histogram``: counts of the values 0 to bins - 1; others are not counted."""
    source, result = op.operands[0], op.result
    (bins,) = result.shape
    counts = Buffer(ctx.scratch(op, result.type.nbytes), result.elem, result.shape)
    ctx.b.effect(f"call void @llvm.memset.p0.i64(ptr {counts.ptr}, i8 0, i64 {result.type.nbytes}, i1 false)")

    def body(point: Point) -> None:
        index, *mask = _operands(ctx, op, point)
        inside = ctx.b.emit(f"icmp ult {source.elem.llvm} {index}, {bins}")
        if mask and mask[0] != "true":
            inside = ctx.b.emit(f"and i1 {inside}, {mask[0]}")

        def count() -> list[str]:
            place = ctx.b.emit(f"getelementptr {result.elem.llvm}, ptr {counts.ptr}, {source.elem.llvm} {index}")
            old = ctx.b.effect_value(f"load {result.elem.llvm}, ptr {place}")
            new = ctx.b.effect_value(f"add {result.elem.llvm} {old}, 1")
            ctx.b.effect(f"store {result.elem.llvm} {new}, ptr {place}")
            return []

        ctx.b.branch(inside, count)

    scalar_nest(ctx, source.shape, body)
    ctx.bind(result, counts)


EAGER_ELEMENTS = {
    "tt.atomic_rmw": lower_atomic_rmw,
    "tt.atomic_cas": lower_atomic_cas,
    "tt.histogram": lower_histogram,
}
