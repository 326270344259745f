"""Reductions inside a kernel: over a vector in registers, over a loop of vectors, or over a loop of single places.

Norms take two passes: the mean first, then the mean of the squared distances from it, which does not cancel as
``E[x^2] - E[x]^2`` does.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tilewright.codegen import selection
from tilewright.codegen.columns import (
    ColumnConflict,
    column_block,
    columns_in_registers,
    columns_name,
    define_columns,
)
from tilewright.codegen.index import Index, unravel
from tilewright.codegen.nodes import arguments, compute_dtype, literal, op_name
from tilewright.codegen.writer import TL_TYPES, KernelWriter, Register, Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.sizes import Size, product
from tilewright.ops import Flow, traits_of
from tilewright.ops.selection import TOP_INDICES

if TYPE_CHECKING:
    from tilewright.codegen.evaluate import Evaluator

aten = torch.ops.aten

_REDUCE = {"sum": "tl.sum", "max": "tl.max", "min": "tl.min"}
_COMBINE = {"sum": "{0} + {1}", "max": "tl.maximum({0}, {1})", "min": "tl.minimum({0}, {1})"}

Make = Callable[[Index], Register]


def reduce_columns(
    writer: KernelWriter, size: Size, make: Make, kind: str, outer: frozenset[str], hint: str, key: Any
) -> Register:
    """Reduces ``make(column)`` over the columns of an axis; the result varies with ``outer`` only.

    Args:
        key: names the result, so that a second request for it does not compute it again.

    Raises:
        ColumnConflict: ``outer`` varies along the tile's column axis.
    """
    if writer.rank - 1 in writer.axes(outer):
        raise ColumnConflict("a reduction has no axis of the tile to run along")
    cache = writer.scope_of(outer).cache
    key = ("reduced", key, kind)
    if key not in cache:
        block, looped = column_block(writer, size)
        if looped:
            cache[key] = _reduce_in_loop(writer, size, block, make, kind, outer, hint)
        else:
            column = columns_in_registers(writer, size)
            cache[key] = _reduce_tile(writer, _neutral(writer, make(column), column, kind), kind, outer, hint)
    found: Register = cache[key]
    return found


def _reduce_in_loop(
    writer: KernelWriter, size: Size, block: int, make: Make, kind: str, outer: frozenset[str], hint: str
) -> Register:
    name = columns_name(writer, size)
    total = writer.unique(hint)
    head = f"for start in range(0, {writer.size(size)}, BLOCK_{name.upper()}):"
    with writer.detached(outer), writer.block(head) as scope:
        column = define_columns(writer, name, size, block, "start")
        value = _neutral(writer, make(column), column, kind)
        part = _reduce_tile(writer, value, kind, outer | column.deps, f"{hint}_part")
        writer.statement(f"{total} = {_COMBINE[kind].format(total, part.text)}")
        scope.before.append(f"{total} = {_initial(writer, value.dtype, kind, outer)}")
    return Register(total, value.dtype, outer)


def _reduce_tile(writer: KernelWriter, value: Register, kind: str, deps: frozenset[str], hint: str) -> Register:
    axis = "1, keep_dims=True" if writer.rank == 2 else "0"
    return Register(writer.emit(hint, f"{_REDUCE[kind]}({value.text}, {axis})", deps), value.dtype, deps)


def _identity(dtype: torch.dtype, kind: str) -> str:
    if kind == "sum":
        return "0.0" if dtype.is_floating_point else "0"
    if dtype.is_floating_point:
        return 'float("-inf")' if kind == "max" else 'float("inf")'
    info = torch.iinfo(dtype)
    return str(info.min if kind == "max" else info.max)


def _initial(writer: KernelWriter, dtype: torch.dtype, kind: str, deps: frozenset[str]) -> str:
    shape = ", ".join(writer.shape(deps))
    return f"tl.full([{shape}], {_identity(dtype, kind)}, {TL_TYPES[dtype]})"


def _neutral(writer: KernelWriter, value: Register, column: Index, kind: str) -> Register:
    """The value with columns that do not count replaced by what leaves the reduction unchanged."""
    deps = value.deps | column.deps
    mask = writer.mask(column.deps)
    if mask is None and column.deps <= value.deps:
        return value
    # A value that does not vary along the columns has to be counted once for each of them.
    kept = mask or f"{writer.index_text(column)} >= 0"
    text = writer.emit(f"{value.text}_kept", f"tl.where({kept}, {value.text}, {_identity(value.dtype, kind)})", deps)
    return Register(text, value.dtype, deps)


def reduce_places(
    writer: KernelWriter, size: Size, make: Make, kind: str, outer: frozenset[str], hint: str
) -> Register:
    """Reduces over single places in a loop, for an axis that is not the tile's column axis."""
    total = writer.unique(hint)
    with writer.detached(outer):
        name = writer.unique("place")
        with writer.block(f"for {name} in range(0, {writer.size(size)}):") as scope:
            place = writer.define(Var(name, size))
            value = make(place)
            missing = writer.shape(outer) != writer.shape(value.deps)
            text = f"tl.broadcast_to({value.text}, {', '.join(writer.shape(outer))})" if missing else value.text
            writer.statement(f"{total} = {_COMBINE[kind].format(total, text)}")
            scope.before.append(f"{total} = {_initial(writer, value.dtype, kind, outer)}")
    return Register(total, value.dtype, outer)


def evaluate(ev: "Evaluator", node: Node, index: tuple[Index, ...]) -> Register:
    """The value of a reduction, norm, softmax or prefix sum at an index of its result."""
    if traits_of(node.target).flow is Flow.REDUCE:
        return _reduction(ev, node, index)
    rule = _LAST_AXIS.get(node.target)
    if rule is None:
        raise CodegenError(f"op {node.target} has no kernel", where=where(node))
    return rule(ev, node, index)


def _deps(index: tuple[Index, ...]) -> frozenset[str]:
    return frozenset(name for part in index for name in part.deps)


def reduced_axes(node: Node) -> list[int]:
    """Axes of its operand that a REDUCE op reduces, counted from 0, in order."""
    given = list(arguments(node).values())
    rank = len(fact(given[0], TensorType).shape)
    axes = given[traits_of(node.target).axes_arg or 1]
    axes = [axes] if isinstance(axes, int) else axes or range(rank)
    return sorted({int(axis) % rank for axis in axes})


def _reduction(ev: "Evaluator", node: Node, index: tuple[Index, ...]) -> Register:
    """sum, mean, amax, amin and argmax over any axes."""
    given = list(arguments(node).items())
    traits = traits_of(node.target)
    source: Node = given[0][1]
    shape = fact(source, TensorType).shape
    axes = reduced_axes(node)
    keep = dict(given).get("keepdim", False)
    dtype = compute_dtype(fact(source if traits.reduce == "argmax" else node, TensorType).dtype)
    left = iter(index)
    outer = [next(left) if axis not in axes or keep else Index() for axis in range(len(shape))]
    reduced = [shape[axis] for axis in axes]
    kind = {"mean": "sum", "argmax": "max"}.get(traits.reduce or "", traits.reduce or "")
    if kind not in _REDUCE:
        raise CodegenError(f"op {node.target} has no kernel", where=where(node))

    def make(place: Index) -> Register:
        full = list(outer)
        for axis, part in zip(axes, unravel(place, reduced), strict=True):
            full[axis] = part
        return ev.number(source, tuple(full), dtype)

    deps = _deps(tuple(outer[axis] for axis in range(len(shape)) if axis not in axes))
    size, writer = product(reduced), ev.writer
    if writer.rank - 1 in writer.axes(deps) and not writer.loop_places:
        raise ColumnConflict("the reduced axis is not the last", where=where(node))

    def reduce(part: Make, how: str, hint: str) -> Register:
        if writer.rank - 1 in writer.axes(deps):
            return reduce_places(writer, size, part, how, deps, hint)
        return reduce_columns(writer, size, part, how, deps, hint, (node, hint, tuple(outer)))

    result = reduce(make, kind, traits.reduce or kind)
    if traits.reduce == "mean":
        return Register(writer.emit("mean", f"{result.text} / {writer.size(size)}", deps), dtype, deps)
    if kind == "sum":
        return result
    if not dtype.is_floating_point:
        return _first_place(writer, make, result, None, size, reduce) if traits.reduce == "argmax" else result

    def is_nan(place: Index) -> Register:
        value = make(place)
        return Register(
            writer.emit("nan", f"({value.text} != {value.text}).to(tl.int32)", value.deps), torch.int32, value.deps
        )

    # tl.max and tl.min pass over NaN, where torch returns it.
    nans = reduce(is_nan, "sum", "nans")
    if traits.reduce == "argmax":
        return _first_place(writer, make, result, nans, size, reduce)
    text = writer.emit(f"{kind}_or_nan", f'tl.where({nans.text} > 0, float("nan"), {result.text})', deps)
    return Register(text, dtype, deps)


def _first_place(
    writer: KernelWriter,
    make: Make,
    peak: Register,
    nans: Register | None,
    size: Size,
    reduce: Callable[[Make, str, str], Register],
) -> Register:
    """First of the places whose value is the greatest; NaN, where there is one, counts as that."""

    def place_of_peak(place: Index) -> Register:
        value = make(place)
        deps = value.deps | peak.deps | place.deps
        found = f"{value.text} == {peak.text}"
        if nans is not None:
            found = f"tl.where({nans.text} > 0, {value.text} != {value.text}, {found})"
        at = f"tl.where({found}, {writer.index_text(place)}, {writer.size(size)}).to(tl.int64)"
        return Register(writer.emit("at", at, deps), torch.int64, deps)

    return reduce(place_of_peak, "min", "argmax")


def _norm_parts(
    ev: "Evaluator", node: Node, index: tuple[Index, ...]
) -> tuple[Make, Size, frozenset[str], torch.dtype]:
    given = arguments(node)
    source: Node = given["input"]
    kind = fact(source, TensorType)
    if len(given["normalized_shape"]) != 1:
        raise CodegenError("a norm over several axes has no kernel", where=where(node))
    dtype = compute_dtype(kind.dtype)
    return (lambda c: ev.number(source, (*index[:-1], c), dtype)), kind.shape[-1], _deps(index[:-1]), dtype


def _scaled(ev: "Evaluator", node: Node, index: tuple[Index, ...], text: str, deps: frozenset[str]) -> Register:
    """The normalized value times the weight plus the bias, as far as given."""
    given = arguments(node)
    dtype = compute_dtype(fact(node, TensorType).dtype)
    for name, operator in (("weight", "*"), ("bias", "+")):
        if isinstance(given.get(name), Node):
            operand = ev.number(given[name], index[-1:], dtype)
            text, deps = f"{text} {operator} {operand.text}", deps | operand.deps
    return Register(ev.writer.emit(op_name(node), text, deps), dtype, deps)


def _layer_norm(ev: "Evaluator", node: Node, index: tuple[Index, ...]) -> Register:
    x, size, outer, dtype = _norm_parts(ev, node, index)
    writer, count = ev.writer, ev.writer.size(size)
    total = reduce_columns(writer, size, x, "sum", outer, "total", (node, "total", index[:-1]))
    mean = writer.emit("mean", f"{total.text} / {count}", outer)

    def squared(column: Index) -> Register:
        value = x(column)
        deps = value.deps | outer
        # Columns past the end hold 0 - mean: they are left out before they are squared and summed.
        mask = writer.mask(column.deps)
        distance = f"{value.text} - {mean}"
        kept = distance if mask is None else f"tl.where({mask}, {distance}, 0.0)"
        away = writer.emit("centered", kept, deps)
        return Register(writer.emit("squared", f"{away} * {away}", deps), dtype, deps)

    spread = reduce_columns(writer, size, squared, "sum", outer, "spread", (node, "spread", index[:-1]))
    rstd = writer.emit("rstd", f"tl.rsqrt({spread.text} / {count} + {literal(arguments(node)['eps'])})", outer)
    value = x(index[-1])
    return _scaled(ev, node, index, f"({value.text} - {mean}) * {rstd}", value.deps | outer)


def _rms_norm(ev: "Evaluator", node: Node, index: tuple[Index, ...]) -> Register:
    x, size, outer, dtype = _norm_parts(ev, node, index)
    writer = ev.writer
    eps = arguments(node)["eps"]
    # torch takes the epsilon of the type it computes in where none is given.
    eps = torch.finfo(dtype).eps if eps is None else eps

    def squared(column: Index) -> Register:
        value = x(column)
        return Register(writer.emit("squared", f"{value.text} * {value.text}", value.deps), dtype, value.deps)

    total = reduce_columns(writer, size, squared, "sum", outer, "total", (node, "total", index[:-1]))
    rstd = writer.emit("rstd", f"tl.rsqrt({total.text} / {writer.size(size)} + {literal(eps)})", outer)
    value = x(index[-1])
    return _scaled(ev, node, index, f"{value.text} * {rstd}", value.deps | outer)


def _softmax(ev: "Evaluator", node: Node, index: tuple[Index, ...]) -> Register:
    given = arguments(node)
    source: Node = given["self"]
    shape = fact(source, TensorType).shape
    axis = int(given["dim"]) % len(shape)
    dtype = compute_dtype(fact(node, TensorType).dtype)
    others = (*index[:axis], *index[axis + 1 :])
    outer = _deps(others)
    writer = ev.writer

    def x(column: Index) -> Register:
        return ev.number(source, (*index[:axis], column, *index[axis + 1 :]), dtype)

    peak = reduce_columns(writer, shape[axis], x, "max", outer, "peak", (node, "peak", others))

    def weight(column: Index) -> Register:
        value = x(column)
        deps = value.deps | outer
        return Register(writer.emit("weight", f"tl.exp({value.text} - {peak.text})", deps), dtype, deps)

    total = reduce_columns(writer, shape[axis], weight, "sum", outer, "total", (node, "total", others))
    value = weight(index[axis])
    return Register(writer.emit("softmax", f"{value.text} / {total.text}", value.deps), dtype, value.deps)


def _cumsum(ev: "Evaluator", node: Node, index: tuple[Index, ...]) -> Register:
    given = arguments(node)
    source: Node = given["self"]
    shape = fact(source, TensorType).shape
    axis = int(given["dim"]) % len(shape)
    dtype = compute_dtype(fact(node, TensorType).dtype)
    outer = _deps((*index[:axis], *index[axis + 1 :]))
    writer = ev.writer
    column = index[axis]
    along = writer.rank - 1
    if (
        along in writer.axes(outer)
        or along not in writer.axes(column.deps)
        or column.const != 0
        or len(column.terms) != 1
    ):
        raise ColumnConflict("a prefix sum must run along the columns of the tile", where=where(node))
    value = ev.number(source, index, dtype)
    deps = value.deps | column.deps
    value = _neutral(writer, value, column, "sum")
    text = writer.emit("cumsum", f"tl.cumsum({value.text}, {along})", deps)
    scope = writer.scope_of(deps)
    if scope.head is None or not scope.head.startswith("for start"):
        return Register(text, dtype, deps)
    carry = writer.unique("carry")
    scope.before.append(f"{carry} = {_initial(writer, dtype, 'sum', outer)}")
    result = writer.emit("cumsum", f"{text} + {carry}", deps)
    block = _reduce_tile(writer, value, "sum", deps, "block_total")
    scope.lines.append(f"{carry} += {block.text}")
    return Register(result, dtype, deps)


_LAST_AXIS: dict[object, Callable[["Evaluator", Node, tuple[Index, ...]], Register]] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.softmax.int: _softmax,
    aten.cumsum.default: _cumsum,
    aten.gather.default: selection.gather,
    TOP_INDICES: selection.top_indices,
}
