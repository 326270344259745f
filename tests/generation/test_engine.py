"""Continuous batching gives each request the tokens it gets alone, whatever runs beside it and however few pages."""

from typing import Any

import pytest
import torch
from expected import greedy, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import ReferenceModel, tiny_gpt2, tiny_llama

from tilewright.runtime.serving.engine import Engine
from tilewright.runtime.serving.request import Request, RequestOptions
from tilewright.runtime.serving.sampling import Sampling

MODELS = {"gpt2": tiny_gpt2(), "llama": tiny_llama()}
GPT2 = MODELS["gpt2"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [5, 64], ids=["chunked", "whole"])
def test_tokens_equal_those_of_each_prompt_alone(name: str, budget: int) -> None:
    model = ReferenceModel(MODELS[name])
    engine = Engine(model, pages=40, token_budget=budget, max_sequences=5)
    given_prompts = prompts(1, 3, 4, 5, 17, 8)
    requests = [engine.add_request(prompt, max_new_tokens=12) for prompt in given_prompts]
    for prompt, request in zip(given_prompts, requests, strict=True):
        assert request.result() == greedy(MODELS[name], prompt, 12)
        assert request.finish_reason == "length"
    assert max(map(sum, model.steps)) <= budget
    assert engine.free_pages == 40
    assert model.pools == 1


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    model = ReferenceModel(GPT2)
    engine = Engine(model, pages=40, token_budget=8, max_sequences=4)
    short, long = prompts(2, 40)
    first = engine.add_request(short, max_new_tokens=12)
    engine.step()
    second = engine.add_request(long, max_new_tokens=2)
    while not second.new_tokens:
        engine.step()
    assert model.steps[1:7] == [[1, 7]] * 5 + [[1, 5]]
    assert first.result() == greedy(GPT2, short, 12)


def test_pages_run_out_and_the_youngest_gives_way() -> None:
    engine = Engine(ReferenceModel(GPT2), pages=9, token_budget=16, max_sequences=4)
    given_prompts = prompts(6, 7, 8, 9)
    requests = [engine.add_request(prompt, max_new_tokens=20) for prompt in given_prompts]
    finished: list[Request] = []
    while engine.busy:
        engine.step()
        finished += [request for request in requests if request.finished and request not in finished]
    assert finished == requests
    assert engine.stats.preempted > 0
    for prompt, request in zip(given_prompts, requests, strict=True):
        assert request.new_tokens == greedy(GPT2, prompt, 20)


def test_a_pool_of_exactly_one_request() -> None:
    engine = Engine(ReferenceModel(GPT2), pages=6, token_budget=16, max_sequences=4)
    given_prompts = prompts(5, 12)
    requests = [engine.add_request(prompt, max_new_tokens=25 - len(prompt)) for prompt in given_prompts]
    for prompt, request in zip(given_prompts, requests, strict=True):
        assert request.result() == greedy(GPT2, prompt, 25 - len(prompt))


def test_a_prompt_known_before_is_not_computed_again() -> None:
    model = ReferenceModel(GPT2)
    engine = Engine(model, pages=20, token_budget=64)
    (prompt,) = prompts(18)
    engine.add_request(prompt, max_new_tokens=3).result()
    model.steps.clear()
    longer = [*prompt, 1, 2, 3]
    assert engine.add_request(longer, max_new_tokens=3).result() == greedy(GPT2, longer, 3)
    assert model.steps[0] == [5]
    assert engine.stats.reused == 16


def test_several_sequences_compute_their_prompt_once() -> None:
    model = ReferenceModel(GPT2)
    engine = Engine(model, pages=40, token_budget=64, max_sequences=3)
    (prompt,) = prompts(10)
    options = [
        RequestOptions(max_new_tokens=9, sampling=Sampling(do_sample=True, generator=torch.Generator().manual_seed(s)))
        for s in range(5)
    ]
    requests = engine.add_requests(prompt, options)
    alone = [Engine(ReferenceModel(GPT2), pages=40).add_request(prompt, _seeded(s)).result() for s in range(5)]
    assert [request.result() for request in requests] == alone
    assert len({tuple(made) for made in alone}) > 1
    assert model.steps[:2] == [[10], [1, 1, 1]]  # what could not start at once finds the full pages later
    assert engine.free_pages == 40


def _seeded(seed: int) -> RequestOptions:
    sampling = Sampling(do_sample=True, generator=torch.Generator().manual_seed(seed))
    return RequestOptions(max_new_tokens=9, sampling=sampling)


def test_followers_of_a_cancelled_request_start_by_themselves() -> None:
    engine = Engine(ReferenceModel(GPT2), pages=40, token_budget=4, max_sequences=4)
    (prompt,) = prompts(10)
    first, second, third = engine.add_requests(prompt, [RequestOptions(max_new_tokens=5)] * 3)
    engine.step()
    first.cancel()
    assert engine.free_pages == 40
    assert second.result() == third.result() == greedy(GPT2, prompt, 5)
    assert first.finish_reason == "cancelled"


def test_followers_wait_with_a_leader_that_finds_no_pages() -> None:
    model = ReferenceModel(GPT2)
    engine = Engine(model, pages=10, token_budget=64, max_sequences=8)
    first, second = prompts(20, 17)
    before = engine.add_request(first, max_new_tokens=3)
    engine.step()
    twins = engine.add_requests(second, [RequestOptions(max_new_tokens=2)] * 3)
    before.result()
    model.steps.clear()
    for request in twins:
        assert request.result() == greedy(GPT2, second, 2)
    assert model.steps == [[17], [1, 1, 1]]


PROMPTS = [[1], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [9] * 8, [1, 2, 3, 4, 9, 9, 9]]


@settings(max_examples=40, deadline=None)
@given(
    pages=st.integers(6, 14),
    budget=st.integers(3, 20),
    events=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, len(PROMPTS) - 1), st.integers(1, 12), st.integers(1, 3)),
            st.tuples(st.just("step"), st.integers(1, 4)),
            st.tuples(st.just("cancel"), st.integers(0, 20)),
            st.tuples(st.just("interrupt")),
        ),
        max_size=25,
    ),
)
def test_any_order_of_events(pages: int, budget: int, events: list[tuple[Any, ...]]) -> None:
    model = ReferenceModel(GPT2)
    engine = Engine(model, pages=pages, token_budget=budget, max_sequences=3)
    requests: list[tuple[list[int], int, Request]] = []
    for event in events:
        if event[0] == "add":
            _, which, count, copies = event
            made = engine.add_requests(PROMPTS[which], [RequestOptions(max_new_tokens=count)] * copies)
            requests += [(PROMPTS[which], count, request) for request in made]
        elif event[0] == "step":
            for _ in range(event[1]):
                engine.step()
        elif event[0] == "cancel" and requests:
            requests[event[1] % len(requests)][2].cancel()
        elif event[0] == "interrupt":
            _interrupted_step(engine, model)
        _check_pages(engine)
    for prompt, count, request in requests:
        made = request.new_tokens if request.finish_reason == "cancelled" else request.result()
        assert made == greedy(GPT2, prompt, 12)[: len(made)]
        assert len(made) == count or request.finish_reason == "cancelled"
    assert engine.free_pages == pages


def _interrupted_step(engine: Engine, model: ReferenceModel) -> None:
    step = model.step
    model.step = _interrupt
    try:
        engine.step()
    except KeyboardInterrupt:
        pass
    finally:
        model.step = step


def _interrupt(pool: Any, batch: Any) -> torch.Tensor:
    raise KeyboardInterrupt


def _check_pages(engine: Engine) -> None:
    scheduler = engine._scheduler
    assert all(not request.table.pages for request in scheduler.waiting)
    held = {page for request in scheduler.running for page in request.table.pages}
    assert engine.free_pages == engine.pages - len(held)
    for request in scheduler.running:
        assert len(request.table.pages) * 4 >= request.computed
    assert len(scheduler.running) <= 3
    arrivals = [request.arrival for request in scheduler.running]
    assert arrivals == sorted(arrivals)
