"""The driver half of the Triton backend "cpu": where kernels run, and how ``kernel[grid](...)`` launches them.

Triton imports this module inside its own import, so torch and llvmlite are imported by the functions that need
them. Inductor constructs ``CpuDriver`` even where it is inactive: the constructor does nothing.
"""

import time
from typing import TYPE_CHECKING, Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import Benchmarker, DriverBase

from tilewright import settings
from tilewright.codegen.cpu.target import CpuTarget

if TYPE_CHECKING:
    from tilewright.codegen.cpu.jit import Code

# Larger than one core's share of any last-level cache: zeroing it evicts a kernel's inputs.
_FLUSH_BYTES = 64 * 2**20

_CPP_TYPES = {
    "i1": "bool",
    "i8": "int8_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "i64": "int64_t",
    "u1": "bool",
    "u8": "uint8_t",
    "u16": "uint16_t",
    "u32": "uint32_t",
    "u64": "uint64_t",
    "fp16": "_Float16",
    "bf16": "__bf16",
    "fp32": "float",
    "f32": "float",
    "fp64": "double",
}


class CpuDriver(DriverBase):
    """Triton's driver interface for the CPU: one device, one stream.

    The device has number 0, and 1 in checked mode: Triton keeps compiled kernels by device, so that a change of the
    setting by ``settings.scope`` takes effect at the next launch.
    """

    @classmethod
    def is_active(cls) -> bool:
        """True when asked for (``TRITON_DEFAULT_BACKEND=cpu``) or when no GPU driver is active.

        Triton accepts one active driver only, so where a GPU is usable the CPU must step back.
        """
        if settings.get("triton_backend") == "cpu":
            return True
        from triton.backends import backends

        return not any(backend.driver.is_active() for backend in backends.values() if backend.driver is not cls)

    @property
    def launcher_cls(self) -> type:
        """Class that Triton instantiates once per compiled kernel."""
        from tilewright.codegen.cpu.launcher import CpuLauncher

        return CpuLauncher

    @property
    def utils(self) -> "CpuUtils":
        """Loading of object code and device properties."""
        return CpuUtils()

    def get_current_target(self) -> GPUTarget:
        """The target of the compiler; a program of a kernel is one thread, so the warp size is 1."""
        # Triton asks for it before it looks a kernel up in its cache.
        from tilewright.codegen.cpu import front_end_key

        front_end_key.remember()
        return GPUTarget("cpu", CpuTarget.native().key, 1)

    def get_current_device(self) -> int:
        """0, and 1 in checked mode."""
        return int(settings.get_once("check"))

    def set_current_device(self, device: int) -> None:
        """There is one device: nothing to do."""

    def get_current_stream(self, device: int) -> int:
        """Always 0: a launch returns when the kernel is done."""
        return 0

    def get_active_torch_device(self) -> Any:
        """``torch.device("cpu")``."""
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> type["CpuDeviceInterface"]:
        """Events and synchronization, as ``triton.testing.do_bench`` uses them."""
        return CpuDeviceInterface

    def map_python_to_cpp_type(self, ty: str) -> str:
        """C type of a parameter (``"*fp32"`` is a ``void*``)."""
        return "void*" if ty.startswith("*") else _CPP_TYPES[ty]

    def get_benchmarker(self) -> Benchmarker:
        """The benchmarking function of ``triton.autotune``."""
        from triton.testing import do_bench

        return do_bench

    def get_empty_cache_for_benchmark(self) -> Any:
        """A buffer whose zeroing evicts the caches between two measured calls."""
        import torch

        return torch.empty(_FLUSH_BYTES, dtype=torch.uint8)

    def clear_cache(self, cache: Any) -> None:
        """Zeroes the buffer of ``get_empty_cache_for_benchmark``."""
        cache.zero_()


class CpuUtils:
    """What Triton calls ``driver.utils``."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> "tuple[Code, Code, int, int, int]":
        """Makes object code callable.

        Args:
            name: symbol of the kernel.
            kernel: sealed object code, the last stage of the compiler.

        Returns:
            The loaded code twice (Triton's module and function: who launches it keeps it alive), n_regs, n_spills and
            n_max_threads. These have no meaning here; n_regs is 1 because tuning code divides by it.

        Raises:
            CacheError: the object code was altered after it was compiled.
        """
        from tilewright.codegen.cpu import jit, store

        code = jit.load(store.unseal(kernel, where=f"kernel '{name}' in Triton's cache"), name)
        return code, code, 1, 0, 2**31 - 1

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Properties that Triton and tuning code ask for.

        Neither shared memory nor registers limit how many programs run at once, so there are plenty of both.
        """
        from tilewright.codegen.cpu import launch

        return {
            "max_shared_mem": 2**31 - 1,
            "multiprocessor_count": launch.num_threads(),
            "max_num_regs": 2**16,
            "warpSize": 1,
        }


class CpuEvent:
    """A point in time, with the interface of ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = True) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        """Sets the event to now: every launch before it is complete."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: "CpuEvent") -> float:
        """Milliseconds from this event to ``end``, never 0."""
        return max((end._seconds - self._seconds) * 1e3, 1e-6)


class CpuDeviceInterface:
    """The part of ``torch.cuda`` that benchmarking uses."""

    Event = CpuEvent

    @staticmethod
    def synchronize(device: Any = None) -> None:
        """Launches are synchronous: nothing to wait for."""

    @staticmethod
    def current_device() -> int:
        """Always 0."""
        return 0
