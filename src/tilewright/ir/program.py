"""What codegen hands to the runtime: a program as plain data, without graphs and without compiled code.

A program is a list of steps over values. A value lives in an input of the call, a weight, the arena, or a
fresh tensor that is returned. Sizes are expressions in B, S and T (``tilewright.ir.sizes``). T is not known
when a call starts: the step ``ReadTokens`` reads it from a value that earlier steps have written, and the
rest of the program is laid out then.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import sympy
import torch

from tilewright.ir.kernels import KernelSource
from tilewright.ir.sizes import Size


class Storage(Enum):
    """Where a value lives."""

    INPUT = "input"  # a tensor of the call
    WEIGHT = "weight"  # a parameter or constant of the model, possibly laid out anew at load time
    ARENA = "arena"  # planned memory, reused between calls
    OUTPUT = "output"  # a fresh tensor that the caller keeps


@dataclass(frozen=True)
class Value:
    """One tensor of the program; contiguous unless it is an input.

    Attributes:
        index: position in ``ProgramSpec.values``.
        name: name of the graph node it stands for, unique.
        storage: where it lives.
        dtype: element type.
        shape: sizes; may use B, S, T.
        state: an INPUT that steps write to: memory of the caller, such as pages of keys.
        source: INPUT: position among the inputs of the program. WEIGHT: key in ``ProgramSpec.weights``.
    """

    index: int
    name: str
    storage: Storage
    dtype: torch.dtype
    shape: tuple[Size, ...]
    source: int | str | None = None
    state: bool = False


@dataclass(frozen=True)
class View:
    """A strided window into a value: ``strides`` and ``offset`` in elements."""

    value: int
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = 0


@dataclass(frozen=True)
class Pointer:
    """Kernel argument: address of ``view``'s first element."""

    view: View


@dataclass(frozen=True)
class Scalar:
    """Kernel argument: an integer size expression, or a float constant."""

    value: Size | float


@dataclass(frozen=True)
class KernelStep:
    """Launch of one Triton kernel.

    Attributes:
        kernel: source; the driver builds it before the program is loaded.
        args: one per runtime parameter of the kernel's signature, in order.
        grid: number of programs along x, y, z.
        reads, writes: indices of the values touched, for memory planning.
        origin: names of the graph nodes it computes.
    """

    kernel: KernelSource
    args: tuple[Pointer | Scalar, ...]
    grid: tuple[Size, Size, Size]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    origin: tuple[str, ...] = ()


@dataclass(frozen=True)
class VendorLinear:
    """``out = x @ weight.T + bias`` by the vendor library: x [M, K], weight [N, K], bias [N] or none, out [M, N]."""

    x: View
    weight: int
    bias: int | None
    out: View
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    origin: tuple[str, ...] = ()


@dataclass(frozen=True)
class EagerStep:
    """A part of the graph that runs as it was, with the reason on record.

    ``call`` takes the input tensors in order and the values of (B, S, T) by keyword ``sizes`` and returns a tuple of
    tensors, which the runtime copies into ``outputs``.
    """

    call: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[View, ...]
    outputs: tuple[View, ...]
    reason: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    origin: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadTokens:
    """Reads the number of packed rows T: the first element of the int32 ``view``, once the steps before are done.

    ``rows_padded`` is the number of rows a padded run computes (B * S); kept for the statistics.
    """

    view: View
    symbol: sympy.Symbol
    rows_padded: Size
    reads: tuple[int, ...]
    writes: tuple[int, ...] = ()
    origin: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A table by row count: the first entry whose ``upper`` bound is at least ``rows`` runs (None: no bound).

    Every entry computes the same values from the same values; scratch values inside an entry belong to it.
    """

    rows: Size
    table: tuple[tuple[int | None, str, tuple["KernelStep | VendorLinear", ...]], ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    origin: tuple[str, ...] = ()


Step = KernelStep | VendorLinear | EagerStep | ReadTokens | Choice


@dataclass(frozen=True)
class Weight:
    """A weight as the program wants it.

    Attributes:
        tensor: the model's tensor (shared, not copied).
        layout: "as_is", or the name of a load-time re-layout known to the kernel that reads it, such as
            "kn" ([N, K] transposed to [K, N]), "panels:64" ([N/64][K][64], zero-filled at the end) or "panels:64:4"
            ([N/64][K/4][64][4]).
    """

    tensor: torch.Tensor
    layout: str = "as_is"


@dataclass(frozen=True)
class ProgramSpec:
    """The whole program.

    Attributes:
        symbols: the size symbols in use, in the order (B, S, T) as far as present.
        bind: for each symbol known at the start of a call, (symbol, input position, dim) it is read from.
        inputs: names of the inputs, in order.
        values: all values, in the order of their index.
        weights: by key.
        steps: in order of execution.
        outputs: indices of the values returned, in the order of the graph's outputs. An output may be an INPUT or
            WEIGHT
            value when the graph returns one unchanged.
    """

    symbols: tuple[sympy.Symbol, ...]
    bind: tuple[tuple[sympy.Symbol, int, int], ...]
    inputs: tuple[str, ...]
    values: tuple[Value, ...]
    weights: dict[str, Weight] = field(repr=False)
    steps: tuple[Step, ...] = ()
    outputs: tuple[int, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
