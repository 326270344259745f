"""Requests cancelled at any moment, from any thread: others get their tokens, and every page comes back."""

import random
import threading
import time
from typing import Any

import pytest
import torch
from expected import greedy, prompts
from reference_model import ReferenceModel, tiny_gpt2

from tilewright.runtime.serving.engine import Engine
from tilewright.runtime.serving.request import Request

GPT2 = tiny_gpt2()
NEW = 8


class Moments:
    """Cancels requests in the middle of chosen calls of the model: before, or after it has computed."""

    def __init__(self, model: ReferenceModel, chance: random.Random, leaving: list[Request]) -> None:
        self._step, self._copy = model.step, model.copy_pages
        self._chance, self._leaving = chance, leaving
        model.step, model.copy_pages = self.step, self.copy_pages  # type: ignore[method-assign]

    def step(self, pool: Any, batch: Any) -> torch.Tensor:
        self._maybe()
        logits = self._step(pool, batch)
        self._maybe()
        return logits

    def copy_pages(self, *args: Any) -> None:
        self._maybe()
        self._copy(*args)

    def _maybe(self) -> None:
        if self._leaving and self._chance.random() < 0.3:
            self._leaving.pop().cancel()


@pytest.mark.parametrize("seed", range(12))
def test_inside_of_a_step(seed: int) -> None:
    chance = random.Random(seed)
    model = ReferenceModel(GPT2)
    engine = Engine(model, pages=chance.randint(9, 16), token_budget=chance.randint(4, 20), max_sequences=4)
    given = prompts(*(chance.randint(1, 14) for _ in range(8)), seed=seed)
    requests = [engine.add_request(prompt, max_new_tokens=NEW) for prompt in given]
    leaving = chance.sample(requests, 5)
    Moments(model, chance, list(leaving))
    while engine.step():
        pass
    _check(engine, given, requests, leaving)


@pytest.mark.parametrize("seed", range(4))
def test_by_other_threads(seed: int) -> None:
    chance = random.Random(seed)
    engine = Engine(ReferenceModel(GPT2), pages=14, token_budget=9, max_sequences=4)
    given = prompts(*(chance.randint(1, 14) for _ in range(10)), seed=seed)
    requests = [engine.add_request(prompt, max_new_tokens=NEW) for prompt in given]
    leaving = requests[::2]

    def leave(request: Request, after: float) -> None:
        time.sleep(after)
        request.cancel()

    threads = [threading.Thread(target=leave, args=(each, chance.random() * 0.1)) for each in leaving]
    threads += [threading.Thread(target=each.result) for each in requests[1::2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    _check(engine, given, requests, leaving)


def _check(engine: Engine, given: list[list[int]], requests: list[Request], leaving: list[Request]) -> None:
    for prompt, request in zip(given, requests, strict=True):
        assert request.finished
        made, expected = request.new_tokens, greedy(GPT2, prompt, NEW)
        assert made == expected[: len(made)]
        assert len(made) == NEW or (request in leaving and request.finish_reason == "cancelled")
    assert not engine.busy
    assert engine.free_pages == engine.pages
