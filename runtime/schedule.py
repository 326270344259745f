"""The order of work of a phase for one outcome of its tables: native launches, vendor linears and eager steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import sympy

from tilewright.ir.program import Choice, EagerStep, KernelStep, ProgramSpec, Step, Storage, VendorLinear, View
from tilewright.ir.sizes import Size, contiguous_strides, product
from tilewright.runtime.weights import LoadedWeight, PackedLinear

PlainStep = KernelStep | VendorLinear | EagerStep

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


@dataclass(frozen=True)
class KernelArrays:
    """The kernel steps of a phase, numbered.

    Attributes:
        numbers: by ``id`` of the step.
        functions: entry points.
        starts: position of each one's first argument slot.
        grids: [kernels, 3] numbers of the size table.
        slots_of: by value, the slots that hold its address: (kernel, position, byte offset as a number of the size
            table, None for 0).
    """

    numbers: Mapping[int, int]
    functions: np.ndarray
    starts: np.ndarray
    grids: np.ndarray
    slots_of: Mapping[int, Sequence[tuple[int, int, int | None]]]


@dataclass(frozen=True)
class Launch:
    """Runs kernels [first, first + count) of the schedule in one native call."""

    first: int
    count: int


@dataclass(frozen=True)
class Linear:
    """A vendor linear; views are numbers of ``Phase.views``.

    Attributes:
        name: for profiles.
        x, bias, out: views.
        weight: packed, or a view of a plain matrix.
        fresh: the value that the library's own result stands for, or None to write into ``out``.
        patches: slots that then get the result's address: (position, byte offset as a number of the size table, None
            for 0).
    """

    name: str
    x: int
    weight: PackedLinear | int
    bias: int | None
    out: int
    fresh: int | None = None
    patches: tuple[tuple[int, int | None], ...] = ()


@dataclass(frozen=True)
class Eager:
    """An eager step; views as in ``Linear``."""

    name: str
    step: EagerStep
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


Action = Launch | Linear | Eager


@dataclass(frozen=True)
class Schedule:
    """What runs for one outcome of all tables.

    Attributes:
        steps: records of the kernels that run, in order, with nothing but their functions filled in.
        arguments: bytes from the first argument slot of the phase to theirs.
        grids: as in ``KernelArrays``.
        names: of those kernels.
        numbers: of those kernels in the phase.
        actions: what to do in order, each with the fresh values that nothing needs afterwards.
        fresh: values for which a result of the vendor library stands.
    """

    steps: np.ndarray
    arguments: np.ndarray
    grids: np.ndarray
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    actions: tuple[tuple[Action, tuple[int, ...]], ...]
    fresh: frozenset[int]


def flatten(steps: Sequence[Step]) -> list[PlainStep]:
    """The steps, with those of all entries in place of a table."""
    flat: list[PlainStep] = []
    for step in steps:
        if isinstance(step, Choice):
            flat += [inner for _, _, entry in step.table for inner in entry]
        elif isinstance(step, PlainStep):
            flat.append(step)
    return flat


def step_name(step: PlainStep) -> str:
    """What a step is called in profiles."""
    if isinstance(step, KernelStep):
        return step.kernel.name
    kind = "vendor_linear" if isinstance(step, VendorLinear) else "eager"
    return f"{kind}({', '.join(step.origin)})"


class FreshOutputs:
    """Finds the vendor linears whose own result tensor can stand for the value they write.

    The library's op returns a new tensor in any case, and a copy into planned memory is one more pass over it. The
    result can stand for a value that no other step writes and no other phase touches. On one thread no clear difference
    to copying was measured; on two threads it is not settled.

    Args:
        spec: the program.
        steps: steps of a phase, flattened.
        weights: by value index.
        local: values that no other phase touches.
    """

    def __init__(
        self, spec: ProgramSpec, steps: Sequence[PlainStep], weights: Mapping[int, LoadedWeight], local: frozenset[int]
    ) -> None:
        self._candidates: dict[int, int] = {}
        for step in steps:
            if isinstance(step, VendorLinear) and isinstance(weights.get(step.weight), PackedLinear):
                value = spec.values[step.out.value]
                planned = value.storage in (Storage.ARENA, Storage.OUTPUT)
                if planned and value.index in local and _covers(step.out, value.shape):
                    self._candidates[id(step)] = value.index

    def among(self, steps: Sequence[PlainStep]) -> dict[int, int]:
        """For the steps that run: position of each such linear -> value."""
        writers: dict[int, int] = {}
        for step in steps:
            for value in step.writes:
                writers[value] = writers.get(value, 0) + 1
        found: dict[int, int] = {}
        seen: set[int] = set()
        for position, step in enumerate(steps):
            candidate = self._candidates.get(id(step))
            if candidate is not None and writers[candidate] == 1 and candidate not in seen:
                found[position] = candidate
            seen.update(step.reads, step.writes)
        return found


def _covers(view: View, shape: Sequence[Size]) -> bool:
    same_count = sympy.expand(sympy.sympify(product(view.shape)) - sympy.sympify(product(shape))) == 0
    return bool(same_count and view.offset == 0 and view.strides == contiguous_strides(view.shape))


def make_schedule(
    spec: ProgramSpec,
    steps: Sequence[PlainStep],
    kernels: KernelArrays,
    actions: Mapping[int, Linear | Eager],
    fresh: Mapping[int, int],
) -> Schedule:
    """Groups the steps that run.

    Args:
        spec: the program.
        steps: those that run, in order.
        kernels: of the phase.
        actions: by ``id`` of a vendor or eager step.
        fresh: as of ``FreshOutputs.among``.
    """
    launches = [step for step in steps if isinstance(step, KernelStep)]
    order = np.array([kernels.numbers[id(step)] for step in launches], dtype=np.int64)
    running = set(order.tolist())
    made: list[Action] = []
    last_use: dict[int, int] = {}
    launched = 0
    for position, step in enumerate(steps):
        if isinstance(step, KernelStep):
            if made and isinstance(made[-1], Launch):
                made[-1] = Launch(made[-1].first, made[-1].count + 1)
            else:
                made.append(Launch(launched, 1))
            launched += 1
        else:
            action: Action = actions[id(step)]
            if position in fresh and isinstance(action, Linear):
                slots = kernels.slots_of.get(fresh[position], ())
                patches = tuple((place, offset) for kernel, place, offset in slots if kernel in running)
                action = Linear(action.name, action.x, action.weight, action.bias, action.out, fresh[position], patches)
            made.append(action)
        last_use.update(dict.fromkeys((*step.reads, *step.writes), len(made) - 1))
    done: list[tuple[int, ...]] = [()] * len(made)
    for value in fresh.values():
        if spec.values[value].storage is Storage.ARENA:
            done[last_use[value]] += (value,)
    records = np.zeros(len(launches), dtype=STEP)
    records["fn"] = kernels.functions[order]
    return Schedule(
        steps=records,
        arguments=kernels.starts[order] * np.uint64(8),
        grids=kernels.grids[order],
        names=tuple(step.kernel.name for step in launches),
        numbers=tuple(order.tolist()),
        actions=tuple(zip(made, done, strict=True)),
        fresh=frozenset(fresh.values()),
    )
