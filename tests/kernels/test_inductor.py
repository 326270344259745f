"""torch.compile with Inductor's Triton backend for the CPU: ordinary models give what they give eager."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
F = nn.functional
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def triton_on_the_cpu() -> Iterator[None]:
    """Kernels are compiled in this process, and none is taken from an earlier run."""
    options: dict[str, Any] = {"cpu_backend": "triton", "compile_threads": 1, "fx_graph_cache": False}
    torch.compiler.reset()
    with torch._inductor.config.patch(options):
        yield
    torch.compiler.reset()


def bert() -> tuple[Callable[..., Tensor], list[Tensor]]:
    model = BertModel(BertConfig(vocab_size=50, **SMALL)).eval()
    return lambda ids: model(ids).last_hidden_state, [torch.randint(0, 50, (2, 11))]


def llama() -> tuple[Callable[..., Tensor], list[Tensor]]:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **SMALL)).eval()
    return lambda ids: model(ids, use_cache=False).logits, [torch.randint(0, 50, (2, 11))]


def convolution() -> tuple[Callable[..., Tensor], list[Tensor]]:
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Softmax(-1),
    ]
    return nn.Sequential(*layers).eval(), [torch.randn(2, 3, 10, 14)]


def half_precision() -> tuple[Callable[..., Tensor], list[Tensor]]:
    weight = torch.randn(50, 20).bfloat16()
    return lambda x: F.gelu(x @ weight).float().softmax(-1), [torch.randn(7, 50).bfloat16()]


def odds_and_ends() -> tuple[Callable[..., Tensor], list[Tensor]]:
    def run(x: Tensor, index: Tensor) -> Tensor:
        parts = [x.cumsum(-1), x.argmax(-1, keepdim=True), x.sort(-1).values, x.var(-1, keepdim=True), x.roll(3, -1)]
        return torch.cat([*parts, x[index], x.index_add(0, index, x)], 1)

    return run, [torch.randn(6, 13), torch.tensor([3, 0, 5, 5, 1, 2])]


@pytest.mark.parametrize("make", [bert, llama, convolution, half_precision, odds_and_ends])
def test_models(make: Callable[[], tuple[Callable[..., Tensor], list[Tensor]]]) -> None:
    torch.manual_seed(0)
    function, arguments = make()
    with torch.no_grad():
        expected = function(*arguments)
        result = torch.compile(function)(*arguments)
    tolerance = 4e-3 if make is half_precision else 1e-5
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_its_kernels_run_on_this_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.codegen.cpu.launcher import CpuLauncher

    made: list[str] = []
    construct = CpuLauncher.__init__

    def note(self: CpuLauncher, source: Any, metadata: Any) -> None:
        made.append(metadata.name)
        construct(self, source, metadata)

    monkeypatch.setattr(CpuLauncher, "__init__", note)
    x = torch.randn(4, 9)
    torch.testing.assert_close(torch.compile(lambda x: (x.sin() + 1).sum(-1))(x), (x.sin() + 1).sum(-1))
    assert made
    assert made[0].startswith("triton_")


def test_training_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 5))
    x, labels = torch.randn(12, 16), torch.randint(0, 5, (12,))

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels)

    gradients = []
    for function in (loss, torch.compile(loss)):
        model.zero_grad()
        function(x, labels).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, eager in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


def test_an_index_out_of_range_is_an_error() -> None:
    table = torch.randn(5, 4)
    lookup = torch.compile(lambda index: table[index] + 1)
    lookup(torch.tensor([0, 4, 2]))
    with pytest.raises(Exception, match="index out of bounds"):
        lookup(torch.tensor([0, 7, 2]))
