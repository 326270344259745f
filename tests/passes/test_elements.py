"""Formulas of elements: what a reshape that joins or splits axes does to an index, checked against the tensor."""

import pytest
import sympy
import torch
from graphs import SIZES, GraphBuilder
from torch.fx import Node

from tilewright.ir.facts import TensorType, set_fact
from tilewright.ir.sizes import BATCH, SEQ, Size
from tilewright.passes.normalization.elements import Elements, Load, Unknown

aten = torch.ops.aten
PLACES = tuple(sympy.Symbol(name, integer=True, nonnegative=True) for name in "abcd")
B, S, HEADS = BATCH, SEQ, 4
Shape = tuple[Size, ...]


def through(*shapes: Shape) -> tuple[GraphBuilder, Node, Node]:
    """An input [B, 4, S] reshaped several times."""
    g = GraphBuilder()
    x = node = g.input("x", B, HEADS, S)
    for shape in shapes:
        node = g.call(aten.reshape.default, node, [int(sympy.sympify(size).subs(SIZES)) for size in shape])
        set_fact(node, TensorType(shape, torch.float32))
    return g, x, node


@pytest.mark.parametrize(
    "shapes",
    [
        [(B * HEADS, 1, S), (B, HEADS, 1, S)],
        [(B * HEADS, S), (1, B, HEADS, S)],
        [(B, 1, HEADS, S)],
    ],
    ids=str,
)
def test_reshapes_that_join_and_split(shapes: list[Shape]) -> None:
    g, x, node = through(*shapes)
    found = Elements(g.done(node)).at(node, PLACES)
    assert isinstance(found, Load)
    for place in ((0, 0, 0, 0), *torch.stack([torch.randint(n, (20,)) for n in g.values[node].shape], 1).tolist()):
        index = [int(each.subs(dict(zip(PLACES, place, strict=True)))) for each in found.index]
        assert g.values[x][tuple(index)] == g.values[node][tuple(place)]


@pytest.mark.parametrize("shapes", [[(B * 2, 2, S)], [(B * HEADS, S), (B * 2, 2, S)], [(B, HEADS * S)]], ids=str)
def test_reshapes_that_are_not_followed(shapes: list[Shape]) -> None:
    g, _, node = through(*shapes)
    with pytest.raises(Unknown, match="a reshape that"):
        Elements(g.done(node)).at(node, PLACES[: len(shapes[-1])])
