"""Small programs made by hand, with kernels in LLVM IR."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tilewright.codegen.cpu import jit, launch
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.ir.kernels import BuiltKernel, KernelSource
from tilewright.ir.program import (
    EagerStep,
    KernelStep,
    Pointer,
    ProgramSpec,
    Scalar,
    Step,
    Storage,
    Value,
    View,
    Weight,
)
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, Size, contiguous_strides
from tilewright.runtime.program import Program

# One program a row: out[row, :] = x[row, :] * scale + shift, with n columns; args: x, out, n, scale.
SCALE_ROWS = KernelSource(
    "scale_rows", "", "scale_rows", (("x", "*fp32"), ("out", "*fp32"), ("n", "i32"), ("scale", "fp32"))
)
SCALE_ROWS_IR = """
define void @scale_rows(ptr %args, i32 %gx, i32 %gy, i32 %gz, i64 %first, i64 %last) {
entry:
  %x = load ptr, ptr %args
  %out.at = getelementptr i8, ptr %args, i64 8
  %out = load ptr, ptr %out.at
  %n.at = getelementptr i8, ptr %args, i64 16
  %n = load i64, ptr %n.at
  %scale.at = getelementptr i8, ptr %args, i64 24
  %scale = load float, ptr %scale.at
  %begin = mul i64 %first, %n
  %end = mul i64 %last, %n
  %some = icmp slt i64 %begin, %end
  br i1 %some, label %loop, label %done
loop:
  %i = phi i64 [ %begin, %entry ], [ %next, %loop ]
  %from = getelementptr float, ptr %x, i64 %i
  %value = load float, ptr %from
  %scaled = fmul float %value, %scale
  %to = getelementptr float, ptr %out, i64 %i
  store float %scaled, ptr %to
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %end
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""

# One program: count[0] = number of nonzero i64 among n; args: x, count, n.
COUNT = KernelSource("count", "", "count", (("x", "*i64"), ("count", "*i32"), ("n", "i32")))
COUNT_IR = """
define void @count(ptr %args, i32 %gx, i32 %gy, i32 %gz, i64 %first, i64 %last) {
entry:
  %x = load ptr, ptr %args
  %count.at = getelementptr i8, ptr %args, i64 8
  %count = load ptr, ptr %count.at
  %n.at = getelementptr i8, ptr %args, i64 16
  %n = load i64, ptr %n.at
  store i32 0, ptr %count
  %some = icmp sgt i64 %n, 0
  br i1 %some, label %loop, label %done
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
  %from = getelementptr i64, ptr %x, i64 %i
  %value = load i64, ptr %from
  %real = icmp ne i64 %value, 0
  %one = zext i1 %real to i32
  %before = load i32, ptr %count
  %after = add i32 %before, %one
  store i32 %after, ptr %count
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""

_IR = {SCALE_ROWS: SCALE_ROWS_IR, COUNT: COUNT_IR}
_built: dict[KernelSource, BuiltKernel] = {}


def built() -> dict[KernelSource, BuiltKernel]:
    """The kernels as native code."""
    if not _built:
        for source, text in _IR.items():
            code = jit.load(jit.compile_ir(text, CpuTarget.native()), source.function)
            _built[source] = BuiltKernel(source, code.address, tuple(n for n, _ in source.signature), code)
    return _built


class Builder:
    """Collects values and steps."""

    def __init__(self, symbols: Sequence[Any] = (BATCH, SEQ, TOKENS)) -> None:
        self.symbols = tuple(symbols)
        self.values: list[Value] = []
        self.weights: dict[str, Weight] = {}
        self.steps: list[Step] = []

    def value(self, storage: Storage, shape: tuple[Size, ...], dtype: torch.dtype = torch.float32) -> View:
        """A new value, as a view of all of it."""
        index = len(self.values)
        source = sum(v.storage is Storage.INPUT for v in self.values) if storage is Storage.INPUT else None
        self.values.append(Value(index, f"v{index}", storage, dtype, shape, source))
        return View(index, shape, contiguous_strides(shape))

    def weight(self, tensor: torch.Tensor, layout: str = "as_is") -> View:
        """A new weight."""
        index = len(self.values)
        self.weights[f"w{index}"] = Weight(tensor, layout)
        self.values.append(Value(index, f"w{index}", Storage.WEIGHT, tensor.dtype, tuple(tensor.shape), f"w{index}"))
        return View(index, tuple(tensor.shape), contiguous_strides(tuple(tensor.shape)))

    def eager(self, call: Callable[..., Any], inputs: Sequence[View], outputs: Sequence[View]) -> EagerStep:
        """An eager step over views."""
        reads, writes = (tuple(v.value for v in views) for views in (inputs, outputs))
        step = EagerStep(call, tuple(inputs), tuple(outputs), "by hand", reads, writes, ("by_hand",))
        self.steps.append(step)
        return step

    def scale(self, x: View, out: View, scale: float) -> KernelStep:
        """out = x * scale, row by row."""
        rows, n = x.shape
        arguments = (Pointer(x), Pointer(out), Scalar(n), Scalar(scale))
        step = KernelStep(SCALE_ROWS, arguments, (rows, 1, 1), (x.value,), (out.value,), ("scale",))
        self.steps.append(step)
        return step

    def spec(self, bind: Sequence[tuple[Any, int, int]], outputs: Sequence[View]) -> ProgramSpec:
        """The program."""
        names = tuple(v.name for v in self.values if v.storage is Storage.INPUT)
        returned = tuple(view.value for view in outputs)
        values, steps = tuple(self.values), tuple(self.steps)
        return ProgramSpec(self.symbols, tuple(bind), names, values, self.weights, steps, returned)

    def program(self, bind: Sequence[tuple[Any, int, int]], outputs: Sequence[View]) -> Program:
        """The program, loaded."""
        return Program(self.spec(bind, outputs), built(), launch.launcher())
