"""Reading and writing memory at pointer lanes: scalar, contiguous, masked, gathered and scattered."""

from tilewright.codegen.cpu.lower.arith import select
from tilewright.codegen.cpu.lower.lanes import Affine, Lane, LaneBuilder, Mask, Uniform, Vector, type_of, width_of
from tilewright.codegen.cpu.ttir.records import I1, I8, Elem

# Readable memory for accesses that a mask switches off: at least one vector of 64 lanes of 8 bytes.
SAFE_PAGE = "@tw.safe"
STREAM_HINT = "!0"
STREAM_HINT_IR = f"{STREAM_HINT} = !{{i32 1}}\n"
SAFE_PAGE_IR = f"{SAFE_PAGE} = internal global [512 x i8] zeroinitializer, align 64\n"


def _memory_elem(elem: Elem) -> Elem:
    return I8 if elem == I1 else elem


def _from_memory(b: LaneBuilder, lane: Lane, elem: Elem) -> Lane:
    if elem != I1:
        return lane
    width = width_of(lane)
    ref = lane.ref if isinstance(lane, Uniform | Vector) else ""
    zero = "zeroinitializer" if width else "0"
    out = b.emit(f"icmp ne {type_of(I8, width)} {ref}, {zero}")
    return Vector(I1, out, width) if width else Uniform(I1, out)


def _mask_type(elem: Elem, width: int) -> str:
    return f"v{width}" + {"half": "f16", "float": "f32", "double": "f64", "ptr": "p0"}.get(elem.llvm, elem.llvm)


def guarded(b: LaneBuilder, pointer: str, flag: str) -> str:
    """The pointer where the condition holds, else memory that may be read (and written) safely."""
    return b.emit(f"select i1 {flag}, ptr {pointer}, ptr {SAFE_PAGE}")


def load_lanes(
    b: LaneBuilder, pointer: Lane, elem: Elem, floor: int, mask: Mask | None = None, other: Lane | None = None
) -> Lane:
    """Value in memory at pointer lanes.

    Args:
        floor: outermost scope level the read may move to.
        mask: lanes to read, all when None.
        other: value of the lanes that are not read; undefined when None, here zero.
    """
    memory = _memory_elem(elem)
    if other is None:
        other = Uniform(elem, zero_literal(elem))
    width = width_of(pointer, mask or pointer)
    if mask is None or mask.all_true:
        return _from_memory(b, _load_all(b, pointer, memory, floor), elem)
    if isinstance(pointer, Uniform) and (mask.bound or mask.vector):
        pointer = Vector(pointer.elem, b.vector(pointer, width), width)
    if mask.bound is None and mask.vector is None and not isinstance(pointer, Vector):
        assert mask.uniform is not None
        assert isinstance(pointer, Uniform | Affine)  # a mask is no pointer
        base = pointer.ref if isinstance(pointer, Uniform) else pointer.base
        safe = guarded(b, base, mask.uniform)
        if isinstance(pointer, Uniform):
            moved: Lane = Uniform(pointer.elem, safe)
        elif pointer.stride == 1:
            moved = Affine(pointer.elem, safe, 1, pointer.width)
        else:
            return _masked(b, pointer, memory, floor, mask, other, elem)
        read = _from_memory(b, _load_all(b, moved, memory, floor), elem)
        return select(b, Uniform(I1, mask.uniform), read, other)
    return _masked(b, pointer, memory, floor, mask, other, elem)


def zero_literal(elem: Elem) -> str:
    """LLVM literal of a scalar zero."""
    if elem == I1:
        return "false"
    if elem.is_ptr:
        return "null"
    return "0" if elem.llvm.startswith("i") else "0.0" if elem.llvm != "half" else "0xH0000"


def _load_all(b: LaneBuilder, pointer: Lane, elem: Elem, floor: int) -> Lane:
    if isinstance(pointer, Uniform):
        return Uniform(elem, b.load(f"load {elem.llvm}, ptr {pointer.ref}, align {elem.size}", floor))
    width = width_of(pointer)
    if isinstance(pointer, Affine) and pointer.stride == 1:
        return Vector(
            elem, b.load(f"load <{width} x {elem.llvm}>, ptr {pointer.base}, align {elem.size}", floor), width
        )
    return Vector(elem, _gather(b, pointer, elem, floor, "splat (i1 true)", "poison", width), width)


def _gather(b: LaneBuilder, pointer: Lane, elem: Elem, floor: int, mask: str, other: str, width: int) -> str:
    type_ = f"<{width} x {elem.llvm}>"
    name = f"@llvm.masked.gather.{_mask_type(elem, width)}.v{width}p0"
    pointers = b.vector(pointer, width)
    call = f"call {type_} {name}(<{width} x ptr> align {elem.size} {pointers}, <{width} x i1> {mask}, {type_} {other})"
    return b.load(call, floor)


def _masked(b: LaneBuilder, pointer: Lane, memory: Elem, floor: int, mask: Mask, other: Lane, elem: Elem) -> Lane:
    width = mask.width
    flags = b.vector(mask, width)
    fill = b.vector(other, width)
    if elem == I1:
        fill = b.emit(f"zext <{width} x i1> {fill} to <{width} x i8>")
    if isinstance(pointer, Affine) and pointer.stride == 1:
        type_ = f"<{width} x {memory.llvm}>"
        name = f"@llvm.masked.load.{_mask_type(memory, width)}.p0"
        call = f"call {type_} {name}(ptr align {memory.size} {pointer.base}, <{width} x i1> {flags}, {type_} {fill})"
        read: Lane = Vector(memory, b.load(call, floor), width)
    else:
        read = Vector(memory, _gather(b, pointer, memory, floor, flags, fill, width), width)
    return _from_memory(b, read, elem)


def store_lanes(b: LaneBuilder, pointer: Lane, lane: Lane, mask: Mask | None = None, stream: bool = False) -> None:
    """Writes a lane to memory, in lane order where addresses repeat.

    Args:
        stream: whole vectors without a mask, which are aligned to their size, pass the caches by.
    """
    elem = lane.elem
    memory = _memory_elem(elem)
    width = width_of(pointer, lane, mask or lane)
    if not width:
        ref = lane.ref if isinstance(lane, Uniform) else "true"
        _store_scalar(b, pointer, elem, memory, ref)
        return
    value = b.vector(lane, width)
    if elem == I1:
        value = b.emit(f"zext <{width} x i1> {value} to <{width} x i8>")
    type_ = f"<{width} x {memory.llvm}>"
    contiguous = isinstance(pointer, Affine) and pointer.stride == 1
    if contiguous and (mask is None or mask.all_true):
        assert isinstance(pointer, Affine)
        how = f"{width * memory.size}, !nontemporal {STREAM_HINT}" if stream else str(memory.size)
        b.effect(f"store {type_} {value}, ptr {pointer.base}, align {how}")
        return
    flags = b.vector(mask, width) if mask is not None else "splat (i1 true)"
    kind = _mask_type(memory, width)
    if contiguous:
        assert isinstance(pointer, Affine)
        b.effect(
            f"call void @llvm.masked.store.{kind}.p0({type_} {value}, ptr align {memory.size} {pointer.base}, "
            f"<{width} x i1> {flags})"
        )
        return
    pointers = b.vector(pointer, width)
    b.effect(
        f"call void @llvm.masked.scatter.{kind}.v{width}p0({type_} {value}, "
        f"<{width} x ptr> align {memory.size} {pointers}, <{width} x i1> {flags})"
    )


def _store_scalar(b: LaneBuilder, pointer: Lane, elem: Elem, memory: Elem, ref: str) -> None:
    assert isinstance(pointer, Uniform)
    if elem == I1:
        ref = b.emit(f"zext i1 {ref} to i8")
    b.effect(f"store {memory.llvm} {ref}, ptr {pointer.ref}, align {memory.size}")
