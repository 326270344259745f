"""torch.compile's graphs: converted, padding recovered from the mask dynamo hands over, at changing sizes."""

from typing import Any

import pytest
import torch
from references import masks
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from zoo import build, normalize

from tilewright.errors import CaptureError
from tilewright.ir.facts import Origin, fact
from tilewright.ir.graph import Level, info
from tilewright.ir.sizes import BATCH, SEQ
from tilewright.models.dynamo_graph import from_dynamo

TARGET = torch.ops.tilewright.attention.default


class _Backend:
    """Converts, normalizes, and runs the graph op by op."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Any:
        graph, inputs, weights = from_dynamo(gm, example_inputs)
        assert info(graph).level is Level.EXPORTED
        assert not set(inputs) & set(weights)
        graph, _ = normalize(graph)
        self.graphs.append(graph)
        return lambda *args: info(graph).output.build(list(Interpreter(graph).run(*(args[i] for i in inputs))))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["bert", "gemma3", "mpnet"])
def test_padding_is_recovered(family: str) -> None:
    model, backend = build(family), _Backend()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    extra = {"use_cache": False} if family == "gemma3" else {}
    for batch, length in ((3, 11), (2, 7), (5, 4)):
        generator = torch.Generator().manual_seed(batch)
        ids, mask = torch.randint(3, 99, (batch, length)), masks(batch, length, "uneven", generator)
        with torch.no_grad():
            ours, eager = (f(input_ids=ids, attention_mask=mask, **extra) for f in (compiled, model))
        assert type(ours) is type(eager)
        assert torch.allclose(ours[0][mask.bool()], eager[0][mask.bool()], atol=1e-5)
    (graph,) = backend.graphs
    assert {spec.shape for spec in info(graph).inputs} == {(BATCH, SEQ)}
    attention = graph.graph.find_nodes(op="call_function", target=TARGET)
    assert len(attention) == 2
    assert all(node.args[3] is not None for node in attention)
    assert all((node.args[4] is None) == (family != "mpnet") for node in attention)
    wanted = [(True, 3, -1), (True, -1, -1)] if family == "gemma3" else [(False, -1, -1)] * 2
    assert [node.args[7:10] for node in attention] == wanted
    origin = fact(attention[0], Origin)
    assert origin.source


def test_constant_sizes() -> None:
    model, backend = build("bert"), _Backend()
    ids = torch.randint(3, 99, (2, 6))
    with torch.no_grad():
        ours, eager = torch.compile(model, backend=backend, dynamic=False)(ids)[0], model(ids)[0]
    assert torch.allclose(ours, eager, atol=1e-5)
    assert "dynamic=True" in info(backend.graphs[0]).reasons["sizes"]


def test_one_sequence() -> None:
    """dynamo makes a graph of its own for a batch of 1; its padding is recovered too."""
    model, backend = build("bert"), _Backend()
    ids, mask = torch.randint(3, 99, (1, 6)), torch.tensor([[0, 0, 1, 1, 1, 0]])
    with torch.no_grad():
        ours, eager = torch.compile(model, backend=backend, dynamic=True)(ids, mask)[0], model(ids, mask)[0]
    assert torch.allclose(ours[0, 2:5], eager[0, 2:5], atol=1e-5)
    attention = backend.graphs[0].graph.find_nodes(op="call_function", target=TARGET)
    assert all(node.args[3] is not None and node.args[4] is None for node in attention)


def test_in_place_ops_become_functional() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y += 1
            y.clamp_(max=2.0)
            return y + x

    backend, x = _Backend(), torch.randn(4, 5)
    assert torch.equal(torch.compile(InPlace(), backend=backend, dynamic=True)(x), InPlace()(x))


def test_writes_seen_through_a_view_are_refused() -> None:
    class Shared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            head = y[:, :1]
            y += 1
            return head + y

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        with pytest.raises(CaptureError, match="in place"):
            from_dynamo(gm, example_inputs)
        return gm.forward

    torch.compile(Shared(), backend=backend, dynamic=True)(torch.randn(4, 5))
