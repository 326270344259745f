"""One element of a value as a formula over its index: what masks are proved with.

``Elements.at(node, index)`` follows the graph backwards and says what stands at ``index`` of the node's tensor: views
only change the index, ``arange`` turns it into a number, inputs end in ``Load``. No node is known by its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, find_fact
from tilewright.ir.sizes import Size
from tilewright.ir.views import same_size
from tilewright.passes.rewrite import argument, dtype_of, operand, rank_of, shape_of, size_value

aten = torch.ops.aten
Index = tuple[Any, ...]


@dataclass(frozen=True)
class Integer:
    """An integer known as an expression over index variables and sizes."""

    value: Any


@dataclass(frozen=True)
class Number:
    """A constant: float or bool."""

    value: float | bool


@dataclass(frozen=True)
class Load:
    """The element of an input or constant at an index."""

    node: Node
    index: Index


@dataclass(frozen=True)
class Apply:
    """An operation on elements: a comparison, "and", "or", "not", "where", "add", "sub", "mul", "neg", "abs", or
    "bool" and "number", which convert to bool (nonzero) and back (0 or 1).
    """

    name: str
    args: tuple["Element", ...]


Element = Integer | Number | Load | Apply


class Unknown(Exception):
    """An op this module does not follow; the message names it."""


_NAMES: dict[Any, str] = {
    aten.bitwise_and.Tensor: "and", aten.logical_and.default: "and", aten.bitwise_or.Tensor: "or",
    aten.logical_or.default: "or", aten.logical_not.default: "not", aten.bitwise_not.default: "not",
    aten.eq.Tensor: "eq", aten.eq.Scalar: "eq", aten.ne.Tensor: "ne", aten.ne.Scalar: "ne", aten.lt.Tensor: "lt",
    aten.lt.Scalar: "lt", aten.le.Tensor: "le", aten.le.Scalar: "le", aten.gt.Tensor: "gt", aten.gt.Scalar: "gt",
    aten.ge.Tensor: "ge", aten.ge.Scalar: "ge", aten.add.Tensor: "add", aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul", aten.neg.default: "neg", aten.abs.default: "abs", aten.where.self: "where",
}  # fmt: skip


class Elements:
    """Formulas of elements in one graph."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self._known: dict[tuple[Node, Index], Element] = {}

    def at(self, node: Any, index: Index) -> Element:
        """The element of ``node`` at ``index``, one entry an axis.

        Raises:
            Unknown: an op on the way is not followed.
        """
        if not isinstance(node, Node):
            return _constant(node)
        size = size_value(node)
        if size is not None:
            return Integer(sympy.sympify(size))
        key = (node, index)
        if key not in self._known:
            self._known[key] = self._at(node, index)
        return self._known[key]

    def _at(self, node: Node, index: Index) -> Element:
        if node.op in ("placeholder", "get_attr"):
            return Load(node, index)
        if node.op != "call_function":
            raise Unknown(f"{node.op} {node.target}")
        if node.target in _NAMES:
            return self._apply(node, index)
        return follow_view(self, node, index)

    def _apply(self, node: Node, index: Index) -> Element:
        name = _NAMES[node.target]
        parts = tuple(self.at(a, self.aligned(a, index)) for a in node.args)
        if name in ("and", "or", "not") and any(isinstance(a, Node) and dtype_of(a) != torch.bool for a in node.args):
            if "bitwise" in str(node.target):
                raise Unknown(f"{node.target} of integers")
            parts = tuple(Apply("bool", (part,)) for part in parts)
        return arithmetic(name, parts)

    def aligned(self, value: Any, index: Index) -> Index:
        """The index into an operand that broadcasts to where ``index`` points."""
        if not isinstance(value, Node) or find_fact(value, TensorType) is None:
            return ()
        shape = shape_of(value)
        tail = index[len(index) - len(shape) :]
        return tuple(sympy.Integer(0) if size == 1 else i for size, i in zip(shape, tail, strict=True))


def arithmetic(name: str, parts: Sequence[Element]) -> Element:
    """Integers are computed at once; everything else stays a formula."""
    values = [p.value for p in parts if isinstance(p, Integer)]
    if len(values) == len(parts):
        match name:
            case "add":
                return Integer(values[0] + values[1])
            case "sub":
                return Integer(values[0] - values[1])
            case "mul":
                return Integer(values[0] * values[1])
            case "neg":
                return Integer(-values[0])
    return Apply(name, tuple(parts))


def _constant(value: Any) -> Element:
    if isinstance(value, bool | float):
        return Number(value)
    if isinstance(value, int):
        return Integer(sympy.Integer(value))
    raise Unknown(f"a constant {value!r}")


def _as_size(value: Any) -> Any:
    size: Size | None = size_value(value)
    if size is None:
        raise Unknown(f"a size {value!r}")
    return sympy.sympify(size)


Follow = Callable[[Elements, Node, Index], Element]
_FOLLOW: dict[Any, Follow] = {}


def _follow(*targets: Any) -> Callable[[Follow], Follow]:
    def add(function: Follow) -> Follow:
        _FOLLOW.update(dict.fromkeys(targets, function))
        return function

    return add


def follow_view(elements: Elements, node: Node, index: Index) -> Element:
    """The element of a view, at the index it has in its source; or of an iota or a filled tensor.

    Raises:
        Unknown: the op is not followed.
    """
    follow = _FOLLOW.get(node.target)
    if follow is None:
        raise Unknown(str(node.target))
    return follow(elements, node, index)


@_follow(torch.ops.prims.convert_element_type.default)
def _convert(elements: Elements, node: Node, index: Index) -> Element:
    source = operand(node)
    part = elements.at(source, index)
    before, after = dtype_of(source), dtype_of(node)
    if after == torch.bool and before != torch.bool:
        return Apply("bool", (part,))
    if before == torch.bool and after != torch.bool:
        return Apply("number", (part,))
    if before.is_floating_point and not after.is_floating_point:
        raise Unknown("a float rounded to an integer")
    return part


@_follow(aten.arange.start_step)
def _arange(elements: Elements, node: Node, index: Index) -> Element:
    return Integer(_as_size(node.args[0]) + _as_size(node.args[2]) * index[0])


@_follow(aten.full.default)
def _full(elements: Elements, node: Node, index: Index) -> Element:
    value = node.args[1]
    if dtype_of(node) == torch.bool:
        return Number(bool(value))
    return _constant(value) if not isinstance(value, Node) else elements.at(value, ())


@_follow(aten.unsqueeze.default)
def _unsqueeze(elements: Elements, node: Node, index: Index) -> Element:
    axis = operand(node, 1)
    return elements.at(operand(node), index[:axis] + index[axis + 1 :])


@_follow(aten.squeeze.dims)
def _squeeze(elements: Elements, node: Node, index: Index) -> Element:
    inner = list(index)
    for axis in sorted(operand(node, 1)):
        inner.insert(axis, sympy.Integer(0))
    return elements.at(operand(node), tuple(inner))


@_follow(aten.expand.default)
def _expand(elements: Elements, node: Node, index: Index) -> Element:
    return elements.at(operand(node), elements.aligned(operand(node), index))


@_follow(aten.permute.default)
def _permute(elements: Elements, node: Node, index: Index) -> Element:
    inner = [sympy.Integer(0)] * len(index)
    for place, axis in enumerate(operand(node, 1)):
        inner[axis] = index[place]
    return elements.at(operand(node), tuple(inner))


@_follow(aten.reshape.default)
def _reshape(elements: Elements, node: Node, index: Index) -> Element:
    """Axes of size 1 may come and go; a fixed inner axis may be split off, or be joined to the one before it."""
    source = operand(node)
    new = [(place, size) for place, size in zip(index, shape_of(node), strict=True) if size != 1]
    found: list[Any] = []
    for size in reversed(shape_of(source)):
        if size == 1:
            found.append(sympy.Integer(0))
            continue
        place, own = new.pop() if new else (None, 1)
        if own != size and isinstance(own, int) and new and same_size(new[-1][1] * own, size):
            outer, _ = new.pop()
            place = outer * own + place
        elif own != size and isinstance(size, int) and (outer := _outer_size(own, size)) is not None:
            before, place = _split(place, size)
            new.append((before, outer))
        elif own != size:
            raise Unknown("a reshape that joins or splits axes")
        found.append(place)
    if new:
        raise Unknown("a reshape that joins or splits axes")
    return elements.at(source, tuple(reversed(found)))


def _outer_size(joined: Size, inner: int) -> Size | None:
    """n of an axis of n * inner places, where that shows."""
    outer = sympy.expand(sympy.sympify(joined) / inner)
    return outer if all(term.as_coeff_Mul()[0].is_Integer for term in sympy.Add.make_args(outer)) else None


def _split(place: Any, inner: int) -> tuple[Any, Any]:
    """The places on two axes of one on both together: place == outer * inner + last, with last below inner.

    A place with two symbols was joined by a reshape. There the one that stands for ``last`` is below the factor of the
    other, which is therefore to be ``inner``.
    """
    if place.is_Integer:
        return divmod(place, inner)
    terms = sympy.Add.make_args(sympy.expand(place))
    outer = sum((term / inner for term in terms if (term.as_coeff_Mul()[0] / inner).is_Integer), sympy.Integer(0))
    last = sympy.expand(place - outer * inner)
    factors = [term.as_coeff_Mul()[0] for term in sympy.Add.make_args(outer) if term.free_symbols]
    if last != 0 and not (last.is_Symbol and 1 in factors):
        raise Unknown(f"a reshape that splits an axis at {place}")
    return outer, last


@_follow(aten.slice.Tensor)
def _slice(elements: Elements, node: Node, index: Index) -> Element:
    axis, start, step = operand(node, 1), _as_size(argument(node, 2, "start", 0)), argument(node, 4, "step", 1)
    if start.is_negative:
        start = start + shape_of(operand(node))[axis]
    inner = list(index)
    inner[axis] = start + step * index[axis]
    return elements.at(operand(node), tuple(inner))


@_follow(aten.select.int)
def _select(elements: Elements, node: Node, index: Index) -> Element:
    axis, place = operand(node, 1), _as_size(node.args[2])
    if place.is_negative:
        place = place + shape_of(operand(node))[axis]
    return elements.at(operand(node), (*index[:axis], place, *index[axis:]))


@_follow(aten.masked_fill.Scalar)
def _masked_fill(elements: Elements, node: Node, index: Index) -> Element:
    source, where, value = node.args
    parts = (
        elements.at(where, elements.aligned(where, index)),
        _constant(value),
        elements.at(source, elements.aligned(source, index)),
    )
    return Apply("where", parts)


@_follow(aten.index.Tensor)
def _index(elements: Elements, node: Node, index: Index) -> Element:
    """Advanced indexing of the leading axes by integer tensors that broadcast against one another."""
    source, places = operand(node), operand(node, 1)
    if any(p is None or dtype_of(p) == torch.bool for p in places):
        raise Unknown("indexing by a mask, or of later axes")
    rank = max(rank_of(p) for p in places)
    head = index[:rank]
    inner = []
    for place, size in zip(places, shape_of(source), strict=False):
        found = elements.at(place, elements.aligned(place, head))
        if not isinstance(found, Integer):
            raise Unknown("indexing by places known only at run time")
        inner.append(found.value + size if found.value.is_negative else found.value)
    return elements.at(source, (*inner, *index[rank:]))


@_follow(aten.tril.default, aten.triu.default)
def _triangle(elements: Elements, node: Node, index: Index) -> Element:
    shift = Integer(index[-1] - index[-2] - argument(node, 1, "diagonal", 0))
    kept = Apply("le" if node.target is aten.tril.default else "ge", (shift, Integer(sympy.Integer(0))))
    zero: Element = Number(False) if dtype_of(node) == torch.bool else Integer(sympy.Integer(0))
    return Apply("where", (kept, elements.at(operand(node), index), zero))
