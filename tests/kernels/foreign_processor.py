"""Runs a kernel compiled for arm64 in an emulator: QEMU's user mode, with a C program around the object code."""

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilewright.codegen.cpu import store
from tilewright.codegen.cpu.target import CpuTarget

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
_TYPES = {
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.float16: "*fp16",
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.bool: "*i1",
}  # fmt: skip
# Reads the number of programs and of arguments, then each argument: its bytes, or -1 and a number. Writes the bytes
# of all tensors back in the same order.
_PROGRAM = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
void kernel(void **args, int32_t x, int32_t y, int32_t z, int64_t first, int64_t last);
static int64_t number(void) {
    int64_t value;
    if (fread(&value, 8, 1, stdin) != 1) exit(2);
    return value;
}
int main(void) {
    int64_t programs = number(), count = number();
    int64_t *slots = calloc(count, 8), *sizes = calloc(count, 8);
    for (int64_t i = 0; i < count; i++) {
        sizes[i] = number();
        if (sizes[i] < 0) { slots[i] = number(); continue; }
        void *memory = aligned_alloc(64, (sizes[i] + 64) / 64 * 64);
        if (fread(memory, 1, sizes[i], stdin) != (size_t)sizes[i]) exit(2);
        slots[i] = (int64_t)memory;
    }
    kernel((void **)slots, programs, 1, 1, 0, programs);
    for (int64_t i = 0; i < count; i++)
        if (sizes[i] >= 0) fwrite((void *)slots[i], 1, sizes[i], stdout);
    return 0;
}
"""


def missing_tools() -> list[str]:
    """Names of the programs that are not installed."""
    return [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]


def object_code(kernel: Any, arguments: Sequence[torch.Tensor | int]) -> bytes:
    """The kernel compiled for arm64, specialized to nothing but the types of its arguments."""
    kinds = [_TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in arguments]
    source = ASTSource(kernel, dict(zip(kernel.arg_names, kinds, strict=True)), {})
    # Not in checked mode, whose memory table the C program does not know.
    compiled = triton.compile(source, GPUTarget("cpu", CpuTarget.named("neon").key, 1), {"check": False})
    return store.unseal(compiled.asm["obj"], where="arm64 object")


def run_on_arm64(kernel: Any, programs: int, arguments: Sequence[torch.Tensor | int], folder: Path) -> None:
    """Runs a function called ``kernel`` in the emulator and copies what it wrote back to the tensors."""
    (folder / "kernel.o").write_bytes(object_code(kernel, arguments))
    (folder / "main.c").write_text(_PROGRAM)
    command = [COMPILER, "-O1", "-static", "-o", "program", "main.c", "kernel.o", "-lm"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    data = struct.pack("<qq", programs, len(arguments))
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            content = argument.contiguous().view(torch.uint8).numpy().tobytes()
            data += struct.pack("<q", len(content)) + content
        else:
            data += struct.pack("<qq", -1, argument)
    result = subprocess.run(
        [EMULATOR, "./program"], cwd=folder, check=True, capture_output=True, input=data, timeout=120
    )
    at = 0
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            size = argument.numel() * argument.element_size()
            piece = bytearray(result.stdout[at : at + size])
            if size:
                argument.copy_(torch.frombuffer(piece, dtype=argument.dtype).reshape(argument.shape))
            at += size
