"""The kernels of Triton's tutorials in our own words at small sizes, and the originals where their folder is given.

Layer norm and attention are in ``test_tutorials_backward``. The environment variable ``TRITON_TUTORIALS`` names a
folder like ``python/tutorials`` of Triton's repository.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

ORIGINALS = [
    "01-vector-add", "02-fused-softmax", "03-matrix-multiplication", "04-low-memory-dropout", "05-layer-norm",
    "06-fused-attention", "07-extern-functions", "08-grouped-gemm", "09-persistent-matmul", "10-block-scaled-matmul",
    "11-programmatic-dependent-launch",
]  # fmt: skip


if os.environ.get("TRITON_TUTORIALS"):

    @pytest.mark.parametrize("name", ORIGINALS)
    def test_originals(name: str, tmp_path: Path) -> None:
        runner = Path(__file__).with_name("run_tutorial.py")
        original = Path(os.environ["TRITON_TUTORIALS"]).resolve() / f"{name}.py"
        command = [sys.executable, str(runner), str(original)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=inside) + tl.load(y_ptr + i, mask=inside), mask=inside)


@pytest.mark.parametrize("n", [0, 1, 1000, 4099])
def test_vector_add(n: int) -> None:
    x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
    add_kernel[(triton.cdiv(n, 1024),)](x, y, out, n, BLOCK=1024)
    assert torch.equal(out, x + y)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, x_stride, out_stride, rows, columns, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    c = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        x = tl.load(x_ptr + row * x_stride + c, mask=c < columns, other=-float("inf"))
        e = tl.exp(x - tl.max(x, axis=0))
        tl.store(out_ptr + row * out_stride + c, e / tl.sum(e, axis=0), mask=c < columns)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (37, 781), (5, 1024)])
def test_softmax_by_programs_that_take_several_rows(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns + 3)[:, :columns] * 5
    out = torch.empty(rows, columns)
    block = triton.next_power_of_2(columns)
    driver = triton.runtime.driver.active
    compiled = softmax_kernel.warmup(
        x, out, x.stride(0), columns, rows, columns, BLOCK=block, STAGES=4, num_warps=8, grid=(1,)
    )
    compiled._init_handles()
    properties = driver.utils.get_device_properties(driver.get_current_device())
    # As tuning code reckons how many programs run at once.
    programs = properties["max_num_regs"] // (compiled.n_regs * properties["warpSize"] * 8)
    programs = min(programs, properties["max_shared_mem"] // compiled.metadata.shared, 4, rows)
    assert programs >= 1
    compiled[(programs, 1, 1)](x, out, x.stride(0), columns, rows, columns, block, 4)
    torch.testing.assert_close(out.double(), x.double().softmax(1), rtol=1e-5, atol=1e-7)


@triton.jit
def leaky(x):
    return tl.where(x >= 0, x, 0.01 * x)


@triton.autotune(
    configs=[
        triton.Config({"BM": 32, "BN": 32, "BK": 32, "GROUP": 2}, num_warps=2),
        triton.Config({"BM": 16, "BN": 64, "BK": 16, "GROUP": 8}, num_stages=4),
    ],
    key=["m", "n", "k"],
)
@triton.jit
def grouped_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, a_m, a_k, b_k, b_n, c_m, c_n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    wide = GROUP * tl.cdiv(n, BN)
    first = pid // wide * GROUP
    size = min(tl.cdiv(m, BM) - first, GROUP)
    pid_m, pid_n = first + pid % wide % size, pid % wide // size
    tl.assume(pid_m >= 0)
    rows = (pid_m * BM + tl.arange(0, BM)) % m
    columns = (pid_n * BN + tl.arange(0, BN)) % n
    inner = tl.arange(0, BK)
    a = a_ptr + rows[:, None] * a_m + inner[None, :] * a_k
    b = b_ptr + inner[:, None] * b_k + columns[None, :] * b_n
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(tl.cdiv(k, BK)):
        left = tl.load(a, mask=inner[None, :] < k - step * BK, other=0.0)
        right = tl.load(b, mask=inner[:, None] < k - step * BK, other=0.0)
        acc = tl.dot(left, right, acc)
        a += BK * a_k
        b += BK * b_k
    if ACTIVATION == "leaky":
        acc = leaky(acc)
    r, c = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    place = c_ptr + r[:, None] * c_m + c[None, :] * c_n
    tl.store(place, acc.to(c_ptr.dtype.element_ty), mask=(r[:, None] < m) & (c[None, :] < n))


@pytest.mark.parametrize(("m", "n", "k"), [(97, 130, 71), (16, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matmul_in_grouped_order(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).t()
    c = torch.empty(m, n, dtype=dtype)
    grid = lambda meta: (triton.cdiv(m, meta["BM"]) * triton.cdiv(n, meta["BN"]),)  # noqa: E731
    grouped_kernel[grid](a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(), ACTIVATION="leaky")
    expected = torch.nn.functional.leaky_relu(a.double() @ b.double(), 0.01)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(c.double(), expected, rtol=tolerance, atol=tolerance * k**0.5)


@triton.jit
def dropout_kernel(x_ptr, out_ptr, n, p, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    keep = tl.rand(seed, i) > p
    tl.store(out_ptr + i, tl.where(keep, x / (1 - p), 0.0), mask=i < n)


def test_dropout_depends_on_the_seed_and_not_on_the_block() -> None:
    n, p = 10_001, 0.3
    x = torch.randn(n)
    outs = []
    for seed, block in ((123, 1024), (123, 256), (512, 1024)):
        outs.append(torch.empty(n))
        dropout_kernel[(triton.cdiv(n, block),)](x, outs[-1], n, p, seed, BLOCK=block)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    kept = outs[0] != 0
    torch.testing.assert_close(outs[0][kept], x[kept] / (1 - p))
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5


@triton.jit
def asin_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, libdevice.asin(tl.load(x_ptr + i, mask=i < n)), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_libdevice(dtype: torch.dtype) -> None:
    x = torch.cat([torch.rand(997) * 2 - 1, torch.tensor([0.0, 1.0, -1.0, 1.5])]).to(dtype)
    out = torch.empty_like(x)
    asin_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), BLOCK=256, extern_libs={"libdevice": "any.bc"})
    tolerance = 4e-7 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(out.double(), x.double().asin(), rtol=tolerance, atol=0, equal_nan=True)


@triton.jit
def group_gemm_kernel(
    a_ptrs, b_ptrs, c_ptrs, sizes_ptr, strides_ptr, groups, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    done = 0
    for g in range(groups):
        m, n, k = tl.load(sizes_ptr + g * 3), tl.load(sizes_ptr + g * 3 + 1), tl.load(sizes_ptr + g * 3 + 2)
        tiles_n = tl.cdiv(n, BN)
        tiles = tl.cdiv(m, BM) * tiles_n
        while tile >= done and tile < done + tiles:
            a_row, b_row, c_row = tl.load(strides_ptr + g * 3), tl.load(strides_ptr + g * 3 + 1), n
            a_ptr = tl.load(a_ptrs + g).to(tl.pointer_type(tl.float16))
            b_ptr = tl.load(b_ptrs + g).to(tl.pointer_type(tl.float16))
            c_ptr = tl.load(c_ptrs + g).to(tl.pointer_type(tl.float16))
            rows = (tile - done) // tiles_n * BM + tl.arange(0, BM)
            columns = (tile - done) % tiles_n * BN + tl.arange(0, BN)
            inner = tl.arange(0, BK)
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for start in range(0, k, BK):
                at = start + inner
                a_mask = (rows[:, None] < m) & (at[None, :] < k)
                b_mask = (at[:, None] < k) & (columns[None, :] < n)
                a = tl.load(a_ptr + rows[:, None] * a_row + at[None, :], mask=a_mask, other=0.0)
                b = tl.load(b_ptr + at[:, None] * b_row + columns[None, :], mask=b_mask, other=0.0)
                acc += tl.dot(a, b)
            mask = (rows[:, None] < m) & (columns[None, :] < n)
            tl.store(c_ptr + rows[:, None] * c_row + columns[None, :], acc.to(tl.float16), mask=mask)
            tile += PROGRAMS
        done += tiles


def test_grouped_products_by_tensors_of_pointers() -> None:
    sizes = [(40, 33, 50), (16, 64, 16), (1, 7, 100)]
    a = [torch.randn(m, k).half() for m, _, k in sizes]
    b = [torch.randn(k, n).half() for _, n, k in sizes]
    c = [torch.empty(m, n).half() for m, n, _ in sizes]
    pointers = [torch.tensor([x.data_ptr() for x in each]) for each in (a, b, c)]
    strides = torch.tensor([[x.stride(0), y.stride(0), 0] for x, y in zip(a, b, strict=True)], dtype=torch.int32)
    sizes_tensor = torch.tensor(sizes, dtype=torch.int32)
    group_gemm_kernel[(4,)](*pointers, sizes_tensor, strides, 3, PROGRAMS=4, BM=16, BN=32, BK=32)
    for x, y, out in zip(a, b, c, strict=True):
        torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=2e-3, atol=2e-2)


@triton.jit
def tile_place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    first = tile // (GROUP * tiles_n) * GROUP
    size = min(tiles_m - first, GROUP)
    return first + tile % size, tile % (GROUP * tiles_n) // size


@triton.jit
def persistent_kernel(
    a_desc, b_ptr, c_ptr, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HALVES: tl.constexpr
):
    b_desc = tl.make_tensor_descriptor(b_ptr, [n, k], [k, 1], [BN, BK])
    c_desc = tl.make_tensor_descriptor(c_ptr, [m, n], [n, 1], [BM, BN // 2 if HALVES else BN])
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_place(tile, tiles_m, tiles_n, 8)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(tl.cdiv(k, BK)):
            a = a_desc.load([pid_m * BM, step * BK])
            acc = tl.dot(a, b_desc.load([pid_n * BN, step * BK]).T, acc)
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            c_desc.store([pid_m * BM, pid_n * BN], left.to(tl.float16))
            c_desc.store([pid_m * BM, pid_n * BN + BN // 2], right.to(tl.float16))
        else:
            c_desc.store([pid_m * BM, pid_n * BN], acc.to(tl.float16))


@pytest.mark.parametrize("halves", [False, True])
def test_persistent_matmul_by_descriptors(halves: bool) -> None:
    m, n, k = 70, 88, 72
    a, b, c = torch.randn(m, k).half(), torch.randn(n, k).half(), torch.full((m, n), 7.0).half()
    descriptor = TensorDescriptor.from_tensor(a, [32, 16])
    persistent_kernel[(3,)](descriptor, b, c, m, n, k, BM=32, BN=32, BK=16, HALVES=halves)
    torch.testing.assert_close(c.double(), a.double() @ b.double().t(), rtol=2e-3, atol=2e-2)


@triton.jit
def block_scaled_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(k // BK):
        inner, groups = step * BK + tl.arange(0, BK), step * (BK // 32) + tl.arange(0, BK // 32)
        a = tl.load(a_ptr + rows[:, None] * k + inner[None, :])
        b = tl.load(b_ptr + columns[None, :] * k + inner[:, None])
        a_scale = tl.load(a_scale_ptr + rows[:, None] * (k // 32) + groups[None, :])
        b_scale = tl.load(b_scale_ptr + columns[:, None] * (k // 32) + groups[None, :])
        acc = tl.dot_scaled(a, a_scale, "e4m3", b, b_scale, "e4m3", acc)
    tl.store(c_ptr + rows[:, None] * n + columns[None, :], acc)


def test_block_scaled_matmul() -> None:
    m, n, k = 64, 32, 256
    values = [torch.randn(rows, k).to(torch.float8_e4m3fn) for rows in (m, n)]
    scales = [torch.randint(120, 134, (rows, k // 32), dtype=torch.uint8) for rows in (m, n)]
    c = torch.empty(m, n)
    grid: Any = (m // 32, n // 16)
    block_scaled_kernel[grid](values[0], scales[0], values[1], scales[1], c, n, k, BM=32, BN=16, BK=64)
    a, b = (
        value.double() * (2.0 ** (scale.double() - 127)).repeat_interleave(32, 1)
        for value, scale in zip(values, scales, strict=True)
    )
    expected = a @ b.t()
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
