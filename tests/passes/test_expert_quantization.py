"""Mixtures of experts with weights in whole numbers and in blocks: rewrites, bounds of the rounding, whole layers."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from graphs import GraphBuilder
from tests.graph.test_block_formats import random_rows
from tests.passes.test_experts import packed
from torch import Tensor
from torch.fx import GraphModule, Interpreter

import tilewright
from tilewright.ir.graph import Level, update_info
from tilewright.ir.sizes import TOKENS
from tilewright.ir.stored_weight import StoredParameter, StoredWeight
from tilewright.ops.blocks import FORMATS, dequantize
from tilewright.ops.selection import TOP_INDICES
from tilewright.passes.base import run_pass
from tilewright.passes.weights.quantize_blocks import QuantizeBlocks
from tilewright.passes.weights.quantize_linears import QuantizeLinears
from tilewright.passes.weights.round_rows import RoundRows
from tilewright.passes.weights.route_experts import RouteExperts
from tilewright.passes.weights.store_blocks import StoreBlocks

aten = torch.ops.aten
tw = torch.ops.tilewright
pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS, TOP, N, K = 33, 2, 40, 64
_SCALES = {"Q8_0": (1,), "Q4_K": (1, 3), "Q6_K": (209,)}  # bytes with the exponents of scales, kept small


def product(g: GraphBuilder) -> GraphModule:
    """Rows [T, K] through the experts that a router with a weight large enough to be rounded chooses."""
    x = g.input("x", TOKENS, K)
    scores = g.call(aten.softmax.int, g.linear(x, "gate", EXPERTS, bias=False), -1)
    experts = g.call(TOP_INDICES, scores, TOP)
    weight = g.weight("experts", EXPERTS, N, K)
    out = g.call(tw.expert_linear.default, g.call(aten.unsqueeze.default, x, 1), weight, experts, name="product")
    return g.done(out, experts)


def exact(g: GraphBuilder, weight: Tensor) -> Tensor:
    rows = next(value for node, value in g.values.items() if node.name == "x")
    return tw.expert_linear.default(rows.double().unsqueeze(1), weight.double(), g.expected[1])


def test_whole_numbers_within_half_a_step() -> None:
    g = GraphBuilder()
    gm, _ = run_pass(RouteExperts(), packed(product(g)))
    gm, record = run_pass(QuantizeLinears(), gm)
    assert record.counts == {"int8": 1, "kept": 1}
    assert "chooses experts" in next(iter(record.reasons.values()))
    found, experts = Interpreter(gm).run(*g.example)
    assert torch.equal(experts, g.expected[1])
    weight = g.root.experts
    steps = weight.abs().amax(-1, keepdim=True) / 127
    rounded = ((weight / steps).round() * steps).double()
    rows = g.example[0].double()
    half = 0.5 * rows.abs().amax(-1) / 127
    bound = half[:, None, None] * rounded.abs().sum(-1)[experts] + 1e-5
    assert ((found.double() - exact(g, rounded)).abs() <= bound).all()


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_blocks_of_four_bits(activations: str) -> None:
    g = GraphBuilder()
    gm, _ = run_pass(RouteExperts(), packed(product(g)))
    gm, record = run_pass(QuantizeBlocks(), gm)
    assert record.counts == {"int4": 1}
    assert "chooses experts" in next(iter(record.reasons.values()))
    (data,) = (tensor for tensor in gm.buffers() if tensor.dtype == torch.uint8)
    wide = dequantize("int4", data.flatten(0, 1)).view(EXPERTS, N, K)
    assert ((wide - g.root.experts).abs() <= (g.root.experts.amax(-1) - g.root.experts.amin(-1))[..., None] / 29).all()
    bound = torch.tensor(1e-5)
    if activations == "int8":
        gm, record = run_pass(RoundRows(), gm)
        assert record.counts == {"products": 1, "rounded": 1}
        steps = 0.5 * g.example[0].double().view(-1, 2, 32).abs().amax(-1) / 127
        sums = wide.double().abs().view(EXPERTS, N, 2, 32).sum(-1)[g.expected[1]]
        bound = (steps[:, None, None] * sums).sum(-1) + 1e-5
    found = Interpreter(gm).run(*g.example)[0]
    assert ((found.double() - exact(g, wide)).abs() <= bound).all()


@pytest.mark.parametrize("names", [("Q8_0", "Q8_0"), ("Q4_K", "Q6_K")])
def test_parts_that_a_file_stores(names: tuple[str, str]) -> None:
    """Gate and up, one product each where their formats differ, on one table of rows."""
    g = GraphBuilder(level=Level.NORMALIZED)
    experts = g.input("experts", TOKENS, TOP, dtype=torch.int64, high=3)
    x = g.input("x", TOKENS, 1, 256)
    out = g.call(tw.expert_linear.default, x, g.weight("joined", 3, 72, 256), experts)
    parts = []
    for seed, (name, n) in enumerate(zip(names, (40, 32), strict=True)):
        data = random_rows(name, 3 * n, 256, seed)
        data.view(3 * n, -1, FORMATS[name].nbytes)[..., _SCALES[name]] &= 0x83
        parts.append(StoredWeight(name, (3, n, 256), data.view(3, n, -1)))
    gm, record = run_pass(StoreBlocks({"joined": StoredParameter(tuple(parts))}), g.done(out))
    assert record.counts == {"experts": 1}
    wide = [dequantize(part.format, part.data.flatten(0, 1)).view(part.shape) for part in parts]
    want = tw.expert_linear.default(g.values[x], torch.cat(wide, 1), g.values[experts])
    torch.testing.assert_close(Interpreter(gm).run(*g.example)[0], want, rtol=1e-4, atol=1e-4)
    update_info(gm, level=Level.PACKED)
    gm, record = run_pass(RouteExperts(), packed(gm))
    assert record.counts == {"products": len(set(names)), "tables": 1}
    torch.testing.assert_close(Interpreter(gm).run(*g.example)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [("int8", 0.02), ("int4", 0.19)])
def test_a_layer_is_near_the_exact_one(dtype: str, limit: float) -> None:
    """As linears, of which two in a row have 0.15 in int4; here there are three. The router is not rounded."""
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_experts": 40, "num_experts_per_tok": 3}
    block = OlmoeSparseMoeBlock(OlmoeConfig(**sizes)).eval()
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(std=0.2)
    double, compiled = deepcopy(block).double(), tilewright.compile(block, dtype=dtype, gemm="triton")
    for tokens in (1, 50):
        x = torch.randn(1, tokens, 64)
        with torch.no_grad():
            want = double(x.double())
            got = compiled(x)
        assert 1e-3 < (got - want).norm() / want.norm() < limit
    assert compiled.stats.eager_steps == 0
    assert compiled.stats.fallbacks == 0
