"""Wrong or unusual input: it works as eager does, falls back with a reason, or stops with a useful error."""

import pytest
import torch
from references import build, masks

import tilewright
from tilewright.errors import CaptureError, InputError, OptionError, PackingRefused, TilewrightError

LENGTH = 9


@pytest.fixture(scope="module")
def bert() -> torch.nn.Module:
    return build("bert", 0)


@pytest.fixture(scope="module")
def compiled(bert: torch.nn.Module) -> tilewright.CompiledModel:
    return tilewright.compile(bert)


def ids(batch: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 99, (batch, length))


def same_as_eager(
    bert: torch.nn.Module, compiled: tilewright.CompiledModel, mask: torch.Tensor, **inputs: object
) -> None:
    with torch.no_grad():
        expected = bert(attention_mask=mask, **inputs).last_hidden_state
    ours = compiled(attention_mask=mask, **inputs).last_hidden_state
    real = (mask != 0) if mask.dim() == 2 else torch.ones(expected.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(ours[real], expected[real], atol=1e-3, rtol=1e-3)


def full_message(error: TilewrightError) -> None:
    text = str(error)
    assert error.what, text
    assert error.why or error.hint, text


@pytest.mark.parametrize("value", [99, 10_000, -1])
def test_ids_out_of_the_vocabulary(compiled: tilewright.CompiledModel, value: int) -> None:
    wrong = ids()
    wrong[1, 2] = value
    with pytest.raises(InputError, match="input_ids") as caught:
        compiled(wrong)
    full_message(caught.value)
    assert torch.isfinite(compiled(ids()).last_hidden_state).all()


@pytest.mark.parametrize("shape", [(3, LENGTH + 1), (2, LENGTH), (3,), (3, LENGTH, 1)])
def test_mask_of_another_shape(compiled: tilewright.CompiledModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="attention_mask") as caught:
        compiled(ids(), attention_mask=torch.ones(shape, dtype=torch.long))
    full_message(caught.value)


@pytest.mark.parametrize("shape", [(0, LENGTH), (0, 0), (3, 0)])
def test_empty_batch(bert: torch.nn.Module, compiled: tilewright.CompiledModel, shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape, dtype=torch.long)
    try:
        ours = compiled(empty)
    except InputError as error:
        full_message(error)
    else:
        assert ours.last_hidden_state.shape == (*shape, 48)


def test_longer_than_the_position_table(compiled: tilewright.CompiledModel) -> None:
    with pytest.raises(InputError, match="512") as caught:
        compiled(ids(2, 513))
    full_message(caught.value)


def test_longest_allowed(bert: torch.nn.Module, compiled: tilewright.CompiledModel) -> None:
    same_as_eager(bert, compiled, masks(2, 512, "uneven", torch.Generator().manual_seed(0)), input_ids=ids(2, 512))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32])
def test_masks_of_other_dtypes(bert: torch.nn.Module, compiled: tilewright.CompiledModel, dtype: torch.dtype) -> None:
    mask = masks(3, LENGTH, "right", torch.Generator().manual_seed(1)).to(dtype)
    same_as_eager(bert, compiled, mask, input_ids=ids())


def test_a_mask_that_is_not_a_padding_mask(bert: torch.nn.Module, compiled: tilewright.CompiledModel) -> None:
    allowed = torch.rand(3, 1, LENGTH, LENGTH) < 0.6
    allowed |= torch.eye(LENGTH, dtype=torch.bool)
    tokens = ids()
    with torch.no_grad():
        expected = bert(tokens, attention_mask=allowed).last_hidden_state
    before = compiled.stats
    ours = compiled(tokens, attention_mask=allowed).last_hidden_state
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    after = compiled.stats
    assert after.fallbacks > before.fallbacks or after.rows_computed - before.rows_computed in (0, 3 * LENGTH)


def test_non_contiguous_inputs(bert: torch.nn.Module, compiled: tilewright.CompiledModel) -> None:
    wide = ids(LENGTH, 6).t()[::2]
    mask = masks(3, LENGTH * 2, "right", torch.Generator().manual_seed(2))[:, ::2]
    assert not wide.is_contiguous()
    same_as_eager(bert, compiled, mask, input_ids=wide)


def test_training_mode(bert: torch.nn.Module) -> None:
    model = build("bert", 0).train()
    with pytest.raises(CaptureError, match="eval") as caught:
        tilewright.compile(model)
    full_message(caught.value)


def test_other_arguments_are_compiled_or_fall_back(bert: torch.nn.Module, compiled: tilewright.CompiledModel) -> None:
    tokens, mask = ids(), masks(3, LENGTH, "right", torch.Generator().manual_seed(4))
    positions = torch.arange(LENGTH).flip(0)[None].expand(3, -1)
    same_as_eager(bert, compiled, mask, input_ids=tokens, position_ids=positions)
    same_as_eager(bert, compiled, mask, input_ids=tokens, output_hidden_states=True)
    same_as_eager(bert, compiled, mask, input_ids=tokens, output_attentions=True)
    same_as_eager(bert, compiled, mask, inputs_embeds=torch.randn(3, LENGTH, 48))


def test_an_op_without_a_kernel_runs_eager_with_a_reason() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.fft.fft(self.linear(x), dim=-1).real)

    model = Odd().eval()
    compiled = tilewright.compile(model)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    assert compiled.stats.eager_steps > 0 or compiled.stats.fallbacks > 0


def test_unpad_on_refuses_rather_than_pads() -> None:
    class Mixer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = build("bert", 0)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state.cumsum(dim=1)

    model = Mixer().eval()
    inputs = {"input_ids": ids(), "attention_mask": masks(3, LENGTH, "right", torch.Generator().manual_seed(0))}
    with pytest.raises(PackingRefused) as caught:
        tilewright.compile(model, unpad="on")(**inputs)
    full_message(caught.value)
    padded = tilewright.compile(model)
    with torch.no_grad():
        torch.testing.assert_close(padded(**inputs), model(**inputs), atol=1e-2, rtol=1e-3)
    assert "packing" in padded.reasons


@pytest.mark.parametrize(
    "option", [{"opt_level": 7}, {"unpad": "maybe"}, {"target": "cuda"}, {"gemm": "blas"}, {"dtype": torch.int32}]
)
def test_options_out_of_range(bert: torch.nn.Module, option: dict[str, object]) -> None:
    with pytest.raises(OptionError) as caught:
        tilewright.compile(bert, **option)
    full_message(caught.value)
