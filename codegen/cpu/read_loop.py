"""A bare read of memory by all threads: what kernels that read weights once are measured against.

The loop adds up eight vectors at a time and keeps nothing. It comes in two forms: each program reads its piece front to
back, or from four places at once, which gives the prefetchers of a processor four streams to follow. Where both give
about the same rate, as they do on memory in large pages, that rate is the memory's and not the loop's.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tilewright.codegen.cpu import jit, launch
from tilewright.codegen.cpu.target import CpuTarget

PIECE = 16384
"""Bytes that one program reads; less at the end of the memory is left out."""
STREAMS = (1, 4)
_VECTORS = 8


def read_loop(data: Tensor, streams: int) -> Callable[[], None]:
    """A call that reads contiguous memory once, on as many threads as kernels use.

    Args:
        data: any dtype and shape.
        streams: places that a program reads from at once, one of ``STREAMS``.
    """
    out = torch.empty(64, dtype=torch.uint8)
    code = _code(streams)
    slots = (ctypes.c_void_p * 2)(data.data_ptr(), out.data_ptr())
    programs = data.numel() * data.element_size() // PIECE
    record = launch.Step(code.address, ctypes.addressof(slots), programs, 1, 1, 0, 0)

    def run(keep: object = (code, slots, data, out)) -> None:
        launch.launcher().run_steps(ctypes.addressof(record), 1, launch.num_threads())

    return run


@functools.cache
def _code(streams: int) -> jit.Code:
    target = CpuTarget.native()
    vector, size = f"<{target.lanes_f32} x i32>", 4 * target.lanes_f32
    each = _VECTORS // streams
    offsets = [stream * (PIECE // streams) + place * size for stream in range(streams) for place in range(each)]
    names = range(_VECTORS)
    phis = "\n".join(f"  %a{i} = phi {vector} [zeroinitializer, %piece], [%s{i}, %loop]" for i in names)
    loads = "\n".join(
        f"  %p{i} = getelementptr i8, ptr %start, i64 {offset}\n  %q{i} = getelementptr i8, ptr %p{i}, i64 %at\n"
        f"  %v{i} = load {vector}, ptr %q{i}, align 4\n  %s{i} = add {vector} %a{i}, %v{i}"
        for i, offset in enumerate(offsets)
    )
    totals = "\n".join(f"  %t{i} = add {vector} {'%s0' if i == 1 else f'%t{i - 1}'}, %s{i}" for i in range(1, _VECTORS))
    text = f"""define void @read(ptr %args, i32 %x, i32 %y, i32 %z, i64 %first, i64 %last) {{
entry:
  %data = load ptr, ptr %args
  %out.at = getelementptr i8, ptr %args, i64 8
  %out = load ptr, ptr %out.at
  br label %piece
piece:
  %id = phi i64 [%first, %entry], [%next, %done]
  %offset = mul i64 %id, {PIECE}
  %start = getelementptr i8, ptr %data, i64 %offset
  br label %loop
loop:
  %at = phi i64 [0, %piece], [%at.next, %loop]
{phis}
{loads}
  %at.next = add i64 %at, {each * size}
  %more = icmp slt i64 %at.next, {PIECE // streams}
  br i1 %more, label %loop, label %done
done:
{totals}
  store {vector} %t{_VECTORS - 1}, ptr %out, align 4
  %next = add i64 %id, 1
  %again = icmp slt i64 %next, %last
  br i1 %again, label %piece, label %exit
exit:
  ret void
}}
"""
    return jit.load(jit.compile_ir(text, target), "read")
