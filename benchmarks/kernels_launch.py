"""What a launch and a compilation cost.

Launches are of kernels of two tiny programs, so that both threads take part; a launch spreads over torch's threads
and returns when they are done. Compilation and first results are measured in processes of their own, from the call of
``kernel[grid]`` to its return, with torch and triton imported before. Absolute times: there is nothing to divide by.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from timing import Line, interleaved

import tilewright
from tilewright.codegen.cpu import launch

BLOCK = 64
STEPS = 1000
PROCESSES = 5


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def affine(x, scale, shift, out, n, x_stride, out_stride, low, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * x_stride, mask=i < n) * scale + shift
    tl.store(out + i * out_stride, tl.maximum(value, low), mask=i < n)


def _arguments() -> dict[Any, tuple[Any, ...]]:
    x, y, out = (torch.zeros(2 * BLOCK) for _ in range(3))
    return {add: (x, y, out, 2 * BLOCK), affine: (x, 2.0, 1.0, out, 2 * BLOCK, 1, 1, 0.0)}


def launches() -> Iterator[Line]:
    """Prepared launches from Python and from native code, and ``kernel[grid]``."""
    calls: dict[str, Any] = {}
    for kernel, arguments in _arguments().items():
        prepared = tilewright.prepare(kernel, (2,), *arguments, BLOCK=BLOCK)
        name = f"{len(arguments)} arguments"
        calls[f"prepared, {name}"] = prepared
        calls[f"kernel[grid], {name}"] = lambda kernel=kernel, given=arguments: kernel[(2,)](*given, BLOCK=BLOCK)
    # The last prepared launch, many times in one native call.
    steps = (launch.Step * STEPS)(*[prepared.memory[1]] * STEPS)
    address, threads = ctypes.addressof(steps), launch.num_threads()
    calls["steps"] = lambda: launch.launcher().run_steps(address, STEPS, threads)
    times = interleaved(calls)
    for name, seconds in times.items():
        target = 1.5 if name.startswith("prepared") else 10
        if name != "steps":
            yield Line(f"{name}, us", target, seconds * 1e6, at_most=True)
    yield Line("a step in native code, us", 1, times["steps"] / STEPS * 1e6, at_most=True)


# Run by a process of its own: the first call and its parts, as one line of JSON.
_FIRST = """
import json, sys, time
sys.path.insert(0, {folder!r})
import torch, triton
import kernels_attention
batch = kernels_attention.Batch((64, 33), torch.float32)
parts = {{}}
def listen(*, src, metadata, metadata_group, times, cache_hit):
    parts.update(front=times.ir_initialization, stages=dict(times.lowering_stages), store=times.store_results)
triton.knobs.compilation.listener = listen
grid, arguments, sizes = batch.launch()
before = set(sys.modules)
start = time.perf_counter()
kernels_attention.attention_varlen[grid](*arguments, **sizes)
seconds = time.perf_counter() - start
print(json.dumps(dict(seconds=seconds, parts=parts, modules=len(set(sys.modules) - before), error=batch.error())))
"""


def _first_call(cache: str) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_CACHE_DIR": f"{cache}/triton", "TILEWRIGHT_CACHE_DIR": f"{cache}/tilewright"}
    script = _FIRST.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def compilation() -> Iterator[Line]:
    """The attention kernel of ``kernels_attention``: compiled, and found in the cache by a second process."""
    first, second = [], []
    for _ in range(PROCESSES):
        with tempfile.TemporaryDirectory() as cache:
            first.append(_first_call(cache))
            second.append(_first_call(cache))
    compiled, cached = (sorted(runs, key=lambda run: run["seconds"])[PROCESSES // 2] for runs in (first, second))
    parts = {"front end": compiled["parts"]["front"]}
    parts |= compiled["parts"]["stages"]
    note = ", ".join(f"{name} {microseconds / 1e3:.0f} ms" for name, microseconds in parts.items())
    yield Line("attention kernel compiled, s", 0.3, compiled["seconds"], note, at_most=True)
    note = f"{cached['modules']} modules imported"
    yield Line("first result of a second process, ms", 10, cached["seconds"] * 1e3, note, at_most=True)


def lines() -> Iterator[Line]:
    """Launches, then compilation."""
    yield from launches()
    yield from compilation()
