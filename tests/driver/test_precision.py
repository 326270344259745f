"""Types asked for and types that models have, on processors with and without arithmetic in them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from references import build, in_double, masks

import tilewright
from tilewright.driver import artifact, precision
from tilewright.errors import OptionError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without half arithmetic, whatever this one has."""
    monkeypatch.setattr(precision, "_is_native", lambda dtype: False)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half types are computed as such, also where that is slow."""
    monkeypatch.setattr(precision, "_is_native", lambda dtype: True)


def error(compiled: Callable[..., object], reference: torch.nn.Module) -> tuple[float, float]:
    """Largest error over real tokens, and largest value."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, 99, (3, 21), generator=generator), masks(3, 21, "right", generator)
    with torch.no_grad():
        want = reference(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        got = compiled(ids, attention_mask=mask).last_hidden_state[mask.bool()]  # type: ignore[attr-defined]
    return float((got.double() - want).abs().max()), float(want.abs().max())


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("name", HALF)
def test_half_asked_for_without_hardware(name: str) -> None:
    model = build("bert", 0)
    with pytest.warns(RuntimeWarning, match="computed in fp32"):
        compiled = tilewright.compile(model, dtype=name)
    assert "this processor has no" in compiled.reasons["dtype"]
    out = compiled(torch.randint(3, 99, (2, 5)))
    assert {value.dtype for value in out.values()} == {HALF[name]}
    # Only the results were rounded: half a unit in the last place of bf16 is 2 ** -9 of a value.
    largest, scale = error(compiled, in_double(model))
    assert largest <= 2.0**-8 * scale


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("dtype", HALF.values())
def test_a_half_checkpoint_without_hardware(dtype: torch.dtype) -> None:
    model = build("roberta", 1).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # nobody asked: a reason is enough
        compiled = tilewright.compile(model)
    assert "of the model is computed in fp32" in compiled.reasons["dtype"]
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert compiled(torch.randint(3, 99, (2, 5))).last_hidden_state.dtype == dtype
    largest, scale = error(compiled, in_double(model))
    eager, _ = error(model, in_double(model))
    assert largest <= min(eager, 2.0**-8 * scale)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", HALF.values())
def test_half_with_hardware(dtype: torch.dtype) -> None:
    model = build("bert", 2)
    compiled = tilewright.compile(model, dtype=dtype)
    assert "dtype" not in compiled.reasons
    half = build("bert", 2).to(dtype)
    largest, scale = error(compiled, in_double(half))
    eager, _ = error(half, in_double(half))
    assert largest <= 2 * eager + 1e-6 * scale


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("fp64", torch.float64)])
def test_names_of_types(name: str, dtype: torch.dtype) -> None:
    compiled = tilewright.compile(build("bert", 0), dtype=name)
    assert compiled(torch.randint(3, 99, (2, 5))).last_hidden_state.dtype == dtype
    assert "dtype" not in compiled.reasons


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whole_numbers_of_another_model_type(dtype: torch.dtype) -> None:
    """Scales and sums are fp32 whatever the model has; results keep its type."""
    model = build("distilbert", 3).to(dtype)
    compiled = tilewright.compile(model, dtype="int8")
    assert compiled(torch.randint(3, 99, (2, 5))).last_hidden_state.dtype == dtype
    largest, scale = error(compiled, in_double(model))
    assert largest <= 0.1 * scale


def test_whole_numbers_have_no_effect_on_the_reference() -> None:
    with pytest.raises(OptionError, match="no effect at opt_level=0"):
        tilewright.compile(build("bert", 0), dtype="int8", opt_level=0)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_saved_model_gives_the_same(dtype: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = tilewright.compile(build("bert", 4), dtype=dtype)
    again = artifact.open_artifact(artifact.save(compiled, tmp_path / "saved"))
    ids, mask = torch.randint(3, 99, (3, 21)), masks(3, 21, "right", torch.Generator().manual_seed(2))
    want, got = (model(ids, attention_mask=mask) for model in (compiled, again))
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value)


@pytest.mark.usefixtures("native")
def test_calls_may_give_floats_in_the_models_own_type() -> None:
    """The inputs of such a model are known only from its first call, which gives fp32 to what computes in bf16."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16)).eval()
    compiled = tilewright.compile(model, dtype="bf16")
    x = torch.randn(5, 24)
    for rows in (x, x.bfloat16()):
        found = compiled(rows)
        assert found.dtype == torch.bfloat16
        with torch.no_grad():
            torch.testing.assert_close(found.double(), in_double(model)(x.double()), rtol=0.02, atol=0.02)
