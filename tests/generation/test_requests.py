"""Requests as their callers see them: streams, ends, errors of their own, and input that is refused."""

import asyncio
import threading
import time
from typing import Any

import pytest
import torch
from expected import greedy, prompts
from reference_model import ReferenceModel, tiny_gpt2

from tilewright.errors import InputError, OptionError
from tilewright.runtime.serving.engine import Engine
from tilewright.runtime.serving.sampling import Sampling

GPT2 = tiny_gpt2()


def _engine(**options: Any) -> Engine:
    return Engine(ReferenceModel(GPT2), **({"pages": 40} | options))


def test_iterating_gives_tokens_as_they_are_made() -> None:
    engine = _engine()
    (prompt,) = prompts(5)
    request = engine.add_request(prompt, max_new_tokens=6)
    steps = []
    for token in request:
        steps.append((token, engine.stats.steps))
    assert steps == [(token, step + 1) for step, token in enumerate(greedy(GPT2, prompt, 6))]


def test_leaving_the_loop_cancels() -> None:
    engine = _engine()
    (prompt,) = prompts(5)
    request = engine.add_request(prompt, max_new_tokens=6)
    tokens = iter(request)
    made = [next(tokens), next(tokens)]
    tokens.close()
    assert request.finish_reason == "cancelled"
    assert made == request.new_tokens == greedy(GPT2, prompt, 6)[:2]
    assert engine.free_pages == 40
    assert not engine.busy


def test_an_end_token_is_the_last() -> None:
    (prompt,) = prompts(5)
    tokens = greedy(GPT2, prompt, 12)
    request = _engine().add_request(prompt, max_new_tokens=12, eos_token_ids=frozenset({tokens[4], 999}))
    assert request.result() == tokens[: tokens.index(tokens[4]) + 1]
    assert request.finish_reason == "eos"


def test_without_a_limit_context_or_pages_end_it() -> None:
    (prompt,) = prompts(5)
    by_context = _engine().add_request(prompt)
    assert len(by_context.result()) == 64 - 5
    by_pages = _engine(pages=3).add_request(prompt)
    assert len(by_pages.result()) == 3 * 4 + 1 - 5
    assert by_context.finish_reason == by_pages.finish_reason == "length"


def test_asyncio_streams_share_steps() -> None:
    engine = _engine()
    given = prompts(3, 7, 5)

    async def read(prompt: list[int]) -> list[int]:
        return [token async for token in engine.add_request(prompt, max_new_tokens=8).stream()]

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*map(read, given))

    assert asyncio.run(all_of_them()) == [greedy(GPT2, prompt, 8) for prompt in given]
    assert engine.stats.steps <= 10
    assert engine.free_pages == 40


def test_a_cancelled_task_cancels_its_request_only() -> None:
    engine = _engine()
    first, second = prompts(3, 7)

    async def both() -> tuple[Any, list[int]]:
        leaving = engine.add_request(first, max_new_tokens=40)
        reading = engine.add_request(second, max_new_tokens=12)
        task = asyncio.create_task(_read(leaving))
        made = []
        async for token in reading.stream():
            made.append(token)
            if len(made) == 4:
                task.cancel()
        return leaving, made

    leaving, made = asyncio.run(both())
    assert leaving.finish_reason == "cancelled"
    assert made == greedy(GPT2, second, 12)
    assert engine.free_pages == 40


async def _read(request: Any) -> None:
    async for _ in request.stream():
        pass


def test_threads_share_the_engine() -> None:
    engine = _engine(pages=20)
    given = prompts(3, 7, 5, 9, 12, 2)
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = engine.add_request(given[index], max_new_tokens=9).result()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[index] for index in range(len(given))] == [greedy(GPT2, prompt, 9) for prompt in given]
    assert engine.free_pages == 20


def test_a_thread_that_waits_takes_the_tokens_of_another_ones_step() -> None:
    model = ReferenceModel(GPT2)
    engine = Engine(model, pages=20)
    request = engine.add_request([1, 2, 3], max_new_tokens=9)
    step, inside, go = model.step, threading.Event(), threading.Event()

    def waiting(pool: Any, batch: Any) -> torch.Tensor:
        inside.set()
        assert go.wait(60)
        return step(pool, batch)

    model.step = waiting  # type: ignore[method-assign]
    runs = threading.Thread(target=engine.step)
    runs.start()
    assert inside.wait(60)
    made: list[int] = []
    reads = threading.Thread(target=lambda: made.append(next(iter(request))))
    reads.start()
    time.sleep(0.05)  # it stands at the engine by now
    go.set()
    runs.join(60)
    reads.join(60)
    assert made == greedy(GPT2, [1, 2, 3], 1)
    assert engine.stats.steps == 1


def test_nothing_is_left_of_an_event_loop() -> None:
    engine = _engine()
    for _ in range(3):
        asyncio.run(_read(engine.add_request([1, 2, 3], max_new_tokens=2)))
    assert not engine._next_steps


@pytest.mark.parametrize("where", ["processor", "stop"])
def test_a_step_inside_of_a_step_is_refused(where: str) -> None:
    engine = _engine()

    def inside(ids: torch.Tensor, scores: Any) -> Any:
        return engine.add_request([1, 2], max_new_tokens=1).result()

    options: dict[str, Any] = {"sampling": Sampling((inside,))} if where == "processor" else {"stop": inside}
    request = engine.add_request([1, 2, 3], max_new_tokens=2, **options)
    with pytest.raises(InputError, match="inside of a step"):
        request.result()
    assert engine.add_request([1, 2, 3], max_new_tokens=2).result() == greedy(GPT2, [1, 2, 3], 2)


def test_cancelling_while_a_step_runs_waits_for_its_end() -> None:
    model = ReferenceModel(GPT2)
    engine = Engine(model, pages=40)
    first, second = prompts(3, 7)
    leaving, staying = (engine.add_request(prompt, max_new_tokens=6) for prompt in (first, second))
    step = model.step

    def cancelling(pool: Any, batch: Any) -> torch.Tensor:
        leaving.cancel()
        assert leaving.finished or leaving.table.pages
        return step(pool, batch)

    model.step = cancelling  # type: ignore[method-assign]
    engine.step()
    assert leaving.finished
    assert not leaving.table.pages
    assert staying.result() == greedy(GPT2, second, 6)


class Broken(Exception):
    """Raised by a user's own code."""


def _breaks(ids: torch.Tensor, scores: Any) -> Any:
    if ids.shape[1] == 9:
        raise Broken
    return scores if isinstance(scores, torch.Tensor) else False


@pytest.mark.parametrize("where", [{"sampling": Sampling((_breaks,))}, {"stop": _breaks}], ids=["processor", "stop"])
def test_an_error_of_one_request_leaves_others_alone(where: dict[str, Any]) -> None:
    engine = _engine()
    first, second = prompts(5, 7)
    broken, other = engine.add_request(first, max_new_tokens=12, **where), engine.add_request(second, max_new_tokens=12)
    with pytest.raises(Broken):
        broken.result()
    assert broken.finish_reason == "error"
    assert broken.new_tokens == greedy(GPT2, first, 12)[:4]
    assert other.result() == greedy(GPT2, second, 12)
    assert engine.free_pages == 40


def test_scores_that_are_no_distribution_end_their_request_only() -> None:
    engine = _engine()
    (prompt,) = prompts(5)

    def nothing_left(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)

    bad = engine.add_request(prompt, max_new_tokens=3, sampling=Sampling((nothing_left,), do_sample=True))
    good = engine.add_request(prompt, max_new_tokens=3, sampling=Sampling(do_sample=True))
    with pytest.raises(RuntimeError, match="probability"):
        bad.result()
    assert len(good.result()) == 3


def test_a_step_that_fails_can_be_repeated() -> None:
    model = ReferenceModel(GPT2)
    engine = Engine(model, pages=40)
    (prompt,) = prompts(5)
    request = engine.add_request(prompt, max_new_tokens=6)
    engine.step()
    step, failures = model.step, iter([MemoryError, KeyboardInterrupt])

    def failing(pool: Any, batch: Any) -> torch.Tensor:
        for failure in failures:
            raise failure
        return step(pool, batch)

    model.step = failing  # type: ignore[method-assign]
    for failure in (MemoryError, KeyboardInterrupt):
        with pytest.raises(failure):
            engine.step()
    assert request.result() == greedy(GPT2, prompt, 6)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([[1, 2]], {}, "a row of at least one token"),
        ([1.5], {}, "whole numbers"),
        ([1, 64], {}, "id 64"),
        ([1, -1], {}, "id -1"),
        ([1] * 64, {}, "longer than the model's context"),
        ([1] * 30, {"max_new_tokens": 35}, "longer than the model's context"),
        ([1] * 17, {}, "the cache is smaller than this request"),
        ([1] * 10, {"max_new_tokens": 8}, "17 tokens need|18 tokens need 5 pages"),
        ([1], {"max_new_tokens": 0}, "at least one token"),
    ],
)
def test_what_can_never_run_is_refused(prompt: Any, options: dict[str, Any], message: str) -> None:
    engine = _engine(pages=4)
    with pytest.raises(InputError, match=message):
        engine.add_request(prompt, **options)
    assert not engine.busy


def test_a_request_may_fill_the_pool_to_the_last_slot() -> None:
    (prompt,) = prompts(10)
    assert _engine(pages=4).add_request(prompt, max_new_tokens=7).result() == greedy(GPT2, prompt, 7)


@pytest.mark.parametrize(
    "options", [{"pages": 0}, {"max_sequences": 0}, {"token_budget": 3, "max_sequences": 4}], ids=str
)
def test_an_engine_of_impossible_sizes_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        _engine(**options)
