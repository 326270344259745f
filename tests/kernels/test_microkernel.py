"""Dot micro-kernels, compiled with llvmlite and called by ctypes, against products in higher precision."""

import ctypes
import dataclasses
from collections.abc import Callable

import pytest
import torch
from llvmlite import binding as llvm

from tilewright.codegen.cpu.microkernel import TileDot, interleaved_group, packed_form, tile_dot
from tilewright.codegen.cpu.microkernel_amx import RELEASE, tile_shape
from tilewright.codegen.cpu.microkernel_pack import PackB, pack_b_text
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.errors import CodegenError

Shape = tuple[int, int, int]

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
}
_NATIVE = CpuTarget.native()
X86_TARGETS = [
    name
    for name, runs in {
        "avx2": _NATIVE.vector_bits >= 256,
        "avx512": _NATIVE.bf16_dot and _NATIVE.int8_dot,
        "amx": _NATIVE.amx,
    }.items()
    if runs
]
_KEPT: list[llvm.ExecutionEngine] = []  # machine code lives as long as its engine


def _machine(target: CpuTarget) -> llvm.TargetMachine:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    found = llvm.Target.from_triple(target.triple)
    return found.create_target_machine(cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="small")


def optimized(text: str, target: CpuTarget) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    machine = _machine(target)
    module = llvm.parse_assembly(f'target triple = "{target.triple}"\n{text}')
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module, machine


def compiled(text: str, symbol: str, arguments: list[type], target: CpuTarget) -> Callable[..., None]:
    module, machine = optimized(text.replace("define internal", "define"), target)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _KEPT.append(engine)
    return ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address(symbol))


def multiply(
    spec: TileDot, target: CpuTarget, acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rows: int | None = None
) -> None:
    text = tile_dot(spec, target)
    shape = spec.tile_shape(target)
    symbol = spec.symbol
    if shape is not None:
        symbol = "on_tiles"
        text += f"""{shape.definition()}
        define void @{symbol}(ptr %acc, ptr %a, i64 %a_stride, ptr %b, i64 %b_stride, i64 %rows) {{
          {shape.load_shape()}
          call void @{spec.symbol}(ptr %acc, ptr %a, i64 %a_stride, ptr %b, i64 %b_stride{", i64 %rows" * spec.ragged})
          {RELEASE}
          ret void
        }}"""
    function = compiled(text, symbol, [_POINTER, _POINTER, _INT, _POINTER, _INT, _INT], target)
    function(acc.data_ptr(), a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), rows or 0)


def pack(spec: PackB, target: CpuTarget, source: torch.Tensor) -> torch.Tensor:
    """The packed tile, [k / group, n * group]."""
    group = 4 // _DTYPES[spec.packed_dtype].itemsize if spec.packed_layout == "vnni" else 1
    packed = torch.zeros(spec.k // group, spec.n * group, dtype=_DTYPES[spec.packed_dtype])
    function = compiled(pack_b_text(spec, target), spec.symbol, [_POINTER, _POINTER, _INT], target)
    function(packed.data_ptr(), source.data_ptr(), source.stride(0))
    return packed


def aligned(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Random accumulator, aligned to 64 bytes as the micro-kernels expect."""
    raw = torch.zeros(m * n * dtype.itemsize + 64, dtype=torch.uint8)
    start = -raw.data_ptr() % 64
    acc = raw[start : start + m * n * dtype.itemsize].view(dtype).view(m, n)
    return acc.copy_(tile(m, n, dtype))


def tile(rows: int, columns: int, dtype: torch.dtype, extra: int = 0) -> torch.Tensor:
    """Random tile inside rows that are ``extra`` longer; integers of the whole range, both ends included."""
    if dtype.is_floating_point:
        return torch.randn(rows, columns + extra, dtype=torch.float64).to(dtype)[:, :columns]
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    values = torch.randint(low, high + 1, (rows, columns + extra)).to(dtype)
    values[torch.rand(values.shape) < 0.1] = low
    return values[:, :columns]


def check(
    shape: Shape, dtype: str, target: CpuTarget, source_layout: str, a_layout: str = "mk", zero_init: bool = False
):
    """Packs B as the target wants it, multiplies, and compares with fp64 (floats) or i64 modulo 2**32 (integers)."""
    m, n, k = shape
    kind = _DTYPES[dtype]
    acc_dtype = {"f64": "f64", "i8": "i32"}.get(dtype, "f32")
    a = tile(m, k, kind, 3) if a_layout == "mk" else tile(k, m, kind, 3)
    b = tile(k, n, kind, 5) if source_layout == "kn" else tile(n, k, kind, 5)
    acc = aligned(m, n, _DTYPES[acc_dtype])
    before = torch.zeros_like(acc) if zero_init else acc.clone()
    form = packed_form(dtype, k, target)
    packed = b
    if source_layout == "nk" or form != (dtype, "kn"):
        packed = pack(PackB(k, n, dtype, source_layout, *form), target, b)
    multiply(TileDot(m, n, k, dtype, form[0], acc_dtype, form[1], a_layout, zero_init), target, acc, a, packed)

    wide = torch.float64 if kind.is_floating_point else torch.int64
    left = (a if a_layout == "mk" else a.T).to(wide)
    right = (b if source_layout == "kn" else b.T).to(wide)
    exact = before.to(wide) + left @ right
    if wide is torch.int64:
        assert torch.equal(acc, exact.to(torch.int32))
        return
    bound = before.abs().to(wide) + left.abs() @ right.abs()
    unit = 2.0**-53 if dtype == "f64" else 2.0**-24
    assert ((acc.to(wide) - exact).abs() <= (k + 1) * unit * bound).all()


@pytest.mark.parametrize(
    "shape",
    [(64, 64, 64), (1, 1, 1), (7, 37, 5), (20, 8, 6), (3, 128, 16), (2, 300, 4), (16, 1, 16), (32, 32, 8), (13, 17, 8)],
)
@pytest.mark.parametrize("a_layout", ["mk", "km"])
@pytest.mark.parametrize("zero_init", [False, True])
def test_f32_in_place(shape, a_layout, zero_init):
    check(shape, "f32", CpuTarget.native(), "kn", a_layout, zero_init)


@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16", "i8"])
@pytest.mark.parametrize("source_layout", ["kn", "nk"])
@pytest.mark.parametrize("a_layout", ["mk", "km"])
@pytest.mark.parametrize("shape", [(32, 64, 64), (48, 16, 192), (8, 8, 8), (5, 27, 12), (9, 20, 3)])
@pytest.mark.parametrize("target", X86_TARGETS)
def test_every_dtype_layout_and_target(dtype, source_layout, a_layout, shape, target):
    check(shape, dtype, CpuTarget.named(target), source_layout, a_layout)


@pytest.mark.parametrize("target", X86_TARGETS)
def test_int8_is_exact_where_products_are_largest(target):
    named = CpuTarget.named(target)
    m, n, k = 4, 32, 256
    a, b = torch.full((m, k), -128, dtype=torch.int8), torch.full((k, n), -128, dtype=torch.int8)
    form = packed_form("i8", k, named)
    packed = pack(PackB(k, n, "i8", "kn", *form), named, b)
    acc = aligned(m, n, torch.int32)
    multiply(TileDot(m, n, k, "i8", form[0], "i32", form[1], zero_init=True), named, acc, a, packed)
    assert (acc == 128 * 128 * k).all()


@pytest.mark.parametrize("target", X86_TARGETS)
@pytest.mark.parametrize("shape", [(32, 64, 64), (5, 20, 12), (7, 3, 8), (1, 1, 4)])
@pytest.mark.parametrize("value", [None, -128])
def test_bytes_read_in_the_layout_of_the_target(target, shape, value):
    """B as weights are laid out at load time: groups of k interleaved, still in bytes."""
    named = CpuTarget.named(target)
    m, n, k = shape
    group = interleaved_group("i8", named)
    a, b = (
        tile(*size, torch.int8, 3) if value is None else torch.full(size, value, dtype=torch.int8)
        for size in ((m, k), (k, n))
    )
    laid_out = b.reshape(k // group, group, n).transpose(1, 2).contiguous().view(k // group, n * group)
    acc = aligned(m, n, torch.int32)
    multiply(TileDot(m, n, k, "i8", "i8", "i32", "vnni", zero_init=True), named, acc, a, laid_out)
    assert torch.equal(acc, (a.long() @ b.long()).to(torch.int32))


@pytest.mark.parametrize("dtype", ["f16", "bf16", "i8"])
def test_unpacked_narrow_b_is_widened_when_loaded(dtype):
    m, n, k = 6, 40, 10
    a, b = tile(m, k, _DTYPES[dtype], 1), tile(k, n, _DTYPES[dtype], 1)
    acc_dtype = "i32" if dtype == "i8" else "f32"
    acc = aligned(m, n, _DTYPES[acc_dtype])
    multiply(TileDot(m, n, k, dtype, dtype, acc_dtype, zero_init=True), CpuTarget.native(), acc, a, b)
    torch.testing.assert_close(acc.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


def test_a_stride_of_zero_repeats_one_row():
    a, b, acc = tile(1, 32, torch.float32), tile(32, 16, torch.float32), aligned(8, 16, torch.float32)
    multiply(TileDot(8, 16, 32, zero_init=True), CpuTarget.native(), acc, a.expand(8, 32), b)
    torch.testing.assert_close(acc, (a @ b).expand(8, 16))


@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16", "i8"])
@pytest.mark.parametrize("target", ["neon", "avx2", "avx512", "amx"])
def test_text_compiles_for_every_target_without_calls(dtype, target):
    named = CpuTarget.named(target)
    form = packed_form(dtype, 16, named)
    spec = TileDot(16, 24, 16, dtype, form[0], {"f64": "f64", "i8": "i32"}.get(dtype, "f32"), form[1])
    packing = PackB(16, 24, dtype, "nk", *form)
    text = tile_dot(spec, named) + pack_b_text(packing, named)
    module, machine = optimized(text.replace("define internal", "define"), named)
    assembly = machine.emit_assembly(module)
    calls = [line for line in assembly.splitlines() if line.split()[:1] in (["call"], ["callq"], ["bl"])]
    assert not calls


def test_wide_tiles_keep_their_accumulators_in_registers():
    for dtype, instruction in (("f32", "vfmadd231ps"), ("bf16", "vdpbf16ps"), ("i8", "vpdpbusd")):
        named = CpuTarget.named("avx512")
        form = packed_form(dtype, 64, named)
        spec = TileDot(64, 64, 64, dtype, form[0], "i32" if dtype == "i8" else "f32", form[1])
        module, machine = optimized(tile_dot(spec, named).replace("define internal", "define"), named)
        assembly = machine.emit_assembly(module)
        assert assembly.count(instruction) >= 64
        assert not [line for line in assembly.splitlines() if "zmm" in line and ("(%rsp)" in line or "(%rbp)" in line)]


def test_tile_registers_are_used_where_all_tiles_have_one_shape():
    amx, avx512 = CpuTarget.named("amx"), CpuTarget.named("avx512")
    assert tile_shape(64, 64, 64, "bf16", avx512) is None
    assert tile_shape(64, 64, 64, "f32", amx) is None
    assert tile_shape(24, 64, 64, "bf16", amx) is None
    for dtype, k, k_bytes in (("bf16", 64, 64), ("bf16", 16, 32), ("i8", 64, 64), ("i8", 32, 32)):
        shape = tile_shape(64, 8, k, dtype, amx)
        assert (shape.m, shape.n, shape.k_bytes) == (16, 8, k_bytes)
    spec = TileDot(32, 32, 32, "bf16", "bf16", "f32", "vnni")
    module, machine = optimized(tile_dot(spec, amx).replace("define internal", "define"), amx)
    assert machine.emit_assembly(module).count("tdpbf16ps") == 4


@pytest.mark.parametrize("target", X86_TARGETS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8"])
@pytest.mark.parametrize("b", ["", "apart", "ahead"])
@pytest.mark.parametrize("m", [32, 96])
def test_ragged_products_have_the_wanted_rows(target, dtype, b, m):
    named = CpuTarget.named(target)
    n, k = 64, 64
    form = packed_form(dtype, k, named)
    kinds = _DTYPES[dtype], _DTYPES["i32" if dtype == "i8" else "f32"]
    for rows in (1, 8, m // 3 + 1, m - m // 3, m):
        a, right, acc = tile(m, k, kinds[0]), tile(k, n, kinds[0]), aligned(m, n, kinds[1])
        if dtype == "i8":
            acc >>= 8  # no sum wraps round
        before = acc.clone()
        packed = pack(PackB(k, n, dtype, "kn", *form), named, right)
        spec = TileDot(m, n, k, dtype, form[0], "i32" if dtype == "i8" else "f32", form[1], ragged=True)
        spec = dataclasses.replace(spec, b_apart=b == "apart" and form[1] == "kn", b_ahead=b == "ahead")
        multiply(spec, named, acc, a, packed, rows)
        exact = (before.double() + a.double() @ right.double())[:rows]
        assert acc[-1].equal(before[-1]) or rows == m or m % 6  # a rest that fills no block is computed always
        torch.testing.assert_close(acc[:rows].double(), exact, rtol=1e-5, atol=1e-3)


def test_what_the_target_cannot_multiply_is_refused():
    bf16 = TileDot(16, 16, 16, "bf16", "bf16", "f32", "vnni")
    with pytest.raises(CodegenError, match="no dot micro-kernel"):
        tile_dot(bf16, CpuTarget.named("avx2"))
    with pytest.raises(CodegenError, match="k = 3"):
        tile_dot(TileDot(16, 16, 3, "bf16", "bf16", "f32", "vnni"), CpuTarget.named("avx512"))
    with pytest.raises(CodegenError, match="multiple of 2"):
        pack_b_text(PackB(3, 16, "bf16", "nk", "bf16", "vnni"), CpuTarget.named("avx512"))
