"""Matrix-vector products over weights larger than the caches, as shares of the bandwidth of bare read loops.

y = W x with W of [4096, 4096] in fp32, bf16 and int4. Successive calls take successive matrices, together larger than
all caches. The bandwidth is the best of loops that only add up the same memory: a native one in two forms
(``codegen.cpu.read_loop``), a Triton kernel that sums rows, and ``torch.sum``.

int4: groups of 64 weights along k share an fp16 scale; byte j of a group holds weight j in its low half and weight
j + 32 in its high half, as value + 8. The activations are int8 with an fp32 scale for each group of 64.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from timing import Line, interleaved

import tilewright
from tilewright.codegen.cpu.read_loop import STREAMS, read_loop

N = K = 4096
GROUP = 64
ROTATED_BYTES = 768 << 20


@triton.jit
def matvec(w, x, y, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, k, BLOCK):
        c = first + tl.arange(0, BLOCK)
        tile = tl.load(w + rows[:, None] * k + c[None, :]).to(tl.float32)
        acc += tl.sum(tile * tl.load(x + c).to(tl.float32)[None, :], axis=1)
    tl.store(y + rows, acc)


@triton.jit
def matvec_row(w, x, y, k, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    product = tl.load(w + row * k + c, mask=c < k, other=0.0).to(tl.float32) * tl.load(x + c, mask=c < k, other=0.0)
    tl.store(y + row, tl.sum(product, axis=0))


@triton.jit
def matvec_int4(w, scales, x, x_scales, x_sums, y, k, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, 32)
    acc = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, k // 64, GROUPS):
        g = first + tl.arange(0, GROUPS)
        packed = tl.load(w + rows[:, None, None] * (k // 2) + g[None, :, None] * 32 + j[None, None, :])
        low = tl.load(x + g[:, None] * 64 + j[None, :]).to(tl.int32)[None, :, :]
        high = tl.load(x + g[:, None] * 64 + 32 + j[None, :]).to(tl.int32)[None, :, :]
        dots = tl.sum((packed & 15).to(tl.int32) * low + (packed >> 4).to(tl.int32) * high, axis=2)
        dots -= 8 * tl.load(x_sums + g)[None, :]
        scale = tl.load(scales + rows[:, None] * (k // 64) + g[None, :]).to(tl.float32) * tl.load(x_scales + g)[None, :]
        acc += tl.sum(dots.to(tl.float32) * scale, axis=1)
    tl.store(y + rows, acc)


@triton.jit
def sum_rows(w, y, k, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0), tl.sum(tl.load(w + tl.program_id(0) * k + c), axis=0))


class Rotation:
    """A call that goes through several prepared calls, one at a time."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        self.calls, self.next = calls, 0

    def __call__(self) -> None:
        self.calls[self.next]()
        self.next = (self.next + 1) % len(self.calls)


def shares(
    name: str, data: list[torch.Tensor], ours: dict[str, list[Callable[[], Any]]], target: float
) -> Iterator[Line]:
    """Lines of bandwidth reached by kernels that read each of ``data`` once, per bandwidth of the best bare loop."""
    out = torch.empty(1 << 16)
    numbers = [each.view(torch.float32).view(-1, 4096) for each in data]
    bare = {f"native {streams}": Rotation([read_loop(each, streams) for each in data]) for streams in STREAMS}
    calls = (
        bare
        | {
            "Triton sum": Rotation(
                [tilewright.prepare(sum_rows, (len(e),), e, out, 4096, BLOCK=4096) for e in numbers]
            ),
            "torch.sum": Rotation([functools.partial(torch.sum, each) for each in numbers]),
        }
        | {kind: Rotation(each) for kind, each in ours.items()}
    )
    # Contenders in step would find in the cache what the one before has just read.
    for number, call in enumerate(calls.values()):
        call.next = number * len(data) // len(calls)
    seconds = interleaved(calls, 25)
    gigabytes = data[0].numel() * data[0].element_size() / 1e9
    note = ", ".join(f"{kind} {gigabytes / value:.1f} GB/s" for kind, value in seconds.items())
    best = min(seconds[kind] for kind in calls if kind not in ours)
    for kind in ours:
        yield Line(f"{name}, {kind}: share of bandwidth", target, best / seconds[kind], note)
        note = ""


def float_lines(dtype: torch.dtype) -> Iterator[Line]:
    """Weights of fp32 or bf16 with fp32 activations."""
    count = ROTATED_BYTES // (N * K * dtype.itemsize)
    weights = [torch.randn(N, K).to(dtype) for _ in range(count)]
    x, y = torch.randn(K), torch.empty(N)
    ours: dict[str, list[Callable[[], Any]]] = {
        "blocks of 4 rows": [tilewright.prepare(matvec, (N // 4,), w, x, y, K, ROWS=4, BLOCK=1024) for w in weights],
        "a row a program": [tilewright.prepare(matvec_row, (N,), w, x, y, K, BLOCK=K) for w in weights],
    }
    want = weights[0].double() @ x.double()
    for name, calls in ours.items():
        calls[0]()
        assert (y - want).abs().max() < 1e-3, name
    yield from shares(f"matvec {str(dtype).removeprefix('torch.')}", weights, ours, 0.95)


def quantized(values: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded to -limit .. limit in groups of 64 along the last axis; the integers and the scales."""
    groups = values.view(*values.shape[:-1], -1, GROUP)
    scales = groups.abs().amax(-1) / limit
    return (groups / scales[..., None]).round().clamp(-limit, limit).to(torch.int8), scales


def int4_lines() -> Iterator[Line]:
    """Weights of 4 bits with activations of 8."""
    exact, x = torch.randn(N, K), torch.randn(K)
    integers, scales = quantized(exact, 7)
    shifted = (integers + 8).to(torch.uint8)
    packed = (shifted[..., :32] | (shifted[..., 32:] << 4)).contiguous()
    half = scales.half().contiguous()
    x8, x_scales = quantized(x, 127)
    x_sums = x8.sum(-1, dtype=torch.int32)
    y = torch.empty(N)
    count = ROTATED_BYTES // (packed.numel() + half.numel() * 2)
    memory = [torch.cat([packed.flatten(), half.flatten().view(torch.uint8)]) for _ in range(count)]
    ours: dict[str, list[Callable[[], Any]]] = {"blocks of 4 rows": []}
    for each in memory:
        args = (each, each[packed.numel() :].view(torch.float16), x8, x_scales, x_sums, y, K)
        ours["blocks of 4 rows"].append(tilewright.prepare(matvec_int4, (N // 4,), *args, ROWS=4, GROUPS=32))
    ours["blocks of 4 rows"][0]()
    size = (exact.double() @ x.double()).abs().max()
    computed = (integers.double() * half.double()[..., None]).view(N, K) @ (
        x8.double() * x_scales.double()[:, None]
    ).view(K)
    rounding = ((y - computed).abs().max() / size).item()
    total = ((y - exact.double() @ x.double()).abs().max() / size).item()
    for line in shares("matvec int4 x int8", memory, ours, 0.8):
        error = (
            f"largest error / largest |y|: {rounding:.1e} against fp64 of the same integers, {total:.1e} of the fp32"
        )
        yield Line(line.name, line.target, line.ratio, f"{line.note}; {error}")


def lines() -> Iterator[Line]:
    """All lines of this group."""
    yield from float_lines(torch.float32)
    yield from float_lines(torch.bfloat16)
    yield from int4_lines()
