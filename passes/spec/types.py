"""Type check of a graph, op by op: each op is run on meta tensors of its operands' types, at two sizes of B, S and T.

A type is a claim about all sizes; two unrelated sizes catch a claim that holds by accident at one.
"""

import functools
import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import SizeValue, TensorType, TupleType, fact, find_fact
from tilewright.ir.graph import info
from tilewright.ir.sizes import BATCH, PAGES, SEQ, SOURCE_TABLE, TABLE, TOKENS, WANTED, Size
from tilewright.ops import Flow, traits_of
from tilewright.passes.spec.rules import Violation, bodies, graphs

_TRIED = (
    {BATCH: 3, SEQ: 5, TOKENS: 11, WANTED: 6, TABLE: 13, SOURCE_TABLE: 8, PAGES: 29},
    {BATCH: 4, SEQ: 7, TOKENS: 19, WANTED: 9, TABLE: 17, SOURCE_TABLE: 10, PAGES: 37},
)
Sizes = tuple[tuple[sympy.Symbol, int], ...]
# Verdicts by what a check can see of a call: a graph is checked after every pass, and most calls stay as they were.
_verdicts: dict[Any, str | None] = {}
_MOST_VERDICTS = 50_000
Concrete = tuple[tuple[int, ...], torch.dtype]


def types_hold(gm: GraphModule) -> Iterator[Violation]:
    """Yields each call whose type is not what the op gives."""
    assignments = _assignments(gm)
    if len(_verdicts) > _MOST_VERDICTS:
        _verdicts.clear()
    for each in graphs(gm):
        for node in each.graph.nodes:
            if node.op != "call_function":
                continue
            key = (*_key(node), assignments)
            if key not in _verdicts:
                _verdicts[key] = next((why for sizes in assignments if (why := _wrong(node, sizes))), None)
            why = _verdicts[key]
            if why:
                yield Violation(node, why)
    for call, body in bodies(gm):
        yield from _region_types(call, body)


def _assignments(gm: GraphModule) -> tuple[Sizes, ...]:
    """The two sets of sizes, brought inside the graph's bounds."""
    bounds = info(gm).bounds
    result = []
    for slack, wanted in zip((1, 0), _TRIED, strict=True):
        sizes = {}
        for symbol, value in wanted.items():
            low, high, _ = bounds.get(symbol, (1, None, ""))
            value = max(value, low)
            sizes[symbol] = value if high is None or value <= high - slack else max(low, high - slack)
        result.append(tuple(sizes.items()))
    return tuple(result)


def _key(node: Node) -> Any:
    """Equal for calls that this check cannot tell apart."""
    return str(node.target), repr(torch.fx.node.map_arg((node.args, node.kwargs), _facts)), str(_facts(node))


def _facts(node: Node) -> Any:
    return find_fact(node, SizeValue) or find_fact(node, TupleType) or find_fact(node, TensorType)


@functools.lru_cache(maxsize=4096)
def _number(size: Size, sizes: Sizes) -> int:
    return size if isinstance(size, int) else int(size.subs(dict(sizes)))


def _concrete(type_: TensorType, sizes: Sizes) -> Concrete:
    return tuple(_number(size, sizes) for size in type_.shape), type_.dtype


def _wrong(node: Node, sizes: Sizes) -> str | None:
    """Why the node's type is wrong at these sizes, or None."""
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(source, Node):
        return _wrong_item(node, source)

    def value(arg: Node) -> Any:
        size = find_fact(arg, SizeValue)
        if size is not None:
            return _number(size.value, sizes)
        shape, dtype = _concrete(fact(arg, TensorType), sizes)
        return torch.empty(shape, dtype=dtype, device="meta")

    if node.target is torch.ops.tilewright.pack_index.default:
        return _wrong_row_index(node)
    call: tuple[Any, Any] = (node.args, node.kwargs)
    args, kwargs = torch.fx.node.map_arg(call, value)
    try:
        got = node.target(*args, **kwargs)  # type: ignore[operator]
    except NotImplementedError:
        return None  # The op has no implementation without data; what it returns cannot be known here.
    except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
        if traits_of(node.target).flow is Flow.OTHER and "data" in str(error):
            return None
        return f"{node.target} refuses operands of these types: {str(error).splitlines()[0]}"
    return _differs(node, got, sizes)


def _differs(node: Node, got: Any, sizes: Sizes) -> str | None:
    size, items = find_fact(node, SizeValue), find_fact(node, TupleType)
    if size is not None:
        expected: Any = _number(size.value, sizes)
        actual: Any = got if isinstance(got, int) else None
    elif items is not None:
        expected = [_concrete(item, sizes) for item in items.items]
        actual = [(tuple(each.shape), each.dtype) for each in got] if isinstance(got, list | tuple) else None
    else:
        expected = _concrete(fact(node, TensorType), sizes)
        actual = (tuple(got.shape), got.dtype) if isinstance(got, torch.Tensor) else None
    if expected == actual:
        return None
    at = ", ".join(f"{symbol}={number}" for symbol, number in sizes)
    return (
        f"its type says {expected} at {at}, {node.target} gives {actual if actual is not None else type(got).__name__}"
    )


def _wrong_item(node: Node, source: Node) -> str | None:
    items, place, type_ = find_fact(source, TupleType), node.args[1], find_fact(node, TensorType)
    if items is None:
        return f"'{source.name}' has one result, none to choose from"
    if not isinstance(place, int) or not 0 <= place < len(items.items):
        return f"'{source.name}' has {len(items.items)} results, no result {place}"
    return None if items.items[place] == type_ else f"its type is {type_}, result {place} is {items.items[place]}"


def _wrong_row_index(node: Node) -> str | None:
    """T depends on data, so no run on meta tensors can tell it."""
    i32 = torch.int32
    rows, batch = TensorType((TOKENS,), i32), TensorType((BATCH,), i32)
    columns = TensorType((len(node.args[1]), BATCH), i32)  # type: ignore[arg-type]
    expected = TupleType((rows, rows, TensorType((BATCH + 1,), i32), batch, batch, columns))
    found = find_fact(node, TupleType)
    return None if found == expected else f"its type is {found}, a row index is {expected}"


def _region_types(call: Node, body: GraphModule) -> Iterator[Violation]:
    inside = [_facts(node) for node in body.graph.nodes if node.op == "placeholder"]
    outside = [_facts(arg) if isinstance(arg, Node) else None for arg in call.args]
    if inside != outside:
        yield Violation(call, f"it passes {outside}, its body takes {inside}")
    results: Any = next(iter(reversed(body.graph.nodes))).args[0]
    items = find_fact(call, TupleType)
    made = tuple(find_fact(node, TensorType) for node in results) if isinstance(results, tuple) else None
    if items is None or made != items.items:
        yield Violation(call, f"its type is {items}, its body returns {made}")
