"""Parallel launch of kernels over torch's own OpenMP threads, by one native function.

A step is one kernel launch. ``run_steps`` executes a list of steps in one native call; each step's programs are
handed out in shrinking chunks from an atomic counter, so uneven programs balance (a static split was 1.4 times slower
on ragged batches). The threads are those of the OpenMP runtime torch itself is linked to: a pool of our own would
compete with torch's spinning workers.

After ``fork`` an OpenMP pool is unusable in the child (its threads do not exist there, and the runtime waits for
them): launches in a forked child, such as a DataLoader worker, run on the calling thread.
"""

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilewright import settings
from tilewright.codegen.cpu import jit, store
from tilewright.codegen.cpu.launch_ir import LAUNCH_IR
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.codegen.cpu.version import llvm_version

SERIAL = 1
"""Flag of a step whose function runs all programs in one call on the calling thread (it is parallel by itself)."""


class Step(ctypes.Structure):
    """One launch, as ``run_steps`` reads it.

    Attributes:
        fn: address of a function with the kernel ABI
            ``void(ptr args, i32 grid_x, i32 grid_y, i32 grid_z, i64 first, i64 last)``.
        args: address of the argument slots, 8 bytes each.
        grid_x, grid_y, grid_z: programs along each axis; a step with no programs does nothing.
        flags: 0 or ``SERIAL``.
        chunk: programs a thread takes at a time; 0 means ``max(1, left / (8 * threads))`` of those that are left: few
            long stretches first, so that neighbours find one another's operands in the caches, and single programs at
            the end, so that threads end together (Polychronopoulos and Kuck, "Guided self-scheduling", 1987).
    """

    _fields_ = (
        ("fn", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("grid_x", ctypes.c_int32),
        ("grid_y", ctypes.c_int32),
        ("grid_z", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("chunk", ctypes.c_int64),
    )


class Launcher:
    """The native launch functions of this process.

    Attributes:
        run_steps: ``(address of Step array, count, threads)``; releases the GIL, returns when all steps are done.
        run_kernel: ``(fn, args, grid_x, grid_y, grid_z, threads)``: the same for one step.
        run_record: ``(record, threads)``: the same for the bytes of one ``Step`` with its slots behind it, whose
            ``args``, ``flags`` and ``chunk`` are not read.
    """

    def __init__(self) -> None:
        code = jit.load(_object_code(), "run_steps", "run_kernel", "run_record", "parallel", "thread_limit")
        pointer, count, grid = ctypes.c_void_p, ctypes.c_int64, (ctypes.c_int32,) * 3
        self.run_steps = ctypes.CFUNCTYPE(None, pointer, count, ctypes.c_int32)(code["run_steps"])
        self.run_kernel = ctypes.CFUNCTYPE(None, pointer, pointer, *grid, ctypes.c_int32)(code["run_kernel"])
        self.run_record = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int32)(code["run_record"])
        # The functions outlive the launcher in whoever keeps them, and so must their code.
        functions: tuple[Any, ...] = (self.run_steps, self.run_kernel, self.run_record)
        for function in functions:
            function.code = code
        self._thread_limit = ctypes.c_int32.from_address(code["thread_limit"])
        if _forked:
            self.limit_threads(1)
        ctypes.c_void_p.from_address(code["parallel"]).value = _find_openmp_parallel()

    def limit_threads(self, limit: int) -> None:
        """Caps the threads of every later launch, whatever a step list was prepared with."""
        self._thread_limit.value = limit


def launcher() -> Launcher:
    """The process's launcher, created on first use."""
    with _lock:
        return _create_launcher()


def num_threads() -> int:
    """Threads that a launch uses now: the setting ``num_threads``, else ``torch.get_num_threads()``."""
    asked = settings.get_once("num_threads")
    return _torch_num_threads()() if asked is None else max(1, asked)


@functools.cache
def _torch_num_threads() -> Callable[[], int]:
    import torch

    return torch.get_num_threads


_lock = threading.Lock()
_forked = False


@functools.cache
def _create_launcher() -> Launcher:
    return Launcher()


def _object_code() -> bytes:
    target = CpuTarget.host()
    key = store.key("launch", LAUNCH_IR, target.key, llvm_version())
    cached = store.get(key)
    if cached is not None:
        return cached
    object_code = jit.compile_ir(LAUNCH_IR, target)
    store.put(key, object_code)
    return object_code


def _find_openmp_parallel() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch is linked to, whatever its file is called.

    A lookup through libtorch_cpu searches the libraries it was linked with. LLVM's and Intel's runtimes export
    the same entry point. None, after a warning, if there is none: launches then use one thread.
    """
    import torch

    names = (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", None)
    for name in names:
        if name is not None and not name.exists():
            continue
        symbol: Any = getattr(ctypes.CDLL(None if name is None else str(name)), "GOMP_parallel", None)
        if symbol is not None:
            return ctypes.cast(symbol, ctypes.c_void_p).value
    warnings.warn(
        "torch's OpenMP runtime does not export GOMP_parallel; CPU kernels run on one thread",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _after_fork_in_child() -> None:
    global _forked
    _forked = True
    if _create_launcher.cache_info().currsize:
        _create_launcher().limit_threads(1)


os.register_at_fork(after_in_child=_after_fork_in_child)
