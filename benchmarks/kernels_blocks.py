"""Products inside compiled programs over weights larger than the caches: block formats, int8, bf16 and fp32.

A program multiplies the same few rows with several matrices of [4096, 4096], one after another, together larger than
all caches. One row is a matter of reading: the figure is the share of the bandwidth of bare read loops over as much
memory, in large pages as the weights are (``codegen.cpu.read_loop``; the better of its two forms). Rows in block
formats are rounded to 8 bits as part of the program, except where they stay floating-point numbers. Eight rows are
given as a multiple of the time of one; fp32 and bf16 beside torch's linears, 512 rows beside its linear in fp32.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from kernels_matvec import Rotation
from timing import Line, interleaved
from torch import Tensor, nn

import tilewright
from tilewright.codegen.cpu.read_loop import STREAMS, read_loop
from tilewright.ops.blocks import FORMATS
from tilewright.runtime.pages import empty_bytes

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


class FloatRows(BlockProducts):
    """The same with rows that are not rounded."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        product, rows = torch.ops.tilewright.block_linear, x.reshape(x.shape[0], K // _ROUNDED, _ROUNDED).flatten(1)
        return tuple(product(rows, weight, None, self.form.name) for weight in self.buffers())


class Linears(nn.Module):
    """Some rows times several weights of floating-point numbers."""

    def __init__(self, dtype: torch.dtype, count: int, n: int = N) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(K, n, bias=False, dtype=dtype) for _ in range(count)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.linears)


def reading(nbytes: int) -> dict[str, Callable[[], Any]]:
    """Read loops over one after another of several pieces of memory in large pages, by form."""
    pieces = [empty_bytes(nbytes).fill_(1) for _ in range(max(2, READ_BYTES // nbytes))]
    return {f"read {streams}": Rotation([read_loop(piece, streams) for piece in pieces]) for streams in STREAMS}


def lines_of(
    name: str, model: nn.Module, rows: torch.dtype, target: float, nbytes: int, **options: Any
) -> Iterator[Line]:
    """One row against reading ``nbytes``, eight rows against one, and, for plain linears, torch against ours."""
    compiled = tilewright.compile(model.eval(), without=("merge_linears",), **options)
    one, eight = torch.randn(1, K, dtype=rows), torch.randn(8, K, dtype=rows)
    for x in (one, eight):
        for found, want in zip(compiled(x), model(x), strict=True):
            assert (found - want).norm() <= 0.02 * want.norm(), name
    calls: Mapping[str, Callable[[], Any]] = {
        **reading(nbytes),
        "one": functools.partial(compiled, one),
        "eight": functools.partial(compiled, eight),
        **({"torch": functools.partial(model, one)} if isinstance(model, Linears) and not options else {}),
    }
    seconds = interleaved(calls, 9)
    read = min(seconds[f"read {streams}"] for streams in STREAMS)
    forms = " and ".join(f"{nbytes / seconds[f'read {streams}'] / 1e9:.1f}" for streams in STREAMS)
    note = f"{nbytes / seconds['one'] / 1e9:.1f} GB/s; bare loops {forms}"
    yield Line(f"{name}, one row: share of bandwidth", target, read / seconds["one"], note)
    yield Line(f"{name}, eight rows: times one row", 2.0, seconds["eight"] / seconds["one"], at_most=True)
    if "torch" in seconds:
        yield Line(f"{name}, one row: torch / ours", None, seconds["torch"] / seconds["one"])


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
            nbytes = count * N * K * dtype.itemsize
            yield from lines_of(str(dtype).removeprefix("torch."), Linears(dtype, count), dtype, 0.95, nbytes)
        count = READ_BYTES // (N * K)
        whole = Linears(torch.float32, count)
        yield from lines_of("int8 per channel", whole, torch.float32, 0.85, count * N * K, dtype="int8")
        for name, target in TARGETS.items():
            nbytes = N * FORMATS[name].row_bytes(K)
            count = max(2, READ_BYTES // nbytes)
            yield from lines_of(name, BlockProducts(name, count), torch.float32, target, count * nbytes)
            yield prefill_line(name)
        for name in ("Q8_0", "Q4_K", "Q6_K"):
            nbytes = N * FORMATS[name].row_bytes(K)
            count = max(2, READ_BYTES // nbytes)
            title = f"{name}, rows in fp32"
            yield from lines_of(title, FloatRows(name, count), torch.float32, 1 / 3, count * nbytes)
