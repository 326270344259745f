"""What runs eager: whole calls and parts of a model, with a reason; and what calls that fail leave behind."""

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references import build, masks
from torch import Tensor, nn

import tilewright
from tilewright import settings
from tilewright.errors import CodegenError, InputError, PackingRefused


def ids(batch: int = 3, length: int = 9) -> Tensor:
    return torch.randint(3, 99, (batch, length))


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return build("bert", 0)


@pytest.fixture(scope="module")
def compiled(bert: nn.Module) -> tilewright.CompiledModel:
    return tilewright.compile(bert)


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": ids().tolist()},
        {"input_ids": ids().numpy()},
        {"input_ids": ids().float()},
        {"input_ids": ids()[0]},
        {"input_ids": "text"},
        {"input_ids": ids(), "attention_mask": np.ones((3, 9))},
        {"input_ids": ids(), "inputs_embeds": torch.randn(3, 9, 48)},
        {"input_ids": ids().to("meta")},
        {"input_ids": ids().to_sparse()},
        {},
    ],
    ids=["list", "numpy", "float", "one axis", "text", "numpy mask", "ids twice", "meta", "sparse", "nothing"],
)
def test_a_call_the_model_refuses(compiled: tilewright.CompiledModel, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        compiled(**arguments)
    assert caught.value.why
    assert caught.value.hint


def test_a_refused_call_does_not_stand_in_the_way_of_a_correct_one(bert: nn.Module) -> None:
    compiled = tilewright.compile(bert)
    with pytest.raises(InputError, match="the model itself fails"):
        compiled(inputs_embeds=torch.randn(3, 9, 47))
    embeds = torch.randn(3, 9, 48)
    with torch.no_grad():
        expected = bert(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(compiled(inputs_embeds=embeds).last_hidden_state, expected, atol=1e-3, rtol=1e-3)
    assert compiled.stats.fallbacks == 0


@pytest.mark.parametrize("queries", [(1, 9), (9, 1)])
def test_masks_of_keys_and_masks_of_pairs(bert: nn.Module, queries: tuple[int, int]) -> None:
    compiled = tilewright.compile(bert)
    keys = masks(3, 9, "right", torch.Generator().manual_seed(0)).bool()[:, None, None]
    tokens = ids()
    for size in queries:
        mask = torch.where(keys, 0.0, torch.finfo(torch.float32).min).expand(3, 1, size, 9)
        with torch.no_grad():
            expected = bert(tokens, attention_mask=mask).last_hidden_state
        ours = compiled(tokens, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    assert compiled.stats.fallbacks == 0


class Halves(nn.Module):
    """Computes with the length as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float(np.full(x.shape[1], 0.5).sum())


def test_a_length_used_as_a_number_runs_eager_for_other_lengths() -> None:
    model = Halves().eval()
    compiled = tilewright.compile(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for length in (4, 7, 4):
            x = torch.randn(2, length, 8)
            torch.testing.assert_close(compiled(x), model(x).detach())


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_what_cannot_be_captured_says_so_once_and_is_refused_on_demand() -> None:
    model = Branches().eval()
    compiled = tilewright.compile(model)
    x = torch.randn(3, 4)
    with pytest.warns(RuntimeWarning, match="as it was"):
        assert torch.equal(compiled(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(-x)
    assert compiled.stats.fallbacks == 2
    assert any("Branches" in why for why in compiled.reasons.values())
    with pytest.raises(PackingRefused, match="cannot be captured"):
        tilewright.compile(model, unpad="on")(x)


def test_a_kernel_that_cannot_be_built_makes_its_part_eager(bert: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.codegen.cpu import build as backend

    original = backend.build

    def build_most(source: Any) -> Any:
        if "gelu" in source.name:
            raise CodegenError("no such kernel", why="the test says so")
        return original(source)

    monkeypatch.setattr(backend, "build", build_most)
    with pytest.warns(UserWarning, match="a kernel cannot be built"):
        compiled = tilewright.compile(bert, gemm="triton")
    tokens, mask = ids(), masks(3, 9, "uneven", torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = bert(tokens, attention_mask=mask).last_hidden_state
    ours = compiled(tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], atol=1e-3, rtol=1e-3)
    assert compiled.stats.eager_steps > 0
    assert any(topic.startswith("eager part") and "the test says so" in why for topic, why in compiled.reasons.items())


def test_settings_of_one_thread_are_not_those_of_another(tmp_path: Path) -> None:
    seen: list[Any] = []
    with settings.scope(cache_dir=tmp_path):
        thread = threading.Thread(target=lambda: seen.append(settings.get("cache_dir")))
        thread.start()
        thread.join()
        assert settings.get("cache_dir") == tmp_path
    assert seen != [tmp_path]


def test_threads_share_a_model_and_compile_one_at_once(bert: nn.Module) -> None:
    compiled = tilewright.compile(bert)
    other = tilewright.compile(bert)
    tokens = [ids(2 + i % 3, 5 + i) for i in range(6)]
    expected = [compiled(each).last_hidden_state for each in tokens]
    wrong: list[Any] = []

    def work() -> None:
        try:
            for _ in range(5):
                for each, result in zip(tokens, expected, strict=True):
                    if not torch.equal(compiled(each).last_hidden_state, result):
                        wrong.append(tuple(each.shape))
            for model in (compiled, other):
                model(tokens[0], output_hidden_states=True)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert compiled.stats.compilations == 2
    assert bert.config._attn_implementation == "sdpa"
