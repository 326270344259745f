"""Weights in blocks in a graph: as a file stores them, or quantized on request, and rows rounded in front of them."""

import math

import pytest
import torch
from graphs import SIZES, GraphBuilder
from tests.graph.test_block_formats import random_rows
from torch import Tensor
from torch.fx import GraphModule, Interpreter

import tilewright
from tilewright.errors import OptionError
from tilewright.ir.facts import TensorType, set_fact
from tilewright.ir.graph import Level
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ir.sizes import BATCH, TOKENS
from tilewright.ir.stored_weight import StoredParameter, StoredWeight
from tilewright.ops.blocks import FORMATS, dequantize, quantize
from tilewright.passes.base import run_pass
from tilewright.passes.regions.merge_linears import MergeLinears
from tilewright.passes.spec.verify import verify
from tilewright.passes.weights.quantize_blocks import QuantizeBlocks
from tilewright.passes.weights.round_rows import RoundRows
from tilewright.passes.weights.store_blocks import StoreBlocks

aten = torch.ops.aten
tw = torch.ops.tilewright
pytestmark = pytest.mark.usefixtures("one_thread")


def stored(name: str, n: int, k: int, seed: int = 0) -> StoredWeight:
    data = random_rows(name, n, k, seed)
    data.view(n, -1, FORMATS[name].nbytes)[..., (1, 3) if "K" in name else (1,)] &= 0x83
    return StoredWeight(name, (n, k), data)


def widened(*parts: StoredWeight) -> Tensor:
    return torch.cat([dequantize(part.format, part.data) for part in parts])


def count(gm: GraphModule, target: object) -> int:
    return sum(node.target is target for node in gm.graph.nodes)


def with_layouts(gm: GraphModule) -> GraphModule:
    for node in gm.graph.nodes:
        set_fact(node, Layout(LayoutKind.FREE if node.op == "get_attr" else LayoutKind.PACKED, 0, 1))
    return gm


def test_linears_and_embeddings_read_what_is_stored() -> None:
    g = GraphBuilder(level=Level.NORMALIZED)
    x, ids = g.input("x", BATCH, 256), g.input("ids", BATCH, dtype=torch.int64, high=40)
    weight, bias = g.weight("table", 40, 256), g.weight("bias", 40)
    outputs = g.call(aten.linear.default, x, weight, bias), g.call(aten.embedding.default, weight, ids)
    part = stored("Q4_K", 40, 256)
    gm, record = run_pass(StoreBlocks({"table": StoredParameter((part,))}), g.done(*outputs))
    verify(gm)
    product, rows = Interpreter(gm).run(*g.example)
    torch.testing.assert_close(product, g.values[x] @ widened(part).t() + g.root.bias)
    assert torch.equal(rows, widened(part)[g.values[ids]])
    assert record.counts == {"linear": 1, "embedding": 1}
    kept = [tensor for tensor in gm.buffers() if tensor.dtype == torch.uint8]
    assert [tensor.data_ptr() for tensor in kept] == [part.data.data_ptr()]


@pytest.mark.parametrize("names", [("Q8_0", "Q8_0"), ("Q4_K", "Q6_K")])
def test_parts_of_a_weight(names: tuple[str, str]) -> None:
    g = GraphBuilder(level=Level.NORMALIZED)
    x = g.input("x", BATCH, 256)
    out = g.call(aten.linear.default, x, g.weight("joined", 72, 256), g.weight("bias", 72))
    parts = stored(names[0], 40, 256), stored(names[1], 32, 256, seed=1)
    gm, _ = run_pass(StoreBlocks({"joined": StoredParameter(parts)}), g.done(out))
    verify(gm)
    (found,) = Interpreter(gm).run(*g.example)
    torch.testing.assert_close(found, g.values[x] @ widened(*parts).t() + g.root.bias)
    assert count(gm, tw.block_linear.default) == len(set(names))


def test_a_parameter_that_is_the_transpose() -> None:
    g = GraphBuilder(level=Level.NORMALIZED)
    x, weight = g.input("x", BATCH, 64), g.weight("conv", 64, 40)
    out = g.call(aten.linear.default, x, g.call(aten.permute.default, weight, [1, 0]))
    part = stored("Q5_0", 40, 64)
    gm, record = run_pass(StoreBlocks({"conv": StoredParameter((part,), transposed=True)}), g.done(out))
    verify(gm)
    (found,) = Interpreter(gm).run(*g.example)
    torch.testing.assert_close(found, g.values[x] @ widened(part).t())
    assert record.counts == {"linear": 1}


def test_other_uses_are_widened_with_the_reason() -> None:
    g = GraphBuilder(level=Level.NORMALIZED)
    x, weight = g.input("x", BATCH, 64), g.weight("table", SIZES[BATCH], 64)
    outputs = g.call(aten.linear.default, x, weight), g.call(aten.mul.Tensor, weight, 2.0)
    part = stored("Q8_0", SIZES[BATCH], 64)
    gm, record = run_pass(StoreBlocks({"table": StoredParameter((part,))}), g.done(*outputs))
    assert torch.equal(Interpreter(gm).run(*g.example)[1], widened(part) * 2)
    assert record.counts == {"linear": 1, "widened": 1}
    assert "'mul_tensor' has no form that reads blocks" in record.reasons["table"]


def test_numbers_are_shared_where_they_have_the_type() -> None:
    weight = torch.randn(40, 64)
    for name, counts in (("F32", {"shared": 1}), ("BF16", {"widened": 1})):
        g = GraphBuilder(level=Level.NORMALIZED)
        x = g.input("x", BATCH, 64)
        out = g.call(aten.linear.default, x, g.weight("w", 40, 64))
        parts = (StoredWeight(name, (40, 64), quantize(name, weight)),)
        gm, record = run_pass(StoreBlocks({"w": StoredParameter(parts)}), g.done(out))
        (found,) = Interpreter(gm).run(*g.example)
        torch.testing.assert_close(found, g.values[x] @ widened(*parts).t())
        assert record.counts == counts


def test_products_of_one_value_and_one_format_are_merged() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 64)
    bytes_of = {
        name: stored(name.split("_", 1)[1], 40, 64, seed) for seed, name in enumerate(("a_Q8_0", "b_Q8_0", "c_Q5_0"))
    }
    products = []
    for name, part in bytes_of.items():
        weight = g.weight(name, 40, part.data.shape[1], dtype=torch.int64)
        setattr(g.root, name, part.data)
        g.values[weight] = part.data
        set_fact(weight, TensorType(tuple(part.data.shape), torch.uint8))
        bias = g.weight("bias", 40) if name == "b_Q8_0" else None
        products.append(g.call(tw.block_linear.default, x, weight, bias, part.format))
    out = g.call(aten.sum.dim_IntList, g.call(aten.reshape.default, products[0], [SIZES[TOKENS], 4, 10]), [2])
    others = [g.call(aten.sum.dim_IntList, p, [1]) for p in products[1:]]
    gm, record = run_pass(MergeLinears(), with_layouts(g.done(out, *others)))
    assert record.counts == {"linears": 2, "into": 1}
    assert count(gm, tw.block_linear.default) == 2
    for found, want in zip(Interpreter(gm).run(*g.example), g.expected, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_rows_are_rounded_once_within_half_a_step(size: float) -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 64)
    g.values[x] *= size
    g.values[x][1] = 0.0
    outputs = [g.linear(x, name, 40) for name in "qk"]
    gm, _ = run_pass(QuantizeBlocks(), with_layouts(g.done(*outputs)))
    exact = [dequantize("int4", tensor).double() for tensor in gm.buffers() if tensor.dtype == torch.uint8]
    gm, record = run_pass(RoundRows(), gm)
    assert record.counts == {"products": 2, "rounded": 1}
    assert count(gm, aten.floor.default) == 1
    steps = g.values[x].double().view(-1, 2, 32).abs().amax(-1) / 127
    for found, weight, name in zip(Interpreter(gm).run(*g.example), exact, "qk", strict=True):
        bias = getattr(g.root, f"{name}_bias").double()
        want = g.values[x].double() @ weight.t() + bias
        bound = 0.5 * steps @ weight.abs().view(40, 2, 32).sum(-1).t() + 1e-5 * (want.abs() + size)
        assert ((found.double() - want).abs() <= bound).all()


def test_what_stays_in_floating_point_says_why() -> None:
    g = GraphBuilder()
    x, y = g.input("x", TOKENS, 64), g.input("y", TOKENS, 96)
    outputs = (
        *(g.linear(x, name, n) for name, n in (("small", 8), ("infinite", 40), ("large", 40))),
        g.linear(y, "odd", 40),
    )
    g.root.infinite_weight[3, 3] = math.inf
    g.root.large_weight[3, 3] = 7e4
    gm, record = run_pass(QuantizeBlocks(), with_layouts(g.done(*outputs)))
    assert record.counts == {}
    assert count(gm, aten.linear.default) == 4
    reasons = " ".join(record.reasons.values())
    assert "is small" in reasons
    assert "do not divide into blocks of 64" in reasons
    assert reasons.count("infinities or NaN, or numbers beyond fp16") == 2


def test_a_model_in_int4_is_near_the_exact_one() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).eval()
    x = torch.randn(3, 5, 64)
    compiled = tilewright.compile(model, dtype="int4")
    with torch.no_grad():
        want, got = model(x), compiled(x)
    assert (got - want).norm() / want.norm() < 0.15
    assert (got - want).norm() / want.norm() > 1e-3
    assert compiled.stats.eager_steps == 0
    assert compiled.stats.kernels_launched > 0
    with pytest.raises(OptionError, match="dtype='int4' has no effect at opt_level=0"):
        tilewright.compile(model, dtype="int4", opt_level=0)
