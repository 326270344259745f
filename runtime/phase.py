"""A stretch of a program whose sizes are all known when it starts, compiled once into arrays of numbers.

Whatever depends on sizes is a number in one table of size expressions, which one function evaluates; whatever depends
on addresses is a list of positions among the argument slots. A call then only fills arrays
(``tilewright.runtime.bound``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch

from tilewright.ir.kernels import BuiltKernel, KernelSource
from tilewright.ir.program import Choice, EagerStep, KernelStep, Pointer, ProgramSpec, Step, Storage, View
from tilewright.ir.sizes import Size, compile_sizes, contiguous_strides
from tilewright.runtime.memory import MemoryPlan
from tilewright.runtime.schedule import (
    Eager,
    FreshOutputs,
    Linear,
    PlainStep,
    Schedule,
    flatten,
    make_schedule,
    step_name,
)
from tilewright.runtime.weights import LoadedWeight, PackedLinear

STEP = np.dtype(
    [
        ("fn", np.uint64),
        ("args", np.uint64),
        ("grid", np.int32, (3,)),
        ("flags", np.int32),
        ("chunk", np.int64),
    ]
)
"""One kernel launch as the native launcher reads it."""

FLOAT_BITS = {
    "fp16": (torch.float16, torch.int16),
    "bf16": (torch.bfloat16, torch.int16),
    "fp32": (torch.float32, torch.int32),
    "fp64": (torch.float64, torch.int64),
}
"""Dtype of a float argument, and the integer of its width."""


class SizeTable:
    """Distinct size expressions, each evaluated once per call."""

    def __init__(self) -> None:
        self._numbers: dict[sympy.Expr, int] = {}

    def add(self, size: Size) -> int:
        """Number of the expression."""
        return self._numbers.setdefault(sympy.sympify(size), len(self._numbers))

    def compile(self, symbols: Sequence[sympy.Symbol]) -> Any:
        """A function from the values of the symbols to the tuple of all sizes."""
        return compile_sizes(symbols, [int(size) if size.is_Integer else size for size in self._numbers])


@dataclass(frozen=True)
class IndexedView:
    """A view with numbers of the size table in place of sizes; the offset is in elements."""

    value: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass
class _Pointers:
    """Slots that hold addresses: position of the slot, the value, and the byte offset as a number of the size table."""

    positions: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        positions, values, offsets = (np.array(n, np.int64) for n in (self.positions, self.values, self.offsets))
        return positions, values, offsets


class Phase:
    """The steps of one stretch, with their arguments as arrays.

    Args:
        spec: the program.
        steps: steps of the stretch, without ``ReadTokens``.
        symbols: sizes known when it starts.
        plan: memory of the arena values that it is the first to touch.
        weights: by value index.
        kernels: built kernels.
        fresh: of this stretch.

    Attributes:
        views: views that vendor and eager steps take tensors of.
        outputs: whole views of the returned values that are written here.
        functions, starts, grids: per kernel: entry point, first argument slot, sizes of the grid.
        template: argument slots, with constants and addresses of weights in place.
        weight_bases: by value index, addresses of the weights, 0 for other values.
        planned: slots with addresses of planned memory: positions, values, byte offsets as numbers of the size table.
        given: the same of inputs and outputs, with indices into ``given_values`` as values.
        scalar_positions, scalar_sizes: slots with sizes.
        narrow: sizes that kernels take as 32-bit integers.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        steps: Sequence[Step],
        symbols: Sequence[sympy.Symbol],
        plan: MemoryPlan,
        weights: Mapping[int, LoadedWeight],
        kernels: Mapping[KernelSource, BuiltKernel],
        fresh: FreshOutputs,
    ) -> None:
        self.spec, self.steps, self.symbols, self.plan, self.weights = spec, tuple(steps), tuple(symbols), plan, weights
        self._fresh = fresh
        self.weight_bases = np.zeros(len(spec.values), dtype=np.int64)
        for value, weight in weights.items():
            self.weight_bases[value] = weight.data_ptr() if isinstance(weight, torch.Tensor) else 0
        self.table = SizeTable()
        self.views: list[IndexedView] = []
        flat = flatten(steps)
        self._add_kernels([step for step in flat if isinstance(step, KernelStep)], kernels)
        self._actions = {id(step): self._action(step) for step in flat if not isinstance(step, KernelStep)}
        written = dict.fromkeys(value for step in flat for value in step.writes)
        self.outputs = tuple(self.whole_view(v) for v in written if spec.values[v].storage is Storage.OUTPUT)
        self._add_tables()
        self._schedules: dict[tuple[int, ...], Schedule] = {}

    def compile_sizes(self) -> None:
        """Makes ``sizes``, the function from the values of the symbols to all sizes; nothing is added after it."""
        self.sizes = self.table.compile(self.symbols)

    def _add_kernels(self, steps: Sequence[KernelStep], kernels: Mapping[KernelSource, BuiltKernel]) -> None:
        self._kernel_number = {id(step): number for number, step in enumerate(steps)}
        self.functions = np.array([kernels[step.kernel].address for step in steps], dtype=np.uint64)
        counts = [len(step.args) for step in steps]
        self.starts = np.cumsum([0, *counts], dtype=np.uint64)[:-1]
        self.template = np.zeros(max(1, sum(counts)), dtype=np.int64)
        grids = [[self.table.add(size) for size in step.grid] for step in steps]
        self.grids = np.array(grids, dtype=np.int64).reshape(-1, 3)
        planned, given = _Pointers(), _Pointers()
        scalars: dict[int, int] = {}
        narrow = set(self.grids.ravel().tolist())
        self._slots_of: dict[int, list[tuple[int, int, int | None]]] = {}
        for number, step in enumerate(steps):
            for argument, (_, kind) in enumerate(step.kernel.signature):
                position, content = int(self.starts[number]) + argument, step.args[argument]
                if isinstance(content, Pointer):
                    self._add_pointer(number, position, content.view, planned, given)
                elif kind in FLOAT_BITS:
                    self.template[position] = _float_bits(float(content.value), kind)
                else:
                    scalars[position] = self.table.add(content.value)
                    narrow |= {scalars[position]} if kind not in ("i64", "u64") else set()
        self.given_values = tuple(dict.fromkeys(given.values))
        given.values = [self.given_values.index(value) for value in given.values]
        self.planned, self.given = planned.arrays(), given.arrays()
        self.scalar_positions = np.array(list(scalars), dtype=np.int64)
        self.scalar_sizes = np.array(list(scalars.values()), dtype=np.int64)
        self.narrow = np.array(sorted(narrow), dtype=np.int64)

    def _add_pointer(self, kernel: int, position: int, view: View, planned: _Pointers, given: _Pointers) -> None:
        value = self.spec.values[view.value]
        offset = sympy.sympify(view.offset) * value.dtype.itemsize
        weight = self.weights.get(view.value)
        if isinstance(weight, torch.Tensor) and offset.is_Integer:
            self.template[position] = weight.data_ptr() + int(offset)
            return
        number = self.table.add(offset)
        pointers = given if value.storage in (Storage.INPUT, Storage.OUTPUT) else planned
        pointers.positions.append(position)
        pointers.values.append(view.value)
        pointers.offsets.append(number)
        self._slots_of.setdefault(view.value, []).append((kernel, position, None if offset == 0 else number))

    def add_view(self, view: View) -> int:
        """Number of the view among ``views``."""
        dtype = self.spec.values[view.value].dtype
        shape, strides = (tuple(map(self.table.add, sizes)) for sizes in (view.shape, view.strides))
        self.views.append(IndexedView(view.value, dtype, shape, strides, self.table.add(view.offset)))
        return len(self.views) - 1

    def whole_view(self, value: int) -> int:
        """Number of a view of all of a value."""
        shape = self.spec.values[value].shape
        return self.add_view(View(value, shape, contiguous_strides(shape)))

    def _action(self, step: PlainStep) -> Linear | Eager:
        if isinstance(step, EagerStep):
            inputs, outputs = (tuple(map(self.add_view, views)) for views in (step.inputs, step.outputs))
            return Eager(step_name(step), step, inputs, outputs)
        assert not isinstance(step, KernelStep)
        packed = self.weights.get(step.weight)
        weight = packed if isinstance(packed, PackedLinear) else self.whole_view(step.weight)
        bias = None if step.bias is None else self.whole_view(step.bias)
        return Linear(step_name(step), self.add_view(step.x), weight, bias, self.add_view(step.out))

    def _add_tables(self) -> None:
        # Layers are alike: tables of the same row count and bounds are decided together.
        self._decisions: dict[tuple[int, tuple[int | None, ...]], int] = {}
        self._decided_by: dict[int, int] = {}
        for step in self.steps:
            if isinstance(step, Choice):
                key = (self.table.add(step.rows), tuple(upper for upper, _, _ in step.table))
                self._decided_by[id(step)] = self._decisions.setdefault(key, len(self._decisions))

    def schedule(self, sizes: Sequence[int]) -> Schedule:
        """What runs at these sizes (the result of ``sizes``)."""
        key = tuple(
            next(i for i, upper in enumerate(uppers) if upper is None or sizes[rows] <= upper)
            for rows, uppers in self._decisions
        )
        found = self._schedules.get(key)
        if found is None:
            found = self._schedules[key] = self._make_schedule(key)
        return found

    def _make_schedule(self, key: tuple[int, ...]) -> Schedule:
        running: list[PlainStep] = []
        for step in self.steps:
            running += flatten(step.table[key[self._decided_by[id(step)]]][2] if isinstance(step, Choice) else (step,))
        fresh = self._fresh.among(running)
        return make_schedule(self.spec, running, self._kernel_number, self._actions, fresh, self._slots_of)


def _float_bits(value: float, kind: str) -> int:
    dtype, bits = FLOAT_BITS[kind]
    pattern = int(torch.tensor(value, dtype=dtype).view(bits).item())
    return pattern if kind == "fp64" else pattern & ((1 << (8 * dtype.itemsize)) - 1)
