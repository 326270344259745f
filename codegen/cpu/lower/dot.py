"""``tt.dot``: the accumulator in place where nothing else reads it, operands in place or packed, and a micro-kernel."""

from dataclasses import replace

from tilewright.codegen.cpu.lower.byte_range import largest_byte
from tilewright.codegen.cpu.lower.carry import reads
from tilewright.codegen.cpu.lower.context import Buffer, Context
from tilewright.codegen.cpu.lower.inline_dot import fits_inline, inline_dot
from tilewright.codegen.cpu.lower.lanes import ZERO, Uniform, is_const
from tilewright.codegen.cpu.lower.operand import Tile, converted, grouped_bytes, grouped_tile_of, tile_of
from tilewright.codegen.cpu.lower.tiles import materialize
from tilewright.codegen.cpu.microkernel import BYTES_OF_WORD, TileDot, interleaved_group, packed_form, tile_dot
from tilewright.codegen.cpu.microkernel_amx import TileShape
from tilewright.codegen.cpu.microkernel_pack import PackB, pack_b_text
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.codegen.cpu.ttir.records import BF16, F16, F32, F64, I1, I8, I32, Block, Elem, Op, Type, Value, walk

_DTYPES = {"f64": "f64", "f32": "f32", "f16": "f16", "bf16": "bf16", "i8": "i8", "i16": "i16", "i32": "i32"}

# Rows of A from which a copy of B's panels pays: 2 % at 64 rows, where rows of B 3 KB apart cost 10 %.
_COPIED_FROM = 32
_LARGEST_SIGNED = 127


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
        return converted(ctx, start, elem), False
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
        if not _in_place(ctx, op, left, acc, zero):
            right = _grouped_right(ctx, op, elem) or tile_of(ctx, op.operands[1], elem)
            _multiply(ctx, op, left, right, acc.ptr, zero)
    else:
        _batched(ctx, op, elem, acc, zero)
    _bind_result(ctx, op, acc)


def _in_place(ctx: Context, op: Op, left: Tile, acc: Buffer, zero: bool) -> bool:
    """Writes the product of few rows with computed bytes without a copy of these; False where it is another product."""
    right = op.operands[1]
    if left.elem == F32 and right.op is not None and right.op.name == "arith.sitofp" and right not in ctx.bindings:
        right = right.op.operands[0]
    if left.elem not in (I8, F32) or right.elem != I8 or op.operands[0].shape[1] % BYTES_OF_WORD:
        return False
    source = grouped_bytes(ctx, right, BYTES_OF_WORD)
    rows, columns = op.result.shape
    if source is None or not fits_inline(ctx, rows, columns, left):
        return False
    inline_dot(ctx, left, source, acc, zero)
    return True


def _grouped_right(ctx: Context, op: Op, elem: Elem) -> Tile | None:
    """The right operand where the kernel has it in groups that the micro-kernels read."""
    groups = [interleaved_group(_DTYPES[elem.name], ctx.target)]
    if elem == I8 and ctx.target.is_x86:
        groups.append(BYTES_OF_WORD)
    for group in dict.fromkeys(groups):
        if group > 1 and op.operands[0].shape[1] % group == 0:
            tile = grouped_tile_of(ctx, op.operands[1], group)
            if tile is not None:
                return tile
    return None


def _bind_result(ctx: Context, op: Op, acc: Buffer) -> None:
    if acc.elem == op.result.elem:
        ctx.bind(op.result, acc)
        return
    wide = Value("", Type(acc.elem, acc.shape))
    ctx.bind(wide, acc)
    ctx.bind(op.result, converted(ctx, wide, op.result.elem))


def _batched(ctx: Context, op: Op, elem: Elem, acc: Buffer, zero: bool) -> None:
    buffers = []
    for operand in op.operands[:2]:
        binding = ctx.bindings.get(operand)
        ready = isinstance(binding, Buffer) and operand.elem == elem
        buffers.append(binding if ready else converted(ctx, operand, elem))

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
    k, n = op.operands[1].shape[-2:]
    dtype = _DTYPES[left.elem.name]
    b_dtype, b_layout = packed_form(dtype, k, ctx.target)
    b_ptr, b_stride = right.ptr, right.stride
    if right.group == 1 and (right.transposed or (b_dtype, b_layout) != (dtype, "kn")):
        pack = PackB(k, n, dtype, "nk" if right.transposed else "kn", b_dtype, b_layout)
        ctx.functions.setdefault(pack.symbol, pack_b_text(pack, ctx.target))
        b_elem = next(e for e in (F64, F32, F16, BF16, I8, I32, Elem("int", 16, "i16")) if e.name == b_dtype)
        packed = ctx.new_buffer(Type(b_elem, (k, n)), op)
        ctx.b.effect(f"call void @{pack.symbol}(ptr {packed.ptr}, ptr {right.ptr}, i64 {right.stride})")
        b_ptr, b_stride = packed.ptr, str(n * (4 // b_elem.size if b_layout == "vnni" else 1))
    spec = _spec(op, left.elem, ctx.target, zero)
    apart = b_ptr == right.ptr and b_layout == "kn" and _far_apart(b_stride, n, spec)
    spec = replace(spec, a_layout="km" if left.transposed else "mk", b_apart=apart)
    if right.group > 1:
        own = right.group == interleaved_group(dtype, ctx.target)
        spec = replace(spec, b_dtype=dtype, b_layout="vnni" if own else "words")
    spec = replace(spec, b_ahead=right.stream and b_ptr == right.ptr)
    if spec.b_dtype == "i8" and largest_byte(op.operands[1]) <= _LARGEST_SIGNED:
        spec = replace(spec, b_positive=True)
    # The sums of rows that are undefined stay what they were, as if zeros had been loaded. They are not left undefined
    # themselves: kernels multiply them with zeros later.
    if left.rows is not None and not zero:
        spec = replace(spec, ragged=True)
    ctx.functions.setdefault(spec.symbol, tile_dot(spec, ctx.target))
    shape = spec.tile_shape(ctx.target)
    if shape is not None and len(ctx.tile_shapes) > 1:
        ctx.b.effect(shape.load_shape())
    arguments = f"ptr {acc}, ptr {left.ptr}, i64 {left.stride}, ptr {b_ptr}, i64 {b_stride}"
    if spec.ragged:
        arguments += f", i64 {left.rows}"
    ctx.b.effect(f"call void @{spec.symbol}({arguments})")


def _far_apart(stride: str, n: int, spec: TileDot) -> bool:
    """Whether to copy the rows of B together instead of reading them where they are for every block of rows of A."""
    return spec.m >= _COPIED_FROM and not (is_const(stride) and int(stride) <= 2 * n)


def _spec(op: Op, elem: Elem, target: CpuTarget, zero: bool) -> TileDot:
    """The product of matrices of an operation with A as it is most often, K contiguous."""
    (m, k), n = op.operands[0].shape[-2:], op.operands[1].shape[-1]
    dtype = _DTYPES[elem.name]
    b_dtype, b_layout = packed_form(dtype, k, target)
    acc_dtype = "f64" if dtype == "f64" else "f32" if elem.is_float else "i32"
    return TileDot(m, n, k, dtype, b_dtype, acc_dtype, b_layout, zero_init=zero)


def find_tile_shapes(ctx: Context, blocks: list[Block]) -> list[TileShape]:
    """Sizes of tile registers that the products of a kernel need; each once."""
    products = [op for op in walk(blocks) if op.name == "tt.dot"]
    shapes = (_spec(op, _compute_elem(ctx, op), ctx.target, False).tile_shape(ctx.target) for op in products)
    return list(dict.fromkeys(shape for shape in shapes if shape is not None))
