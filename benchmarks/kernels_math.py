"""Mathematical functions mapped over an array in the second-level cache, against loops of scalar C library calls.

Both run on one thread, on the same numbers: the kernel by its prepared launch, the loop as native code of its own.
"""

import ctypes
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from timing import Line, interleaved
from torch import Tensor
from triton.language.extra import libdevice

import tilewright
from tilewright.codegen.cpu import jit
from tilewright.codegen.cpu.target import CpuTarget

COUNT = 1 << 16  # in and out together half a megabyte
TARGET = 4.0
# Name of the function: the loop's body on %x in LLVM IR, and the range of the numbers.
_CALL = "%y = call float @{}f(float %x)"
TARGETED: dict[str, tuple[str, float, float]] = {
    "exp": (_CALL, -20.0, 20.0),
    "exp2": (_CALL, -20.0, 20.0),
    "log": (_CALL, 1e-3, 1e3),
    "sin": (_CALL, -10.0, 10.0),
    "cos": (_CALL, -10.0, 10.0),
    "tanh": (_CALL, -4.0, 4.0),
    "erf": (_CALL, -3.0, 3.0),
    "sigmoid": (
        "%n = fneg float %x\n  %e = call float @expf(float %n)\n  %d = fadd float %e, 1.0\n  %y = fdiv float 1.0, %d",
        -8.0,
        8.0,
    ),
    "rsqrt": ("%r = call float @sqrtf(float %x) nobuiltin\n  %y = fdiv float 1.0, %r", 1e-3, 1e3),
}
FURTHER: dict[str, tuple[str, float, float]] = {
    "log2": (_CALL, 1e-3, 1e3),
    "log1p": (_CALL, 0.0, 10.0),
    "expm1": (_CALL, -5.0, 5.0),
    "tan": (_CALL, -10.0, 10.0),
    "atan": (_CALL, -10.0, 10.0),
    "asin": (_CALL, -1.0, 1.0),
    "sinh": (_CALL, -5.0, 5.0),
    "erfc": (_CALL, -3.0, 5.0),
}


@triton.jit
def map_kernel(x_ptr, out_ptr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.sigmoid(x) if NAME == "sigmoid" else getattr(libdevice, NAME)(x)
    tl.store(out_ptr + i, y)


def scalar_loop(name: str, body: str) -> tuple[Callable[[Tensor, Tensor], None], object]:
    """A native loop over ``COUNT`` numbers; the second value keeps its code alive."""
    text = f"""
declare float @{name}f(float)
{"declare float @expf(float)" if name == "sigmoid" else ""}
{"declare float @sqrtf(float)" if name == "rsqrt" else ""}
define void @loop(ptr %in, ptr %out) {{
entry:
  br label %body
body:
  %i = phi i64 [0, %entry], [%next, %body]
  %px = getelementptr float, ptr %in, i64 %i
  %py = getelementptr float, ptr %out, i64 %i
  %x = load float, ptr %px
  {body.format(name)}
  store float %y, ptr %py
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, {COUNT}
  br i1 %more, label %body, label %done
done:
  ret void
}}"""
    code = jit.load(jit.compile_ir(text, CpuTarget.native()), "loop")
    native = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(code.address)
    return lambda x, out: native(x.data_ptr(), out.data_ptr()), code


def lines() -> Iterator[Line]:
    """How many times as fast as the loop of scalar calls the kernel is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, (body, low, high) in (TARGETED | FURTHER).items():
        x = torch.rand(COUNT) * (high - low) + low
        out, expected = torch.empty(COUNT), torch.empty(COUNT)
        launch = tilewright.prepare(map_kernel, (COUNT // 4096,), x, out, NAME=name, BLOCK=4096)
        loop, code = scalar_loop(name, body)
        seconds = interleaved({"kernel": launch, "loop": lambda loop=loop, x=x, out=expected: loop(x, out)})
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        each = {who: value / COUNT * 1e9 for who, value in seconds.items()}
        del code
        yield Line(
            name if name in TARGETED else f"{name} (no target)",
            TARGET if name in TARGETED else 1.0,
            seconds["loop"] / seconds["kernel"],
            f"{each['kernel']:.2f} ns a number, scalar calls {each['loop']:.2f} ns",
        )
    torch.set_num_threads(threads)
