"""Checks of a program when it is loaded: what it says of itself has to hold before kernels get addresses."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import sympy
import torch

from tilewright.errors import TilewrightError
from tilewright.ir.kernels import BuiltKernel, KernelSource
from tilewright.ir.program import (
    Choice,
    EagerStep,
    KernelStep,
    Pointer,
    ProgramSpec,
    ReadTokens,
    Step,
    Storage,
    VendorLinear,
    View,
)
from tilewright.ir.sizes import Size
from tilewright.runtime.phase import FLOAT_BITS
from tilewright.runtime.schedule import step_name
from tilewright.runtime.weights import LoadedWeight, PackedLinear


def check_spec(
    spec: ProgramSpec, weights: Mapping[int, LoadedWeight], kernels: Mapping[KernelSource, BuiltKernel]
) -> None:
    """Checks a program.

    Args:
        spec: the program.
        weights: its weights as laid out, by value index.
        kernels: its kernels.

    Raises:
        TilewrightError: it contradicts itself; the message names the step or value.
    """
    for index, value in enumerate(spec.values):
        if value.index != index:
            raise _broken(f"value '{value.name}'", f"it says it has index {value.index}, and is at {index}")
    for index in spec.outputs:
        if spec.values[index].storage is Storage.ARENA:
            raise _broken(f"value '{spec.values[index].name}'", "it is returned, but lives in memory that is reused")
    known = {symbol for symbol, _, _ in spec.bind}
    written = {value.index for value in spec.values if value.storage in (Storage.INPUT, Storage.WEIGHT)}
    for step in spec.steps:
        _check_step(step, spec, weights, kernels, known, written)
        if isinstance(step, ReadTokens):
            known.add(step.symbol)
    if missing := [spec.values[index].name for index in spec.outputs if index not in written]:
        raise _broken(f"value '{missing[0]}'", "it is returned, but no step writes it")


def _broken(where: str, why: str) -> TilewrightError:
    return TilewrightError(
        "a program contradicts itself and cannot be loaded",
        where=where,
        why=why,
        hint="this is a bug of code generation; report it with the model's configuration",
    )


def _check_step(
    step: Step,
    spec: ProgramSpec,
    weights: Mapping[int, LoadedWeight],
    kernels: Mapping[KernelSource, BuiltKernel],
    known: set[sympy.Symbol],
    written: set[int],
) -> None:
    where = f"step {_name(step)}"
    names = [value.name for value in spec.values]
    if unwritten := [names[value] for value in step.reads if value not in written]:
        raise _broken(where, f"it reads '{unwritten[0]}', which no step before it writes")
    fixed = (Storage.INPUT, Storage.WEIGHT)
    values = (spec.values[value] for value in step.writes)
    if kept := [value.name for value in values if value.storage in fixed and not value.state]:
        raise _broken(where, f"it writes '{kept[0]}', which is an input or a weight")
    declared = {*step.reads, *step.writes}
    if hidden := [names[view.value] for view in _views(step) if view.value not in declared]:
        raise _broken(where, f"it has a view of '{hidden[0]}', which is neither among its reads nor its writes")
    sizes = [*_sizes(step), *(size for value in declared for size in spec.values[value].shape)]
    if unknown := {str(s) for size in sizes for s in getattr(size, "free_symbols", set()) - known}:
        raise _broken(where, f"its sizes use {', '.join(sorted(unknown))}, which is not known yet when it runs")
    if isinstance(step, KernelStep):
        _check_kernel(step, where, kernels, weights)
    elif isinstance(step, VendorLinear):
        _check_linear(step, where, spec)
    elif isinstance(step, ReadTokens) and spec.values[step.view.value].dtype != torch.int32:
        raise _broken(where, "the number of tokens is not an int32")
    elif isinstance(step, Choice):
        uppers = [upper for upper, _, _ in step.table]
        if not uppers or uppers[-1] is not None or None in uppers[:-1] or not _rises(uppers[:-1]):
            raise _broken(where, f"the bounds {uppers} do not cover every row count once")
        for _, _, entry in step.table:
            inside = set(written)
            for inner in entry:
                _check_step(inner, spec, weights, kernels, known, inside)
            if missing := [names[value] for value in step.writes if value not in inside]:
                raise _broken(where, f"an entry does not write '{missing[0]}'")
    written.update(step.writes)


def _rises(uppers: Sequence[int | None]) -> bool:
    return all(a < b for a, b in itertools.pairwise(uppers) if a is not None and b is not None)


def _check_kernel(
    step: KernelStep,
    where: str,
    kernels: Mapping[KernelSource, BuiltKernel],
    weights: Mapping[int, LoadedWeight],
) -> None:
    signature = step.kernel.signature
    if step.kernel not in kernels:
        raise _broken(where, "its kernel was not built")
    if len(step.args) != len(signature) or len(kernels[step.kernel].params) != len(signature):
        raise _broken(where, f"it passes {len(step.args)} arguments to a kernel that takes {len(signature)}")
    for argument, (name, kind) in zip(step.args, signature, strict=True):
        if isinstance(argument, Pointer) != kind.startswith("*"):
            raise _broken(where, f"argument '{name}' is of type {kind}, and gets {argument}")
        if isinstance(argument, Pointer):
            if isinstance(weights.get(argument.view.value), PackedLinear):
                raise _broken(where, f"argument '{name}' is a weight in the vendor library's own form")
        elif getattr(argument.value, "free_symbols", None) if kind in FLOAT_BITS else isinstance(argument.value, float):
            raise _broken(where, f"argument '{name}' is of type {kind}, and gets {argument.value}")


def _check_linear(step: VendorLinear, where: str, spec: ProgramSpec) -> None:
    if len(step.x.shape) != 2 or len(step.out.shape) != 2:
        raise _broken(where, "its input or output is not a matrix")
    used = [step.x.value, step.weight, step.out.value, *([] if step.bias is None else [step.bias])]
    if len({spec.values[value].dtype for value in used}) != 1:
        raise _broken(where, f"its dtypes differ: {[str(spec.values[value].dtype) for value in used]}")


def _views(step: Step) -> Iterator[View]:
    if isinstance(step, KernelStep):
        yield from (argument.view for argument in step.args if isinstance(argument, Pointer))
    elif isinstance(step, VendorLinear):
        yield from (step.x, step.out)
    elif isinstance(step, EagerStep):
        yield from (*step.inputs, *step.outputs)
    elif isinstance(step, ReadTokens):
        yield step.view


def _sizes(step: Step) -> Iterator[Size]:
    for view in _views(step):
        yield from (*view.shape, *view.strides, view.offset)
    if isinstance(step, KernelStep):
        yield from step.grid
        yield from (a.value for a in step.args if not isinstance(a, Pointer) and not isinstance(a.value, float))
    elif isinstance(step, Choice):
        yield step.rows


def _name(step: Step) -> str:
    if isinstance(step, ReadTokens | Choice):
        return f"{type(step).__name__}({', '.join(step.origin)})"
    return step_name(step)
