"""Products of experts: top-k and tables as ops, packing row by row, and the regions that come of it."""

import pytest
import torch
from tests.graphs import GraphBuilder
from torch.fx import GraphModule, Interpreter, Node

from tilewright.ir.facts import TensorType, fact, find_fact, set_fact
from tilewright.ir.graph import Level
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.regions import Anchor, RegionTag
from tilewright.ir.sizes import BATCH, SEQ, TOKENS
from tilewright.ops.experts import EXPERT_LINEAR, GROUPED_LINEAR, ROUTE
from tilewright.ops.selection import TOP_INDICES
from tilewright.passes.base import run_pass
from tilewright.passes.normalization.recognize_top_k import RecognizeTopK
from tilewright.passes.packing.remove_padding import RemovePadding
from tilewright.passes.regions.find_regions import FindRegions
from tilewright.passes.weights.route_experts import RouteExperts

aten = torch.ops.aten
tw = torch.ops.tilewright
pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS, TOP, WIDTH, INNER = 6, 2, 20, 12


def router(g: GraphBuilder, x: Node) -> tuple[Node, Node]:
    """Experts and their weights for rows x [.., WIDTH]."""
    probabilities = g.call(aten.softmax.int, g.linear(x, "gate", EXPERTS, bias=False), -1, name="softmax")
    places = g.call(TOP_INDICES, probabilities, TOP, name="top")
    values = g.call(aten.gather.default, probabilities, len(g.values[x].shape) - 1, places, name="scores")
    return places, g.call(aten.div.Tensor, values, g.call(aten.sum.dim_IntList, values, [-1], True), name="shares")


def layer(g: GraphBuilder, x: Node) -> Node:
    """A mixture of experts on rows x [T, WIDTH], with the residual and a norm behind it."""
    experts, weights = router(g, x)
    up, down = g.weight("up", EXPERTS, 2 * INNER, WIDTH), g.weight("down", EXPERTS, WIDTH, INNER)
    hidden = g.call(EXPERT_LINEAR, g.call(aten.unsqueeze.default, x, 1), up, experts, name="first")
    gate, value = (g.call(aten.slice.Tensor, hidden, 2, at, at + INNER) for at in (0, INNER))
    gated = g.call(aten.mul.Tensor, g.call(aten.silu.default, gate), value)
    out = g.call(EXPERT_LINEAR, gated, down, experts, name="second")
    weighted = g.call(aten.mul.Tensor, out, g.call(aten.unsqueeze.default, weights, 2), name="weighted")
    total = g.call(aten.sum.dim_IntList, weighted, [1], False, name="total")
    return g.norm(g.call(aten.add.Tensor, x, total, name="added"), "norm")


def packed(gm: GraphModule) -> GraphModule:
    """Layouts as on packed rows."""
    for node in gm.graph.nodes:
        if find_fact(node, TensorType):
            set_fact(node, Layout(LayoutKind.FREE if node.op == "get_attr" else LayoutKind.PACKED, 0, 1))
    return gm


def same(gm: GraphModule, g: GraphBuilder) -> None:
    for one, other in zip(Interpreter(gm).run(*g.example), g.expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_products_of_the_same_experts_share_a_table() -> None:
    g = GraphBuilder()
    gm, record = run_pass(RouteExperts(), packed(g.done(layer(g, g.input("x", TOKENS, WIDTH)))))
    assert record.counts == {"products": 2, "tables": 1}
    assert [sum(node.target is op for node in gm.graph.nodes) for op in (EXPERT_LINEAR, GROUPED_LINEAR, ROUTE)] == [
        0,
        2,
        1,
    ]
    assert all(find_fact(node, Layout) for node in gm.graph.nodes if find_fact(node, TensorType))
    same(gm, g)


def test_other_experts_have_a_table_of_their_own() -> None:
    g = GraphBuilder()
    x, weight = g.input("x", TOKENS, 1, WIDTH), g.weight("w", EXPERTS, 8, WIDTH)
    ids = [g.input(name, TOKENS, TOP, dtype=torch.int64, high=EXPERTS) for name in ("a", "b")]
    gm, record = run_pass(RouteExperts(), packed(g.done(*(g.call(EXPERT_LINEAR, x, weight, each) for each in ids))))
    assert record.counts == {"products": 2, "tables": 2}
    same(gm, g)


def test_nothing_to_route() -> None:
    g = GraphBuilder()
    _, record = run_pass(RouteExperts(), packed(g.done(g.linear(g.input("x", TOKENS, WIDTH), "a", 8))))
    assert record.counts == {}


def test_regions() -> None:
    """The router is one kernel, the scale joins the second product, and the sum joins the residual and the norm."""
    g = GraphBuilder()
    gm, _ = run_pass(RouteExperts(), packed(g.done(layer(g, g.input("x", TOKENS, WIDTH)))))
    gm, _ = run_pass(FindRegions(), gm)
    region_of: dict[str, int] = {}
    anchors: dict[int, Anchor] = {}
    refused: dict[int, dict[str, str]] = {}
    for node in gm.graph.nodes:
        tag = find_fact(node, RegionTag)
        if tag is not None:
            region_of[node.name] = tag.region
            if tag.record is not None:
                anchors[tag.region] = tag.record.anchor
                refused[tag.region] = dict(tag.record.refused)
    kinds = list(anchors.values())
    assert [kinds.count(kind) for kind in (Anchor.GEMM, Anchor.ROUTE, Anchor.EXPERTS, Anchor.ROW)] == [1, 1, 2, 3]
    assert region_of["softmax"] == region_of["top"] == region_of["scores"] == region_of["shares"]
    weighted, total = region_of["weighted"], region_of["total"]
    assert anchors[weighted] is Anchor.EXPERTS
    assert total == region_of["added"] == region_of["norm"]
    assert "needs all of axis 1" in refused[weighted]["total"]
    assert "table" in refused[region_of["route_default"]]["top"]


def padded_layer(g: GraphBuilder) -> Node:
    """The layer on embedded tokens, in rows of the padded batch as models write it."""
    ids = g.input("ids", BATCH, SEQ, dtype=torch.int64)
    mask = g.mask()
    words = g.call(aten.embedding.default, g.weight("words", 5, WIDTH), ids)
    heads = g.call(aten.unsqueeze.default, words, 1)
    attended = g.call(tw.attention.default, heads, heads, heads, mask, None, None, 0.3, True, -1, -1, 0.0)
    rows = g.call(aten.reshape.default, attended, [-1, WIDTH])
    return g.call(aten.reshape.default, layer(g, rows), [g.size(ids, 0), g.size(ids, 1), WIDTH])


def test_packs_row_by_row() -> None:
    g = GraphBuilder(Level.NORMALIZED)
    gm = g.done(padded_layer(g))
    gm, record = run_pass(RemovePadding("on"), gm)
    products = [node for node in gm.graph.nodes if node.target is EXPERT_LINEAR]
    assert [fact(node, TensorType).shape for node in products] == [(TOKENS, TOP, 2 * INNER), (TOKENS, TOP, WIDTH)]
    assert fact(products[0].args[2], TensorType).shape == (TOKENS, TOP)
    assert record.counts["scatter"] == 1
    real = g.example[1].bool()
    torch.testing.assert_close(Interpreter(gm).run(*g.example)[0][real], g.expected[0][real], rtol=1e-4, atol=1e-4)


def test_top_k_is_two_ops() -> None:
    g = GraphBuilder(Level.EXPORTED)
    top = g.call(aten.topk.default, g.input("x", TOKENS, 9), 3)
    gm, record = run_pass(RecognizeTopK(), g.done(g.item(top, 0), g.item(top, 1)))
    assert record.counts == {"top_k": 1}
    assert {aten.gather.default, TOP_INDICES} < {node.target for node in gm.graph.nodes}
    for one, other in zip(Interpreter(gm).run(*g.example), g.expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("axis", "largest", "kind"), [(0, True, torch.float32), (1, False, torch.float32), (1, True, torch.int64)]
)
def test_other_top_k_stays(axis: int, largest: bool, kind: torch.dtype) -> None:
    g = GraphBuilder(Level.EXPORTED)
    top = g.call(aten.topk.default, g.input("x", TOKENS, 9, dtype=kind), 3, axis, largest)
    _, record = run_pass(RecognizeTopK(), g.done(g.item(top, 0)))
    assert record.counts == {}
