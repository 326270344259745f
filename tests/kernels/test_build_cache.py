"""Kernels built from source text: what is kept on disk, and when it is not used."""

import ctypes
import dataclasses
import gc
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from triton.runtime import cache as triton_cache

from tilewright import settings
from tilewright.codegen.cpu import build as build_module
from tilewright.codegen.cpu import front_end_key, launch, store
from tilewright.codegen.cpu.build import build, kernel_key
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.errors import CacheError, CodegenError
from tilewright.ir.kernels import BuiltKernel, KernelSource

TEXT = '''"""Adds two vectors."""
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    tl.store(out_ptr + index, tl.load(x_ptr + index, mask=mask) + tl.load(y_ptr + index, mask=mask), mask=mask)
'''
SIGNATURE = (("x_ptr", "*fp32:16"), ("y_ptr", "*fp32"), ("out_ptr", "*fp32"), ("n", "i32"))
ADD = KernelSource("add", TEXT, "add_kernel", SIGNATURE, (("BLOCK", 1024),))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[Path]:
    """A cache directory of the test's own, and a process that has loaded nothing. Kernels get their slots by hand."""
    with settings.scope(cache_dir=tmp_path / "cache", check=False):
        yield tmp_path / "cache"
    gc.collect()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were compiled, in order."""
    names: list[str] = []
    original = build_module._compile

    def compile_and_note(source: KernelSource, target: CpuTarget) -> bytes:
        names.append(source.name)
        return original(source, target)

    monkeypatch.setattr(build_module, "_compile", compile_and_note)
    return names


def check_adds(kernel: BuiltKernel) -> None:
    """Runs the kernel on fresh inputs of a size that is no multiple of the block."""
    n = 2500
    x, y, out = torch.randn(n), torch.randn(n), torch.full((n + 8,), 7.0)
    slots = (ctypes.c_int64 * 4)(x.data_ptr(), y.data_ptr(), out.data_ptr(), n)
    launch.launcher().run_kernel(kernel.address, ctypes.addressof(slots), 3, 1, 1, 2)
    assert torch.equal(out[:n], x + y)
    assert bool((out[n:] == 7.0).all())


def entry_path(source: KernelSource) -> Path:
    return store._path(kernel_key(source, CpuTarget.native()))


def test_builds_without_tensors_and_shares_code(compilations: list[str]) -> None:
    kernel = build(ADD)
    assert kernel.params == ("x_ptr", "y_ptr", "out_ptr", "n")
    check_adds(kernel)
    assert build(ADD).address == kernel.address
    assert compilations == ["add"]


def test_code_is_unloaded_with_its_last_user(compilations: list[str]) -> None:
    kernel = build(ADD)
    key = kernel_key(ADD, CpuTarget.native())
    assert key in build_module._loaded
    del kernel
    gc.collect()
    assert key not in build_module._loaded
    check_adds(build(ADD))
    assert compilations == ["add"]


@pytest.mark.parametrize("damage", ["empty", "cut in the header", "cut in the code", "one bit", "header bit", "longer"])
def test_a_damaged_entry_is_rebuilt(damage: str, compilations: list[str]) -> None:
    del_first = build(ADD)
    del del_first
    gc.collect()
    path = entry_path(ADD)
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 16]) + good[middle + 1 :]
    path.write_bytes({
        "empty": b"",
        "cut in the header": good[:30],
        "cut in the code": good[:-100],
        "one bit": flipped,
        "header bit": bytes([good[0] ^ 1]) + good[1:],
        "longer": good + b"\0",
    }[damage])  # fmt: skip
    check_adds(build(ADD))
    assert compilations == ["add", "add"]
    assert path.read_bytes()[:20] == good[:20]
    store.unseal(path.read_bytes(), where="test")


WARM = f"""
import ctypes, sys
sys.path[:0] = {sys.path!r}
from tilewright.codegen.cpu import jit, launch
from tilewright.codegen.cpu.build import build
from tilewright.ir.kernels import KernelSource
"""


def run_python(body: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "TILEWRIGHT_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", WARM + body]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_warm_process_uses_neither_triton_nor_the_optimizer(cache: Path) -> None:
    build(ADD)
    launch.launcher()
    process = run_python(
        f"""
sys.modules["triton"] = None
sys.modules["tilewright.codegen.cpu.lower"] = None
def refuse(*args, **kwargs):
    raise AssertionError("compiled in a warm process")
jit.compile_ir = refuse
kernel = build({ADD!r})
import numpy
x, y, out = (numpy.arange(2500, dtype="float32") for _ in range(3))
slots = (ctypes.c_int64 * 4)(x.ctypes.data, y.ctypes.data, out.ctypes.data, 2500)
ABI = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *(ctypes.c_int32,) * 3, *(ctypes.c_int64,) * 2)
ABI(kernel.address)(ctypes.addressof(slots), 3, 1, 1, 0, 3)
print((out == x + y).all(), "torch" in sys.modules)
""",
        cache,
    )
    output, errors = process.communicate(timeout=60)
    assert output == "True False\n", errors


def test_processes_that_build_at_once_all_get_the_kernel(cache: Path) -> None:
    body = f"""
import torch
kernel = build({ADD!r})
x, y, out = torch.randn(2500), torch.randn(2500), torch.zeros(2500)
slots = (ctypes.c_int64 * 4)(x.data_ptr(), y.data_ptr(), out.data_ptr(), 2500)
launch.launcher().run_kernel(kernel.address, ctypes.addressof(slots), 3, 1, 1, 2)
print(torch.equal(out, x + y))
"""
    processes = [run_python(body, cache) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert output == "True\n", errors
    assert not list(cache.rglob("*.tmp"))


def test_threads_that_build_at_once_compile_once(compilations: list[str]) -> None:
    kernels: list[BuiltKernel] = []
    threads = [threading.Thread(target=lambda: kernels.append(build(ADD))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({kernel.address for kernel in kernels}) == 1
    assert compilations == ["add"]


def test_an_interrupted_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: str, destination: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.put(store.key("a"), b"content")
    assert store.get(store.key("a")) is None
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_directory_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with settings.scope(cache_dir=tmp_path / "file" / "cache"), pytest.warns(RuntimeWarning, match="not kept"):
        check_adds(build(ADD))


def test_the_key_names_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    native = CpuTarget.native()
    variants = [
        ADD,
        dataclasses.replace(ADD, text=TEXT + "\n"),
        dataclasses.replace(ADD, signature=(("x_ptr", "*fp32"), *SIGNATURE[1:])),
        dataclasses.replace(ADD, signature=(*SIGNATURE[:3], ("n", "i64"))),
        dataclasses.replace(ADD, constexprs=(("BLOCK", 512),)),
        dataclasses.replace(ADD, constexprs=(("BLOCK", 1),)),
        dataclasses.replace(ADD, constexprs=(("BLOCK", True),)),
        dataclasses.replace(ADD, constexprs=(("BLOCK", 1.0),)),
    ]
    keys = {kernel_key(variant, native) for variant in variants}
    keys |= {kernel_key(ADD, CpuTarget.named(name)) for name in ("avx512", "avx2", "neon")}
    for name in ("toolchain_version", "front_end_version"):
        with monkeypatch.context() as patch:
            patch.setattr(build_module, name, lambda: "another version")
            keys.add(kernel_key(ADD, native))
    assert len(keys) == len(variants) + 5
    assert kernel_key(ADD, native) == kernel_key(dataclasses.replace(ADD), native)
    assert store.key("ab", "c") != store.key("a", "bc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": "subtract"}, "has no function 'subtract'"),
        ({"text": "def add_kernel(:"}, "cannot be executed"),
        ({"text": "import no_such_module"}, "No module named 'no_such_module'"),
        ({"signature": SIGNATURE[:3]}, "other parameters"),
        ({"signature": (*SIGNATURE, ("m", "i32"))}, "other parameters"),
        ({"signature": (*SIGNATURE[1:], SIGNATURE[0])}, "another order"),
        ({"text": TEXT.replace("tl.arange(0, BLOCK)", "tl.no_such_function(BLOCK)")}, "does not compile"),
        ({"constexprs": (("BLOCK", 1000),)}, "does not compile"),
    ],
)
def test_a_wrong_record_is_an_error_that_names_the_kernel(change: dict[str, object], message: str) -> None:
    with pytest.raises(CodegenError, match=message) as caught:
        build(dataclasses.replace(ADD, **change))
    assert "'add'" in str(caught.value)


def test_altered_content_is_refused() -> None:
    sealed = store.seal(b"machine code")
    assert store.unseal(sealed, where="here") == b"machine code"
    with pytest.raises(CacheError, match="here"):
        store.unseal(sealed[:-1] + b"X", where="here")


def test_the_digest_of_triton_is_kept_until_a_file_changes(tmp_path: Path) -> None:
    package = tmp_path / "triton"
    calls: list[int] = []
    for name in ("runtime/cache.py", "language/core.py", "_C/libtriton.so"):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text("x")

    def digest() -> str:
        calls.append(1)
        return f"digest {len(calls)}"

    with settings.scope(cache_dir=str(tmp_path / "cache")):
        assert [front_end_key.remembering(digest, package)() for _ in range(3)] == ["digest 1"] * 3
        (package / "language/core.py").write_text("xy")
        assert front_end_key.remembering(digest, package)() == "digest 2"
        (package / "language/new.py").write_text("")
        assert front_end_key.remembering(digest, package)() == "digest 3"
        os.utime(package / "_C/libtriton.so", ns=(1, 1))
        assert front_end_key.remembering(digest, package)() == "digest 4"


def test_the_remembered_digest_is_tritons() -> None:
    front_end_key.remember()
    assert triton_cache.triton_key() == inspect.unwrap(triton_cache.triton_key)()
