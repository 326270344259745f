"""The arithmetic peak of this machine: a bare loop of multiply-adds on registers, on all threads at once."""

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from kernels_tiles import bare_loop

from tilewright.codegen.cpu.microkernel_step import bf16_step, fma_step, int8_step
from tilewright.codegen.cpu.target import CpuTarget

_CALLS = 400  # of the native loop, a fraction of a millisecond each: waking a thread does not count
_ROUNDS = 5


def peak(precision: str) -> float | None:
    """Operations a second (a multiplication and an addition are two) on all threads; None without the instruction.

    Args:
        precision: "fp32", "bf16" or "int8".
    """
    target = CpuTarget.named("avx512") if CpuTarget.host().amx else CpuTarget.host()
    if (precision == "bf16" and not target.bf16_dot) or (precision == "int8" and not target.int8_dot):
        return None
    steps = {
        "fp32": lambda: fma_step("f32", "f32", target),
        "bf16": lambda: bf16_step(target),
        "int8": lambda: int8_step(target, b_positive=False),
    }
    threads = torch.get_num_threads()
    buffers = [torch.zeros(1 << 12) for _ in range(threads)]  # the loops hold addresses only
    loops = [bare_loop(steps[precision](), target, buffer) for buffer in buffers]

    def work(index: int) -> None:
        for _ in range(_CALLS):
            loops[index].call()

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(work, range(threads)))
            best = min(best, time.perf_counter() - start)
    return sum(loop.operations for loop in loops) * _CALLS / best
