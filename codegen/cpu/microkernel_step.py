"""One step of a dot product: how a group of k values of A and of B is loaded and multiplied into an accumulator.

A group fills 32 bits where the processor has an instruction that sums products inside a lane (2 values of bf16 or
i16, 4 of i8); else it is one value.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tilewright.codegen.cpu.microkernel_ir import BYTES, LLVM_TYPES, IrText, powers_of_two, vector, widen
from tilewright.codegen.cpu.target import CpuTarget


@dataclass(frozen=True)
class Step:
    """The instruction at the heart of a micro-kernel.

    Attributes:
        group: values of k that one instruction consumes.
        a_dtype: dtype of A as the instruction reads it; A of another dtype is widened first.
        acc: LLVM type of an accumulator lane.
        lanes: accumulator lanes of a full register.
        a_bytes: bytes of one group of A, which is broadcast to all lanes.
        b_bytes: bytes of one group of B, one group for each lane.
        load_a: (ir, pointer, lanes) -> broadcast group of A.
        load_b: (ir, pointer, lanes) -> one group of B for each lane.
        multiply: (ir, accumulator, a, b, lanes) -> new accumulator.
        surplus: (ir, accumulator, b, lanes) -> accumulator plus what ``multiply`` adds too much for these values
            of B, whatever A is; None where it adds nothing too much.
        unsigned_a: ``multiply`` wants A as unsigned bytes a + 128; the surplus is that of the 128.
    """

    group: int
    a_dtype: str
    acc: str
    lanes: int
    a_bytes: int
    b_bytes: int
    load_a: Callable[[IrText, str, int], str]
    load_b: Callable[[IrText, str, int], str]
    multiply: Callable[[IrText, str, str, str, int], str]
    surplus: Callable[[IrText, str, str, int], str] | None = None
    unsigned_a: bool = False


def fma_step(compute: str, b_dtype: str, target: CpuTarget) -> Step:
    """Floating-point outer product in ``compute`` ("f32" or "f64"); B is widened to it when loaded."""
    # Without the instruction llvm.fma is a call of libm; llvm.fmuladd is then a product and a sum.
    name = "fma" if target.fma else "fmuladd"

    def multiply(ir: IrText, acc: str, a: str, b: str, lanes: int) -> str:
        kind = vector(LLVM_TYPES[compute], lanes)
        return ir.op(f"call {kind} @llvm.{name}.v{lanes}{compute}({kind} {a}, {kind} {b}, {kind} {acc})")

    return _single(compute, b_dtype, target, multiply)


def integer_step(b_dtype: str, target: CpuTarget) -> Step:
    """Outer product in i32 for processors or sizes without a grouped instruction."""

    def multiply(ir: IrText, acc: str, a: str, b: str, lanes: int) -> str:
        kind = vector("i32", lanes)
        return ir.op(f"add {kind} {acc}, {ir.op(f'mul {kind} {a}, {b}')}")

    return _single("i32", b_dtype, target, multiply)


def _single(
    compute: str, b_dtype: str, target: CpuTarget, multiply: Callable[[IrText, str, str, str, int], str]
) -> Step:
    element, size = LLVM_TYPES[compute], BYTES[compute]

    def load_a(ir: IrText, pointer: str, lanes: int) -> str:
        return ir.splat(element, ir.load(element, pointer, size), lanes)

    def load_b(ir: IrText, pointer: str, lanes: int) -> str:
        return widen(ir, ir.load(vector(LLVM_TYPES[b_dtype], lanes), pointer, BYTES[b_dtype]), b_dtype, compute, lanes)

    lanes = target.vector_bits // (8 * size)
    return Step(1, compute, element, lanes, size, BYTES[b_dtype], load_a, load_b, multiply)


def bf16_step(target: CpuTarget) -> Step:
    """``vdpbf16ps``: two products of bf16 are added to each f32 lane.

    The instruction rounds to nearest even and treats denormal inputs and results as zero (Intel SDM, VDPBF16PS).
    """

    def multiply(ir: IrText, acc: str, a: str, b: str, lanes: int) -> str:
        wide, pairs = vector("float", lanes), vector("bfloat", 2 * lanes)
        call = f"call {wide} @llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
        return ir.op(f"{call}({wide} {acc}, {pairs} {a}, {pairs} {b})")

    return _grouped("bf16", "float", target, multiply)


def int16_step(b_dtype: str, target: CpuTarget) -> Step:
    """``vpmaddwd`` and a sum: two products of i16 are added to each i32 lane; exact for i8 values.

    B of i8 stays bytes in memory, half as much to read, and is widened when loaded.
    """

    def load_bytes(ir: IrText, pointer: str, lanes: int) -> str:
        words = widen(ir, ir.load(vector("i8", 2 * lanes), pointer, 1), "i8", "i16", 2 * lanes)
        return _fill(ir, "i16", words, 2 * lanes, 8)

    step = _grouped("i16", "i32", target, _add_pairs)
    return replace(step, b_bytes=2, load_b=load_bytes) if b_dtype == "i8" else step


def _add_pairs(ir: IrText, acc: str, a: str, b: str, lanes: int) -> str:
    wide, pairs = vector("i32", lanes), vector("i16", 2 * lanes)
    name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[lanes]
    products = ir.op(f"call {wide} @llvm.x86.{name}({pairs} {a}, {pairs} {b})")
    return ir.op(f"add {wide} {acc}, {products}")


def byte_words_step(target: CpuTarget) -> Step:
    """Four products of i8 are added to each i32 lane without ``vpdpbusd``: ``vpmaddwd`` of the bytes with even numbers
    and of those with odd ones, both widened in their places."""

    def multiply(ir: IrText, acc: str, a: str, b: str, lanes: int) -> str:
        kind = vector("i16", 2 * lanes)

        def odd(value: str) -> str:
            return ir.op(f"ashr {kind} {value}, splat (i16 8)")

        def even(value: str) -> str:
            return odd(ir.op(f"shl {kind} {value}, splat (i16 8)"))

        return _add_pairs(ir, _add_pairs(ir, acc, even(a), even(b), lanes), odd(a), odd(b), lanes)

    return replace(_grouped("i16", "i32", target, multiply, align=1), group=4, a_dtype="i8")


def int8_step(target: CpuTarget, b_positive: bool) -> Step:
    """``vpdpbusd``: four products of i8 are added to each i32 lane, modulo 2**32.

    The instruction multiplies unsigned by signed values. Where no value of B is below zero, B is its unsigned operand.
    Else A enters as a + 128 and the surplus is 128 times the column sums of B. A is made unsigned once
    (``make_unsigned``): in this loop it would take the ports of the products.
    """

    def multiply(ir: IrText, acc: str, a: str, b: str, lanes: int) -> str:
        wide, groups = vector("i32", lanes), vector("i8", 4 * lanes)
        call = f"call {wide} @llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return ir.op(f"{call}({wide} {acc}, {groups} {a}, {groups} {b})")

    def surplus(ir: IrText, acc: str, b: str, lanes: int) -> str:
        words = ir.op(f"bitcast {vector('i32', lanes)} {_upper_bits(ir, lanes)} to {vector('i8', 4 * lanes)}")
        return multiply(ir, acc, words, b, lanes)

    if b_positive:
        return _grouped("i8", "i32", target, lambda ir, acc, a, b, lanes: multiply(ir, acc, b, a, lanes))
    return replace(_grouped("i8", "i32", target, multiply, surplus), unsigned_a=True)


def make_unsigned(ir: IrText, to: str, source: str, stride: str, rows: int, columns: int, target: CpuTarget) -> None:
    """Writes a contiguous copy of i8 rows as a + 128, which is a ^ 0x80 read as unsigned.

    Args:
        ir: the function that is written.
        to: where the copy goes; may be the source itself where that is contiguous.
        source: address of the first row.
        stride: bytes between rows.
        rows, columns: sizes; columns are a multiple of 4.
        target: the processor.
    """

    def piece(start: str, result: str, offset: int, lanes: int, index: str) -> None:
        place = ir.add(index, offset)
        # Words on their own are scalars: the constant passes through registers of their kind.
        kind = vector("i32", lanes) if lanes >= 4 else "i32"
        words = ir.load(kind, ir.at(start, place), 1)
        ir.store(kind, ir.op(f"xor {kind} {words}, {_upper_bits(ir, lanes)}"), ir.at(result, place), 1)

    def row(index: str) -> None:
        start, result = ir.at(source, ir.mul(index, stride)), ir.at(to, ir.mul(index, columns))
        full = columns // (4 * target.lanes_f32) * (4 * target.lanes_f32)
        ir.each(full, 4 * target.lanes_f32, partial(piece, start, result, 0, target.lanes_f32))
        offset = full
        for lanes in powers_of_two((columns - full) // 4):
            size = 4 * (lanes if lanes >= 4 else 1)
            ir.each(4 * lanes, size, partial(piece, start, result, offset, size // 4))
            offset += 4 * lanes

    ir.each(rows, 1, row)


def _upper_bits(ir: IrText, lanes: int) -> str:
    """0x80 in every byte of i32 lanes, or of one i32.

    Passing it through an empty assembler statement hides that it is constant: LLVM 22 selects instructions for the xor
    of a broadcast and a constant forever.
    """
    kind, value, register = (vector("i32", lanes), "splat (i32 {})", "x") if lanes >= 4 else ("i32", "{}", "r")
    call = f'call {kind} asm "", "={register},0"({kind} {value.format(-0x7F7F7F80)})'
    return ir.op(f"{call} memory(none) nounwind willreturn")


def _grouped(
    dtype: str,
    acc: str,
    target: CpuTarget,
    multiply: Callable[[IrText, str, str, str, int], str],
    surplus: Callable[[IrText, str, str, int], str] | None = None,
    align: int | None = None,
) -> Step:
    """A step whose instruction exists for 4, 8 and 16 lanes; fewer lanes are computed in 4."""
    element, group = LLVM_TYPES[dtype], 4 // BYTES[dtype]
    align = align or BYTES[dtype]

    def load_a(ir: IrText, pointer: str, lanes: int) -> str:
        lanes = max(lanes, 4)
        # One load of 32 bits and a broadcast: the form that becomes an embedded broadcast.
        words = ir.splat("i32", ir.load("i32", pointer, align), lanes)
        return ir.op(f"bitcast {vector('i32', lanes)} {words} to {vector(element, group * lanes)}")

    def load_b(ir: IrText, pointer: str, lanes: int) -> str:
        words = _fill(ir, "i32", ir.load(vector("i32", lanes), pointer, align), lanes)
        lanes = max(lanes, 4)
        return ir.op(f"bitcast {vector('i32', lanes)} {words} to {vector(element, group * lanes)}")

    def padded(ir: IrText, call: Callable[[str, int], str], value: str, lanes: int) -> str:
        if lanes >= 4:
            return call(value, lanes)
        return ir.shuffle(acc, 4, call(_fill(ir, acc, value, lanes), 4), "poison", range(lanes))

    def padded_multiply(ir: IrText, value: str, a: str, b: str, lanes: int) -> str:
        return padded(ir, lambda wide, width: multiply(ir, wide, a, b, width), value, lanes)

    def padded_surplus(ir: IrText, value: str, b: str, lanes: int) -> str:
        assert surplus is not None
        return padded(ir, lambda wide, width: surplus(ir, wide, b, width), value, lanes)

    return Step(
        group, dtype, acc, target.lanes_f32, 4, 4, load_a, load_b, padded_multiply, padded_surplus if surplus else None
    )


def _fill(ir: IrText, element: str, value: str, lanes: int, least: int = 4) -> str:
    """The vector with zeros behind it up to ``least`` lanes."""
    return (
        value
        if lanes >= least
        else ir.shuffle(element, lanes, value, "zeroinitializer", [*range(lanes), *[lanes] * (least - lanes)])
    )
