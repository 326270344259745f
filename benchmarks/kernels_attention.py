"""Variable-length flash attention on packed tokens against torch's attention on the padded batch.

The kernel is an ordinary Triton kernel: one program for each (block of queries, head, sequence), keys and values block
by block, online softmax to base 2. torch gets what a padded model gives it: [B, H, S, D] and a mask of the keys. At
equal lengths it gets no mask, and both do the same operations.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from timing import Line, interleaved

import tilewright

LENGTHS = (512, 384, 256, 200, 128, 100, 60, 33)
EQUAL = (256,) * 8
HEADS, SIZE = 12, 64
BLOCK_M, BLOCK_N = 64, 64
LOG2_E = 1.4426950408889634


@triton.jit
def attention_varlen(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_seqlens_ptr,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1)
    first = tl.load(cu_seqlens_ptr + tl.program_id(2))
    last = tl.load(cu_seqlens_ptr + tl.program_id(2) + 1)
    length = last - first
    top = tl.program_id(0) * BLOCK_M
    if top >= length:
        return
    rows = top + tl.arange(0, BLOCK_M)
    d = tl.arange(0, SIZE)
    at = first * HEADS * SIZE + head * SIZE
    row_offsets = rows[:, None] * HEADS * SIZE + d[None, :]
    row_mask = rows[:, None] < length
    q = tl.load(q_ptr + at + row_offsets, mask=row_mask, other=0.0)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, SIZE], tl.float32)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + at + keys[None, :] * HEADS * SIZE + d[:, None], mask=keys[None, :] < length, other=0.0)
        scores = tl.dot(q, k) * scale
        scores = tl.where(keys[None, :] < length, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        v = tl.load(v_ptr + at + keys[:, None] * HEADS * SIZE + d[None, :], mask=keys[:, None] < length, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc)
        peak = new_peak
    acc = acc / total[:, None]
    tl.store(out_ptr + at + row_offsets, acc.to(out_ptr.dtype.element_ty), mask=row_mask)


class Batch:
    """Random packed queries, keys and values [T, H, D] of one list of lengths, and their padded forms."""

    def __init__(self, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.lengths = lengths
        self.packed = [torch.randn(sum(lengths), HEADS, SIZE).to(dtype) for _ in range(3)]
        self.out = torch.empty_like(self.packed[0])
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        self.mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
        self.padded = [self._pad(tensor) for tensor in self.packed]

    def _pad(self, packed: torch.Tensor) -> torch.Tensor:
        padded = packed.new_zeros(len(self.lengths), max(self.lengths), HEADS, SIZE)
        padded[self.mask] = packed
        return padded.transpose(1, 2).contiguous()

    @property
    def operations(self) -> float:
        """Multiplications and additions of both products over real tokens."""
        return sum(4.0 * length * length for length in self.lengths) * HEADS * SIZE

    def kernel(self) -> Callable[[], Any]:
        """The packed kernel, prepared."""
        grid, arguments, sizes = self.launch()
        return tilewright.prepare(attention_varlen, grid, *arguments, **sizes)

    def launch(self) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, int]]:
        """Grid, arguments and constants of the kernel."""
        grid = (triton.cdiv(max(self.lengths), BLOCK_M), HEADS, len(self.lengths))
        sizes = {"HEADS": HEADS, "SIZE": SIZE, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
        return grid, (*self.packed, self.out, self.cu_seqlens, SIZE**-0.5 * LOG2_E), sizes

    def sdpa(self) -> Callable[[], Any]:
        """torch's attention on the padded batch, with a mask where the lengths differ."""
        mask = None if len(set(self.lengths)) == 1 else self.mask[:, None, None, :]
        return lambda: torch.nn.functional.scaled_dot_product_attention(*self.padded, attn_mask=mask)

    def error(self) -> float:
        """Largest error of the kernel's last result against torch in fp64."""
        q, k, v = (tensor.double() for tensor in self.padded)
        mask = self.mask[:, None, None, :]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return float((self.out.double() - expected[self.mask]).abs().max())


def lines() -> Iterator[Line]:
    """Ragged and equal lengths in fp32, and bf16 against our own fp32."""
    ragged, equal = Batch(LENGTHS, torch.float32), Batch(EQUAL, torch.float32)
    brain = Batch(LENGTHS, torch.bfloat16)
    calls = {"ragged": ragged.kernel(), "padded": ragged.sdpa(), "bf16": brain.kernel(), "padded bf16": brain.sdpa()}
    times = interleaved(calls)
    rate = {name: batch.operations / times[name] / 1e9 for name, batch in (("ragged", ragged), ("bf16", brain))}
    name = f"varlen attention, {HEADS} heads of {SIZE}, lengths {', '.join(map(str, LENGTHS))}"
    note = f"{times['ragged'] * 1e3:.2f} ms, {rate['ragged']:.0f} GFLOP/s, error {ragged.error():.1e}"
    yield Line(f"{name}: fp32 against padded SDPA", 4.0, times["padded"] / times["ragged"], note)
    note = f"{times['bf16'] * 1e3:.2f} ms, {rate['bf16']:.0f} GFLOP/s, error {brain.error():.1e}; "
    note += f"padded SDPA in bf16 takes {times['padded bf16'] / times['bf16']:.1f} times as long"
    yield Line("the same: bf16 against our own fp32", 1.7, times["ragged"] / times["bf16"], note)
    times = interleaved({"ours": equal.kernel(), "sdpa": equal.sdpa()})
    note = f"{equal.operations / times['ours'] / 1e9:.0f} GFLOP/s, error {equal.error():.1e}"
    yield Line(f"{len(EQUAL)} sequences of {EQUAL[0]}: fp32 against SDPA", 1.2, times["sdpa"] / times["ours"], note)
