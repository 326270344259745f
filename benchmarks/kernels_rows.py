"""Row kernels: residual + bias + layer norm, softmax, and reductions of other kinds, beside torch.

Every kernel is written as in Triton's tutorials: one program a row, a block of the next power of two, masks. The
variants in blocks of several rows compute the same. Outputs exist before the timing starts, and memory that is freed
stays in the process, so that a torch call without an out variant writes to memory that was written before as well.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from timing import Line, interleaved

import tilewright

SIZES = ((1305, 768), (4096, 4096))
ROTATED_BYTES = 700 << 20  # more than all caches together
EPS = 1e-5
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@triton.jit
def norm_row(x, residual, bias, weight, shift, out, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + row * n + i, mask=mask, other=0.0)
    v += tl.load(residual + row * n + i, mask=mask, other=0.0)
    v += tl.load(bias + i, mask=mask, other=0.0)
    mean = tl.sum(v, axis=0) / n
    d = tl.where(mask, v - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(d * d, axis=0) / n + eps)
    w = tl.load(weight + i, mask=mask)
    s = tl.load(shift + i, mask=mask)
    tl.store(out + row * n + i, d * rstd * w + s, mask=mask)


@triton.jit
def norm_rows(x, residual, bias, weight, shift, out, m, n, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = (rows < m) & (i < n)
    v = tl.load(x + rows * n + i, mask=mask, other=0.0) + tl.load(residual + rows * n + i, mask=mask, other=0.0)
    v += tl.load(bias + i, mask=i < n, other=0.0)
    mean = tl.sum(v, axis=1) / n
    d = tl.where(mask, v - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(d * d, axis=1) / n + eps)
    w = tl.load(weight + i, mask=i < n)
    s = tl.load(shift + i, mask=i < n)
    tl.store(out + rows * n + i, d * rstd[:, None] * w + s, mask=mask)


@triton.jit
def norm_chunks(x, residual, bias, weight, shift, out, n, eps, BLOCK: tl.constexpr):
    start = tl.program_id(0) * n
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        v = tl.load(x + start + i, mask=i < n, other=0.0) + tl.load(residual + start + i, mask=i < n, other=0.0)
        total += v + tl.load(bias + i, mask=i < n, other=0.0)
    mean = tl.sum(total, axis=0) / n
    square = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        v = tl.load(x + start + i, mask=i < n, other=0.0) + tl.load(residual + start + i, mask=i < n, other=0.0)
        v += tl.load(bias + i, mask=i < n, other=0.0)
        d = tl.where(i < n, v - mean, 0.0)
        square += d * d
    rstd = 1 / tl.sqrt(tl.sum(square, axis=0) / n + eps)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        v = tl.load(x + start + i, mask=i < n) + tl.load(residual + start + i, mask=i < n)
        v += tl.load(bias + i, mask=i < n)
        w = tl.load(weight + i, mask=i < n)
        tl.store(out + start + i, (v - mean) * rstd * w + tl.load(shift + i, mask=i < n), mask=i < n)


@triton.jit
def softmax_row(x, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * n + i, mask=i < n, other=-float("inf"))
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(out + row * n + i, e / tl.sum(e, axis=0), mask=i < n)


@triton.jit
def softmax_rows(x, out, m, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    mask = (rows < m) & (i < n)
    v = tl.load(x + rows * n + i, mask=mask, other=-float("inf"))
    e = tl.exp(v - tl.max(v, axis=1)[:, None])
    tl.store(out + rows * n + i, e / tl.sum(e, axis=1)[:, None], mask=mask)


@triton.jit
def softmax_persistent(x, out, m, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0), m, tl.num_programs(0)):
        v = tl.load(x + row * n + i, mask=i < n, other=-float("inf"))
        e = tl.exp(v - tl.max(v, axis=0))
        tl.store(out + row * n + i, e / tl.sum(e, axis=0), mask=i < n)


@triton.jit
def reduce_rows(x, out, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * n + i)
    if KIND == "argmax":
        r = tl.argmax(v, axis=0)
    elif KIND == "max":
        r = tl.max(v, axis=0)
    else:
        r = tl.sum(v.to(tl.float32), axis=0) if v.dtype.is_floating() else tl.sum(v.to(tl.int32), axis=0)
    tl.store(out + tl.program_id(0), r)


@triton.jit
def sum_columns(x, out, m, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(0, m, ROWS):
        rows = first + tl.arange(0, ROWS)
        acc += tl.load(x + rows[:, None] * n + c[None, :], mask=(rows < m)[:, None], other=0.0)
    tl.store(out + c, tl.sum(acc, axis=0))


def keep_freed_memory() -> None:
    """Makes the C library reuse freed blocks instead of returning them to the system, large ones too."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """One call that makes all of them, each on other memory."""

    def run() -> None:
        for call in calls:
            call()

    return run


def norm_calls(m: int, n: int, sets: int) -> dict[str, Callable[[], None]]:
    """Each contender, over ``sets`` sets of inputs and outputs."""
    calls: dict[str, list[Callable[[], Any]]] = {}
    bias, weight, shift = torch.randn(3, n)
    block = triton.next_power_of_2(n)
    rows = 4
    mean, rstd = torch.empty(m, 1), torch.empty(m, 1)
    for _ in range(sets):
        x, residual, out, ours = torch.randn(m, n), torch.randn(m, n), torch.empty(m, n), torch.empty(m, n)
        args = (x, residual, bias, weight, shift, ours)
        variants = {
            "row": tilewright.prepare(norm_row, (m,), *args, n, EPS, BLOCK=block),
            "rows": tilewright.prepare(norm_rows, (triton.cdiv(m, rows),), *args, m, n, EPS, ROWS=rows, BLOCK=block),
            "chunks": tilewright.prepare(norm_chunks, (m,), *args, n, EPS, BLOCK=1024),
        }

        def sums(x: torch.Tensor = x, residual: torch.Tensor = residual, out: torch.Tensor = out) -> None:
            torch.add(x, residual, out=out)
            torch.add(out, bias, out=out)

        def torch_new(sums: Callable[[], None] = sums, out: torch.Tensor = out) -> None:
            sums()
            torch.nn.functional.layer_norm(out, (n,), weight, shift, EPS)

        def torch_out(sums: Callable[[], None] = sums, out: torch.Tensor = out, ours: torch.Tensor = ours) -> None:
            sums()
            torch.ops.aten.native_layer_norm.out(out, (n,), weight, shift, EPS, out0=ours, out1=mean, out2=rstd)

        flat = torch.empty(3 * m * n // 2), torch.empty(3 * m * n // 2)
        variants |= {"torch": torch_new, "torch out": torch_out, "copy": functools.partial(flat[1].copy_, flat[0])}
        variants["add"] = functools.partial(torch.add, x, residual, out=out)
        for name, call in variants.items():
            calls.setdefault(name, []).append(call)
        wide = (x.double() + residual + bias).contiguous()
        want = torch.nn.functional.layer_norm(wide, (n,), weight.double(), shift.double(), EPS)
        for name in ("row", "rows", "chunks"):
            variants[name]()
            assert (ours - want).abs().max() < 1e-4, name
    return {name: in_turn(listed) for name, listed in calls.items()}


def norm_lines() -> Iterator[Line]:
    """Layer norm against torch in place and against copies in and out of cache."""
    for m, n in SIZES:
        name = f"add + bias + layer norm [{m}, {n}]"
        single = 16 * m * n
        sets = max(1, ROTATED_BYTES // single) if n > 1024 else 1
        seconds = {k: v / sets for k, v in interleaved(norm_calls(m, n, sets), 9).items()}
        torch_time, copy_time = min(seconds["torch"], seconds["torch out"]), min(seconds["copy"], seconds["add"])
        note = ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in seconds.items())
        yield Line(f"{name}: torch / ours", 2.5, torch_time / seconds["row"], note)
        yield Line(f"{name}: ours / copy", 1.2, seconds["row"] / copy_time, at_most=True)
        yield Line(f"{name}: blocks of 4 rows / one row", 1.02, seconds["rows"] / seconds["row"], at_most=True)
        yield Line(f"{name}: in chunks of 1024, torch / ours", None, torch_time / seconds["chunks"])


def softmax_lines() -> Iterator[Line]:
    """Softmax against torch into existing outputs."""
    for m, n in SIZES:
        x, out, ours = torch.randn(m, n), torch.empty(m, n), torch.empty(m, n)
        block = triton.next_power_of_2(n)
        calls = {
            "row": tilewright.prepare(softmax_row, (m,), x, ours, n, BLOCK=block),
            "rows": tilewright.prepare(softmax_rows, (triton.cdiv(m, 4),), x, ours, m, n, ROWS=4, BLOCK=block),
            "persistent": tilewright.prepare(softmax_persistent, (64,), x, ours, m, n, BLOCK=block),
            "torch": functools.partial(torch.softmax, x, -1, out=out),
        }
        want = torch.softmax(x.double(), -1)
        for name in ("row", "rows", "persistent"):
            calls[name]()
            assert (ours - want).abs().max() < 1e-6, name
        seconds = interleaved(calls)
        note = ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in seconds.items())
        for name in ("row", "rows", "persistent"):
            label = f"softmax [{m}, {n}], {name}: torch / ours"
            yield Line(label, 1.0, seconds["torch"] / seconds[name], note if name == "row" else "")


def other_lines() -> Iterator[Line]:
    """Reductions of other kinds and types, in cache: torch / ours."""
    m, n = 2048, 2048
    floats = torch.randn(m, n)
    cases: dict[str, tuple[torch.Tensor, str, Callable[[torch.Tensor], torch.Tensor]]] = {
        "sum f32": (floats, "sum", lambda x: x.sum(1)),
        "max f32": (floats, "max", lambda x: x.amax(1)),
        "argmax f32": (floats, "argmax", lambda x: x.argmax(1)),
        "sum f16": (floats.half(), "sum", lambda x: x.sum(1, dtype=torch.float32)),
        "sum bf16": (floats.bfloat16(), "sum", lambda x: x.sum(1, dtype=torch.float32)),
        "sum int8": ((floats * 40).to(torch.int8), "sum", lambda x: x.sum(1, dtype=torch.int32)),
        "sum bool": (floats > 0, "sum", lambda x: x.sum(1, dtype=torch.int32)),
    }
    for name, (x, kind, reference) in cases.items():
        want = reference(x)
        ours = torch.empty(m, dtype=torch.int32 if kind == "argmax" else want.dtype)
        call = tilewright.prepare(reduce_rows, (m,), x, ours, n, KIND=kind, BLOCK=n)
        call()
        assert (ours.double() - want.double()).abs().max() < 1e-2, name
        seconds = interleaved({"torch": functools.partial(reference, x), "ours": call})
        yield Line(f"{name} over rows [{m}, {n}]: torch / ours", None, seconds["torch"] / seconds["ours"])
    out = torch.empty(n)
    call = tilewright.prepare(sum_columns, (n // 128,), floats, out, m, n, ROWS=16, BLOCK=128)
    call()
    assert (out - floats.double().sum(0)).abs().max() < 1e-3
    seconds = interleaved({"torch": functools.partial(torch.sum, floats, 0), "ours": call})
    yield Line(f"sum f32 over columns [{m}, {n}]: torch / ours", None, seconds["torch"] / seconds["ours"])


def lines() -> Iterator[Line]:
    """All lines of this group."""
    keep_freed_memory()
    yield from norm_lines()
    yield from softmax_lines()
    yield from other_lines()
