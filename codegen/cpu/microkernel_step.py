"""One step of a dot product: how a group of k values of A and of B is loaded and multiplied into an accumulator."""

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen.cpu.microkernel_ir import BYTES, LLVM_TYPES, IrText, vector
from tilewright.codegen.cpu.target import CpuTarget


@dataclass(frozen=True)
class Step:
    """The instruction at the heart of a micro-kernel.

    Attributes:
        group: values of k that one instruction consumes (1, 2 for ``vdpbf16ps``, 4 for ``vpdpbusd``).
        acc: LLVM type of an accumulator lane.
        lanes: accumulator lanes of a full register.
        a_bytes: bytes of one group of A, which is broadcast to all lanes.
        b_bytes: bytes of one group of B, one group for each lane.
        load_a: (ir, pointer, lanes) -> broadcast group of A.
        load_b: (ir, pointer, lanes) -> one group of B for each lane.
        multiply: (ir, accumulator, a, b, lanes) -> new accumulator.
    """

    group: int
    acc: str
    lanes: int
    a_bytes: int
    b_bytes: int
    load_a: Callable[[IrText, str, int], str]
    load_b: Callable[[IrText, str, int], str]
    multiply: Callable[[IrText, str, str, str, int], str]


def fma_step(compute: str, b_dtype: str, target: CpuTarget) -> Step:
    """Floating-point outer product in ``compute`` ("f32" or "f64"); B is widened to it when loaded."""
    element = LLVM_TYPES[compute]
    size = BYTES[compute]
    # Without the instruction llvm.fma is a call of libm; llvm.fmuladd is then a product and a sum.
    name = "fma" if target.fma else "fmuladd"

    def load_a(ir: IrText, pointer: str, lanes: int) -> str:
        return ir.splat(element, ir.load(element, pointer, size), lanes)

    def load_b(ir: IrText, pointer: str, lanes: int) -> str:
        return widen(ir, ir.load(vector(LLVM_TYPES[b_dtype], lanes), pointer, BYTES[b_dtype]), b_dtype, compute, lanes)

    def multiply(ir: IrText, acc: str, a: str, b: str, lanes: int) -> str:
        kind = vector(element, lanes)
        suffix = f"v{lanes}{compute}"
        return ir.op(f"call {kind} @llvm.{name}.{suffix}({kind} {a}, {kind} {b}, {kind} {acc})")

    return Step(1, element, target.vector_bits // (8 * size), size, BYTES[b_dtype], load_a, load_b, multiply)


def widen(ir: IrText, value: str, source: str, result: str, lanes: int) -> str:
    """Converts a vector to a wider dtype, exactly."""
    if source == result:
        return value
    if source == "bf16" and result == "f32":
        # A bf16 is the upper half of an f32; fpext would call a library routine where bf16 is no native type.
        bits = ir.op(f"bitcast {vector('bfloat', lanes)} {value} to {vector('i16', lanes)}")
        wide = ir.op(f"zext {vector('i16', lanes)} {bits} to {vector('i32', lanes)}")
        shift = ir.splat("i32", "16", lanes)
        upper = ir.op(f"shl {vector('i32', lanes)} {wide}, {shift}")
        return ir.op(f"bitcast {vector('i32', lanes)} {upper} to {vector('float', lanes)}")
    if source == "bf16":
        return widen(ir, widen(ir, value, "bf16", "f32", lanes), "f32", result, lanes)
    kinds = vector(LLVM_TYPES[source], lanes), vector(LLVM_TYPES[result], lanes)
    return ir.op(f"{'sext' if source.startswith('i') else 'fpext'} {kinds[0]} {value} to {kinds[1]}")
