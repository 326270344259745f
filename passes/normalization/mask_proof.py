"""Proves what an additive attention mask allows, from its formula over (batch b, head h, query q, key k)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from tilewright.ir.graph import get_tensor, info
from tilewright.passes.normalization.elements import Apply, Element, Elements, Integer, Load, Number, arithmetic
from tilewright.passes.normalization.recognize_attention import LOWEST
from tilewright.passes.rewrite import dtype_of, rank_of, shape_of

B, H, Q, K = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "q", "k"))
# Operations whose arguments are conditions, or may be, and so can be simplified as such.
_OF_CONDITIONS = ("and", "or", "not", "bool", "number", "where")
_NEGATED = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


class NotProved(Exception):
    """The mask is not proved to be validity and order; the message says what stands in the way."""


@dataclass
class Conjunction:
    """What a mask allows: all of ``valid`` hold for the token at (b, k), and -left <= k - q <= right.

    Attributes:
        valid: formulas over elements at (b, k).
        queries: formulas that also hold, at (b, q), written over (b, k): what a token must be to attend at all.
        left, right: greatest distance of a key to the left and right of the query; None for no limit.
        never: nothing is allowed.
    """

    valid: list[Element] = field(default_factory=list)
    queries: list[Element] = field(default_factory=list)
    left: int | None = None
    right: int | None = None
    never: bool = False

    def limit(self, *, left: int | None = None, right: int | None = None) -> None:
        """Narrows the window."""
        if left is not None:
            self.left = left if self.left is None else min(left, self.left)
        if right is not None:
            self.right = right if self.right is None else min(right, self.right)


def _formula(elements: Elements, term: Node) -> Element:
    index = (B, H, Q, K)[4 - rank_of(term) :]
    return elements.at(term, elements.aligned(term, index))


def prove(elements: Elements, term: Node) -> Conjunction:
    """What the additive term allows.

    Raises:
        NotProved, Unknown: it is not 0 for allowed and about -inf for other places, or depends on more than (b, k)
        and q - k.
    """
    result = Conjunction()
    formula = _formula(elements, term)
    _conjoin(elements, _kept(elements, formula), result)
    if result.never:
        raise NotProved("it allows nothing")
    if result.queries and not _pads_are_uniform(result, formula, dtype_of(term)):
        raise NotProved("it blocks queries otherwise than all keys of those that are no keys themselves, by one number")
    return result


def _pads_are_uniform(found: Conjunction, formula: Element, dtype: torch.dtype) -> bool:
    """Whether queries that attend to nothing are those that are no keys, and weigh all keys alike.

    So they do where their scores become one number: one so low that adding it to a score gives it alone.
    """
    swamps = max(torch.finfo(dtype).min, -1e30)
    numbers = [float(leaf.value) for leaf in _leaves(formula) if isinstance(leaf, Number | Integer) and _lowest(leaf)]
    one = all(float("-inf") < number <= swamps for number in numbers)
    ordered = found.left is not None or found.right is not None
    return one and not ordered and set(found.queries) == set(found.valid)


def _leaves(element: Element) -> Iterator[Element]:
    if isinstance(element, Apply):
        for arg in element.args:
            yield from _leaves(arg)
    else:
        yield element


def _kept(elements: Elements, element: Element) -> Element:
    """Where an additive mask is 0 (True), as opposed to about -inf (False)."""
    match element:
        case Number(value) | Integer(value) if value == 0:
            return Number(True)
        case Number(value) | Integer(value) if isinstance(value, float | sympy.Integer | int) and value <= LOWEST:
            return Number(False)
        case Apply("where", (condition, first, second)):
            return Apply("where", (condition, _kept(elements, first), _kept(elements, second)))
        case Apply("add", (first, second)):
            return Apply("and", (_kept(elements, first), _kept(elements, second)))
        case Apply("mul", (first, Number() | Integer() as factor)) if _lowest(factor):
            return _zero(elements, first)
        case Apply("mul", (first, Number(value))) if value >= 0.01:
            return _kept(elements, first)  # what is blocked stays about -inf under such a factor
        case Apply("mul", (Number() | Integer() as factor, second)) if _lowest(factor):
            return _zero(elements, second)
        case Load(node, index) if node.op == "get_attr":
            return _kept(elements, _constant_pattern(elements, node, index))
    raise NotProved("it adds something other than 0 or about -inf")


def _lowest(factor: Element) -> bool:
    match factor:
        case Number(value):
            return value <= LOWEST
        case Integer(value):
            return bool(value.is_Integer and value <= LOWEST)
    return False


def _zero(elements: Elements, element: Element) -> Element:
    """Where a value that is 0 or 1 is 0; such values come from bools, the validity input, and 1 minus one of these.

    Raises:
        NotProved: it may have other values.
    """
    match element:
        case Apply("number", (condition,)):
            return Apply("not", (condition,))
        case Apply("sub", (Number(one) | Integer(one), inner)) if one == 1:
            return Apply("not", (_zero(elements, inner),))
        case Apply("add", (Apply("neg", (inner,)), Number(one) | Integer(one))) if one == 1:
            return Apply("not", (_zero(elements, inner),))
        case Load(node, _) if _is_validity(elements, node):
            return Apply("not", (Apply("bool", (element,)),))
    raise NotProved("it scales something that is not proved to be 0 or 1")


def _is_validity(elements: Elements, node: Node) -> bool:
    names = {spec.name for spec in info(elements.gm).inputs if spec.validity}
    return node.op == "placeholder" and (node.name in names or str(node.target) in names)


def _conjoin(elements: Elements, element: Element, result: Conjunction) -> None:
    """Adds a condition to the conjunction.

    Raises:
        NotProved: it is no conjunction of the kind.
    """
    element = _simple(elements, element)
    match element:
        case Number(value):
            result.never |= not value
        case Apply("and", (first, second)):
            _conjoin(elements, first, result)
            _conjoin(elements, second, result)
        case Apply("not", (Apply("or", (first, second)),)):
            _conjoin(elements, Apply("not", (first,)), result)
            _conjoin(elements, Apply("not", (second,)), result)
        case Apply(("lt" | "le" | "gt" | "ge" | "eq") as name, (Integer(a), Integer(b))):
            _order(name, a - b, result)
        case Apply(("lt" | "le") as name, (Apply("abs", (Integer(a),)), Integer(b))):
            _order(name, a - b, result)
            _order(name, -a - b, result)
        case _:
            moved = _of_query(element)
            _require_token(moved or element)
            conditions = result.valid if moved is None else result.queries
            if (moved or element) not in conditions:
                conditions.append(moved or element)


def _of_query(element: Element) -> Element | None:
    """The condition over (b, k) where it reads tensors at (b, q) alone; None for any other."""
    places = [leaf.index for leaf in _leaves(element) if isinstance(leaf, Load)]
    if not places or any(Q not in index or K in index for index in places):
        return None
    return _moved(element)


def _moved(element: Element) -> Element:
    match element:
        case Load(node, index):
            return Load(node, tuple(K if i == Q else i for i in index))
        case Apply(name, args):
            return Apply(name, tuple(map(_moved, args)))
    return element


def _simple(elements: Elements, element: Element) -> Element:
    """Removes constants, double negations, and conversions between bool and number."""
    if isinstance(element, Load) and element.node.op == "get_attr":
        return _simple(elements, Apply("bool", (_constant_pattern(elements, element.node, element.index),)))
    if not isinstance(element, Apply):
        return element
    parts = [_simple(elements, a) if element.name in _OF_CONDITIONS else a for a in element.args]
    if element.name in ("eq", "ne"):
        tables = [isinstance(part, Load) and part.node.op == "get_attr" for part in parts]
        pairs = zip(parts, tables, strict=True)
        parts = [_constant_pattern(elements, p.node, p.index) if table else p for p, table in pairs]  # type: ignore[union-attr]
    match element.name, parts:
        case "bool", [Number(value) | Integer(value)]:
            return Number(bool(value != 0))
        case "bool", [Apply("number", (inner,))]:
            return _simple(elements, inner)
        case "bool", [Apply("bool" | "and" | "or" | "not" | "lt" | "le" | "gt" | "ge" | "eq" | "ne") as inner]:
            return inner
        case "bool", [Apply("mul", (a, b))]:
            return _simple(elements, Apply("and", (Apply("bool", (a,)), Apply("bool", (b,)))))
        case "bool", [Apply("where", (condition, a, b))]:
            return _simple(elements, Apply("where", (condition, Apply("bool", (a,)), Apply("bool", (b,)))))
        case "not", [Number(value)]:
            return Number(not value)
        case "not", [Apply("not", (inner,))]:
            return inner
        case "not", [Apply(name, args)] if name in _NEGATED:
            return _simple(elements, Apply(_NEGATED[name], args))
        case ("and" | "or") as name, [Number(value), other] | [other, Number(value)]:
            return other if bool(value) == (name == "and") else Number(bool(value))
        case "where", [condition, Number(a), Number(b)]:
            if bool(a) == bool(b):
                return Number(bool(a))
            return condition if a else _simple(elements, Apply("not", (condition,)))
        case "where", [condition, inner, Number(value)] if not value:
            return Apply("and", (condition, inner))
        case "where", [condition, Number(value), inner] if not value:
            return Apply("and", (_simple(elements, Apply("not", (condition,))), inner))
        case "ne", [Apply("number", (inner,)), Number(value) | Integer(value)] if value == 0:
            return _simple(elements, inner)
        case "eq", [Apply("number", (inner,)), Number(value) | Integer(value)] if value == 0:
            return _simple(elements, Apply("not", (inner,)))
        case "eq", [Apply("number", (inner,)), Number(value) | Integer(value)] if value == 1:
            return _simple(elements, inner)
        case ("lt" | "le" | "gt" | "ge" | "eq" | "ne") as name, [Integer(a), Integer(b)]:
            truth = _truth(name, a - b)
            return Apply(name, tuple(parts)) if truth is None else Number(truth)
    return arithmetic(element.name, parts)


def _truth(name: str, difference: Any) -> bool | None:
    """A comparison with 0 that holds, or fails, at every index."""
    match name:
        case "ge" if difference.is_nonnegative:
            return True
        case "gt" if difference.is_positive:
            return True
        case "lt" if difference.is_nonnegative:
            return False
        case "eq" if difference == 0:
            return True
        case "ne" if difference == 0:
            return False
        case "le" if difference.is_nonpositive:
            return True
    return None


def _order(name: str, difference: Any, result: Conjunction) -> None:
    """Adds ``difference`` compared with 0, where the difference must be k - q or q - k plus a number.

    Raises:
        NotProved: it compares anything else.
    """
    for sign in (1, -1):
        offset = sympy.expand(difference - sign * (K - Q))
        if not offset.is_Integer:
            continue
        # sign * (k - q) + offset  (name)  0
        shift = int(offset)
        strict = name in ("lt", "gt")
        upper = (name in ("lt", "le")) == (sign == 1)
        bound = -shift * sign
        if upper:
            bound -= strict  # k - q <= bound
            if bound < 0:
                break
            result.limit(right=bound)
        else:
            bound += strict  # k - q >= bound
            if bound > 0:
                break
            result.limit(left=-bound)
        if name == "eq":
            break
        return
    raise NotProved(f"it compares {difference} with 0, which is no causal order and no window")


def _require_token(element: Element) -> None:
    """The condition may read tensors at (b, k) alone.

    Raises:
        NotProved: it reads another place, or depends on the index itself.
    """
    match element:
        case Load(node, index):
            if len(index) != 2 or not all(map(_is_place, index, (B, K), shape_of(node))):
                raise NotProved(f"it reads '{node.name}' at {index}, not at the key's token (b, k)")
            if dtype_of(node).is_floating_point:
                raise NotProved(f"it reads the float input '{node.name}'")
        case Integer(value):
            if value.free_symbols & {B, H, Q, K}:
                raise NotProved("it compares a token with its own place")
        case Apply(name, args):
            if name in ("where", "abs", "neg", "mul", "add", "sub"):
                raise NotProved(f"it depends on tokens through '{name}'")
            for arg in args:
                _require_token(arg)


def _is_place(index: Any, wanted: sympy.Symbol, size: Any) -> bool:
    """An axis of size 1, in a graph made for one sequence or one token, has place 0 alone."""
    return bool(index == wanted or (size == 1 and index == 0))


def _constant_pattern(elements: Elements, node: Node, index: tuple[Any, ...]) -> Element:
    """A constant table of ones and zeros, or of 0 and -inf, over (q, k): the triangle, if it is one, or a band of it.

    Raises:
        NotProved: it is another table.
    """
    tensor = get_tensor(elements.gm, node)
    zero = sympy.Integer(0)
    square = tensor.dim() >= 2 and tensor.shape[-1] == tensor.shape[-2] and tensor.numel() == tensor.shape[-1] ** 2
    if not square or index[-2:] != (Q, K) or any(i != zero for i in index[:-2]):
        raise NotProved(f"it reads the table '{node.target}'")
    table = tensor.reshape(tensor.shape[-2:])
    for of_ones in (True, False):
        kept = table.bool() if of_ones else table == 0
        left = int(kept[-1].sum()) - 1  # the last query sees as far back as any
        if not torch.equal(kept, torch.ones_like(kept).tril().triu(-left)):
            continue
        condition = Apply("le", (Integer(K - Q), Integer(zero)))
        if left < len(table) - 1:
            condition = Apply("and", (condition, Apply("le", (Integer(Q - K), Integer(sympy.Integer(left))))))
        if of_ones and bool((table[kept] == 1).all()):
            return Apply("number", (condition,))
        if not of_ones and bool((table[~kept] <= LOWEST).all()):
            return Apply("where", (condition, Number(0.0), Number(float("-inf"))))
    raise NotProved(f"the table '{node.target}' is no triangle and no band of one")
