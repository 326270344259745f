"""Dot micro-kernels on tiles in cache, as shares of a bare loop of the same instruction, on one core.

python benchmarks/microkernel.py

A bare loop keeps 16 accumulators in registers and reads no memory. All loops of a dtype run in turns in one process
and the least time of each counts. The last column is the time to pack the tile of B from rows of contiguous K, in
units of the time of the dot product: what a kernel saves that reads packed weights.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilewright.codegen.cpu import jit
from tilewright.codegen.cpu.microkernel import TileDot, packed_form, tile_dot
from tilewright.codegen.cpu.microkernel_ir import BYTES, IrText, vector
from tilewright.codegen.cpu.microkernel_pack import PackB, pack_b_text
from tilewright.codegen.cpu.microkernel_step import Step, bf16_step, fma_step, int8_step
from tilewright.codegen.cpu.target import CpuTarget

SHAPES = ((64, 64, 64), (32, 64, 64), (128, 128, 32), (16, 64, 64), (64, 128, 64), (64, 64, 256))
BARE_STEPS = 60_000
BARE_ACCUMULATORS = 16
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


def native(text: str, symbol: str, *arguments: int) -> Callable[[], None]:
    """Compiles a module; the result calls one of its functions with these 64-bit arguments."""
    code = jit.load(jit.compile_ir(text, CpuTarget.native()), symbol)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(code[symbol])

    def call(keep: jit.Code = code) -> None:
        function(*arguments)

    return call


def repeated(text: str, symbol: str, arguments: int, count: int) -> str:
    """The module with a function ``repeat`` that calls another one ``count`` times."""
    ir = IrText()
    names = ", ".join(f"i64 %x{index}" for index in range(arguments))
    pointers = text.split(f"@{symbol}(")[1].split(")")[0].split(", ")
    passed = []
    for index, parameter in enumerate(pointers):
        if parameter.startswith("ptr"):
            passed.append(f"ptr {ir.op(f'inttoptr i64 %x{index} to ptr')}")
        else:
            passed.append(f"i64 %x{index}")
    ir.each(count, 1, lambda _: ir.do(f"call void @{symbol}({', '.join(passed)})"))
    return f"{text}\ndefine void @repeat({names}) {{\n{ir.text()}\n}}\n"


def bare_loop(step: Step, buffer: torch.Tensor) -> Timed:
    """The step's instruction on registers alone."""
    ir = IrText()
    kind = vector(step.acc, step.lanes)
    pointer = ir.op("inttoptr i64 %x0 to ptr")
    a, b = step.load_a(ir, pointer, step.lanes), step.load_b(ir, pointer, step.lanes)

    def body(_: str, values: list[str]) -> list[str]:
        return [step.multiply(ir, value, a, b, step.lanes) for value in values]

    results = ir.loop(BARE_STEPS, body, [(kind, "zeroinitializer")] * BARE_ACCUMULATORS)
    for index, value in enumerate(results):
        ir.store(kind, value, ir.at(pointer, index * step.lanes * 4), 4)
    operations = 2.0 * BARE_STEPS * BARE_ACCUMULATORS * step.lanes * step.group
    return Timed(native(f"define void @bare(i64 %x0) {{\n{ir.text()}\n}}\n", "bare", buffer.data_ptr()), operations)


def tile_loops(shape: tuple[int, int, int], dtype: str, buffer: torch.Tensor) -> tuple[Timed, Timed]:
    """The dot product of a tile shape, and the packing of its B; operations are those of the dot product in both."""
    m, n, k = shape
    target = CpuTarget.native()
    form = packed_form(dtype, k, target)
    spec = TileDot(m, n, k, dtype, form[0], "i32" if dtype == "i8" else "f32", form[1])
    pack = PackB(k, n, dtype, "nk", *form)
    group = 4 // BYTES[form[0]]
    count = int(TILE_MULTIPLICATIONS * group / (m * n * k))
    # One after the other, as the scratch tiles of a kernel are.
    acc = buffer.data_ptr()
    a = acc + m * n * 4
    b = a + m * k * BYTES[dtype]
    dot_text = repeated(tile_dot(spec, target), spec.symbol, 5, count)
    pack_text = repeated(pack_b_text(pack, target), pack.symbol, 3, count)
    operations = 2.0 * m * n * k * count
    dot = Timed(native(dot_text, "repeat", acc, a, k, b, n * group if form[1] == "vnni" else n), operations)
    return dot, Timed(native(pack_text, "repeat", b, a, k), operations)


def least_seconds(loops: list[Timed]) -> list[float]:
    """Least time of each, all running in turns."""
    least = [float("inf")] * len(loops)
    for _ in range(ROUNDS):
        for index, loop in enumerate(loops):
            start = time.perf_counter()
            loop.call()
            least[index] = min(least[index], time.perf_counter() - start)
    return least


def main() -> None:
    """Prints the table."""
    target = CpuTarget.native()
    steps = {"f32": fma_step("f32", "f32", target)}
    if target.bf16_dot:
        steps["bf16"] = bf16_step(target)
    if target.int8_dot:
        steps["i8"] = int8_step(target)
    print(f"{'dtype':6s} {'tile':>12s} {'share of bare loop':>20s} {'packing / dot':>14s}")
    for dtype, step in steps.items():
        buffer = torch.zeros(1 << 17)
        loops = [bare_loop(step, buffer)]
        for shape in SHAPES:
            loops += tile_loops(shape, dtype, buffer)
        rates = [loop.operations / seconds for loop, seconds in zip(loops, least_seconds(loops), strict=True)]
        print(f"{dtype:6s} {'bare loop':>12s} {rates[0] / 1e9:15.1f} G/s")
        for index, shape in enumerate(SHAPES):
            dot, pack = rates[1 + 2 * index], rates[2 + 2 * index]
            print(f"{dtype:6s} {'x'.join(map(str, shape)):>12s} {dot / rates[0]:20.3f} {dot / pack:14.3f}")


if __name__ == "__main__":
    main()
