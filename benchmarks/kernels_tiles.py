"""Dot micro-kernels on tiles in cache, as shares of a bare loop of the same instruction, on one core.

A bare loop keeps its accumulators in registers and reads no memory. All loops of a dtype run in turns in one process
and the least time of each counts: other work on the machine can only add. bf16 and int8 are measured on vector
registers and, where the processor has them, on tile registers, against the bare loop of the instruction in question.
The note tells the time to pack the tile of B from rows of contiguous K, in units of the time of the dot product: what a
kernel saves that reads packed weights.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timing import Line

from tilewright.codegen.cpu import jit
from tilewright.codegen.cpu.microkernel import TileDot, packed_form, tile_dot
from tilewright.codegen.cpu.microkernel_amx import RELEASE, TileShape
from tilewright.codegen.cpu.microkernel_ir import BYTES, IrText, vector
from tilewright.codegen.cpu.microkernel_pack import PackB, pack_b_text
from tilewright.codegen.cpu.microkernel_step import Step, bf16_step, fma_step, int8_step
from tilewright.codegen.cpu.target import CpuTarget

SHAPES = ((64, 64, 64), (16, 64, 64), (64, 64, 256))
TARGETS = {"f32": 0.9, "bf16": 0.85, "i8": 0.85}
INSTRUCTIONS = {"bf16": "tdpbf16ps", "i8": "tdpbssd"}
BARE_STEPS = 60_000
# By bits of a vector: with one of A and one of B they fit the registers.
BARE_ACCUMULATORS = {512: 16, 256: 12, 128: 12}
TILE_MULTIPLICATIONS = 2.5e7  # for one group of k; long enough that the call from Python does not count
ROUNDS = 25


@dataclass(frozen=True)
class Timed:
    """Native code to time.

    Attributes:
        call: runs it once.
        operations: multiplications and additions of one run.
    """

    call: Callable[[], None]
    operations: float


def native(text: str, symbol: str, target: CpuTarget, *arguments: int) -> Callable[[], None]:
    """Compiles a module; the result calls one of its functions with these 64-bit arguments."""
    code = jit.load(jit.compile_ir(text, target), symbol)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(code[symbol])

    def call(keep: jit.Code = code) -> None:
        function(*arguments)

    return call


def repeated(text: str, symbol: str, arguments: int, count: int, shape: TileShape | None = None) -> str:
    """The module with a function ``repeat`` that calls another one ``count`` times, with tile registers set up."""
    ir = IrText()
    names = ", ".join(f"i64 %x{index}" for index in range(arguments))
    pointers = text.split(f"@{symbol}(")[1].split(")")[0].split(", ")
    passed = []
    for index, parameter in enumerate(pointers):
        if parameter.startswith("ptr"):
            passed.append(f"ptr {ir.op(f'inttoptr i64 %x{index} to ptr')}")
        else:
            passed.append(f"i64 %x{index}")
    if shape is not None:
        text += shape.definition()
        ir.do(shape.load_shape())
    ir.each(count, 1, lambda _: ir.do(f"call void @{symbol}({', '.join(passed)})"))
    if shape is not None:
        ir.do(RELEASE)
    return f"{text}\ndefine void @repeat({names}) {{\n{ir.text()}\n}}\n"


def bare_loop(step: Step, target: CpuTarget, buffer: torch.Tensor) -> Timed:
    """The step's instruction on registers alone."""
    ir = IrText()
    accumulators = BARE_ACCUMULATORS[target.vector_bits]
    kind = vector(step.acc, step.lanes)
    pointer = ir.op("inttoptr i64 %x0 to ptr")
    a, b = step.load_a(ir, pointer, step.lanes), step.load_b(ir, pointer, step.lanes)

    def body(_: str, values: list[str]) -> list[str]:
        return [step.multiply(ir, value, a, b, step.lanes) for value in values]

    results = ir.loop(BARE_STEPS, body, [(kind, "zeroinitializer")] * accumulators)
    for index, value in enumerate(results):
        ir.store(kind, value, ir.at(pointer, index * step.lanes * 4), 4)
    operations = 2.0 * BARE_STEPS * accumulators * step.lanes * step.group
    text = f"define void @bare(i64 %x0) {{\n{ir.text()}\n}}\n"
    return Timed(native(text, "bare", target, buffer.data_ptr()), operations)


def bare_tile_loop(dtype: str, target: CpuTarget) -> Timed:
    """The instruction on full tile registers alone, with 4 of them as accumulators."""
    shape = TileShape(16, 16, 64)
    ir = IrText()
    ir.do(shape.load_shape())

    def body(_: str) -> None:
        for register in range(4):
            name = INSTRUCTIONS[dtype]
            ir.do(f"call void @llvm.x86.{name}(i8 {register}, i8 {4 + register // 2}, i8 {6 + register % 2})")

    ir.each(BARE_STEPS, 1, body)
    ir.do(RELEASE)
    text = f"{shape.definition()}define void @bare() {{\n{ir.text()}\n}}\n"
    return Timed(native(text, "bare", target), 2.0 * BARE_STEPS * 4 * 16 * 16 * 64 / BYTES[dtype])


def tile_loops(shape: tuple[int, int, int], dtype: str, target: CpuTarget, buffer: torch.Tensor) -> tuple[Timed, Timed]:
    """The dot product of a tile shape, and the packing of its B; operations are those of the dot product in both."""
    m, n, k = shape
    form = packed_form(dtype, k, target)
    spec = TileDot(m, n, k, dtype, form[0], "i32" if dtype == "i8" else "f32", form[1])
    pack = PackB(k, n, dtype, "nk", *form)
    group = 4 // BYTES[form[0]]
    registers = spec.tile_shape(target)
    count = int(TILE_MULTIPLICATIONS * group * (1 if registers is None else 8) / (m * n * k))
    # One after the other, as the scratch tiles of a kernel are.
    acc = -(-buffer.data_ptr() // 64) * 64
    a = acc + m * n * 4
    b = a + m * k * BYTES[dtype]
    dot_text = repeated(tile_dot(spec, target), spec.symbol, 5, count, registers)
    pack_text = repeated(pack_b_text(pack, target), pack.symbol, 3, count)
    operations = 2.0 * m * n * k * count
    b_stride = n * group if form[1] == "vnni" else n
    dot = Timed(native(dot_text, "repeat", target, acc, a, k, b, b_stride), operations)
    return dot, Timed(native(pack_text, "repeat", target, b, a, k), operations)


def least_seconds(loops: list[Timed]) -> list[float]:
    """Least time of each, all running in turns."""
    least = [float("inf")] * len(loops)
    for _ in range(ROUNDS):
        for index, loop in enumerate(loops):
            start = time.perf_counter()
            loop.call()
            least[index] = min(least[index], time.perf_counter() - start)
    return least


def lines() -> Iterator[Line]:
    """Every dtype on vector registers, then bf16 and int8 on tile registers."""
    host = CpuTarget.host()
    vectors = CpuTarget.named("avx512") if host.amx else host
    steps = {"f32": fma_step("f32", "f32", vectors)}
    if vectors.bf16_dot:
        steps["bf16"] = bf16_step(vectors)
    if vectors.int8_dot:
        steps["i8"] = int8_step(vectors, b_positive=False)
    buffer = torch.zeros(1 << 17)
    for dtype, step in steps.items():
        yield from _lines(dtype, "vectors", vectors, bare_loop(step, vectors, buffer), buffer)
    for dtype in INSTRUCTIONS if host.amx else ():
        yield from _lines(dtype, "tile registers", host, bare_tile_loop(dtype, host), buffer)


def _lines(dtype: str, registers: str, target: CpuTarget, bare: Timed, buffer: torch.Tensor) -> Iterator[Line]:
    loops = [bare]
    for shape in SHAPES:
        loops += tile_loops(shape, dtype, target, buffer)
    rates = [loop.operations / seconds for loop, seconds in zip(loops, least_seconds(loops), strict=True)]
    for index, shape in enumerate(SHAPES):
        dot, pack = rates[1 + 2 * index], rates[2 + 2 * index]
        name = f"{dtype} {'x'.join(map(str, shape))} on {registers}, share of the bare loop"
        note = f"bare loop {rates[0] / 1e9:.0f} G/s; packing B takes {dot / pack:.2f} of the product"
        yield Line(name, TARGETS[dtype], dot / rates[0], note)
