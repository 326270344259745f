"""What may be compiled besides transformers models: any module, exported programs, graphs, poolers; first calls."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import build, masks
from torch import Tensor, nn

import tilewright
from tilewright.errors import CaptureError, InputError, KernelAssertion

WIDTH = 32


class Layer(nn.Module):
    # The parameter that stands for the module need not be called self.
    def __init__(this, heads: int = 4) -> None:
        super().__init__()
        this.heads = heads
        this.norm, this.project = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        this.out = nn.Linear(WIDTH, WIDTH)

    def forward(this, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = this.project(this.norm(x)).view(batch, length, 3, this.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (WIDTH // this.heads) ** -0.5
        weights = scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1)
        return x + this.out((weights @ v).transpose(1, 2).reshape(batch, length, WIDTH))


class Encoder(nn.Module):
    """At most 64 tokens, which no configuration tells."""

    def __init__(this) -> None:
        super().__init__()
        this.tokens, this.places = nn.Embedding(99, WIDTH), nn.Parameter(torch.randn(1, 64, WIDTH))
        this.layers = nn.ModuleList([Layer(), Layer()])

    def forward(this, ids: Tensor, mask: Tensor) -> Tensor:
        x = this.tokens(ids) + this.places[:, : ids.shape[1]]
        for layer in this.layers:
            x = layer(x, mask)
        return x


def call(batch: int, length: int, pattern: str = "right") -> tuple[Tensor, Tensor]:
    mask = masks(batch, length, pattern, torch.Generator().manual_seed(batch * length)).bool()
    return torch.randint(3, 99, (batch, length)), mask


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


class LastTokens(nn.Module):
    """The last token by the number of tokens, the last column, and a column that is given."""

    def __init__(this) -> None:
        super().__init__()
        this.encoder, this.out = Encoder(), nn.Linear(WIDTH, 5)

    def forward(this, ids: Tensor, mask: Tensor, column: Tensor) -> tuple[Tensor, ...]:
        x = this.encoder(ids, mask)
        rows = torch.arange(ids.shape[0])
        return this.out(x)[rows, mask.sum(1) - 1], x[:, -1], x[rows, column]


@pytest.mark.parametrize("unpad", ["on", "off"])
def test_columns_that_are_known_at_run_time(unpad: str) -> None:
    torch.manual_seed(0)
    model = LastTokens().eval()
    ids, mask = call(4, 9)
    column = torch.tensor([0, -1, 3, -9])
    compiled = tilewright.compile(model, unpad=unpad)
    for pattern in ("right", "left", "holes", "empty_row", "full"):
        given = (*call(4, 9, pattern), column)
        with torch.no_grad():
            expected = model(*given)
        for old, new in zip(expected, compiled(*given), strict=True):
            real = given[1].any(1)  # a softmax over no key is 0/0
            torch.testing.assert_close(new[real], old[real], rtol=2e-5, atol=2e-5)
    assert compiled.stats.eager_steps == 0
    for outside in (9, -10):
        column[2] = outside
        with pytest.raises(IndexError):
            model(ids, mask, column)
        with pytest.raises(KernelAssertion, match="outside of the sequence"):
            compiled(ids, mask, column)
    column[2] = 8
    compiled(ids, mask, column)


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}
    return torch.export.export(model, call(3, 9), dynamic_shapes=(dims, dims))


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "exported program": exported,
    "graph of an exported program": lambda model: exported(model).module(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_packs(kind: str, encoder: nn.Module) -> None:
    compiled = tilewright.compile(KINDS[kind](encoder), unpad="on")
    # The first call has the length 1 and says nothing about other lengths.
    for ids, mask in (call(1, 1, "full"), call(3, 9), call(2, 64, "left"), call(4, 33, "uneven")):
        before = compiled.stats.rows_computed
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids, mask)[mask], encoder(ids, mask)[mask], atol=1e-5, rtol=1e-5)
        assert compiled.stats.rows_computed - before == int(mask.sum())
    assert compiled.stats.fallbacks == 0
    assert compiled.stats.compilations == 1
    assert not any("capture" in topic for topic in compiled.reasons)
    with pytest.raises(InputError, match="64"):
        compiled(*call(2, 65))


def test_calls_by_name_and_by_position_are_one(encoder: nn.Module) -> None:
    compiled = tilewright.compile(encoder)
    ids, mask = call(2, 8)
    assert torch.equal(compiled(ids, mask), compiled(mask=mask, ids=ids))
    assert compiled.stats.compilations == 1


def test_an_exported_program_of_constant_sizes(encoder: nn.Module) -> None:
    example = call(3, 9)
    compiled = tilewright.compile(torch.export.export(encoder, example))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*example), encoder(*example), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="the model itself fails"):
        compiled(*call(2, 9))


@pytest.mark.parametrize("shape", [(5, 8), (8,), (3, 5, 8), (2, 3, 4, 8), (1, 8)])
def test_an_argument_named_like_a_function_of_python(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU()).eval()
    x = torch.randn(shape)
    for each in (model, torch.fx.symbolic_trace(model)):
        compiled = tilewright.compile(each, gemm="triton")
        torch.testing.assert_close(compiled(x), model(x).detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(compiled(input=x), model(x).detach(), atol=1e-5, rtol=1e-5)
        assert compiled.stats.fallbacks == 0
        assert compiled.stats.compilations == 1


def test_an_empty_first_call_says_so_and_leaves_nothing() -> None:
    model = nn.Linear(8, 8).eval()
    compiled = tilewright.compile(model)
    with pytest.raises(InputError, match="empty"):
        compiled(torch.zeros(0, 8))
    compiled(torch.zeros(3, 8))
    assert compiled.stats.fallbacks == 0


class Pooler(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=1)


def test_mean_pooling_over_an_encoder_packs() -> None:
    model = Pooler(build("bert", 0)).eval()
    compiled = tilewright.compile(model, unpad="on")
    for batch, length in ((1, 1), (3, 9), (5, 21)):
        ids, mask = call(batch, length)
        before = compiled.stats.rows_computed
        with torch.no_grad():
            expected = model(ids, mask.long())
        torch.testing.assert_close(compiled(ids, mask.long()), expected, atol=1e-5, rtol=1e-5)
        assert compiled.stats.rows_computed - before == int(mask.sum())


def test_a_call_that_runs_eager_has_the_dtype_asked_for() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else self.linear(-x)

    model = Branches().eval()
    compiled = tilewright.compile(model, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert compiled(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.linear.weight.dtype == torch.float32


@pytest.mark.parametrize("thing", [None, "bert-base", nn.Linear, torch.relu, 3], ids=lambda thing: type(thing).__name__)
def test_what_is_no_model_is_refused(thing: Any) -> None:
    with pytest.raises(CaptureError, match="no model") as caught:
        tilewright.compile(thing)
    assert caught.value.hint


def test_a_module_in_training_mode_is_refused_at_once() -> None:
    with pytest.raises(CaptureError, match="training"):
        tilewright.compile(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
