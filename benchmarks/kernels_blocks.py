"""Products inside compiled programs over weights larger than the caches: block formats, bf16 and fp32.

A program multiplies the same few rows with several matrices of [4096, 4096], one after another, together larger than
all caches. One row is a matter of reading: the figure is the share of the bandwidth of bare read loops over as much
memory (``kernels_matvec``). Rows in block formats are rounded to 8 bits as part of the program. Eight rows are given as
a multiple of the time of one; 512 rows beside torch's linear in fp32.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernels_matvec import Rotation, bare_read
from timing import Line, interleaved
from torch import Tensor, nn

import tilewright
from tilewright.ops.blocks import FORMATS

N = K = 4096
READ_BYTES = 192 << 20
TARGETS = {"int4": 0.8, "Q4_0": 0.85, "Q4_K": 0.85, "Q5_0": 0.85, "Q5_K": 0.85, "Q6_K": 0.85, "Q8_0": 0.85}
_ROUNDED = 32


class BlockProducts(nn.Module):
    """Some rows times several weights in one format."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        self.form = FORMATS[name]
        size = (N, self.form.row_bytes(K))
        for index in range(count):
            data = torch.randint(0, 256, size, dtype=torch.uint8)
            # Bytes that hold exponents of scales, in any of the formats: 0.01 or so whatever the format.
            data.view(N, -1, self.form.nbytes)[..., [1, 3, -1]] &= 0x27
            self.register_buffer(f"weight_{index}", data)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        blocks = x.view(x.shape[0], K // _ROUNDED, _ROUNDED)
        scales = torch.maximum(blocks.amax(-1, keepdim=True), -blocks.amin(-1, keepdim=True)) / 127
        whole = (blocks / scales.clamp(min=1e-30) + 0.5).floor()
        sums = ((whole.sum(-1, keepdim=True)) * scales).squeeze(-1) if self.form.has_minimums else None
        rows, flat = whole.to(torch.int8).view(x.shape), scales.squeeze(-1)
        product = torch.ops.tilewright.block_linear_int8
        return tuple(product(rows, weight, None, self.form.name, flat, sums) for weight in self.buffers())


class Linears(nn.Module):
    """Some rows times several weights of floating-point numbers."""

    def __init__(self, dtype: torch.dtype, count: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(K, N, bias=False, dtype=dtype) for _ in range(count)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.linears)


def reading(nbytes: int) -> Callable[[], Any]:
    """A read loop over one after another of several pieces of memory."""
    out = torch.empty(1 << 16)
    pieces = [torch.randn(nbytes // 4) for _ in range(max(2, READ_BYTES // nbytes))]
    return Rotation([bare_read(piece, out) for piece in pieces])


def lines_of(name: str, model: nn.Module, dtype: torch.dtype, target: float) -> Iterator[Line]:
    """One row against reading, and eight rows against one."""
    compiled = tilewright.compile(model.eval(), without=("merge_linears",))
    weights = [*model.parameters(), *model.buffers()]
    nbytes = sum(weight.numel() * weight.element_size() for weight in weights)
    one, eight = torch.randn(1, K, dtype=dtype), torch.randn(8, K, dtype=dtype)
    for x in (one, eight):
        for found, want in zip(compiled(x), model(x), strict=True):
            assert (found - want).norm() <= 0.02 * want.norm(), name
    whole = nbytes // 65536 * 65536
    calls = {
        "read": reading(whole),
        "one": functools.partial(compiled, one),
        "eight": functools.partial(compiled, eight),
    }
    seconds = interleaved(calls, 9)
    note = f"{nbytes / seconds['one'] / 1e9:.1f} of {whole / seconds['read'] / 1e9:.1f} GB/s"
    yield Line(
        f"{name}, one row: share of bandwidth", target, (nbytes / seconds["one"]) / (whole / seconds["read"]), note
    )
    yield Line(f"{name}, eight rows: times one row", 2.0, seconds["eight"] / seconds["one"], at_most=True)


def prefill_line(name: str) -> Line:
    """512 rows."""
    model, linear = BlockProducts(name, 1).eval(), nn.Linear(K, N, bias=False)
    compiled, x = tilewright.compile(model), torch.randn(512, K)
    with torch.no_grad():
        seconds = interleaved({"ours": functools.partial(compiled, x), "torch": functools.partial(linear, x)}, 3)
    return Line(
        f"{name}, 512 rows: torch's fp32 linear / ours", 1.2, seconds["torch"] / seconds["ours"],
        f"{2 * 512 * N * K / seconds['ours'] / 1e9:.0f} G operations/s",
    )  # fmt: skip


def lines() -> Iterator[Line]:
    """All lines of this group."""
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            count = max(2, READ_BYTES // (N * K * dtype.itemsize))
            yield from lines_of(str(dtype).removeprefix("torch."), Linears(dtype, count), dtype, 0.95)
        for name, target in TARGETS.items():
            count = max(2, READ_BYTES // (N * FORMATS[name].row_bytes(K)))
            yield from lines_of(name, BlockProducts(name, count), torch.float32, target)
            yield prefill_line(name)
