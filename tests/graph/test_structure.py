"""Structural keys: equal for the layers of a model, different for anything that changes a kernel."""

from collections.abc import Callable

import torch
from tests.graphs import GraphBuilder, packed_bert
from torch.fx import GraphModule, Node

from tilewright.ir.facts import find_fact
from tilewright.ir.regions import Anchor, Region
from tilewright.ir.sizes import BATCH, TOKENS
from tilewright.ir.structure import structure_key, structure_text
from tilewright.passes.base import run_pass
from tilewright.passes.find_regions import FindRegions
from tilewright.passes.outline_regions import OutlineRegions

aten = torch.ops.aten


def texts(gm: GraphModule) -> list[str]:
    """Structure of each region."""
    for pass_ in (FindRegions(), OutlineRegions()):
        gm, _ = run_pass(pass_, gm)
    found = []
    for node in gm.graph.nodes:
        region = find_fact(node, Region)
        if region is not None:
            body = gm.get_submodule(str(node.target))
            assert isinstance(body, GraphModule)
            found.append(structure_text(body, region))
    return found


def test_more_layers_bring_no_new_structures() -> None:
    few, many = (packed_bert(layers) for layers in (2, 12))
    assert set(texts(few.done(*few.outputs))) == set(texts(many.done(*many.outputs)))


def _plain(g: GraphBuilder, x: Node) -> Node:
    return g.call(aten.gelu.default, g.linear(x, "w", 24))


def _tanh_form(g: GraphBuilder, x: Node) -> Node:
    return g.call(aten.gelu.default, g.linear(x, "w", 24), approximate="tanh")


_VARIANTS: dict[str, tuple[object, Callable[[GraphBuilder, Node], Node], torch.dtype]] = {
    "plain": (TOKENS, _plain, torch.float32),
    "rows": (BATCH, _plain, torch.float32),
    "dtype": (TOKENS, _plain, torch.float64),
    "columns": (TOKENS, lambda g, x: g.call(aten.gelu.default, g.linear(x, "w", 16)), torch.float32),
    "no bias": (TOKENS, lambda g, x: g.call(aten.gelu.default, g.linear(x, "w", 24, bias=False)), torch.float32),
    "op": (TOKENS, lambda g, x: g.call(aten.relu.default, g.linear(x, "w", 24)), torch.float32),
    "keyword": (
        TOKENS,
        lambda g, x: g.call(aten.gelu.default, g.linear(x, "w", 24), approximate="tanh"),
        torch.float32,
    ),
    "int constant": (TOKENS, lambda g, x: g.call(aten.mul.Tensor, g.linear(x, "w", 24), 1), torch.float32),
    "float constant": (TOKENS, lambda g, x: g.call(aten.mul.Tensor, g.linear(x, "w", 24), 1.0), torch.float32),
}


def test_whatever_changes_a_kernel_changes_the_key() -> None:
    found = {}
    for name, (rows, make, dtype) in _VARIANTS.items():
        g = GraphBuilder(dtype=dtype)
        x = g.input("x", rows, 8, dtype=dtype)  # type: ignore[arg-type]
        (found[name],) = texts(g.done(make(g, x)))
    assert len(set(found.values())) == len(found)


def test_the_caller_adds_to_the_key() -> None:
    g = GraphBuilder()
    gm = g.done(g.call(aten.relu.default, g.input("x", TOKENS, 8)))
    region = Region(0, Anchor.ROW, None)
    plain, strided = structure_key(gm, region), structure_key(gm, region, ["strides (16, 2)"])
    assert plain != strided
    assert plain == structure_key(gm, Region(7, Anchor.ROW, "relu", refused=(("a", "b"),)))
    assert len(plain) == 8
