"""Functions inside kernels: combine functions that branch, functions mapped over elements, tuples and aggregates."""

from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tilewright.codegen.cpu.lower.kernel import lower_module
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.errors import CodegenError, UnsupportedOp


@triton.jit
def larger_by_branch(a, b):
    if a > b:
        return a
    return b


@triton.jit(noinline=True)
def nearer_to_zero(a, b):
    if a * a > b * b:
        return b
    return a


@triton.jit
def combine_kernel(x_ptr, out_ptr, scan_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr, tl.reduce(x, 0, larger_by_branch))
    tl.store(out_ptr + 1, tl.reduce(x, 0, nearer_to_zero))
    tl.store(scan_ptr + i, tl.associative_scan(x, 0, larger_by_branch))


@pytest.mark.parametrize("size", [1, 4, 256])
def test_combine_functions_that_branch(size: int) -> None:
    x = torch.randn(size)
    out, scan = torch.empty(2), torch.empty(size)
    combine_kernel[(1,)](x, out, scan, BLOCK=size)
    assert out.tolist() == [x.max(), x[x.abs().argmin()]]
    assert torch.equal(scan, x.cummax(0).values)


@triton.jit
def ordered(a, b):
    if a > b:
        return a * 2, b
    return b, a


@triton.jit
def collatz(n, table):
    steps = 0
    while n > 1:
        n = tl.where(n % 2 == 0, n // 2, 3 * n + 1)
        steps += 1
    return steps, tl.load(table + steps % 4)


@triton.jit
def crossed(a0, a1, b0, b1):
    return a0 + b1, a1 * b0, a1 - a0, b0 - b1


@triton.jit
def map_kernel(x_ptr, n_ptr, table, out_ptr, steps_ptr, ROWS: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    size: tl.constexpr = ROWS * 4
    x = tl.load(x_ptr + i)
    y = tl.load(x_ptr + size + i)
    a, b = tl.map_elementwise(ordered, x, y)
    tl.store(out_ptr + i, a)
    tl.store(out_ptr + size + i, b)
    a, b = tl.map_elementwise(crossed, x, y, pack=2)
    tl.store(out_ptr + 2 * size + i, a)
    tl.store(out_ptr + 3 * size + i, b)
    steps, found = tl.map_elementwise(collatz, tl.load(n_ptr + i), table)
    tl.store(steps_ptr + i, steps)
    tl.store(steps_ptr + size + i, found)


def collatz_steps(n: int) -> int:
    steps = 0
    while n > 1:
        n, steps = (n // 2 if n % 2 == 0 else 3 * n + 1), steps + 1
    return steps


def test_functions_mapped_over_elements() -> None:
    x, n = torch.randn(2, 8, 4), torch.randint(1, 100, (8, 4), dtype=torch.int32)
    table = torch.arange(4, dtype=torch.int32) * 10
    out, found = torch.empty(4, 8, 4), torch.empty(2, 8, 4, dtype=torch.int32)
    map_kernel[(1,)](x, n, table, out, found, ROWS=8)
    a, b = x
    pairs_a, pairs_b = a.reshape(-1, 2).unbind(1), b.reshape(-1, 2).unbind(1)
    expected = [
        torch.where(a > b, a * 2, b),
        torch.where(a > b, b, a),
        torch.stack([pairs_a[0] + pairs_b[1], pairs_a[1] * pairs_b[0]], 1).reshape(8, 4),
        torch.stack([pairs_a[1] - pairs_a[0], pairs_b[0] - pairs_b[1]], 1).reshape(8, 4),
    ]
    torch.testing.assert_close(out, torch.stack(expected))
    steps = torch.tensor([collatz_steps(k) for k in n.flatten().tolist()]).reshape(8, 4)
    assert torch.equal(found.long(), torch.stack([steps, steps % 4 * 10]))


class Pair(NamedTuple):
    """Arguments that belong together."""

    x: Any
    scaled: Any


@tl.core._aggregate
class Extremes:
    """A running sum and maximum."""

    total: tl.tensor
    largest: tl.tensor

    @triton.constexpr_function
    def __init__(self, total, largest):
        self.total = total
        self.largest = largest

    @triton.jit
    def add(self, x):
        return Extremes(self.total + x, tl.maximum(self.largest, x))


@triton.jit
def structure_kernel(pair, out_ptr, rows, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    found = Extremes(tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], float("-inf"), tl.float32))
    for row in range(rows):
        y = tl.load(pair.scaled[0] + row * BLOCK + i) * pair.scaled[1]
        found = found.add(tl.load(pair.x + row * BLOCK + i) + y)
    tl.store(out_ptr + i, found.total)
    tl.store(out_ptr + BLOCK + i, found.largest)


def test_named_tuples_and_aggregates() -> None:
    x, y = torch.randn(2, 5, 32)
    out = torch.empty(2, 32)
    structure_kernel[(1,)](Pair(x, (y, 3)), out, 5, BLOCK=32)
    expected = x.double() + 3 * y.double()
    torch.testing.assert_close(
        out.double(), torch.stack([expected.sum(0), expected.max(0).values]), rtol=1e-5, atol=1e-5
    )


@triton.jit
def descriptor_kernel(source, target, out_ptr):
    x = source.load([1, -1])
    target.store([1, 3], x * 2)
    target.atomic_add([0, 0], x)
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :], x + source.shape[0] + source.strides[0])


def test_descriptors_made_on_the_host() -> None:
    x, y, out = torch.randn(6, 12), torch.zeros(6, 12), torch.empty(4, 8)
    descriptors = [TensorDescriptor(t, list(t.shape), list(t.stride()), [4, 8]) for t in (x, y)]
    descriptor_kernel[(1,)](*descriptors, out)
    block = torch.zeros(4, 8)
    block[:, 1:] = x[1:5, :7]
    expected = torch.zeros(6, 12)
    expected[1:5, 3:11] = block * 2
    expected[:4, :8] += block
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(out, block + 18)


@triton.jit
def lock_kernel(lock_ptr, count_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(count_ptr, tl.load(count_ptr) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


def test_a_lock_between_programs(two_threads: None) -> None:
    lock, count = torch.zeros(2, 1, dtype=torch.int32)
    lock_kernel[(500,)](lock, count)
    assert count.item() == 500


@triton.jit
def address_kernel(addresses, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for k in range(2):
        tl.store(out_ptr + k * BLOCK + i, tl.load(tl.load(addresses + k).to(tl.pointer_type(tl.float32)) + i))
    pointers = tl.load(addresses + tl.arange(0, 2)).to(tl.pointer_type(tl.float32))
    tile = tl.load(pointers[:, None] + i[None, :])
    tl.store(out_ptr + 2 * BLOCK + tl.arange(0, 2)[:, None] * BLOCK + i[None, :], tile)


def test_pointers_read_from_memory() -> None:
    tensors = torch.randn(16), torch.randn(16)
    out = torch.empty(4, 16)
    address_kernel[(1,)](torch.tensor([t.data_ptr() for t in tensors]), out, BLOCK=16)
    assert torch.equal(out, torch.stack([*tensors, *tensors]))


@triton.jit
def towards_zero_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty, fp_downcast_rounding="rtz"))


def edges(dtype: torch.dtype) -> Tensor:
    """Zeros, subnormals, numbers beyond the range, special values, and many others."""
    special = [0.0, -0.0, 1e30, -1e30, 1e-7, -1e-7, 6e-8, 3e-9, 65519.0, float("inf"), float("-inf"), float("nan")]
    return torch.cat([torch.tensor(special), torch.randn(116) * 100]).to(dtype)


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn])
def test_casts_round_towards_zero(source: torch.dtype, dtype: torch.dtype) -> None:
    x = edges(source)
    out = torch.empty(128, dtype=dtype)
    towards_zero_kernel[(1,)](x, out, BLOCK=128)
    got, want = out.double(), x.double()
    assert torch.equal(got.isnan(), want.isnan())
    number = want.isfinite()
    got, want = got[number], want[number]
    assert (got.abs() <= want.abs()).all()
    assert ((got.signbit() == want.signbit()) | (got == 0)).all()
    # The next number away from zero is too far.
    small = torch.uint8 if out.element_size() == 1 else torch.int16
    following = (out.view(small) + 1).view(dtype).double()[number]
    assert ((following.abs() > want.abs()) | ~following.isfinite() | (got == want)).all()


MALFORMED = """
module {
  tt.func public @k(%a: !tt.ptr<f32>) {
    %r = tt.make_range {end = 8 : i32} : tensor<8xi32> loc("user.py":7:1)
    %p = tt.splat %a : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>>
    %q = tt.addptr %p, %r : tensor<8x!tt.ptr<f32>>, tensor<8xi32>
    %x = tt.load %q : tensor<8x!tt.ptr<f32>>
    tt.store %q, %x : tensor<8x!tt.ptr<f32>> loc("user.py":8:1)
    tt.return
  }
}
"""


def test_what_goes_wrong_inside_the_lowering_names_kernel_and_line() -> None:
    with pytest.raises(CodegenError) as caught:
        lower_module(MALFORMED, CpuTarget.named("avx2"))
    assert all(text in str(caught.value) for text in ("tt.store", "node 'k'", "user.py:8", "KeyError"))


def test_a_line_that_cannot_be_read_is_named() -> None:
    text = MALFORMED.replace("tt.addptr %p, %r", "tt.addptr %p, %other")
    with pytest.raises(UnsupportedOp, match=r"tt\.addptr"):
        lower_module(text, CpuTarget.named("avx2"))
