"""Launches without overhead: everything about a launch is decided once, and only the native call is repeated."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from tilewright.codegen.cpu import launch
from tilewright.codegen.cpu.launch_memory import LaunchMemory
from tilewright.codegen.cpu.launcher import Launch, recording
from tilewright.errors import InputError


class PreparedKernel(functools.partial):
    """A callable that launches one kernel again with the same arguments; it holds the tensors.

    Attributes:
        launch: what is launched.
        memory: the native records of it, which the call points to.
    """

    launch: Launch
    memory: tuple[Any, ...]


def prepare(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> PreparedKernel:
    """Compiles a Triton kernel for the CPU and returns a callable that launches it.

    The memory of the tensors is read and written at each call; scalars, grid and number of threads keep the values
    they have now. Launch hooks and pre-run hooks are not called again. Nothing is launched here, except that a
    kernel with ``triton.autotune`` is run to choose its configuration.

    Args:
        kernel: a function decorated with ``triton.jit``, also below ``triton.autotune`` or ``triton.heuristics``.
        grid: as in ``kernel[grid]``: a tuple of 1 to 3 sizes, or a function of the kernel's arguments.
        args: the kernel's arguments; tensors have to be on the CPU.
        kwargs: more arguments and compile options, as in ``kernel[grid](*args, **kwargs)``.

    Returns:
        A callable without arguments. Call it from one thread at a time, as with any kernel that writes memory.

    Raises:
        InputError: ``kernel`` is not a Triton kernel, Triton's active driver is not the CPU's, or an argument
            cannot be passed.
        UnsupportedOp: the kernel cannot run on the CPU.
    """
    # Triton imports the backend's modules inside its own import, so it has to be imported before them.
    import triton

    from tilewright.codegen.cpu.driver import CpuDriver

    if not isinstance(kernel, triton.runtime.KernelInterface):
        raise InputError(
            f"{getattr(kernel, '__name__', kernel)!r} is not a Triton kernel",
            why=f"it is a {type(kernel).__name__}",
            hint="decorate it with @triton.jit",
        )
    if not isinstance(triton.runtime.driver.active, CpuDriver):
        raise InputError(
            "kernels are not launched on the CPU in this process",
            why=f"Triton's active driver is {type(triton.runtime.driver.active).__name__}",
            hint="set TRITON_DEFAULT_BACKEND=cpu",
        )
    if _is_autotuned(kernel):
        kernel[grid](*args, **kwargs)
    with recording() as launches:
        kernel[grid](*args, **kwargs)
    return _repeat(launches[-1])


def _is_autotuned(kernel: Any) -> bool:
    import triton

    while not isinstance(kernel, triton.runtime.JITFunction):
        if isinstance(kernel, triton.runtime.Autotuner):
            return True
        kernel = kernel.fn
    return False


def _repeat(recorded: Launch) -> PreparedKernel:
    slots = ctypes.create_string_buffer(recorded.slots, len(recorded.slots))
    grid_x, grid_y, grid_z = recorded.grid
    step = launch.Step(recorded.code.address, ctypes.addressof(slots), grid_x, grid_y, grid_z, 0, 0)
    run_steps, threads = launch.launcher().run_steps, launch.num_threads()
    if recorded.memory is None:
        prepared = PreparedKernel(run_steps, ctypes.addressof(step), 1, threads)
    else:
        prepared = PreparedKernel(_run_and_report, recorded.memory, run_steps, ctypes.addressof(step), threads)
    prepared.launch = recorded
    prepared.memory = (slots, step)
    return prepared


def _run_and_report(memory: LaunchMemory, run_steps: Callable[[int, int, int], None], step: int, threads: int) -> None:
    """A launch of a kernel that can stop itself.

    Raises:
        KernelStopped: it did.
    """
    memory.record.reset()
    run_steps(step, 1, threads)
    memory.raise_if_stopped()
