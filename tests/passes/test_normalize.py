"""One spelling for one meaning: each rewrite keeps the result, leaves nothing it removes, and breaks no fact."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from zoo import build, normalize, ops

from tilewright.ir.facts import SizeValue, TensorType, find_fact
from tilewright.ir.graph import Level, info
from tilewright.models.capture import capture
from tilewright.passes.base import run_pass
from tilewright.passes.normalization.normalize import normalization

GONE = (
    "view", "transpose", "aten.t.", "contiguous", "alias", "detach", "dropout", "_to_copy", "aten.to.", "type_as",
    "assert", "addmm", "aten.mm.", "Scalar_", "split", "chunk", "unbind", "stack", "flatten", "squeeze.dim.",
    "aten.repeat.", "repeat_interleave", "slice_scatter", "aten.copy.", "empty", "aten.index.", "maximum", "minimum",
    "aten.scatter.",
)  # fmt: skip


def _filled(x: Tensor) -> Tensor:
    """A tensor that is written part by part, one of them narrower and of another type; the last part stays."""
    out = x.new_zeros(*x.shape[:-1], 14)
    out[..., :5].copy_(x[..., :5])
    out[..., 5:13] = x[..., :1].double()
    out[..., 3:6] = x[..., -3:]
    return out


def _marked(x: Tensor) -> tuple[Tensor, ...]:
    """A number at some places of each row: of nothing but one number, of a computed tensor, twice at the same place."""
    places = x.topk(3, -1).indices
    twice = torch.cat((places[..., :1], places[..., :1]), -1)
    ones = torch.zeros_like(x[..., 0, :]).scatter_(1, places[..., 0, :], 1)
    return ones, (x + 1).scatter(-1, places, -2.5), x.to(torch.int32).scatter(2, twice, 7)


def _joined(x: Tensor) -> Tensor:
    """A tensor of whatever was in memory, all of it written over."""
    out = torch.empty_like(x)
    out[..., :5], out[..., 5:] = x[..., 11:], x[..., :11]
    return out


def _column(x: Tensor) -> Tensor:
    """A column of each sequence, counted from the end."""
    return -1 - x[..., 0].argmax(1)


class _Model(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))
        self.matrix = nn.Parameter(torch.randn(16, 12))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _normalized(function: Callable[..., Any]) -> tuple[GraphModule, nn.Module]:
    torch.manual_seed(0)
    model = _Model(function).eval()
    gm, _ = normalize(capture(model, example=((torch.randn(2, 5, 16),), {})))
    return gm, model


def _agree(gm: GraphModule, model: nn.Module) -> None:
    for shape in ((3, 7, 16), (1, 1, 16), (2, 1, 16)):
        x = torch.randn(shape)
        with torch.no_grad():
            ours, theirs = Interpreter(gm).run(x), model(x)
        for a, b in zip(ours, theirs if isinstance(theirs, tuple) else (theirs,), strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.allclose(a, b, atol=1e-5, equal_nan=True)


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


RECOGNIZED: dict[str, tuple[Callable[..., Any], str]] = {
    "gelu tanh": (lambda _, x: _tanh_gelu(x), "aten.gelu.default"),
    "gelu erf": (lambda _, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "aten.gelu.default"),
    "silu": (lambda _, x: torch.sigmoid(x) * x, "aten.silu.default"),
    "rms": (lambda m, x: m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), "aten.rms_norm.default"),
    "rms one plus": (
        lambda m, x: x / torch.sqrt((x * x).mean(-1, True) + 1e-6) * (1 + m.weight), "aten.rms_norm.default",
    ),
    "layer": (
        lambda m, x: (
            (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * m.weight + m.bias
        ),
        "aten.layer_norm.default",
    ),
    "matmul": (lambda m, x: x @ m.matrix, "aten.linear.default"),
    "addmm": (
        lambda m, x: torch.addmm(m.bias[:12], x.reshape(-1, 16), m.matrix).view(*x.shape[:2], 12),
        "aten.linear.default",
    ),
    "bias after": (lambda m, x: nn.functional.linear(x, m.matrix.t()) + m.bias[:12], "aten.linear.default"),
    "column": (lambda _, x: x[torch.arange(x.shape[0]), _column(x)], "tilewright.select_column.default"),
    "attention": (lambda _, x: torch.softmax(x @ x.transpose(1, 2) / 4.0, -1) @ x, "tilewright.attention.default"),
    "clamped attention": (
        lambda _, x: torch.softmax(torch.max(x @ x.mT * 0.3, torch.full((), torch.finfo(x.dtype).min)), -1) @ x,
        "tilewright.attention.default",
    ),
    "capped attention": (
        lambda _, x: torch.softmax(torch.tanh(x @ x.mT * 0.02) * 5.0, -1) @ x, "tilewright.attention.default",
    ),
}  # fmt: skip

NOT_RECOGNIZED: dict[str, tuple[Callable[..., Any], str]] = {
    "wrong constant": (lambda _, x: 0.5 * x * (1 + torch.tanh(0.9 * (x + 0.044715 * x**3))), "aten.gelu.default"),
    "other operand": (lambda _, x: torch.sigmoid(x * 1.7) * x, "aten.silu.default"),
    "other axis": (lambda _, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6), "aten.rms_norm.default"),
    "unbiased": (
        lambda _, x: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5), "aten.layer_norm.default",
    ),
    "not its own mean": (
        lambda _, x: (x - (2 * x).mean(-1, True)) / torch.sqrt((x - x.mean(-1, True)).pow(2).mean(-1, True) + 1e-5),
        "aten.layer_norm.default",
    ),
    "softmax over queries": (lambda _, x: torch.softmax(x @ x.mT, 1) @ x, "tilewright.attention.default"),
    "scores limited": (lambda _, x: torch.softmax((x @ x.mT).clamp(-1e5, 3.0), -1) @ x, "tilewright.attention.default"),
    "weights returned": (lambda _, x: (w := torch.softmax(x @ x.mT, -1), w @ x), "tilewright.attention.default"),
    "sequences in another order": (
        lambda _, x: x[torch.arange(x.shape[0]).flip(0), _column(x)], "tilewright.select_column.default",
    ),
    "several columns": (
        lambda _, x: x[torch.arange(x.shape[0])[:, None], _column(x)[:, None]], "tilewright.select_column.default",
    ),
    "two computed tensors": (lambda _, x: x @ x.mT, "aten.linear.default"),
}  # fmt: skip

REWRITTEN: dict[str, Callable[..., Any]] = {
    "views": lambda _, x: x.view(*x.shape[:2], 4, 4).transpose(-1, -2).contiguous().flatten(2),
    "split": lambda _, x: torch.cat((*x.split(4, -1)[:2], x.chunk(2, -1)[1], torch.stack(x.unbind(-1)[:2], -1)), -1),
    "indices": lambda _, x: (
        x[:, -1],
        x[..., -1],
        x[:, :, 2:-3],
        x[:, 0:],
        x.squeeze(-1),
        x[..., -3:],
        x[..., -5:-2],
        x[..., -20:4],
    ),
    "permutes": lambda _, x: x.view(*x.shape[:2], 2, 8).permute(0, 2, 3, 1).permute(1, 3, 2, 0).permute(2, 0, 1, 3),
    "repeats": lambda _, x: (x.repeat(1, 2, 1), x.repeat(2, 1, 1, 3), x[:, :1].repeat(1, 3, 2), x.repeat(1, 1, 1)),
    "repeats in a row": lambda _, x: (x.repeat_interleave(2, -1), x.repeat_interleave(3, 1), x.repeat_interleave(2, 0)),
    "parts": lambda _, x: (_filled(x), _joined(x)),
    "marks": lambda _, x: _marked(x),
    "constant places": lambda _, x: (x[..., [-2]], x[..., [3, 4, 5]], x.view(*x.shape[:2], 4, 4)[:, :, [0, 1]]),
    "limits": lambda _, x: (torch.max(x, torch.tensor(0.3)), torch.minimum(x, torch.tensor(-0.2))),
    "scalars": lambda _, x: torch.add(2 - x, x.square(), alpha=3) / 2 + 1 - torch.sub(x, x, alpha=2),
    "neutral": lambda _, x: (((x + 0) * 1) + torch.zeros_like(x)).to(torch.float32).expand_as(x),
    "fills": lambda _, x: (
        torch.where(x > 0, x, -1.0) + torch.ones_like(x) + x.new_zeros(x.shape) + torch.full_like(x, 2)
    ),
    "where one": lambda m, x: (
        torch.where(x > 0, torch.tensor(2.0), x),
        torch.where(m.bias < 0, x, torch.full((), 3.0)),
    ),
    "where both": lambda _, x: torch.where(x > 0, 1.0, -1.0) + torch.where(x > 0, 0.5, x),
    "reductions": lambda _, x: (x.sum(-1), x.mean((0, 2)), x.half().softmax(-1, dtype=torch.float32), x.cumsum(-1)),
    "conversions": lambda _, x: (x.double().type_as(x), x.to(torch.int64).bool(), x.half().float()),
    "addcmul": lambda m, x: torch.addcmul(x, x, x, value=0.5).masked_fill(x < 0, 3.0).clamp(-1, 1),
}


COLUMNS = ("argmax", "neg", "add")  # what the column is computed by


@pytest.mark.parametrize("kind", RECOGNIZED)
def test_recognized(kind: str) -> None:
    function, op = RECOGNIZED[kind]
    gm, model = _normalized(function)
    counts = ops(gm)
    assert counts[op] == 1
    rest = {name: n for name, n in counts.items() if name != op and "sym_size" not in name}
    views = ("reshape", "permute", "unsqueeze", "squeeze", "select", "slice", *(COLUMNS if kind == "column" else ()))
    assert all(any(view in name for view in views) for name in rest), rest
    _agree(gm, model)


@pytest.mark.parametrize("kind", NOT_RECOGNIZED)
def test_not_recognized(kind: str) -> None:
    function, op = NOT_RECOGNIZED[kind]
    gm, model = _normalized(function)
    assert ops(gm)[op] == 0
    _agree(gm, model)


@pytest.mark.parametrize("kind", REWRITTEN)
def test_rewritten(kind: str) -> None:
    gm, model = _normalized(REWRITTEN[kind])
    assert not [name for name in ops(gm) if any(gone in name for gone in GONE)]
    _agree(gm, model)


def test_repeated_heads_are_dropped() -> None:
    def grouped(_: Any, x: Tensor) -> Tensor:
        heads = x.view(*x.shape[:2], 4, 4).transpose(1, 2)
        narrow = heads[:, :2][:, :, None].expand(-1, -1, 2, -1, -1).reshape(heads.shape)
        return nn.functional.scaled_dot_product_attention(heads, narrow, narrow)

    gm, model = _normalized(grouped)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.tilewright.attention.default)
    assert find_fact(node.args[1], TensorType).shape[1] == 2
    assert "aten.expand.default" not in ops(gm)
    _agree(gm, model)


def test_folded_constants_take_no_more_memory_than_their_operands() -> None:
    """A table through a projection is computed at once, however large; what grows is computed at each call."""
    table, square, grown, row = torch.randn(300, 256), torch.ones(256, 256), torch.randn(400, 1), torch.ones(1, 400)

    def model(_: Any, x: Tensor) -> Any:
        folded = (nn.functional.linear(table, square) * torch.tensor(2.0).sqrt()).sum(0)
        return x[..., :1] + folded, x / torch.tensor(3.0).log(), grown * row

    gm, _ = _normalized(model)
    counts = ops(gm)
    assert "aten.linear.default" not in counts
    assert "aten.sum.dim_IntList" not in counts
    assert counts["aten.mul.Tensor"] == 1
    (scaled,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor)
    assert isinstance(scaled.args[1], float)


def test_slopes_of_heads_are_constants() -> None:
    """Floats made of numbers of the graph itself are; integers, of which masks are made, keep their formulas."""

    def model(_: Any, x: Tensor) -> Any:
        slopes = torch.pow(torch.full((), 0.25), torch.arange(1, 5, dtype=torch.int32))
        return x[..., :4] * slopes, torch.arange(16) * 2 < x

    gm, model_ = _normalized(model)
    assert not any("pow" in name for name in ops(gm))
    assert ops(gm)["aten.arange.start_step"] == 1
    _agree(gm, model_)


EXPECTED = {
    "bert": {"linear": 13, "layer_norm": 5, "gelu": 2, "attention": 2, "embedding": 3},
    "albert": {"linear": 14, "layer_norm": 5, "gelu": 2, "attention": 2},
    "gpt2": {"linear": 8, "layer_norm": 5, "gelu": 2, "attention": 2, "addmm": 0},
    "llama": {"linear": 15, "rms_norm": 5, "silu": 2, "attention": 2, "pow": 0},
    "gemma3": {"linear": 14, "rms_norm": 13, "gelu": 2, "attention": 2, "rsqrt": 0},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_op_counts_and_facts(family: str) -> None:
    gm, records = normalize(capture(build(family)))
    counts = ops(gm)
    for op, wanted in EXPECTED[family].items():
        assert sum(n for name, n in counts.items() if f".{op}." in name) == wanted, op
    assert not [name for name in counts if any(gone in name for gone in GONE)]
    for node in gm.graph.nodes:
        if node.op != "output":
            assert find_fact(node, TensorType) or find_fact(node, SizeValue), node
            assert node.users or node.op == "placeholder"
    assert info(gm).level is Level.NORMALIZED
    assert [record.name for record in records] == [pass_.name for pass_ in normalization()]
    for pass_ in normalization():
        text = str(gm.graph)
        gm, _ = run_pass(pass_, gm)
        assert str(gm.graph) == text, f"{pass_} changes a graph that is normalized"
