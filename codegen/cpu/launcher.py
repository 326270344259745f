"""What Triton calls to launch a compiled kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.cpu import launch
from tilewright.codegen.cpu.arguments import HEADER, ArgumentPacker, flat_names
from tilewright.codegen.cpu.jit import Code
from tilewright.codegen.cpu.launch_memory import LaunchMemory
from tilewright.errors import InputError

_MAX_PROGRAMS = 2**62
# A thread has a context of its own, and asking it is much cheaper than asking a threading.local.
_recorder: ContextVar["list[Launch] | None"] = ContextVar("_recorder", default=None)


@dataclass(frozen=True)
class Launch:
    """One launch, ready to be repeated.

    Attributes:
        code: the kernel; has to be kept as long as the launch may run.
        slots: packed arguments.
        grid: programs along x, y, z.
        arguments: the objects whose memory the slots point to.
        memory: what the kernel is told about memory, if it can stop itself.
    """

    code: Code
    slots: bytes
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    memory: LaunchMemory | None = None


class CpuLauncher:
    """Launches one compiled kernel; Triton creates it once per kernel.

    Args:
        src: Triton's source object; its ``signature`` gives the type of each parameter.
        metadata: what the compiler's stages recorded; its ``name`` is used in error messages.
    """

    def __init__(self, src: Any, metadata: Any) -> None:
        self._packer = ArgumentPacker(src.signature.values(), metadata.name)
        self._name = metadata.name
        self._names = tuple(flat_names(src.signature, src.signature.values()))
        self._stops, self._searches = metadata.stops, metadata.searches
        self._run_record = launch.launcher().run_record

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: Code,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], None] | None,
        exit_hook: Callable[[Any], None] | None,
        *arguments: Any,
    ) -> None:
        """Runs all programs of the grid and returns when they are done; a grid with a 0 does nothing.

        Raises:
            InputError: an argument cannot be passed, or the grid is negative or too large.
            KernelStopped: the kernel stopped itself.
        """
        programs = grid_x * grid_y * grid_z
        if grid_x < 0 or grid_y < 0 or grid_z < 0 or programs > _MAX_PROGRAMS:
            raise InputError(
                f"kernel '{self._name}' cannot run on this grid",
                why=f"the grid is ({grid_x}, {grid_y}, {grid_z})",
                hint="each size is 0 or more, and there are at most 2**62 programs",
            )
        record = self._packer.record(function.address, grid_x, grid_y, grid_z, arguments)
        memory = LaunchMemory(self._packer, self._names, arguments, self._searches) if self._stops else None
        if memory is not None:
            record += memory.slot
        recorded = _recorder.get()
        if recorded is not None:
            recorded.append(Launch(function, record[HEADER.size :], (grid_x, grid_y, grid_z), arguments, memory))
            return
        if enter_hook is not None:
            enter_hook(launch_metadata)
        threads = launch.num_threads() if programs > 1 else 1
        self._run_record(record, threads)
        if exit_hook is not None:
            exit_hook(launch_metadata)
        if memory is not None:
            memory.raise_if_stopped()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the ``with`` block, launches of this thread are appended to the list instead of run."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)
