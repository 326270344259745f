"""Kernel records: Triton source with everything needed to build it, and the built kernel."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelSource:
    """A Triton kernel as text, with what its compilation depends on.

    Attributes:
        name: stable readable name, e.g. ``row_add_layer_norm_1f3a``; two regions of equal structure share it.
        text: a complete Python module (imports included) that defines the kernel.
        function: name of the ``@triton.jit`` function in ``text``.
        signature: runtime parameters in order, as (name, Triton type): ``*fp32``, ``i32``, ``fp32``; a
            pointer that is always a multiple of 16 bytes is written ``*fp32:16``.
        constexprs: compile-time parameters and their values.
        num_warps, num_stages: launch options that matter on GPUs.
        asserts: it stops itself where a ``tl.device_assert`` in it does not hold; else these are left out.
        origin: for readers, which nodes and source lines of the model it computes, a line each. Not part of identity:
            identity: regions of equal structure have equal kernels wherever they stand in the model.
    """

    name: str
    text: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, int | float | bool | str], ...] = ()
    num_warps: int = 4
    num_stages: int = 1
    asserts: bool = False
    origin: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @property
    def readable(self) -> str:
        """The text with a comment that says what it computes in the model."""
        return "".join(f"# {line}\n" for line in self.origin) + self.text


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel ready to launch.

    Attributes:
        source: what it was built from.
        address: entry point of the native code on the CPU, in the kernel ABI of ``docs/kernels.md``.
        params: runtime parameters in the order of the argument slots.
        keepalive: owner of the code; the address is valid while it lives.
        stops: it asserts something, or was built in checked mode: it has one more slot, the address
            of a ``tilewright.ir.stops.MemoryTable``.
    """

    source: KernelSource
    address: int
    params: tuple[str, ...]
    keepalive: Any = field(repr=False, compare=False)
    stops: bool = False
