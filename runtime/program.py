"""A program that is loaded and can be called: its steps as arrays, its weights laid out, its memory planned."""

import ctypes
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from tilewright import settings
from tilewright.errors import InputError, TilewrightError
from tilewright.ir.kernels import BuiltKernel, KernelSource
from tilewright.ir.program import ProgramSpec, ReadTokens, Step, Storage
from tilewright.ir.sizes import TOKENS, product
from tilewright.runtime.bound import Bound, Call, Launcher, Workspace
from tilewright.runtime.check import check_spec
from tilewright.runtime.memory import Lifetime, MemoryPlan, touched
from tilewright.runtime.phase import Phase
from tilewright.runtime.schedule import FreshOutputs, flatten
from tilewright.runtime.stats import Recorder, Stats
from tilewright.runtime.weights import ALIGNMENT, LoadedWeight, PackedLinear, load_weights


@dataclass(frozen=True)
class _Input:
    position: int
    name: str
    value: int
    dtype: torch.dtype
    rank: int
    state: bool


class Program:
    """A loaded program.

    Any number of threads may call it at once, and it may be called from inside one of its own eager steps: each call
    takes a workspace (arenas and argument slots) of its own from a pool, which grows to the number of calls that were
    under way at the same time. A call that ends by an error or an interrupt leaves the program as it was.

    Args:
        spec: what to run.
        kernels: every kernel of ``spec``, built.
        launcher: runs kernels natively.
        stats: counters to add to; new ones by default.

    Raises:
        TilewrightError: the spec contradicts itself, or a weight cannot be laid out.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        kernels: Mapping[KernelSource, BuiltKernel],
        launcher: Launcher,
        stats: Stats | None = None,
    ) -> None:
        self.spec = spec
        self.stats = Stats() if stats is None else stats
        self._recorder = Recorder(self.stats)
        self._launcher = launcher
        self._kernels = tuple(kernels.values())  # their code has to stay loaded
        weights = load_weights(spec.weights)
        self._weights = {v.index: weights[str(v.source)] for v in spec.values if v.storage is Storage.WEIGHT}
        check_spec(spec, self._weights, kernels)
        self._bind = sorted(spec.bind, key=lambda bound: spec.symbols.index(bound[0]))
        symbols = [symbol for symbol, _, _ in self._bind]
        self._rows = symbols.index(TOKENS) if TOKENS in symbols else None
        self._reads = tuple(step for step in spec.steps if isinstance(step, ReadTokens))
        self._phases = _make_phases(spec, self._weights, kernels)
        self._inputs = tuple(
            _Input(int(value.source or 0), value.name, value.index, value.dtype, len(value.shape), value.state)
            for value in spec.values
            if value.storage is Storage.INPUT
        )
        first = self._phases[0].table
        self._input_shapes = tuple(tuple(map(first.add, spec.values[given.value].shape)) for given in self._inputs)
        self._read_sizes = tuple(
            (phase.table.add(read.view.offset), phase.table.add(read.rows_padded))
            for phase, read in zip(self._phases, self._reads, strict=False)
        )
        for phase in self._phases:
            phase.compile_sizes()
        self._idle: list[Workspace] = []

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Runs the program.

        Args:
            inputs: contiguous CPU tensors, in the order of ``spec.inputs``.

        Returns:
            The outputs in the order of ``spec.outputs``: fresh tensors that the caller keeps, or inputs and weights
            that the graph returns as they are.

        Raises:
            InputError: an input has another dtype, rank or shape than the program was made for.
            MemoryError: the arena cannot grow to what these sizes need.
        """
        return self._run(inputs, None)

    def profile(self, *inputs: Tensor) -> list[tuple[str, float]]:
        """Runs the program with every step timed: (step, seconds) in order of execution.

        Each kernel is a native call of its own here, so the sum is a little more than a plain run takes.
        """
        timeline: list[tuple[str, float]] = []
        self._run(inputs, timeline)
        return timeline

    def planned_bytes(self, *sizes: int) -> int:
        """Bytes of arena that a call uses.

        Args:
            sizes: values of ``spec.symbols``: (B, S, T) as far as present.

        Results of the vendor library that stand for planned values are not in the arena and not counted.
        """
        return sum(phase.plan.place(sizes[: len(phase.symbols)])[1] for phase in self._phases)

    def bytes_without_reuse(self, *sizes: int) -> int:
        """What ``planned_bytes`` would be if every value had memory of its own."""
        return sum(phase.plan.bytes_without_reuse(sizes[: len(phase.symbols)]) for phase in self._phases)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The stretches between reads of the number of tokens, each with its memory plan."""
        return tuple(self._phases)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of arena that are kept for the next calls: the largest need so far."""
        return sum(workspace.bytes for workspace in self._idle)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in the layouts that steps read, memory that several share counted once.

        What the vendor library makes of a weight is opaque; it is counted as large as the weight.
        """
        counted: dict[object, int] = {}
        for weight in self._weights.values():
            opaque = isinstance(weight, PackedLinear)
            tensor = weight.weight if isinstance(weight, PackedLinear) else weight
            counted[id(tensor) if opaque else tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return sum(counted.values())

    def release_memory(self) -> None:
        """Gives the arenas back; the next call allocates them anew."""
        self._idle.clear()

    def _run(self, inputs: Sequence[Tensor], timeline: list[tuple[str, float]] | None) -> list[Tensor]:
        threads = settings.get("num_threads") or torch.get_num_threads()
        call = Call(self._launcher, threads, self._check_inputs(inputs), timeline)
        sizes = tuple(inputs[position].shape[dim] for _, position, dim in self._bind)
        # Taking from and giving back to a list are atomic, so the pool needs no lock.
        try:
            workspace = self._idle.pop()
        except IndexError:
            workspace = Workspace(self._phases)
        try:
            # Views kept from a call in inference mode could not be written by a later call outside of it.
            outer = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
            with outer, torch.no_grad():
                self._run_phases(call, workspace, sizes)
        finally:
            self._idle.append(workspace)
        self._recorder.add(call.counts)
        return [self._result(value, inputs, call) for value in self.spec.outputs]

    def _run_phases(self, call: Call, workspace: Workspace, sizes: tuple[int, ...]) -> None:
        bound: Bound | None = None
        rows = sizes[self._rows] if self._rows is not None else math.prod(sizes)
        call.counts.rows_computed = call.counts.rows_padded = rows
        for index in range(len(self._phases)):
            bound = workspace.bind(index, sizes, bound)
            if index == 0:
                self._check_shapes(call, bound)
            bound.run(call)
            if index < len(self._reads):
                tokens, padded = self._read(index, bound, call)
                call.counts.rows_computed, call.counts.rows_padded = tokens, padded
                sizes = (*sizes, tokens)

    def _read(self, index: int, bound: Bound, call: Call) -> tuple[int, int]:
        """Number of packed rows, and rows of a padded run."""
        offset, rows_padded = (bound.sizes[number] for number in self._read_sizes[index])
        address = bound.address(self._reads[index].view.value, call)
        tokens = ctypes.c_int32.from_address(address + 4 * offset).value
        if not 0 <= tokens <= rows_padded:
            raise TilewrightError(
                "the row index of a batch is wrong",
                where=f"value '{self.spec.values[self._reads[index].view.value].name}'",
                why=f"it counts {tokens} tokens among {rows_padded} places",
                hint="this is a bug of a kernel; report it with the model's configuration",
            )
        return tokens, rows_padded

    def _result(self, value: int, inputs: Sequence[Tensor], call: Call) -> Tensor:
        record = self.spec.values[value]
        if record.storage is Storage.INPUT:
            return inputs[int(record.source or 0)]
        if record.storage is Storage.WEIGHT:
            return self.spec.weights[str(record.source)].tensor
        return call.tensors[value]

    def _check_inputs(self, inputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Inputs by value index."""
        if len(inputs) != len(self.spec.inputs):
            raise InputError(
                "the program got another number of inputs",
                why=f"it takes {len(self.spec.inputs)} ({', '.join(self.spec.inputs)}), and got {len(inputs)}",
            )
        tensors: dict[int, Tensor] = {}
        for given in self._inputs:
            tensor = inputs[given.position]
            fits = isinstance(tensor, Tensor) and tensor.dtype == given.dtype and tensor.dim() == given.rank
            if not (fits and tensor.is_cpu and tensor.is_contiguous()):
                raise InputError(
                    f"input '{given.name}' does not fit the program",
                    why=f"it is {_describe(tensor)}",
                    hint=f"pass a contiguous CPU tensor of dtype {given.dtype} with {given.rank} dimensions",
                )
            # Kernels may rely on 16 bytes; a slice of a larger tensor begins anywhere.
            if tensor.data_ptr() % ALIGNMENT:
                if given.state:
                    raise InputError(
                        f"input '{given.name}' does not fit the program",
                        why=f"it is written to, and does not begin at a multiple of {ALIGNMENT} bytes",
                        hint="pass a whole tensor",
                    )
                tensor = tensor.clone()
            tensors[given.value] = tensor
        return tensors

    def _check_shapes(self, call: Call, bound: Bound) -> None:
        for given, numbers in zip(self._inputs, self._input_shapes, strict=True):
            expected = tuple(bound.sizes[number] for number in numbers)
            if call.tensors[given.value].shape != expected:
                raise InputError(
                    f"input '{given.name}' does not fit the other inputs",
                    why=f"its shape is {tuple(call.tensors[given.value].shape)}, expected {expected}",
                    hint=f"its sizes are {self.spec.values[given.value].shape}, B and S as of the other inputs",
                )


def _describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
    return f"a {layout} tensor of {tensor.dtype} and shape {tuple(tensor.shape)} on {tensor.device}"


def _make_phases(
    spec: ProgramSpec, weights: Mapping[int, LoadedWeight], kernels: Mapping[KernelSource, BuiltKernel]
) -> list[Phase]:
    """Splits the steps where the number of tokens is read, and plans the memory of each stretch.

    A value's memory is planned by the first stretch that touches it, with the sizes known there.
    """
    symbols = sorted((symbol for symbol, _, _ in spec.bind), key=spec.symbols.index)
    stretches: list[tuple[list[Step], tuple[sympy.Symbol, ...]]] = [([], tuple(symbols))]
    for step in spec.steps:
        if isinstance(step, ReadTokens):
            symbols.append(step.symbol)
            stretches.append(([], tuple(symbols)))
        else:
            stretches[-1][0].append(step)
    spans = touched(spec.steps)
    used_in = [{value for step in steps for value in (*step.reads, *step.writes)} for steps, _ in stretches]
    read = {value for step in spec.steps if isinstance(step, ReadTokens) for value in step.reads}
    phases: list[Phase] = []
    for index, (steps, known) in enumerate(stretches):
        flat = flatten(steps)
        used = {value for step in flat for value in (*step.reads, *step.writes)}
        elsewhere = set().union(read, *used_in[:index], *used_in[index + 1 :])
        fresh = FreshOutputs(spec, flat, weights, frozenset(used - elsewhere))
        planned = used - set().union(*used_in[:index]) - set(fresh.among(flat).values())
        lifetimes = [
            Lifetime(value, product(spec.values[value].shape) * spec.values[value].dtype.itemsize, *spans[value])
            for value in sorted(planned)
            if spec.values[value].storage is Storage.ARENA
        ]
        phases.append(Phase(spec, steps, known, MemoryPlan(known, lifetimes), weights, kernels, fresh))
    return phases
