"""Object code, argument slots, and launches over torch's OpenMP threads."""

import ctypes
import gc
import itertools
import os
import signal
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

from tilewright import settings
from tilewright.codegen.cpu import jit, launch
from tilewright.codegen.cpu.arguments import ArgumentPacker
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.errors import CodegenError, InputError, OptionError

# Two kernels in the kernel ABI over int64 buffers of one element per program. @count adds to runs[p] the encoded
# grid, so each program has to run exactly once with the right grid, and adds 1 to calls[0] for each call.
# @reverse writes out[p] = runs[total - 1 - p] + 1, right only if every program of the step before it is done.
KERNELS = """
define void @count(ptr %args, i32 %x, i32 %y, i32 %z, i64 %first, i64 %last) {
entry:
  %runs = load ptr, ptr %args
  %calls.at = getelementptr i64, ptr %args, i64 1
  %calls = load ptr, ptr %calls.at
  %ignored = atomicrmw add ptr %calls, i64 1 seq_cst
  %y100 = mul i32 %y, 100
  %z10000 = mul i32 %z, 10000
  %xy = add i32 %x, %y100
  %xyz = add i32 %xy, %z10000
  %grid = sext i32 %xyz to i64
  br label %loop
loop:
  %p = phi i64 [ %first, %entry ], [ %next, %loop ]
  %at = getelementptr i64, ptr %runs, i64 %p
  %old = load i64, ptr %at
  %new = add i64 %old, %grid
  store i64 %new, ptr %at
  %next = add i64 %p, 1
  %more = icmp slt i64 %next, %last
  br i1 %more, label %loop, label %done
done:
  ret void
}

define void @reverse(ptr %args, i32 %x, i32 %y, i32 %z, i64 %first, i64 %last) {
entry:
  %runs = load ptr, ptr %args
  %out.at = getelementptr i64, ptr %args, i64 1
  %out = load ptr, ptr %out.at
  %total = sext i32 %x to i64
  br label %loop
loop:
  %p = phi i64 [ %first, %entry ], [ %next, %loop ]
  %next = add i64 %p, 1
  %mirror = sub i64 %total, %next
  %from = getelementptr i64, ptr %runs, i64 %mirror
  %value = load i64, ptr %from
  %sum = add i64 %value, 1
  %to = getelementptr i64, ptr %out, i64 %p
  store i64 %sum, ptr %to
  %more = icmp slt i64 %next, %last
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""


@pytest.fixture(scope="module")
def kernels() -> jit.Code:
    return jit.load(jit.compile_ir(KERNELS, CpuTarget.native()), "count", "reverse")


def slots(*tensors: torch.Tensor) -> ctypes.Array:
    return (ctypes.c_int64 * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("grid", [(1, 1, 1), (7, 1, 1), (3, 5, 2), (99, 33, 1), (1, 1, 64)])
def test_every_program_runs_once(kernels: jit.Code, grid: tuple[int, int, int], threads: int) -> None:
    total = grid[0] * grid[1] * grid[2]
    for chunk in (0, 1, 13, 10**9):
        runs, calls = torch.zeros(total + 8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        arguments = slots(runs, calls)
        step = launch.Step(kernels["count"], ctypes.addressof(arguments), *grid, 0, chunk)
        launch.launcher().run_steps(ctypes.addressof(step), 1, threads)
        assert torch.equal(runs[:total], torch.full((total,), grid[0] + 100 * grid[1] + 10000 * grid[2]))
        assert not runs[total:].any()
        if threads > 1 and total > 1 and chunk in (0, 1, 13):
            assert calls.item() == (-(-total // chunk) if chunk else shrinking_chunks(total, threads))


def shrinking_chunks(total: int, threads: int) -> int:
    """Chunks until none of the programs is left."""
    count = 0
    while total:
        total -= max(1, total // (8 * threads))
        count += 1
    return count


@pytest.mark.parametrize("grid", [(0, 1, 1), (5, 0, 1), (5, 1, 0)])
def test_empty_grid_runs_nothing(kernels: jit.Code, grid: tuple[int, int, int]) -> None:
    runs, calls = torch.zeros(8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    arguments = slots(runs, calls)
    launch.launcher().run_kernel(kernels["count"], ctypes.addressof(arguments), *grid, 2)
    assert not calls.any()


def test_a_step_starts_when_the_one_before_is_done(kernels: jit.Code) -> None:
    total = 500
    runs, calls = torch.zeros(total, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    out = torch.zeros(total, dtype=torch.int64)
    first, second = slots(runs, calls), slots(runs, out)
    steps = (launch.Step * 40)()
    for index in range(0, 40, 2):
        steps[index] = launch.Step(kernels["count"], ctypes.addressof(first), total, 1, 1, 0, 1)
        steps[index + 1] = launch.Step(kernels["reverse"], ctypes.addressof(second), total, 1, 1, 0, 1)
    launch.launcher().run_steps(ctypes.addressof(steps), 40, 2)
    each = total + 100 + 10000
    assert torch.equal(runs, torch.full((total,), 20 * each))
    assert torch.equal(out, runs.flip(0) + 1)


def test_serial_step_is_one_call(kernels: jit.Code) -> None:
    runs, calls = torch.zeros(64, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    arguments = slots(runs, calls)
    step = launch.Step(kernels["count"], ctypes.addressof(arguments), 64, 1, 1, launch.SERIAL, 1)
    launch.launcher().run_steps(ctypes.addressof(step), 1, 2)
    assert calls.item() == 1
    assert bool((runs > 0).all())


def test_launches_from_several_python_threads(kernels: jit.Code) -> None:
    total, rounds = 300, 50
    buffers = [torch.zeros(total, dtype=torch.int64) for _ in range(4)]

    def work(runs: torch.Tensor) -> None:
        calls = torch.zeros(1, dtype=torch.int64)
        arguments = slots(runs, calls)
        for _ in range(rounds):
            launch.launcher().run_kernel(kernels["count"], ctypes.addressof(arguments), total, 1, 1, 2)

    threads = [threading.Thread(target=work, args=(runs,)) for runs in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for runs in buffers:
        assert torch.equal(runs, torch.full((total,), rounds * (total + 10100)))


def test_nested_launch_runs_every_program() -> None:
    # A kernel launched by a program of another one: the function that launches is run_kernel itself.
    nested = """
    define void @outer(ptr %args, i32 %x, i32 %y, i32 %z, i64 %first, i64 %last) {
      %run = load ptr, ptr %args
      %fn.at = getelementptr i64, ptr %args, i64 1
      %fn = load ptr, ptr %fn.at
      %inner = getelementptr i64, ptr %args, i64 2
      call void %run(ptr %fn, ptr %inner, i32 50, i32 1, i32 1, i32 2)
      ret void
    }
    define void @inner(ptr %args, i32 %x, i32 %y, i32 %z, i64 %first, i64 %last) {
      %sum = load ptr, ptr %args
      %programs = sub i64 %last, %first
      %old = atomicrmw add ptr %sum, i64 %programs seq_cst
      ret void
    }
    """
    code = jit.load(jit.compile_ir(nested, CpuTarget.native()), "outer", "inner")
    run_kernel = launch.launcher().run_kernel
    total = torch.zeros(1, dtype=torch.int64)
    address = ctypes.cast(run_kernel, ctypes.c_void_p).value
    arguments = (ctypes.c_int64 * 3)(address, code["inner"], total.data_ptr())
    step = launch.Step(code["outer"], ctypes.addressof(arguments), 4, 1, 1, 0, 1)
    launch.launcher().run_steps(ctypes.addressof(step), 1, 2)
    assert total.item() == 4 * 50


def test_without_an_openmp_runtime_launches_use_one_thread(kernels: jit.Code, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_find_openmp_parallel", lambda: None)
    runs, calls = torch.zeros(64, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    arguments = slots(runs, calls)
    launch.Launcher().run_kernel(kernels["count"], ctypes.addressof(arguments), 64, 1, 1, 2)
    assert calls.item() == 1
    assert bool((runs > 0).all())


def test_the_openmp_runtime_is_the_one_torch_loaded() -> None:
    address = launch._find_openmp_parallel()
    assert address is not None
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        mapped += [line.split()[-1]] if first <= address < last else []
    (path,) = mapped
    assert Path(path).is_relative_to(Path(torch.__file__).parent.parent)
    assert "omp" in Path(path).name


def test_number_of_threads_is_a_setting() -> None:
    assert launch.num_threads() == torch.get_num_threads()
    with settings.scope(num_threads=3):
        assert launch.num_threads() == 3


SCRIPT = f"""
import ctypes, os, sys, threading, torch
from tilewright.codegen.cpu import jit, launch
from tilewright.codegen.cpu.target import CpuTarget
code = jit.load(jit.compile_ir({KERNELS!r}, CpuTarget.native()), "count")
runs, calls = torch.zeros(100000, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
arguments = (ctypes.c_int64 * 2)(runs.data_ptr(), calls.data_ptr())
def run():
    launch.launcher().run_kernel(code.address, ctypes.addressof(arguments), 100000, 1, 1, 2)
"""


def run_script(body: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", SCRIPT + body]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_interrupt_during_launches_raises_keyboard_interrupt() -> None:
    process = run_script("""
try:
    run()
    print("running", flush=True)
    while True:
        run()
except KeyboardInterrupt:
    run()
    print("interrupted", flush=True)
""")
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (output, process.returncode) == ("interrupted\n", 0), errors


def test_forked_child_launches_on_its_own_thread() -> None:
    # Without the limit the child waits for ever for pool threads that exist in the parent only.
    process = run_script("""
run()
child = os.fork()
if child == 0:
    run()
    os._exit(7 if calls.item() > 1 else 1)
_, status = os.waitpid(child, 0)
run()
print(os.waitstatus_to_exitcode(status))
""")
    output, errors = process.communicate(timeout=60)
    assert output == "7\n", errors


def test_equal_symbols_do_not_clash_and_code_is_unloaded() -> None:
    text = "define i64 @f() {{ ret i64 {} }}"
    codes = [jit.load(jit.compile_ir(text.format(n), CpuTarget.native()), "f") for n in (5, 6)]
    assert [ctypes.CFUNCTYPE(ctypes.c_int64)(code.address)() for code in codes] == [5, 6]
    tracker = weakref.ref(codes[0]._tracker)
    del codes[0]
    gc.collect()
    assert tracker() is None
    assert ctypes.CFUNCTYPE(ctypes.c_int64)(codes[0].address)() == 6


def test_invalid_ir_and_missing_symbols_are_reported() -> None:
    with pytest.raises(CodegenError, match="not valid"):
        jit.compile_ir("define i64 @f() { ret i32 1 }", CpuTarget.native())
    good = jit.compile_ir("declare i64 @no_such_function()\ndefine i64 @f() {\n"
                          "%r = call i64 @no_such_function()\nret i64 %r }", CpuTarget.native())  # fmt: skip
    with pytest.raises(CodegenError, match="cannot be loaded"):
        jit.load(good, "f")
    with pytest.raises(CodegenError, match="cannot be loaded"):
        jit.load(jit.compile_ir("define i64 @f() { ret i64 1 }", CpuTarget.native()), "g")


@pytest.mark.parametrize(("name", "machine"), [("avx512", 0x3E), ("avx2", 0x3E), ("neon", 0xB7)])
def test_compiles_for_other_processors(name: str, machine: int) -> None:
    target = CpuTarget.named(name)
    object_code = jit.compile_ir(KERNELS, target)
    assert object_code[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", object_code, 18) == (machine,)
    assert CpuTarget.from_key(target.key) == target


def test_targets() -> None:
    keys = {CpuTarget.named(name).key for name in ("avx512", "avx2", "neon")}
    assert len(keys) == 3
    with settings.scope(cpu_features="avx2"):
        assert CpuTarget.native() == CpuTarget.named("avx2")
    with settings.scope(cpu_features="mmx"), pytest.raises(OptionError, match="mmx"):
        CpuTarget.native()
    with pytest.raises(OptionError, match="no CPU target has the key"):
        CpuTarget.from_key("riscv64-generic-0")


def test_slots_hold_each_type() -> None:
    tensor = torch.zeros(3)
    cases = [
        ("*fp32", tensor, tensor.data_ptr()),
        ("*i8", None, 0),
        ("i1", True, 1),
        ("i8", -128, -128),
        ("i32", -5, -5),
        ("u32", 2**32 - 1, 2**32 - 1),
        ("i64", -(2**63), -(2**63)),
        ("u64", 2**64 - 1, -1),
    ]
    kinds, values, expected = zip(*cases, strict=True)
    packed = ArgumentPacker(kinds, "k").pack(values)
    assert struct.unpack(f"={len(cases)}q", packed) == expected


def test_slots_hold_floats_with_correct_rounding() -> None:
    values = [*torch.randn(50, dtype=torch.float64).tolist(), 0.0, -0.0, 1e-7, 65519.0, 65520.0, float("inf"), 3.0e38]
    for value in values:
        packed = ArgumentPacker(("fp16", "bf16", "fp32", "fp64"), "k").pack((value,) * 4)
        half, brain, single, double = struct.unpack("=H6xH6xf4xd", packed)
        wide = torch.tensor(value, dtype=torch.float32)
        assert half == torch.tensor(value, dtype=torch.float64).half().view(torch.int16).item() & 0xFFFF
        assert brain == wide.bfloat16().view(torch.int16).item() & 0xFFFF
        assert single == wide.item()
        assert double == value
    nan = ArgumentPacker(("bf16", "fp16"), "k").pack((float("nan"), float("nan")))
    for bits, kind in zip(struct.unpack("=h6xh6x", nan), (torch.bfloat16, torch.float16), strict=True):
        assert torch.tensor(bits, dtype=torch.int16).view(kind).isnan()


def test_slots_skip_constants_and_flatten_tuples() -> None:
    packer = ArgumentPacker(("i32", "constexpr", ("i32", ("i64", "constexpr"))), "k")
    assert struct.unpack("=3q", packer.pack((1, "relu", (2, (3, None))))) == (1, 2, 3)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("i32", 2**31),
        ("i8", -129),
        ("u32", -1),
        ("u64", 2**64),
        ("i32", 1.5),
        ("fp32", "x"),
        ("*fp32", "x"),
        ("*fp32", torch.empty(2, device="meta")),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kind: str, value: object) -> None:
    with pytest.raises(InputError, match="kernel 'scale'"):
        ArgumentPacker(("i32", kind), "scale").pack((1, value))


def test_missing_arguments_are_named() -> None:
    with pytest.raises(InputError, match="got 2 arguments and takes 3"):
        ArgumentPacker(("i32", "constexpr", "i32"), "scale").pack((1, 2))


def test_no_counter_is_shared_between_launches(kernels: jit.Code) -> None:
    # The counter of programs lives on the launching thread's stack: interleaved sizes would show a stale one.
    for total, threads in itertools.product((1, 2, 3, 17, 400), (1, 2)):
        runs, calls = torch.zeros(total, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        arguments = slots(runs, calls)
        launch.launcher().run_kernel(kernels["count"], ctypes.addressof(arguments), total, 1, 1, threads)
        assert bool((runs == total + 10100).all())


def test_a_record_is_a_step_with_its_slots(kernels: jit.Code) -> None:
    runs, calls = torch.zeros(12, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    record = ArgumentPacker(("*i64", "constexpr", "*i64"), "k").record(kernels["count"], 3, 2, 2, (runs, 64, calls))
    launch.launcher().run_record(record, 2)
    assert torch.equal(runs, torch.full((12,), 3 + 200 + 20000))


@pytest.mark.parametrize(("value", "expected"), [(1e300, "inf"), (-1e300, "-inf"), (7, "7"), (True, "1")])
def test_slots_of_floats_that_are_no_fp32(value: float, expected: str) -> None:
    packed = ArgumentPacker(("fp32", "fp64"), "k").pack((value, value))
    assert struct.unpack("=f4xd", packed) == (float(expected), float(value))


def test_the_environment_is_read_once_and_a_scope_always(monkeypatch: pytest.MonkeyPatch) -> None:
    before = launch.num_threads()
    monkeypatch.setenv("TILEWRIGHT_NUM_THREADS", str(before + 3))
    assert launch.num_threads() == before
    with settings.scope(num_threads=before + 1):
        assert launch.num_threads() == before + 1
