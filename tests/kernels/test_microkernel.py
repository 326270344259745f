"""Dot micro-kernels, compiled with llvmlite and called by ctypes, against products in higher precision."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from llvmlite import binding as llvm

from tilewright.codegen.cpu.microkernel import TileDot, tile_dot
from tilewright.codegen.cpu.target import CpuTarget

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
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


def call(spec: TileDot, target: CpuTarget, acc: np.ndarray, a: np.ndarray, a_stride: int, b: np.ndarray, b_stride: int):
    function = compiled(tile_dot(spec, target), spec.symbol, [_POINTER, _POINTER, _INT, _POINTER, _INT], target)
    function(acc.ctypes.data, a.ctypes.data, a_stride, b.ctypes.data, b_stride)


def aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(64, 64, 64), (1, 1, 1), (7, 37, 5), (20, 8, 6), (3, 128, 16)])
@pytest.mark.parametrize("a_layout", ["mk", "km"])
@pytest.mark.parametrize("zero_init", [False, True])
def test_f32_product_is_within_rounding_of_fp64(shape, a_layout, zero_init):
    m, n, k = shape
    rng = np.random.default_rng()
    wide_a = rng.standard_normal((m, k + 3) if a_layout == "mk" else (k, m + 3)).astype(np.float32)
    wide_b = rng.standard_normal((k, n + 5)).astype(np.float32)
    a = wide_a[:, :k] if a_layout == "mk" else wide_a[:, :m].T
    acc = aligned((m, n), np.float32)
    acc[:] = rng.standard_normal((m, n))
    before = np.zeros_like(acc) if zero_init else acc.copy()
    spec = TileDot(m, n, k, a_layout=a_layout, zero_init=zero_init)
    call(spec, CpuTarget.native(), acc, wide_a, wide_a.shape[1], wide_b, n + 5)
    b = wide_b[:, :n]
    exact = before.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
    bound = np.abs(before) + np.abs(a).astype(np.float64) @ np.abs(b)
    assert np.all(np.abs(acc - exact) <= (k + 1) * 2.0**-24 * bound)
