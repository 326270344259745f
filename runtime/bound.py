"""A phase at concrete sizes and addresses, ready to run, and the memory it runs in."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tilewright.errors import InputError, TilewrightError
from tilewright.runtime.memory import Arena
from tilewright.runtime.phase import Phase
from tilewright.runtime.schedule import STEP, Eager, Launch, Linear
from tilewright.runtime.stats import RunCounts
from tilewright.runtime.stopping import Checks
from tilewright.runtime.weights import PackedLinear, linear_into

_LARGEST_INT32 = 2**31 - 1
_PLANS_KEPT = 32


class Launcher(Protocol):
    """What runs kernels natively; the CPU backend has one."""

    def run_steps(self, steps: int, count: int, threads: int, /) -> object:
        """Runs ``count`` records of ``tilewright.runtime.phase.STEP`` at address ``steps``, one after another.

        A step with no programs does nothing. Returns when all are done.
        """


@dataclass
class Call:
    """State of one call.

    Attributes:
        launcher: runs the kernels.
        threads: of each launch.
        tensors: by value: inputs, outputs, and results of the vendor library that stand for planned values.
        timeline: (step, seconds), if the call is profiled; each kernel is then a native call of its own.
    """

    launcher: Launcher
    threads: int
    tensors: dict[int, Tensor]
    timeline: list[tuple[str, float]] | None = None
    counts: RunCounts = field(default_factory=RunCounts)


class Bound:
    """A phase laid out in an arena for one set of sizes. It may run any number of times, one at a time.

    Args:
        phase: what to run.
        sizes: values of the phase's symbols.
        placed: the memory plan at these sizes.
        arena: memory that is large enough, and stays in place while this is used.
        earlier: the phase before it, bound for the same call.
    """

    def __init__(
        self, phase: Phase, sizes: Sequence[int], placed: tuple[np.ndarray, int], arena: Arena, earlier: "Bound | None"
    ) -> None:
        self.phase, self.arena, self._earlier = phase, arena, earlier
        self.sizes: tuple[int, ...] = phase.sizes(*sizes)
        self.symbol_values = tuple(sizes)
        self._has_zero = 0 in sizes
        offsets, self._planned_bytes = placed
        self._offsets = dict(zip(phase.plan.values, offsets.tolist(), strict=True))
        self.bases: np.ndarray = phase.weight_bases.copy() if earlier is None else earlier.bases.copy()
        self.bases[phase.plan.value_numbers] = offsets + arena.address
        self.schedule = phase.schedule(self.sizes)
        self._tensors: dict[tuple[object, ...], Tensor] = {}
        self._views: list[Tensor | None] = list(phase.weight_views)
        self._fill(np.array(self.sizes, dtype=np.int64))
        self._checks = Checks(self) if phase.stopping else None
        self._outputs: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self._fresh_outputs: list[tuple[int, tuple[int, ...]]] = []
        for view in (phase.views[number] for number in phase.outputs):
            shape = tuple(self.sizes[n] for n in view.shape)
            if view.value in self.schedule.fresh:
                self._fresh_outputs.append((view.value, shape))
            else:
                self._outputs.append((view.value, shape, view.dtype))

    def _fill(self, sizes: np.ndarray) -> None:
        """Argument slots and steps, but for the addresses that differ from call to call."""
        phase, schedule = self.phase, self.schedule
        if max(self.sizes, default=0) > _LARGEST_INT32 and (sizes[phase.narrow] > _LARGEST_INT32).any():
            raise InputError(
                "the input is too large for this program",
                why=f"a kernel would get a size of {sizes[phase.narrow].max()}, which 32 bits do not hold",
                hint="call it with fewer or shorter sequences at a time",
            )
        positions, values, added = phase.laid_out
        self.slots = phase.template.copy()
        self.slots[positions] = self.bases[values] + sizes[added]
        self._given_offsets = sizes[phase.given[2]]
        grids = sizes[schedule.grids]
        self._kernels = len(grids) if grids.all() else int(np.count_nonzero(grids.all(axis=1)))
        self._steps = schedule.steps.copy()
        self._steps["args"] = schedule.arguments + np.uint64(self.slots.ctypes.data)
        self._steps["grid"] = grids
        self._steps_address = self._steps.ctypes.data

    def run(self, call: Call) -> None:
        """Runs all steps of the phase."""
        self._attach(call)
        for action, done in self.schedule.actions:
            begin = time.perf_counter() if call.timeline is not None else 0.0
            if isinstance(action, Launch):
                self._launch(action, call)
            elif isinstance(action, Linear):
                self._linear(action, call)
            else:
                self._eager(action, call)
            if call.timeline is not None and not isinstance(action, Launch):
                call.timeline.append((action.name, time.perf_counter() - begin))
            for value in done:
                del call.tensors[value]
        for value, shape in self._fresh_outputs:
            call.tensors[value] = call.tensors[value].view(shape)
        call.counts.kernels_launched += self._kernels

    def _attach(self, call: Call) -> None:
        """Makes the outputs, and fills in the addresses of inputs and outputs."""
        make = torch.zeros if self._has_zero else torch.empty
        for value, shape, dtype in self._outputs:
            call.tensors[value] = make(shape, dtype=dtype)
        if self._has_zero and self._planned_bytes:
            # Steps without programs leave their values unwritten; what reads them must not find old numbers.
            self.arena.clear(self._planned_bytes)
        positions, numbers, _ = self.phase.given
        if positions.size:
            addresses = [self._given_address(value, call) for value in self.phase.given_values]
            self.slots[positions] = np.array(addresses, dtype=np.int64)[numbers] + self._given_offsets

    def _given_address(self, value: int, call: Call) -> int:
        tensor = call.tensors.get(value)
        # An empty tensor has no address; kernels may still form one from it.
        return (tensor.data_ptr() if tensor is not None else 0) or self.arena.address

    def address(self, value: int, call: Call) -> int:
        """Address of a value of this phase or of an earlier one."""
        tensor = call.tensors.get(value)
        return int(self.bases[value]) if tensor is None else tensor.data_ptr()

    def tensor(self, number: int, call: Call) -> Tensor:
        """Tensor of a view of the phase; those of planned memory are kept."""
        found = self._views[number]
        if found is not None:
            return found
        view = self.phase.views[number]
        sizes = self.sizes
        shape, strides = tuple(sizes[n] for n in view.shape), tuple(sizes[n] for n in view.strides)
        base = call.tensors.get(view.value)
        weight = self.phase.weights.get(view.value)
        if isinstance(weight, Tensor):
            base = weight
        if base is not None:
            return base.as_strided(shape, strides, base.storage_offset() + sizes[view.offset])
        # Layers are alike and reuse memory, so many views are the same; making a tensor costs more than finding one.
        arena, offset = self._planned_at(view.value)
        key = (arena, offset, sizes[view.offset], view.dtype, shape, strides)
        found = self._tensors.get(key)
        if found is None:
            base = arena.tensor(view.dtype)
            start = base.storage_offset() + offset // view.dtype.itemsize + sizes[view.offset]
            found = self._tensors[key] = base.as_strided(shape, strides, start)
        self._views[number] = found
        return found

    def _planned_at(self, value: int) -> tuple[Arena, int]:
        offset = self._offsets.get(value)
        if offset is not None:
            return self.arena, offset
        assert self._earlier is not None
        return self._earlier._planned_at(value)

    def _launch(self, action: Launch, call: Call) -> None:
        if self._checks is not None:
            self._checks.prepare(self.schedule.numbers[action.first : action.first + action.count], call)
        self._run_steps(action, call)
        if self._checks is not None:
            self._checks.raise_if_stopped()

    def _run_steps(self, action: Launch, call: Call) -> None:
        run_steps, threads = call.launcher.run_steps, call.threads
        if call.timeline is None:
            run_steps(self._steps_address + action.first * STEP.itemsize, action.count, threads)
            return
        for number in range(action.first, action.first + action.count):
            begin = time.perf_counter()
            run_steps(self._steps_address + number * STEP.itemsize, 1, threads)
            call.timeline.append((self.schedule.names[number], time.perf_counter() - begin))

    def _linear(self, action: Linear, call: Call) -> None:
        x, weight = self.tensor(action.x, call), action.weight
        bias = None if action.bias is None else self.tensor(action.bias, call)
        call.counts.vendor_calls += 1
        if not isinstance(weight, PackedLinear):
            linear_into(self.tensor(action.out, call), x, self.tensor(weight, call), bias)
            return
        result = weight.apply(x, bias)
        if action.fresh is None:
            self.tensor(action.out, call).copy_(result)
            return
        call.tensors[action.fresh] = result
        address = result.data_ptr()
        for position, offset in action.patches:
            self.slots[position] = address if offset is None else address + self.sizes[offset]

    def _eager(self, action: Eager, call: Call) -> None:
        inputs = [self.tensor(view, call) for view in action.inputs]
        outputs = [self.tensor(view, call) for view in action.outputs]
        call.counts.eager_steps += 1
        try:
            results = action.step.call(*inputs, sizes=self.symbol_values)
        except Exception as error:
            error.add_note(f"raised in {action.name}, which runs eager because: {action.step.reason}")
            raise
        if [tuple(result.shape) for result in results] != [tuple(out.shape) for out in outputs]:
            raise TilewrightError(
                "an eager step returned other shapes than its graph says",
                where=action.name,
                why=f"returned {[tuple(r.shape) for r in results]}, expected {[tuple(o.shape) for o in outputs]}",
                hint="an operator's shape depends on the data; compile the model with opt_level=0",
            )
        for out, result in zip(outputs, results, strict=True):
            out.copy_(result)


class Workspace:
    """Memory for one call at a time: an arena for each phase, and the phases bound to the sizes seen lately.

    A phase has an arena of its own because a later one is laid out, and may have to grow its arena, while values of
    the earlier ones are in use.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self._arenas = [Arena() for _ in phases]
        self._bound: list[OrderedDict[tuple[int, ...], Bound]] = [OrderedDict() for _ in phases]
        self._phases = phases

    @property
    def bytes(self) -> int:
        """Size of the arenas."""
        return sum(arena.bytes for arena in self._arenas)

    def bind(self, index: int, sizes: tuple[int, ...], earlier: Bound | None) -> Bound:
        """Phase ``index`` at these sizes; cheap if they were met lately.

        Args:
            index: of the phase.
            sizes: values of its symbols.
            earlier: the phase before, as bound for this call.

        Raises:
            InputError: a size does not fit a kernel's 32-bit integer.
            MemoryError: the arena cannot grow.
        """
        known = self._bound[index]
        bound = known.get(sizes)
        if bound is not None:
            known.move_to_end(sizes)
            return bound
        phase, arena = self._phases[index], self._arenas[index]
        placed = phase.plan.place(sizes)
        if placed[1] > arena.bytes or not arena.address:
            # What is bound here, and later, points into memory that goes away now.
            for later in self._bound[index:]:
                later.clear()
            arena.reserve(placed[1])
        bound = known[sizes] = Bound(phase, sizes, placed, arena, earlier)
        if len(known) > _PLANS_KEPT:
            known.popitem(last=False)
        return bound
