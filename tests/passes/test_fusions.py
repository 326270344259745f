"""What the parts of encoders must become by the rules alone: the regions of a layer, for every norm and activation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.graphs import GraphBuilder, packed_bert
from torch.fx import Node

from tilewright.ir.facts import find_fact, set_fact
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.regions import RegionTag
from tilewright.ir.sizes import BATCH, SEQ, TOKENS
from tilewright.passes.base import run_pass
from tilewright.passes.regions.find_regions import FindRegions
from tilewright.passes.regions.merge_linears import MergeLinears

aten = torch.ops.aten
packing = torch.ops.tilewright
N = 32
Norm = Callable[[GraphBuilder, Node, str], Node]


def regions(g: GraphBuilder, *outputs: Node) -> list[str]:
    """The ops of each region, in the order in which regions run; views that joined are left out."""
    gm = g.done(*outputs)
    for node in gm.graph.nodes:
        set_fact(node, Layout(LayoutKind.FREE if node.op == "get_attr" else LayoutKind.PACKED, 0, 1))
    gm, _ = run_pass(MergeLinears(), gm)
    gm, record = run_pass(FindRegions(), gm)
    assert record.counts.get("copies", 0) == 0
    found: dict[int, list[str]] = {}
    for node in gm.graph.nodes:
        tag = find_fact(node, RegionTag)
        if tag is not None:
            found.setdefault(tag.region, []).append(str(node.target).partition(".")[2].split(".")[0])
    dull = ("", "getitem", "reshape", "unsqueeze", "expand", "slice")
    return [" ".join(op for op in found[number] if op not in dull) for number in sorted(found)]


def layer_norm(g: GraphBuilder, x: Node, name: str) -> Node:
    return g.norm(x, name)


def rms_norm(g: GraphBuilder, x: Node, name: str) -> Node:
    return g.call(aten.rms_norm.default, x, [N], g.weight(f"{name}_weight", N), 1e-6, name=name)


def self_attention(g: GraphBuilder, x: Node, bias: bool, groups: int = 1) -> Node:
    """Attention over heads of 16; ``groups`` queries share a key."""
    heads = N // 16
    sizes = {"q": heads, "k": heads // groups, "v": heads // groups}
    rows = g.size(x, 0)
    parts = [
        g.call(aten.reshape.default, g.linear(x, name, count * 16, bias), [rows, count, 16])
        for name, count in sizes.items()
    ]
    packed = g.call(packing.pack_index.default, g.mask(), [], name="pack")
    index = [g.item(packed, place) for place in range(6)]
    offsets = [index[2], index[3], index[4], index[1], index[1]]
    length = g.size(g.input("ids", BATCH, SEQ, dtype=torch.int64), 1)
    options = (None, None, length, length, 0.25, False, -1, -1, 0.0)
    return g.call(aten.reshape.default, g.call(packing.attention_packed.default, *parts, *offsets, *options), [rows, N])


def test_post_norm_layer() -> None:
    g = packed_bert(layers=1, n=N)
    assert regions(g, *g.outputs) == [
        "full pack_index",
        "gather_rows gather_rows embedding embedding add layer_norm",
        "linear",
        "attention_packed",
        "linear add",
        "layer_norm",
        "linear gelu",
        "linear add",
        "layer_norm",
        "scatter_rows",
        "select_rows",
        "linear tanh",
    ]


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("groups", [1, 2])
def test_pre_norm_layer(norm: Norm, groups: int) -> None:
    """The residual stream is read by a norm and by the next sum, and stays in the GEMM that makes it."""
    g = GraphBuilder()
    x = g.input("x", TOKENS, N)
    attended = self_attention(g, norm(g, x, "norm1"), bias=norm is layer_norm, groups=groups)
    x = g.call(aten.add.Tensor, x, g.linear(attended, "out", N, bias=False))
    hidden = g.call(aten.relu.default, g.linear(norm(g, x, "norm2"), "wi", 4 * N, bias=False))
    x = g.call(aten.add.Tensor, x, g.linear(hidden, "wo", N, bias=False))
    name = norm.__name__
    assert sorted(regions(g, norm(g, x, "norm3"))) == sorted(
        ["pack_index", name, "linear", "attention_packed", "linear add", name, "linear relu", "linear add", name]
    )


ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "gelu": aten.gelu.default,
    "gelu tanh": partial(aten.gelu.default, approximate="tanh"),
    "relu": aten.relu.default,
    "silu": aten.silu.default,
    "tanh": aten.tanh.default,
    "sigmoid": aten.sigmoid.default,
}


def activate(g: GraphBuilder, name: str, x: Node) -> Node:
    """A call of an activation."""
    if name == "gelu tanh":
        return g.call(aten.gelu.default, x, approximate="tanh")
    return g.call(ACTIVATIONS[name], x)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_activation_is_an_epilogue(name: str, bias: bool) -> None:
    g = GraphBuilder()
    product = g.linear(g.input("x", TOKENS, N), "ff", 64, bias)
    assert regions(g, activate(g, name, product)) == [f"linear {name.split()[0]}"]


def test_activation_spelled_out_and_a_bias_of_its_own() -> None:
    g = GraphBuilder()
    product = g.linear(g.input("x", TOKENS, N), "ff", 64, bias=False)
    x = g.call(aten.add.Tensor, product, g.weight("bias", 64))
    swish = g.call(aten.mul.Tensor, x, g.call(aten.sigmoid.default, g.call(aten.mul.Tensor, x, 1.702)))
    assert regions(g, swish) == ["linear add mul sigmoid mul"]


@pytest.mark.parametrize("name", ["gelu", "gelu tanh", "silu", "relu"])
def test_gated_mlp_of_two_linears(name: str) -> None:
    """One product is stored; the activation of the other and the product with it are its epilogue."""
    g = GraphBuilder()
    x = g.input("x", TOKENS, N)
    gate, up = g.linear(x, "gate", 64, bias=False), g.linear(x, "up", 64, bias=False)
    gated = g.call(aten.mul.Tensor, activate(g, name, gate), up)
    out = g.call(aten.add.Tensor, g.linear(gated, "down", N, bias=False), x)
    assert regions(g, out) == ["linear", f"linear {name.split()[0]} mul", "linear add"]


def test_gated_mlp_of_one_linear() -> None:
    """Halves of a product are other tiles: both are stored once, and one kernel reads them."""
    g = GraphBuilder()
    both = g.linear(g.input("x", TOKENS, N), "wi", 128, bias=False)
    gate, up = (g.call(aten.slice.Tensor, both, 1, start, start + 64) for start in (0, 64))
    gated = g.call(aten.mul.Tensor, g.call(aten.gelu.default, gate), up)
    assert regions(g, g.linear(gated, "wo", N, bias=False)) == ["linear", "gelu mul", "linear"]


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_residual_and_norm_in_one_kernel_where_no_gemm_takes_the_sum(norm: Norm) -> None:
    g = GraphBuilder()
    x, y = g.input("x", TOKENS, N), g.input("y", TOKENS, N)
    total = g.call(aten.add.Tensor, g.call(aten.add.Tensor, x, g.weight("bias", N)), y)
    assert regions(g, norm(g, total, "norm"), total) == [f"add add {norm.__name__}"]


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_embeddings_sum_and_norm(norm: Norm) -> None:
    g = GraphBuilder()
    ids = [g.input(name, TOKENS, dtype=torch.int64) for name in ("words", "places", "types")]
    tables = [g.call(aten.embedding.default, g.weight(f"table{i}", 5, N), rows) for i, rows in enumerate(ids)]
    total = g.call(aten.add.Tensor, g.call(aten.add.Tensor, tables[0], tables[1]), tables[2])
    scaled = g.call(aten.mul.Tensor, total, N**0.5)
    assert regions(g, norm(g, scaled, "norm")) == [f"embedding embedding embedding add add mul {norm.__name__}"]
