"""Requests behind sources: each gets its own tokens, sources are read once and shared, and wrong ones harm nobody."""

from typing import Any

import pytest
import torch
from expected import prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import ReferenceModel, tiny_gpt2
from reference_source_model import ReferenceSourceModel, tiny_bart

from tilewright.errors import InputError
from tilewright.ir.steps import SourceBatch, SourceModel
from tilewright.runtime.serving.engine import Engine
from tilewright.runtime.serving.request import Request, RequestOptions
from tilewright.runtime.serving.sampling import Sampling

BART = tiny_bart()
SOURCES = prompts(1, 17, 8, 3, 12, seed=3)
_MADE: dict[tuple[Any, ...], list[int]] = {}


def greedy(source: list[int], count: int, start: tuple[int, ...] = (2,)) -> list[int]:
    """What transformers writes behind a source."""
    key = (tuple(source), count, start)
    if key not in _MADE:
        made = BART.generate(
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([start]), max_new_tokens=count
        )
        _MADE[key] = made[0, len(start) :].tolist()
    return _MADE[key]


def _engine(**options: Any) -> Engine:
    return Engine(ReferenceSourceModel(BART), **({"pages": 60} | options))


def test_the_reference_reads_sources() -> None:
    assert isinstance(ReferenceSourceModel(BART), SourceModel)
    assert not isinstance(ReferenceModel(tiny_gpt2()), SourceModel)


@pytest.mark.parametrize("budget", [6, 64], ids=["chunked", "whole"])
def test_tokens_equal_those_of_each_source_alone(budget: int) -> None:
    engine = _engine(token_budget=budget, max_sequences=4)
    requests = [engine.add_request([2], source=source, max_new_tokens=12) for source in SOURCES]
    for source, request in zip(SOURCES, requests, strict=True):
        assert request.result() == greedy(source, 12)
    assert engine.stats.sources == len(SOURCES)
    assert engine.free_pages == 60


def test_sources_that_fit_are_read_in_one_run() -> None:
    model = ReferenceSourceModel(BART)
    engine = Engine(model, pages=60, token_budget=30, max_sequences=5)
    for source in SOURCES:
        engine.add_request([2], source=source, max_new_tokens=3)
    engine.step()
    assert model.read == [SOURCES[:4]]  # 29 tokens and 4 of the starts; the next one does not fit beside them
    engine.step()
    assert model.read[1:] == [SOURCES[4:]]


def test_a_source_known_before_is_not_read_again() -> None:
    engine = _engine()
    start = (2, 5, 6, 7, 8, 9)
    first = engine.add_request(start, source=SOURCES[1], max_new_tokens=6).result()
    assert first == greedy(SOURCES[1], 6, start)
    assert engine.add_request(start, source=SOURCES[1], max_new_tokens=6).result() == first
    assert (engine.stats.sources, engine.stats.reused) == (1, 4)
    # The same prompt behind another source has other keys.
    assert engine.add_request(start, source=SOURCES[2], max_new_tokens=6).result() == greedy(SOURCES[2], 6, start)
    assert (engine.stats.sources, engine.stats.reused) == (2, 4)
    # A source that begins like a known one is another source, all through: an encoder sees all of it.
    for other in ([*SOURCES[2], 1], [*SOURCES[1][:-1], 63 - SOURCES[1][-1]]):
        assert engine.add_request([2], source=other, max_new_tokens=6).result() == greedy(other, 6)
    assert engine.stats.sources == 4


def test_several_sequences_share_their_source() -> None:
    engine = _engine(token_budget=64, max_sequences=3)
    options = [
        RequestOptions(max_new_tokens=9, sampling=Sampling(do_sample=True, generator=torch.Generator().manual_seed(s)))
        for s in range(5)
    ]
    requests = engine.add_requests([2], options, source=SOURCES[1])
    engine.step()
    running = [request for request in requests if request.made]
    assert len(running) == 3
    assert {tuple(request.source.pages) for request in running if request.source} == {tuple(running[0].pages[-5:])}
    made = [request.result() for request in requests]
    assert len({tuple(tokens) for tokens in made}) > 1
    assert engine.stats.sources == 1
    assert engine.free_pages == 60


def test_pages_run_out_and_the_youngest_gives_way() -> None:
    engine = _engine(pages=14, token_budget=32, max_sequences=4)
    requests = [engine.add_request([2], source=source, max_new_tokens=25) for source in SOURCES]
    finished: list[Request] = []
    while engine.busy:
        engine.step()
        assert engine.free_pages + len({page for each in requests for page in each.pages}) == 14
        finished += [request for request in requests if request.finished and request not in finished]
    assert finished == requests
    assert engine.stats.preempted > 0
    for source, request in zip(SOURCES, requests, strict=True):
        assert request.new_tokens == greedy(source, 25)


@settings(max_examples=25, deadline=None)
@given(
    pages=st.integers(9, 16),
    budget=st.integers(3, 20),
    moments=st.lists(st.integers(0, 12), min_size=5, max_size=5),
    cancelled=st.sets(st.integers(0, 4), max_size=3),
)
def test_cancelled_at_any_moment(pages: int, budget: int, moments: list[int], cancelled: set[int]) -> None:
    engine = _engine(pages=pages, token_budget=budget, max_sequences=3)
    requests = [engine.add_request([2], source=source, max_new_tokens=14) for source in SOURCES]
    for step in range(13):
        engine.step()
        for number in cancelled:
            if moments[number] == step:
                requests[number].cancel()
    for number, (source, request) in enumerate(zip(SOURCES, requests, strict=True)):
        made = request.new_tokens if number in cancelled else request.result()
        assert made == greedy(source, 14)[: len(made)]
    while engine.step():
        pass
    assert engine.free_pages == pages


class _Interrupted(ReferenceSourceModel):
    """Fails in the middle of reading, once."""

    fails = True

    def read_sources(self, pool: torch.Tensor, batch: SourceBatch) -> None:
        if self.fails and len(self.read) == 1:
            self.fails = False
            raise KeyboardInterrupt
        super().read_sources(pool, batch)


def test_an_interruption_while_a_source_is_read() -> None:
    engine = Engine(_Interrupted(BART), pages=40)
    first = engine.add_request([2], source=SOURCES[0], max_new_tokens=12)
    engine.step()
    second = engine.add_request([2], source=SOURCES[1], max_new_tokens=12)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert second.result() == greedy(SOURCES[1], 12)
    assert first.result() == greedy(SOURCES[0], 12)
    assert engine.free_pages == 40


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "a request needs a source"),
    "empty": ({"source": []}, "a source has to be a row of at least one token"),
    "two rows": ({"source": [[1, 2], [3, 4]]}, "a source has to be a row"),
    "no ids": ({"source": [0.5]}, "a source has to be whole numbers"),
    "out of the vocabulary": ({"source": [64]}, "a token is not in the vocabulary"),
    "longer than the encoder": ({"source": [1] * 41}, "the source is longer than the model reads"),
    "larger than the pool": ({"source": [1] * 40}, "the cache is smaller than this request"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_sources_harm_nobody(case: str) -> None:
    fields, why = REFUSED[case]
    engine = _engine(pages=13)
    other = engine.add_request([2], source=SOURCES[2], max_new_tokens=14)
    engine.step()
    with pytest.raises(InputError, match=why):
        engine.add_request([2], max_new_tokens=14, **fields)
    assert other.result() == greedy(SOURCES[2], 14)
    assert engine.free_pages == 13


def test_a_causal_model_reads_none() -> None:
    engine = Engine(ReferenceModel(tiny_gpt2()), pages=9)
    with pytest.raises(InputError, match="the model reads no source"):
        engine.add_request([1], source=[1, 2])


def test_without_a_limit_the_pages_beside_the_source_end_it() -> None:
    request = _engine(pages=7).add_request([2], source=SOURCES[1])
    assert len(request.result()) == (7 - 5) * 4
    assert request.finish_reason == "length"
