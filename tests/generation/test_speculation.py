"""Speculative decoding makes the same tokens in fewer steps; what is rejected leaves no trace."""

from typing import Any

import numpy as np
import pytest
import torch
from expected import greedy, prompts
from reference_model import ReferenceModel, tiny_gpt2

from tilewright.driver.generation import TextGenerator
from tilewright.errors import OptionError
from tilewright.runtime.serving.drafts import Ask, Drafter, DraftModel, PromptLookup
from tilewright.runtime.serving.engine import Engine
from tilewright.runtime.serving.sampling import Sampling

GPT2 = tiny_gpt2()
OTHER = tiny_gpt2(seed=1)


class Oracle:
    """Proposes what will come, with every third token wrong: what drafting is at best."""

    def __init__(self, wrong_every: int) -> None:
        self.wrong_every = wrong_every

    def propose(self, asks: Any) -> list[list[int]]:
        return [self._one(ask) for ask in asks]

    def forget(self, key: Any) -> None:
        pass

    def _one(self, ask: Ask) -> list[int]:
        made = greedy(GPT2, ask.tokens.tolist(), ask.count)
        return [(token + (i % self.wrong_every == self.wrong_every - 1)) % 64 for i, token in enumerate(made)]


def _drafters() -> dict[str, Drafter]:
    return {
        "lookup": PromptLookup(2),
        "same model": DraftModel(ReferenceModel(GPT2), pages=60),
        "sure only": DraftModel(ReferenceModel(GPT2), pages=60, confidence=0.9),
        "other model": DraftModel(ReferenceModel(OTHER), pages=60),
        "other pages": DraftModel(ReferenceModel(GPT2, page_size=8), pages=30, token_budget=6, max_sequences=3),
        "few pages": DraftModel(ReferenceModel(GPT2), pages=4),
        "oracle": Oracle(3),
    }


@pytest.mark.parametrize("name", _drafters())
def test_greedy_tokens_stay_the_same(name: str) -> None:
    drafter = _drafters()[name]
    engine = Engine(ReferenceModel(GPT2), pages=30, token_budget=20, max_sequences=4)
    given = prompts(1, 6, 11, 16, 8)
    requests = [
        engine.add_request(prompt, max_new_tokens=20, drafter=drafter, draft_tokens=1 + index)
        for index, prompt in enumerate(given)
    ]
    for prompt, request in zip(given, requests, strict=True):
        assert request.result() == greedy(GPT2, prompt, 20)
    assert engine.free_pages == 30
    if isinstance(drafter, DraftModel):
        assert drafter._allocator.available == drafter._allocator.count
        assert not drafter._drafts


def test_accepted_drafts_save_steps() -> None:
    (prompt,) = prompts(6)
    for drafter, steps in ((Oracle(100), 1 + 3), (DraftModel(ReferenceModel(GPT2), pages=20), 1 + 3)):
        engine = Engine(ReferenceModel(GPT2), pages=30)
        assert engine.add_request(prompt, max_new_tokens=13, drafter=drafter, draft_tokens=3).result() == greedy(
            GPT2, prompt, 13
        )
        assert engine.stats.steps == steps
        assert engine.stats.accepted == 9


def test_drafts_give_way_where_pages_end() -> None:
    (prompt,) = prompts(10)
    engine = Engine(ReferenceModel(GPT2), pages=4)
    request = engine.add_request(prompt, max_new_tokens=7, drafter=Oracle(2), draft_tokens=9)
    assert request.result() == greedy(GPT2, prompt, 7)
    assert engine.stats.preempted == 0


def test_an_end_token_among_accepted_drafts_ends() -> None:
    (prompt,) = prompts(6)
    tokens = greedy(GPT2, prompt, 12)
    engine = Engine(ReferenceModel(GPT2), pages=30)
    eos = frozenset({tokens[3]})
    request = engine.add_request(prompt, max_new_tokens=12, eos_token_ids=eos, drafter=Oracle(99), draft_tokens=8)
    assert request.result() == tokens[: tokens.index(tokens[3]) + 1]


def test_drawn_tokens_stay_the_same_too() -> None:
    (prompt,) = prompts(6)
    made = []
    for drafter in (None, PromptLookup(1), Oracle(2), DraftModel(ReferenceModel(GPT2), pages=20)):
        sampling = Sampling((lambda ids, scores: scores * 3,), True, torch.Generator().manual_seed(5))
        engine = Engine(ReferenceModel(GPT2), pages=30)
        options = {"sampling": sampling, "drafter": drafter, "draft_tokens": 4}
        made.append(engine.add_request(prompt, max_new_tokens=20, **options).result())
        assert drafter is None or engine.stats.drafted > 0
    assert made[1:] == made[:-1]


def test_a_draft_model_with_a_short_context_stops_where_it_ends() -> None:
    draft = ReferenceModel(tiny_gpt2(n_positions=16))
    (prompt,) = prompts(12)
    engine = Engine(ReferenceModel(GPT2), pages=30)
    drafter = DraftModel(draft, pages=20, token_budget=4, max_sequences=1)
    request = engine.add_request(prompt, max_new_tokens=30, drafter=drafter, draft_tokens=1)
    assert request.result() == greedy(GPT2, prompt, 30)
    assert sum(map(sum, draft.steps)) <= 16


def test_one_draft_model_serves_two_engines() -> None:
    drafter = DraftModel(ReferenceModel(GPT2), pages=40)
    engines = [Engine(ReferenceModel(GPT2), pages=30) for _ in range(2)]
    given = prompts(12, 5)
    requests = [
        engine.add_request(prompt, max_new_tokens=12, drafter=drafter, draft_tokens=2)
        for engine, prompt in zip(engines, given, strict=True)
    ]
    while engines[0].step() | engines[1].step():
        pass
    assert [each.result() for each in requests] == [greedy(GPT2, prompt, 12) for prompt in given]
    assert all(engine.stats.accepted > 0 for engine in engines)


@pytest.mark.parametrize(
    ("tokens", "ngram", "expected"),
    [
        ([1, 2, 3, 1, 2], 2, [3, 1, 2]),
        ([1, 2, 3, 9, 2], 2, [3, 9, 2]),  # no run of two: the last token alone
        ([1, 2, 3, 9, 2], 1, [3, 9, 2]),
        ([1, 2, 7, 1, 2, 8, 1, 2], 2, [8, 1, 2]),  # the latest
        ([1, 1, 1], 2, [1]),
        ([1, 2, 3], 2, []),
        ([4], 3, []),
    ],
)
def test_prompt_lookup(tokens: list[int], ngram: int, expected: list[int]) -> None:
    assert PromptLookup(ngram).propose([Ask(0, np.array(tokens), 3)]) == [expected]


def _generator(model: Any, **options: Any) -> TextGenerator:
    return TextGenerator(ReferenceModel(model), model.config, model.generation_config, **options)


def test_generate_takes_both_kinds() -> None:
    ids = torch.tensor(prompts(9, 9))
    expected = GPT2.generate(ids, max_new_tokens=15)
    generator = _generator(GPT2)
    assert torch.equal(generator.generate(ids, max_new_tokens=15, prompt_lookup_num_tokens=4), expected)
    assert generator.engine.stats.drafted > 0
    drafted = generator.generate(ids, max_new_tokens=15, assistant_model=_generator(GPT2), num_assistant_tokens=4)
    assert torch.equal(drafted, expected)
    assert generator.engine.stats.accepted > 0


def test_draft_models_that_do_not_fit_are_refused() -> None:
    ids = torch.tensor(prompts(9))
    with pytest.raises(OptionError, match="another vocabulary"):
        _generator(GPT2).generate(ids, assistant_model=_generator(tiny_gpt2(vocab_size=65)))
    with pytest.raises(OptionError, match="not compiled"):
        _generator(GPT2).generate(ids, assistant_model=GPT2)
    with pytest.raises(OptionError, match="at least one token"):
        PromptLookup(0)
