"""Linears of one value become one; each that stays alone has its reason, and no slice of the result is copied."""

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.graphs import GraphBuilder, packed_bert
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tilewright.ir.facts import TensorType, fact, find_fact, set_fact
from tilewright.ir.graph import get_tensor
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.regions import Anchor, Region, RegionTag
from tilewright.ir.sizes import BATCH, SEQ, TOKENS
from tilewright.passes.base import PassRecord, run_pass
from tilewright.passes.regions.find_regions import FindRegions
from tilewright.passes.regions.merge_linears import MergeLinears
from tilewright.passes.regions.outline_regions import OutlineRegions

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("one_thread")


def merged(g: GraphBuilder, *outputs: Node) -> tuple[GraphModule, PassRecord]:
    """The graph after the pass, which computes what it did before."""
    gm = g.done(*outputs)
    for node in gm.graph.nodes:
        if find_fact(node, TensorType):
            set_fact(node, Layout(LayoutKind.FREE if node.op == "get_attr" else LayoutKind.PACKED, 0, 1))
    gm, record = run_pass(MergeLinears(), gm)
    gm.graph.lint()
    assert all(find_fact(node, Layout) for node in gm.graph.nodes if find_fact(node, TensorType))
    same(Interpreter(gm).run(*g.example), g.expected)
    return gm, record


def same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal up to the order of sums."""
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def linears(gm: GraphModule) -> list[Node]:
    """All products of the graph."""
    return [node for node in gm.graph.nodes if node.target is aten.linear.default]


def sums(g: GraphBuilder, *parts: Node) -> Node:
    """A reader of each part that can take rows lying apart, and is no epilogue: it reads a column of them."""
    total = g.call(aten.sum.dim_IntList, parts[0], [1], True)
    for part in parts[1:]:
        total = g.call(aten.add.Tensor, total, g.call(aten.sum.dim_IntList, part, [1], True))
    return total


def test_encoder_layers_have_one_product_for_queries_keys_and_values() -> None:
    g = packed_bert(layers=2, n=32)
    gm, record = merged(g, *g.outputs)
    shapes = [fact(node, TensorType).shape for node in linears(gm)]
    assert shapes.count((TOKENS, 96)) == 2
    assert len(shapes) == 2 * 4 + 1
    assert record.counts == {"linears": 6, "into": 2}
    assert record.reasons == {}
    regions = [find_fact(node, RegionTag) for node in run_pass(FindRegions(), gm)[0].graph.nodes]
    kinds = [tag.record.anchor for tag in regions if tag and tag.record]
    assert kinds.count(Anchor.GEMM) == 9
    gm, record = run_pass(OutlineRegions(), gm)
    assert record.counts["copies"] == 0
    assert sum(find_fact(node, Region) is not None for node in gm.graph.nodes) == len(kinds)


def test_parts_of_different_width_some_without_bias() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 12)
    parts = [g.linear(x, name, n, bias) for name, n, bias in (("q", 24, False), ("k", 10, True), ("v", 6, False))]
    gm, _ = merged(g, sums(g, *parts))
    (product,) = linears(gm)
    bias = get_tensor(gm, product.args[2])  # type: ignore[arg-type]
    assert fact(product, TensorType).shape == (TOKENS, 40)
    assert torch.equal(bias[:24], torch.zeros(24))
    assert torch.equal(bias[34:], torch.zeros(6))
    assert not [node for node in gm.graph.nodes if node.op == "get_attr" and node.target.startswith(("q_", "k_"))]


def test_no_bias_at_all_and_leading_axes() -> None:
    g = GraphBuilder()
    x = g.input("x", BATCH, SEQ, 12)
    parts = [g.linear(x, name, 5, bias=False) for name in "ab"]
    total = g.call(aten.sum.dim_IntList, parts[0], [2])
    gm, _ = merged(g, g.call(aten.add.Tensor, total, g.call(aten.sum.dim_IntList, parts[1], [2])))
    (product,) = linears(gm)
    assert len(product.args) == 2
    assert fact(product, TensorType).shape == (BATCH, SEQ, 10)


def test_weights_shared_by_layers_are_joined_once() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 16)
    a, b = g.weight("a", 16, 16), g.weight("b", 16, 16)
    for _ in range(3):
        x = sums(g, *(g.call(aten.linear.default, x, weight) for weight in (a, b)))
        x = g.call(aten.add.Tensor, x, g.weight(f"row_{_}", 16))
    gm, record = merged(g, x)
    joined = {get_tensor(gm, node.args[1]).data_ptr() for node in linears(gm)}  # type: ignore[arg-type]
    assert (record.counts, len(joined)) == ({"linears": 6, "into": 3}, 1)


def test_a_weight_used_elsewhere_stays() -> None:
    g = GraphBuilder()
    x, other = g.input("x", TOKENS, 16), g.input("other", TOKENS, 16)
    a, b = g.weight("a", 16, 16), g.weight("b", 16, 16)
    parts = [g.call(aten.linear.default, source, weight) for source, weight in ((x, a), (x, b), (other, a))]
    gm, _ = merged(g, sums(g, *parts))
    assert sorted(str(node.args[1]) for node in linears(gm)) == ["a", "joined_0"]


def epilogue(g: GraphBuilder, x: Node) -> tuple[Node, ...]:
    """The gate of a gated MLP has its activation as its epilogue."""
    gate, up = g.linear(x, "gate", 16), g.linear(x, "up", 16)
    return (g.call(aten.mul.Tensor, g.call(aten.silu.default, gate, name="act"), up, name="gated"),)


def returned(g: GraphBuilder, x: Node) -> tuple[Node, ...]:
    """Both are outputs."""
    return g.linear(x, "start", 1), g.linear(x, "end", 1)


def flattened(g: GraphBuilder, x: Node) -> tuple[Node, ...]:
    """A view that needs its rows one behind the other."""
    parts = [g.call(aten.reshape.default, g.linear(x, name, 16), [-1]) for name in "ab"]
    return (g.call(aten.add.Tensor, *parts),)


def computed_weight(g: GraphBuilder, x: Node) -> tuple[Node, ...]:
    """The weight comes from an input."""
    weight = g.input("given", 16, 16)
    return (sums(g, g.call(aten.linear.default, x, weight, name="a"), g.linear(x, "b", 16)),)


def later_layers(g: GraphBuilder, x: Node) -> tuple[Node, ...]:
    """Cross attention reads the encoder's output in every layer."""
    first = g.linear(g.linear(x, "first", 16), "layer", 16)
    return (sums(g, first, g.linear(x, "second", 16)),)


@pytest.mark.parametrize(
    ("build", "node", "why"),
    [
        (epilogue, "gate", "'act' joins it as its epilogue"),
        (epilogue, "up", "'gated' joins it as its epilogue"),
        (returned, "start", "it is returned"),
        (flattened, "a", "would need a copy"),
        (computed_weight, "a", "its weight 'given' is computed"),
        (later_layers, "second", "'layer' lies before it and waits for 'first'"),
    ],
)
def test_what_stays_alone_says_why(build: Callable[..., tuple[Node, ...]], node: str, why: str) -> None:
    g = GraphBuilder()
    gm, record = merged(g, *build(g, g.input("x", TOKENS, 16)))
    assert why in record.reasons[node]
    assert record.counts == {}
    assert not [node for node in gm.graph.nodes if node.target is aten.slice.Tensor]


def test_nothing_to_merge_is_no_change() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 16)
    gm, record = merged(g, g.linear(g.linear(x, "one", 16), "two", 16))
    assert (len(linears(gm)), record.counts, record.reasons) == (2, {}, {})
