"""A stretch of a program whose sizes are all known when it starts, compiled once into arrays of numbers.

Whatever depends on sizes is a number in one table of size expressions, which one function evaluates; whatever depends
on addresses is a list of positions among the argument slots. A call then only fills arrays
(``tilewright.runtime.bound``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch

from tilewright.ir.kernels import BuiltKernel, KernelSource
from tilewright.ir.program import Choice, EagerStep, KernelStep, Pointer, ProgramSpec, Scalar, Step, Storage, View
from tilewright.ir.sizes import Size, compile_sizes, contiguous_strides, product
from tilewright.runtime.memory import MemoryPlan
from tilewright.runtime.schedule import (
    Eager,
    FreshOutputs,
    KernelArrays,
    Linear,
    PlainStep,
    Schedule,
    flatten,
    make_schedule,
    step_name,
)
from tilewright.runtime.weights import LoadedWeight, PackedLinear

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


@dataclass(frozen=True)
class StoppingKernel:
    """A kernel step in checked mode.

    Attributes:
        step: the step.
        position: of the argument slot for its memory table.
        memory: by argument that is a pointer, the value, and the number of its bytes in the size table.
    """

    step: KernelStep
    position: int
    memory: Mapping[int, tuple[int, int]]


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
        weight_views: the tensors of those that show a weight at sizes that never change, None for the others.
        outputs: whole views of the returned values that are written here.
        template: argument slots, with constants and addresses of weights in place.
        weight_bases: by value index, addresses of the weights, 0 for other values; a 0 at the end.
        laid_out: [3, slots] of the slots that depend on sizes: position, value whose address is in it (or the number of
            values: none), and a number of the size table, for what is added to it.
        given: the same for slots with addresses of inputs and outputs; their second row indexes ``given_values``.
        narrow: sizes that kernels take as 32-bit integers.
        stopping: by number, the kernels that can stop themselves.
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
        self.weight_bases = np.zeros(len(spec.values) + 1, dtype=np.int64)
        for value, weight in weights.items():
            self.weight_bases[value] = weight.data_ptr() if isinstance(weight, torch.Tensor) else 0
        self.table = SizeTable()
        self.views: list[IndexedView] = []
        self.weight_views: list[torch.Tensor | None] = []
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
        counts = [len(step.args) + kernels[step.kernel].stops for step in steps]
        starts = np.cumsum([0, *counts], dtype=np.uint64)[:-1]
        self.template = np.zeros(max(1, sum(counts)), dtype=np.int64)
        grids = np.array([[self.table.add(size) for size in step.grid] for step in steps], dtype=np.int64)
        narrow = set(grids.ravel().tolist())
        laid_out: list[tuple[int, int, int]] = []
        given: list[tuple[int, int, int]] = []
        slots_of: dict[int, list[tuple[int, int, int | None]]] = {}
        for number, step in enumerate(steps):
            for argument, (_, kind) in enumerate(step.kernel.signature):
                position, content = int(starts[number]) + argument, step.args[argument]
                if isinstance(content, Scalar):
                    if kind in FLOAT_BITS:
                        self.template[position] = _float_bits(float(content.value), kind)
                        continue
                    size = self.table.add(content.value)
                    laid_out.append((position, len(self.spec.values), size))
                    narrow |= {size} if kind not in ("i64", "u64") else set()
                    continue
                value, offset = self._address(content.view)
                if offset is None:
                    self.template[position] = value
                    continue
                is_given = self.spec.values[value].storage in (Storage.INPUT, Storage.OUTPUT)
                (given if is_given else laid_out).append((position, value, offset))
                slots_of.setdefault(value, []).append((number, position, offset if content.view.offset != 0 else None))
        self.stopping = {
            number: StoppingKernel(step, int(starts[number]) + len(step.args), self._memory_of(step))
            for number, step in enumerate(steps)
            if kernels[step.kernel].stops
        }
        self.given_values = tuple(dict.fromkeys(value for _, value, _ in given))
        given = [(position, self.given_values.index(value), offset) for position, value, offset in given]
        self.laid_out, self.given = (np.array(rows, np.int64).reshape(-1, 3).T.copy() for rows in (laid_out, given))
        self.narrow = np.array(sorted(narrow), dtype=np.int64)
        functions = np.array([kernels[step.kernel].address for step in steps], dtype=np.uint64)
        numbers = {id(step): number for number, step in enumerate(steps)}
        self._kernels = KernelArrays(numbers, functions, starts, grids.reshape(-1, 3), slots_of)

    def _memory_of(self, step: KernelStep) -> dict[int, tuple[int, int]]:
        values = {n: arg.view.value for n, arg in enumerate(step.args) if isinstance(arg, Pointer)}
        records = self.spec.values
        return {
            n: (value, self.table.add(product(records[value].shape) * records[value].dtype.itemsize))
            for n, value in values.items()
        }

    def _address(self, view: View) -> tuple[int, int | None]:
        """(value, byte offset as a number of the size table), or (address, None) if it never changes."""
        offset = sympy.sympify(view.offset) * self.spec.values[view.value].dtype.itemsize
        weight = self.weights.get(view.value)
        if isinstance(weight, torch.Tensor) and offset.is_Integer:
            return weight.data_ptr() + int(offset), None
        return view.value, self.table.add(offset)

    def add_view(self, view: View) -> int:
        """Number of the view among ``views``."""
        dtype = self.spec.values[view.value].dtype
        shape, strides = (tuple(map(self.table.add, sizes)) for sizes in (view.shape, view.strides))
        self.views.append(IndexedView(view.value, dtype, shape, strides, self.table.add(view.offset)))
        weight = self.weights.get(view.value)
        symbolic = any(getattr(size, "free_symbols", ()) for size in (*view.shape, *view.strides, view.offset))
        if isinstance(weight, torch.Tensor) and not symbolic:
            shape, strides = (tuple(map(int, sizes)) for sizes in (view.shape, view.strides))
            self.weight_views.append(weight.as_strided(shape, strides, weight.storage_offset() + int(view.offset)))
        else:
            self.weight_views.append(None)
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
        return make_schedule(self.spec, running, self._kernels, self._actions, fresh)


def _float_bits(value: float, kind: str) -> int:
    dtype, bits = FLOAT_BITS[kind]
    pattern = int(torch.tensor(value, dtype=dtype).view(bits).item())
    return pattern if kind == "fp64" else pattern & ((1 << (8 * dtype.itemsize)) - 1)
