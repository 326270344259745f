"""QuantizeLinears: within the bound that rounding allows of the exact product, or left in floating point."""

import math

import pytest
import torch
from graphs import SIZES, GraphBuilder
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

import tilewright
from tilewright.errors import OptionError
from tilewright.ir.facts import set_fact
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.sizes import TOKENS
from tilewright.passes.base import PassRecord, run_pass
from tilewright.passes.weights.quantize_linears import QuantizeLinears

aten = torch.ops.aten
tw = torch.ops.tilewright
pytestmark = pytest.mark.usefixtures("one_thread")


def with_layouts(gm: GraphModule) -> GraphModule:
    """Gives every node a layout, as RemovePadding would."""
    for node in gm.graph.nodes:
        set_fact(node, Layout(LayoutKind.FREE if node.op == "get_attr" else LayoutKind.PACKED, 0, 1))
    return gm


def quantized(g: GraphBuilder, *outputs: Node) -> tuple[list[Tensor], GraphModule, PassRecord]:
    """Results after the pass, the graph and the record."""
    gm, record = run_pass(QuantizeLinears(), with_layouts(g.done(*outputs)))
    return list(Interpreter(gm).run(*g.example)), gm, record


def bound(x: Tensor, weight: Tensor) -> Tensor:
    """Largest error of rounding: half a step of each factor times the other, summed along K; and of fp32 around it."""
    x, weight = x.double(), weight.double()
    steps = [value.abs().amax(dim=1) / 127 / 2 for value in (x, weight)]
    first = x.abs().sum(dim=1)[:, None] * steps[1][None]
    second = weight.abs().sum(dim=1)[None] * steps[0][:, None]
    return (first + second + x.shape[1] * steps[0][:, None] * steps[1][None]) * (1 + 1e-5) + 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_error_of_one_product_is_that_of_rounding(seed: int, scale: float) -> None:
    g = GraphBuilder(seed=seed)
    x = g.input("x", TOKENS, 64)
    g.values[x] *= scale * torch.rand(SIZES[TOKENS], 1)
    out = g.linear(x, "one", 40)
    (found,), gm, record = quantized(g, out)
    weight, bias = g.root.one_weight, g.root.one_bias
    exact = g.values[x].double() @ weight.double().t() + bias.double()
    allowed = bound(g.values[x], weight) * 1.0 + exact.abs() * 1e-6
    assert ((found.double() - exact).abs() <= allowed).all()
    assert record.counts == {"int8": 1}
    assert sum(node.target is tw.int8_linear.default for node in gm.graph.nodes) == 1


def test_sums_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (n, 5000), generator=generator, dtype=torch.int8) for n in (3, 7))
    x[0], weight[0] = 127, 127
    assert torch.equal(tw.int8_linear(x, weight), (x.long() @ weight.long().t()).int())


def test_what_several_linears_read_is_rounded_once() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 32)
    _, gm, record = quantized(g, *(g.linear(x, name, 32) for name in "qkv"))
    assert record.counts == {"int8": 3}
    assert sum(node.target is aten.floor.default for node in gm.graph.nodes) == 1


def test_rows_of_zeros_nan_and_infinities_stay_theirs() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 32)
    g.values[x][1], g.values[x][2, 3], g.values[x][4, 5] = 0.0, math.nan, math.inf
    (found,), _, _ = quantized(g, g.linear(x, "one", 32))
    assert torch.equal(found[1], g.root.one_bias)
    assert found[2].isnan().all()
    assert not found[4].isfinite().any()
    rest = [row for row in range(SIZES[TOKENS]) if row not in (2, 4)]
    assert found[rest].isfinite().all()


@pytest.mark.parametrize(
    ("n", "k", "value", "why"),
    [(8, 64, 0.5, "small"), (64, 8, 0.5, "small"), (64, 34, 0.5, "divide"), (64, 64, math.nan, "NaN")],
)
def test_kept_in_floating_point(n: int, k: int, value: float, why: str) -> None:
    g = GraphBuilder()
    out = g.linear(g.input("x", TOKENS, k), "one", n)
    g.root.one_weight[0, 0] = value
    (found,), _, record = quantized(g, out)
    assert record.counts == {"kept": 1}
    assert why in record.reasons["one"]
    torch.testing.assert_close(found, Interpreter(g.done(out)).run(*g.example)[0], equal_nan=True)


def test_a_computed_weight_is_kept() -> None:
    g = GraphBuilder()
    weight = g.call(aten.mul.Tensor, g.weight("w", 32, 32), 2.0)
    _, _, record = quantized(g, g.call(aten.linear.default, g.input("x", TOKENS, 32), weight))
    assert "is computed" in next(iter(record.reasons.values()))


def test_a_weight_of_zeros_gives_the_bias() -> None:
    g = GraphBuilder()
    out = g.linear(g.input("x", TOKENS, 32), "one", 32)
    g.root.one_weight.zero_()
    (found,), _, _ = quantized(g, out)
    assert torch.equal(found, g.root.one_bias.expand_as(found))


@pytest.mark.parametrize(("opt_level", "unpad"), [(1, "off"), (2, "on")])
def test_compiled(opt_level: int, unpad: str) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}
    model = BertModel(BertConfig(vocab_size=99, **sizes)).eval()
    compiled = tilewright.compile(model, dtype="int8", opt_level=opt_level, unpad=unpad)
    for batch, length in ((1, 1), (3, 7), (5, 33)):
        ids = torch.randint(3, 99, (batch, length))
        mask = (torch.arange(length)[None] < torch.randint(1, length + 1, (batch, 1))).long()
        with torch.no_grad():
            want = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        got = compiled(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        assert got.dtype == torch.float32
        assert (want - got).norm() <= 0.02 * want.norm()
    assert compiled.stats.eager_steps == 0


@pytest.mark.parametrize("dtype", ["int2", "float", torch.int16, 8])
def test_unknown_types_are_refused(dtype: object) -> None:
    with pytest.raises(OptionError, match="is not a choice"):
        tilewright.compile(torch.nn.Linear(4, 4).eval(), dtype=dtype)


def test_a_graph_without_such_linears_is_left_as_it_is() -> None:
    """Also what nothing reads: removing it would be a change."""
    g = GraphBuilder()
    x = g.input("x", TOKENS, 8)
    g.call(aten.neg.default, x)
    gm = with_layouts(g.done(g.linear(x, "one", 8)))
    before = str(gm.graph)
    after, record = run_pass(QuantizeLinears(), gm)
    assert str(after.graph) == before
    assert record.counts == {"kept": 1}
