"""Tilewright as a backend of stock Triton: imports, choice of driver, launches, caches, Inductor."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import tilewright
from tilewright import settings
from tilewright.codegen.cpu.compiler import CpuBackend
from tilewright.codegen.cpu.driver import CpuDriver
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.errors import CacheError, InputError, UnsupportedOp


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    tl.store(out_ptr + index, tl.load(x_ptr + index, mask=mask) + tl.load(y_ptr + index, mask=mask), mask=mask)


@triton.jit
def scale_kernel(x_ptr, out_ptr, n, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    tl.store(out_ptr + index, tl.load(x_ptr + index, mask=mask) * factor, mask=mask)


@triton.jit
def grid_kernel(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    linear = x + tl.num_programs(0) * (y + tl.num_programs(1) * z)
    tl.store(out_ptr + linear, 10000 * z + 100 * y + x)


@triton.jit
def mixed_kernel(
    in_desc, out_desc, flag: tl.int1, half: tl.float16, brain: tl.bfloat16, pair, byte: tl.uint8, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    value = in_desc.load([row, column])
    if flag:
        value = value * half.to(tl.float32)
    out_desc.store([row, column], value + brain.to(tl.float32) + pair[1] + byte)


@pytest.fixture(autouse=True)
def triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "triton"))
    return tmp_path / "triton"


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("order", ["triton, tilewright", "tilewright, triton"])
def test_import_order_does_not_matter_and_imports_stay_light(order: str) -> None:
    code = f"""
import sys
import {order}
heavy = [name for name in ("torch", "llvmlite", "numpy", "transformers") if name in sys.modules]
print(sorted(triton.backends.backends), heavy)
"""
    assert run_python(code) == "['amd', 'cpu', 'nvidia'] []"


def test_bare_import_loads_neither_torch_nor_triton() -> None:
    assert run_python("import sys, tilewright; print('torch' in sys.modules, 'triton' in sys.modules)") == "False False"


def test_the_cpu_steps_back_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class ActiveGpu:
        @staticmethod
        def is_active() -> bool:
            return True

    assert CpuDriver.is_active()
    gpu = triton.backends.Backend(compiler=CpuBackend, driver=ActiveGpu)
    monkeypatch.setitem(triton.backends.backends, "gpu", gpu)
    assert not CpuDriver.is_active()
    with settings.scope(triton_backend="cpu"):
        assert CpuDriver.is_active()
    # Inductor constructs the driver of the backend named cpu even then.
    assert triton.backends.backends["cpu"].driver().get_current_target().backend == "cpu"


def test_driver_describes_the_cpu() -> None:
    driver = triton.runtime.driver.active
    assert isinstance(driver, CpuDriver)
    assert driver.get_active_torch_device() == torch.device("cpu")
    assert driver.get_current_target().arch == CpuTarget.native().key
    assert driver.map_python_to_cpp_type("*fp32") == "void*"
    assert driver.map_python_to_cpp_type("i64") == "int64_t"


@pytest.mark.parametrize("n", [1, 2, 1024, 4100])
def test_kernel_launch(n: int) -> None:
    x, y, out = torch.randn(n), torch.randn(n), torch.full((n + 4,), 3.0)
    add_kernel[(triton.cdiv(n, 1024),)](x, y, out, n, BLOCK=1024)
    assert torch.equal(out[:n], x + y)
    assert bool((out[n:] == 3.0).all())


def test_scalars_keywords_and_grid_function() -> None:
    x, out = torch.randn(300), torch.zeros(300)
    for factor in (0.5, -3.0, 1e-30):
        scale_kernel[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, out, n=300, factor=factor, BLOCK=64)
        assert torch.equal(out, x * torch.tensor(factor, dtype=torch.float32))


def test_grid_axes() -> None:
    out = torch.zeros(3 * 4 * 5, dtype=torch.int32)
    grid_kernel[(3, 4, 5)](out)
    z, y, x = torch.meshgrid(torch.arange(5), torch.arange(4), torch.arange(3), indexing="ij")
    assert torch.equal(out, (10000 * z + 100 * y + x).flatten().int())
    before = out.clone()
    grid_kernel[(3, 0, 5)](out.zero_())
    assert not out.any()
    with pytest.raises(InputError, match="grid_kernel"):
        grid_kernel[(-1,)](before)


@pytest.mark.parametrize("flag", [True, False])
def test_descriptors_tuples_and_typed_scalars(flag: bool) -> None:
    x, out = torch.randn(50, 44), torch.zeros(50, 44)
    descriptors = [TensorDescriptor.from_tensor(tensor, [16, 16]) for tensor in (x, out)]
    mixed_kernel[(4, 3)](*descriptors, flag, 0.5, 0.25, (3, 7), 200, BLOCK=16)
    torch.testing.assert_close(out, (x * 0.5 if flag else x) + 207.25)


def test_arguments_elsewhere_than_on_the_cpu_are_refused() -> None:
    with pytest.raises(InputError, match="meta"):
        add_kernel[(1,)](torch.empty(8, device="meta"), torch.empty(8), torch.empty(8), 8, BLOCK=64)


def test_hooks_run_around_a_launch() -> None:
    calls: list[str] = []
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    on_enter, on_leave = lambda metadata: calls.append("enter"), lambda metadata: calls.append("leave")
    enter.add(on_enter)
    leave.add(on_leave)
    try:
        add_kernel[(1,)](torch.randn(8), torch.randn(8), torch.empty(8), 8, BLOCK=64)
    finally:
        enter.remove(on_enter)
        leave.remove(on_leave)
    assert calls == ["enter", "leave"]


def test_launches_from_several_python_threads() -> None:
    inputs = [torch.randn(5000) for _ in range(4)]
    outputs = [torch.empty(5000) for _ in inputs]

    def work(x: torch.Tensor, out: torch.Tensor) -> None:
        for _ in range(20):
            add_kernel[(20,)](x, x, out, 5000, BLOCK=256)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, outputs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, out in zip(inputs, outputs, strict=True):
        assert torch.equal(out, x + x)


def test_prepared_kernel_repeats_the_launch_without_running_it_first() -> None:
    x, y, out = torch.randn(3000), torch.randn(3000), torch.zeros(3000)
    prepared = tilewright.prepare(add_kernel, (12,), x, y, out, 3000, BLOCK=256)
    assert not out.any()
    prepared()
    assert torch.equal(out, x + y)
    x.normal_()
    prepared()
    assert torch.equal(out, x + y)


def test_prepared_kernel_keeps_its_tensors_and_code() -> None:
    out = torch.zeros(100)
    expected = torch.arange(100.0)
    prepared = tilewright.prepare(scale_kernel, (2,), torch.arange(100.0), out, 100, 3.0, BLOCK=64)
    scale_kernel.device_caches.clear()
    gc.collect()
    # Whatever was freed too early is overwritten by these.
    fillers = [
        ctypes.create_string_buffer(b"\xff" * size, size) for size in (8, 16, 24, 32, 40, 48) for _ in range(500)
    ]
    tensors = [torch.full((100,), -1.0) for _ in range(50)]
    for _ in range(3):
        prepared()
        assert torch.equal(out, expected * 3.0)
    assert len(fillers) == 3000
    assert all(bool((tensor == -1.0).all()) for tensor in tensors)


def test_prepare_refuses_other_callables() -> None:
    with pytest.raises(InputError, match="not a Triton kernel"):
        tilewright.prepare(torch.add, (1,), torch.zeros(1), torch.zeros(1))


def test_autotune_and_heuristics() -> None:
    tuned = triton.autotune(
        configs=[triton.Config({"BLOCK": size}, num_warps=warps) for size, warps in ((64, 1), (512, 8))],
        key=["n"],
        do_bench=lambda call, quantiles: (call(), [1.0, 1.0, 1.0])[1],
    )(triton.jit(add_kernel.fn))
    x, y, out = torch.randn(999), torch.randn(999), torch.zeros(999)
    tuned[lambda meta: (triton.cdiv(999, meta["BLOCK"]),)](x, y, out, 999)
    assert torch.equal(out, x + y)
    prepared = tilewright.prepare(tuned, lambda meta: (triton.cdiv(999, meta["BLOCK"]),), x, y, out.zero_(), 999)
    prepared()
    assert torch.equal(out, x + y)
    heuristic = triton.heuristics({"BLOCK": lambda arguments: triton.next_power_of_2(arguments["n"])})(
        triton.jit(add_kernel.fn)
    )
    heuristic[(1,)](x, y, out.zero_(), 999)
    assert torch.equal(out, x + y)


def test_options_of_other_gpus_are_accepted() -> None:
    x = torch.randn(100)
    out = torch.empty_like(x)
    config = triton.Config({"BLOCK": 64, "waves_per_eu": 2, "matrix_instr_nonkdim": 16, "kpack": 2}, num_warps=4)
    triton.autotune([config], key=["n"])(scale_kernel)[(2,)](x, out, 100, 2.0)
    assert torch.equal(out, x * 2)


def test_do_bench_measures_milliseconds() -> None:
    x, out = torch.randn(64), torch.empty(64)
    best = triton.testing.do_bench(lambda: scale_kernel[(1,)](x, out, 64, 2.0, BLOCK=64), warmup=1, rep=2)
    assert 0 < best < 1e3


def test_a_second_process_reads_the_object_code_from_tritons_cache(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text("""
import sys, torch, triton, triton.language as tl
@triton.jit
def double_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index) * 2)
if len(sys.argv) > 1:
    sys.modules["tilewright.codegen.cpu.lower"] = None
x, out = torch.randn(64), torch.empty(64)
double_kernel[(1,)](x, out, BLOCK=64)
print(torch.equal(out, x * 2))
""")
    for arguments in ([], ["warm"]):
        result = subprocess.run(
            [sys.executable, str(tmp_path / "kernel.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        )
        assert result.stdout == "True\n", result.stderr


def test_altered_object_code_in_tritons_cache_is_never_run(triton_cache: Path) -> None:
    x, out = torch.randn(8), torch.empty(8)
    scale_kernel.device_caches.clear()
    scale_kernel[(1,)](x, out, 8, 2.0, BLOCK=8)
    (path,) = triton_cache.rglob("scale_kernel.obj")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    scale_kernel.device_caches.clear()
    with pytest.raises(CacheError, match="scale_kernel"):
        scale_kernel[(1,)](x, out, 8, 2.0, BLOCK=8)
    scale_kernel.device_caches.clear()


def test_options_are_hashable_and_keyed_by_the_target() -> None:
    backends = [
        CpuBackend(triton.backends.compiler.GPUTarget("cpu", CpuTarget.named(name).key, 1))
        for name in ("avx2", "avx512")
    ]
    options = [backend.parse_options({"num_warps": 8, "num_stages": None}) for backend in backends]
    assert len({option.hash() for option in options}) == 2
    assert len({backend.hash() for backend in backends}) == 2
    assert options[0] == backends[0].parse_options({"num_warps": 8})
    assert hash(options[0]) == hash(backends[0].parse_options({"num_warps": 8}))
    assert options[0].hash() != backends[0].parse_options({"num_warps": 4}).hash()
    named = [backends[0].parse_options({"extern_libs": libs}) for libs in ({"m": "libm.bc"}, [["m", "libm.bc"]])]
    assert named[0] == named[1]
    assert hash(named[0]) == hash(named[1])


def test_gluon_kernels_are_refused() -> None:
    backend = CpuBackend(triton.runtime.driver.active.get_current_target())
    with pytest.raises(UnsupportedOp, match="Gluon"):
        backend.add_stages({}, backend.parse_options({}), triton.backends.compiler.Language.GLUON)


def test_default_inductor_still_generates_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    # has_triton() is true on a CPU machine with this backend installed; Inductor's choice must not depend on it.
    from torch._inductor.async_compile import AsyncCompile
    from torch.utils._triton import has_triton

    sources: list[str] = []

    def note(self: AsyncCompile, argument_types: list[str], source: str, *rest: object) -> object:
        sources.append(source)
        return lambda *arguments: None

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", note)
    # vec_isa_ok spares Inductor's trial compilations of each vector instruction set.
    with torch._inductor.config.patch({"fx_graph_cache": False, "cpp.vec_isa_ok": True}):
        torch.compile(lambda x: (x.sin() + 1).sum(-1))(torch.randn(4, 8))
    assert has_triton()
    assert len(sources) == 1
    assert 'extern "C"' in sources[0]
    assert "triton" not in sources[0]
