"""``generate`` gives what Hugging Face's gives: tokens, scores, shapes, padding, and the same draws for a seed."""

from typing import Any

import pytest
import torch
from reference_model import ReferenceModel, tiny_gpt2, tiny_llama
from transformers import GenerationConfig

from tilewright.driver.generation import TextGenerator

MODELS = {"gpt2": tiny_gpt2(), "llama": tiny_llama()}
GPT2 = MODELS["gpt2"]


def _generator(model: Any, **options: Any) -> TextGenerator:
    return TextGenerator(ReferenceModel(model), model.config, model.generation_config, **options)


def _ids(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (rows, columns), generator=torch.Generator().manual_seed(seed))


def _both(model: Any, ids: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    """Hugging Face's result and ours, from the same seed."""
    results = []
    for generator in (model, _generator(model)):
        torch.manual_seed(7)
        results.append(generator.generate(ids, **options))
    return results[0], results[1]


EOS = {"eos_token_id": [5, 9, 13, 21, 33, 40, 50], "pad_token_id": 0}
DETERMINISTIC = {
    "greedy": {},
    "end tokens": EOS,
    "one end token": {"eos_token_id": 9, "pad_token_id": 1},
    "minimum": EOS | {"min_new_tokens": 8},
    "minimum length": EOS | {"min_length": 12},
    "maximum length": {"max_length": 11, "max_new_tokens": None},
    "repetition": {"repetition_penalty": 1.7},
    "no repeats": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[7], [8, 9], [11]]},
    "bias": {"sequence_bias": {(4,): 40.0}},
    "suppressed": {"suppress_tokens": [3, 4, 5], "begin_suppress_tokens": [6, 7]},
    "forced end": {"forced_eos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0},
    "decay": EOS | {"exponential_decay_length_penalty": (2, 1.5)},
    "encoder repetition": {"encoder_repetition_penalty": 2.5},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: [row + 3, (int(ids[-1]) + 1) % 64]},
    "beams": {"num_beams": 4},
    "beams with end tokens": EOS | {"num_beams": 4, "num_return_sequences": 3},
    "long beams": EOS | {"num_beams": 3, "length_penalty": 2.5},
    "short beams": EOS | {"num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
    "patient beams": EOS | {"num_beams": 2, "early_stopping": "never"},
    "beams with processors": EOS | {"num_beams": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}
DRAWN = {
    "sample": {},
    "temperature": {"temperature": 0.6},
    "top k": {"top_k": 5},
    "top p": {"top_p": 0.7, "top_k": 0},
    "min p": {"min_p": 0.1},
    "typical": {"typical_p": 0.5},
    "cut-offs": {"epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
    "all of them": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    "sequences": {"num_return_sequences": 3},
    "drawn beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_tokens_equal(name: str, options: dict[str, Any]) -> None:
    expected, found = _both(MODELS[name], _ids(2, 5), **({"max_new_tokens": 12} | options))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", DRAWN.values(), ids=DRAWN)
def test_draws_equal_those_of_the_same_seed(options: dict[str, Any]) -> None:
    expected, found = _both(GPT2, _ids(2, 5), max_new_tokens=10, do_sample=True, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    one, found = _both(
        GPT2, _ids(1, 5), max_new_tokens=10, do_sample=True, **EOS, **(options | {"num_return_sequences": 1})
    )
    torch.testing.assert_close(found, one, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 9}, {"num_beams": 3}], ids=str)
def test_scores_and_logits(options: dict[str, Any]) -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, found = _both(GPT2, _ids(2, 5), max_new_tokens=6, repetition_penalty=1.2, **asked, **options)
    assert set(expected) - set(found) == {"past_key_values"}
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_scores_of_a_row_at_its_end_are_zero() -> None:
    found = _generator(GPT2).generate(
        _ids(5, 5), max_new_tokens=12, return_dict_in_generate=True, output_scores=True, **EOS
    )
    ended = found.sequences[:, 5:] == 0
    assert 0 < ended.sum() < ended.numel()
    for column, scores in enumerate(found.scores):
        assert ((scores == 0).all(1) == ended[:, column]).all()


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("options", [{}, EOS | {"num_beams": 3}, EOS | {"repetition_penalty": 1.6}], ids=str)
def test_a_padded_row_is_what_its_prompt_gets_alone(side: str, options: dict[str, Any]) -> None:
    generator = _generator(GPT2)
    rows = [_ids(1, length, seed=length)[0] for length in (1, 4, 7)]
    ids, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        start = {"left": 7 - len(tokens), "right": 0, "both": (7 - len(tokens)) // 2}[side]
        ids[row, start : start + len(tokens)], mask[row, start : start + len(tokens)] = tokens, 1
    found = generator.generate(ids, attention_mask=mask, max_new_tokens=9, **options)
    assert torch.equal(found[:, :7], ids)
    for row, tokens in enumerate(rows):
        alone = GPT2.generate(tokens[None], max_new_tokens=9, **options)[0, len(tokens) :]
        made = found[row, 7:]
        assert made[: len(alone)].tolist() == alone.tolist()
        assert (made[len(alone) :] == 0).all()


def test_left_padding_as_transformers_has_it() -> None:
    ids, mask = _ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    ids[0, :3], mask[0, :3] = 0, 0
    for options in ({}, EOS | {"min_length": 9}, {"max_length": 10}, {"num_beams": 2}, {"repetition_penalty": 1.5}):
        expected, found = _both(GPT2, ids, attention_mask=mask, **({"max_new_tokens": 8} | options))
        assert torch.equal(found, expected), options


def test_fewer_pages_and_sequences_than_rows() -> None:
    expected = GPT2.generate(_ids(6, 9), max_new_tokens=10)
    generator = _generator(GPT2, pages=6, max_sequences=4, token_budget=7)
    assert torch.equal(generator.generate(_ids(6, 9), max_new_tokens=10), expected)
    assert generator.engine.pages == generator.engine.free_pages == 6


def test_beams_beside_requests_that_hold_pages() -> None:
    generator = _generator(GPT2, pages=14)
    request = generator.submit(_ids(1, 20)[0], max_new_tokens=30)
    for _ in range(10):
        generator.engine.step()
    expected = GPT2.generate(_ids(1, 10, seed=2), max_new_tokens=8, num_beams=3)
    assert torch.equal(generator.generate(_ids(1, 10, seed=2), max_new_tokens=8, num_beams=3), expected)
    assert request.result() == GPT2.generate(_ids(1, 20), max_new_tokens=30)[0, 20:].tolist()
    assert generator.engine.stats.preempted == 1


def test_a_pool_of_its_own_size_grows_with_the_calls() -> None:
    generator = _generator(GPT2)
    generator.generate(_ids(1, 5), max_new_tokens=3)
    assert generator.engine.pages == 2
    generator.generate(_ids(2, 5), max_new_tokens=20)
    assert generator.engine.pages == 16
    generator.generate(_ids(1, 5), max_new_tokens=3)
    assert generator.engine.pages == 16


def test_a_pool_of_its_own_size_holds_all_rows_at_once() -> None:
    """All begin in the same step, so drawn tokens are those of transformers."""
    ids, mask = _ids(3, 5), torch.ones(3, 5, dtype=torch.int64)
    mask[:2, :3] = 0
    expected, found = _both(GPT2, ids, attention_mask=mask, max_new_tokens=2, do_sample=True, temperature=4.0)
    assert torch.equal(found, expected)


def test_defaults_come_from_the_generation_config() -> None:
    config = GenerationConfig(max_new_tokens=4, num_beams=2, eos_token_id=None)
    generator = TextGenerator(ReferenceModel(GPT2), GPT2.config, config)
    expected = GPT2.generate(_ids(1, 5), max_new_tokens=4, num_beams=2)
    assert torch.equal(generator.generate(_ids(1, 5)), expected)
    changed = GenerationConfig(max_new_tokens=6, num_beams=1)
    assert torch.equal(generator.generate(_ids(1, 5), changed), GPT2.generate(_ids(1, 5), max_new_tokens=6))


def test_without_a_prompt_the_start_token_begins() -> None:
    expected = GPT2.generate(bos_token_id=3, max_new_tokens=5)
    assert torch.equal(_generator(GPT2).generate(bos_token_id=3, max_new_tokens=5), expected)
