"""GEMM + bias + GELU (erf) as one Triton kernel each, against the vendor's library: ratios of one run, all threads.

[1305, 768] times a weight [3072, 768] transposed. Weights are read in panels laid out beforehand, as the project's own
programs do, or as they are; the last line is a matmul in the form of Triton's tutorial. The vendor makes new memory for
its result where it has no form that writes into existing memory.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from timing import Line, interleaved

import tilewright
from tilewright.codegen.cpu.microkernel import interleaved_group
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.runtime.weights import vendor_packs

M, N, K = 1305, 3072, 768
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "i8"}  # in the backend
F = torch.nn.functional


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def linear_gelu(
    x_ptr, w_ptr, bias_ptr, row_scale_ptr, scale_ptr, out_ptr, M, N, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """GROUP 0: the weight is [N, K]; else [N / BN, K / GROUP, BN, GROUP]. With scales where ACC is int32."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    panel = tl.program_id(1).to(tl.int64) * (K * BN)
    acc = tl.zeros([BM, BN], ACC)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        x = tl.load(x_ptr + rows[:, None] * K + ks[None, :], mask=rows[:, None] < M)
        if GROUP == 0:
            w = tl.load(w_ptr + cols[:, None] * K + ks[None, :]).T
        elif GROUP == 1:
            w = tl.load(w_ptr + panel + ks[:, None] * BN + tl.arange(0, BN)[None, :])
        else:
            groups = k // GROUP + tl.arange(0, BK // GROUP)
            place = (groups[:, None, None] * BN + tl.arange(0, BN)[None, :, None]) * GROUP
            w = tl.load(w_ptr + panel + place + tl.arange(0, GROUP)[None, None, :])
            w = w.permute(0, 2, 1).reshape(BK, BN)
        acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=ACC)
    if tl.int32 == ACC:
        row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
        y = acc.to(tl.float32) * row_scale[:, None] * tl.load(scale_ptr + cols)[None, :]
    else:
        y = acc
    y = gelu(y + tl.load(bias_ptr + cols).to(tl.float32)[None, :])
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], y, mask=rows[:, None] < M)


@triton.autotune([triton.Config({"BM": 128, "BN": 64, "BK": 64, "GROUP_M": 8})], key=["M", "N", "K"])
@triton.jit
def tutorial_gelu(
    a_ptr, b_ptr, bias_ptr, out_ptr, M, N, K, a_row, a_col, b_row, b_col, o_row, o_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    in_group = GROUP_M * blocks_n
    first = pid // in_group * GROUP_M
    size = min(blocks_m - first, GROUP_M)
    pid_m = first + (pid % in_group) % size
    pid_n = (pid % in_group) // size
    rows = (pid_m * BM + tl.arange(0, BM)) % M
    cols = (pid_n * BN + tl.arange(0, BN)) % N
    ks = tl.arange(0, BK)
    a = a_ptr + rows[:, None] * a_row + ks[None, :] * a_col
    b = b_ptr + ks[:, None] * b_row + cols[None, :] * b_col
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        x = tl.load(a, mask=ks[None, :] < K - k * BK, other=0.0)
        w = tl.load(b, mask=ks[:, None] < K - k * BK, other=0.0)
        acc = tl.dot(x, w, acc)
        a += BK * a_col
        b += BK * b_row
    cols = pid_n * BN + tl.arange(0, BN)
    y = gelu(acc + tl.load(bias_ptr + cols, mask=cols < N, other=0.0)[None, :])
    rows = pid_m * BM + tl.arange(0, BM)
    place = out_ptr + rows[:, None] * o_row + cols[None, :] * o_col
    tl.store(place, y, mask=(rows[:, None] < M) & (cols[None, :] < N))


# Rows, columns and step along K of a program's tile; packed and [N, K] weights. The latter are packed by each program
# again: tall tiles pay for it.
TILES = {
    torch.float32: ((32, 64, 256), (128, 64, 256)),
    torch.bfloat16: ((32, 256, 256), (256, 64, 256)),
    torch.int8: ((32, 256, 256), (256, 64, 256)),
}


def panels(weight: torch.Tensor, width: int, group: int) -> torch.Tensor:
    """[N, K] as [N / width, K / group, width, group]."""
    n, k = weight.shape
    return weight.view(n // width, width, k // group, group).transpose(1, 2).contiguous()


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight [N, K] and bias."""
    if dtype == torch.int8:
        x, weight = (torch.randint(-127, 128, (size, K), dtype=dtype) for size in (M, N))
        return x, weight, torch.randn(N)
    return torch.randn(M, K).to(dtype), (torch.randn(N, K) * K**-0.5).to(dtype), torch.randn(N).to(dtype)


def ours(dtype: torch.dtype, packed: bool, tile: tuple[int, int, int] | None = None) -> Callable[[], None]:
    """One of our kernels, checked against fp64."""
    x, weight, bias = operands(dtype)
    bm, bn, bk = tile or TILES[dtype][0 if packed else 1]
    group = interleaved_group(NAMES[dtype], CpuTarget.native()) if packed else 0
    row_scale, scale = torch.rand(M) * 1e-3, torch.rand(N) * 1e-3
    integer = dtype == torch.int8
    out = torch.empty(M, N, dtype=torch.float32 if integer else dtype)
    laid_out = panels(weight, bn, group) if packed else weight
    grid = (triton.cdiv(M, bm), triton.cdiv(N, bn))
    call = tilewright.prepare(
        linear_gelu, grid, x, laid_out, bias, row_scale, scale, out, M, N, K, BM=bm, BN=bn, BK=bk, GROUP=group,
        ACC=tl.int32 if integer else tl.float32,
    )  # fmt: skip
    call()
    exact = x.double() @ weight.double().T
    exact = exact * row_scale.double()[:, None] * scale.double() if integer else exact
    _check(out, F.gelu(exact + bias.double()), 1e-2 if dtype == torch.bfloat16 else 1e-5)
    return call


def _check(out: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


def vendor(dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """The vendor's ways to compute the same; for int8 the product alone."""
    x, weight, bias = operands(dtype)
    if dtype == torch.int8:
        out, turned = torch.empty(M, N, dtype=torch.int32), weight.T.contiguous()
        return {
            "nk": lambda: torch._int_mm(x, weight.T, out=out),
            "kn": lambda: torch._int_mm(x, turned, out=out),
        }
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight.default(weight)
    linear = ops._linear_pointwise.default
    return {
        "fused": lambda: linear(x, packed, bias, "gelu", [], "none"),
        "followed": lambda: F.gelu(linear(x, packed, bias, "none", [], "")),
    }


def _line(name: str, target: float, seconds: dict[str, float], key: str, peers: list[str]) -> Line:
    peer = min(peers, key=lambda peer: seconds[peer])
    rates = [2e-9 * M * N * K / seconds[name] for name in (key, peer)]
    return Line(name, target, seconds[peer] / seconds[key], f"{rates[0]:.0f} G/s against {rates[1]:.0f} ({peer})")


def lines() -> Iterator[Line]:
    """Speed of each kernel relative to the fastest of the vendor's forms."""
    for dtype in TILES:
        if dtype.is_floating_point and not vendor_packs(dtype):
            continue  # the vendor has no such product on this processor
        name = str(dtype).removeprefix("torch.")
        peers = vendor(dtype)
        contenders = {"packed": ours(dtype, True), "plain": ours(dtype, False)}
        seconds = interleaved({**contenders, **peers})
        against = "_int_mm" if dtype == torch.int8 else "prepacked linear"
        yield _line(f"{name}, packed weight, to {against}", 1.0, seconds, "packed", list(peers))
        yield _line(f"{name}, weight [N, K], to {against}", 0.9, seconds, "plain", list(peers))
    yield _tutorial_line()


def _tutorial_line() -> Line:
    x, weight, bias = operands(torch.float32)
    weight = weight.T.contiguous()
    out = torch.empty(M, N)
    grid = lambda meta: (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)  # noqa: E731
    call = tilewright.prepare(
        tutorial_gelu, grid, x, weight, bias, out, M, N, K, *x.stride(), *weight.stride(), *out.stride()
    )
    call()
    _check(out, F.gelu(x.double() @ weight.double() + bias), 1e-5)
    seconds = interleaved({"tutorial": call, "addmm": lambda: F.gelu(torch.addmm(bias, x, weight))})
    return _line("float32, the tutorial's form, to addmm and GELU", 1.2, seconds, "tutorial", ["addmm"])
