"""Ctrl-C between any two lines of a step: every request still gets its tokens, and every page comes back."""

import linecache
import sys
from types import FrameType
from typing import Any

import pytest
from expected import greedy, prompts
from reference_model import ReferenceModel, tiny_gpt2
from reference_source_model import ReferenceSourceModel, tiny_bart

from tilewright.runtime.serving.drafts import DraftModel
from tilewright.runtime.serving.engine import Engine
from tilewright.runtime.serving.request import Request, RequestOptions

GPT2 = tiny_gpt2()
SHORT, MIDDLE, LONG = prompts(6, 5, 9)
END = greedy(GPT2, SHORT, 9)[5]
SOME = 37  # every so many lines one is interrupted; the first of them differs from test to test


class Interrupt:
    """Raises KeyboardInterrupt at the ``at``-th line that calls something, while it is entered.

    Python looks for signals after calls, and not on the way into or out of a ``with``.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.lines = 0
        self.raised = False

    def __enter__(self) -> "Interrupt":
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if "/runtime/" not in file.replace("\\", "/") or self.raised:
            return None
        line = linecache.getline(file, frame.f_lineno).strip()
        if event == "line" and "(" in line and not line.startswith("with "):
            self.lines += 1
            if self.lines == self.at:
                self.raised = True
                raise KeyboardInterrupt
        return self._trace


def _requests(engine: Engine, drafter: DraftModel | None) -> list[tuple[list[int], Request]]:
    """Requests with followers, an end token, drafts, and one that must be computed in chunks."""
    options = RequestOptions(9, frozenset({END}), drafter=drafter, draft_tokens=3)
    twins = engine.add_requests(SHORT, [options] * 2)
    kept = engine.add_request(MIDDLE, max_new_tokens=7, keep_logits=True)
    long = engine.add_request(LONG, max_new_tokens=12)
    short = greedy(GPT2, SHORT, 9)[:6]
    return [(short, twins[0]), (short, twins[1]), (greedy(GPT2, MIDDLE, 7), kept), (greedy(GPT2, LONG, 12), long)]


def _interrupted_run(at: int, drafts: bool) -> bool:
    """Runs all requests with an interruption; whether it came before they were finished."""
    engine = Engine(ReferenceModel(GPT2), pages=14, token_budget=8, max_sequences=4)
    drafter = DraftModel(ReferenceModel(GPT2), pages=60) if drafts else None
    requests = _requests(engine, drafter)
    with Interrupt(at) as interrupt:
        try:
            while engine.step():
                pass
        except KeyboardInterrupt:
            pass
    while engine.step():
        pass
    for expected, request in requests:
        assert request.result() == expected
        assert not request.options.keep_logits or len(request.logits) == request.made
    assert engine.free_pages == 14
    assert drafter is None or drafter._allocator.available == 60
    return interrupt.raised


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
@pytest.mark.parametrize("first", [1, 12, 24])
def test_ctrl_c_at_any_line(first: int, drafts: bool) -> None:
    at = first
    while _interrupted_run(at, drafts):
        at += SOME
    assert at > 20 * SOME


BART = tiny_bart()


def _source_run(at: int) -> tuple[bool, list[list[int]]]:
    """As ``_interrupted_run``, of an encoder-decoder; with the tokens that were made."""
    engine = Engine(ReferenceSourceModel(BART), pages=24, token_budget=16, max_sequences=4)
    twins = engine.add_requests([2], [RequestOptions(max_new_tokens=6)] * 2, source=MIDDLE)
    requests = [*twins, engine.add_request([2], source=LONG, max_new_tokens=9)]
    with Interrupt(at) as interrupt:
        try:
            while engine.step():
                pass
        except KeyboardInterrupt:
            pass
    made = [request.result() for request in requests]
    assert engine.free_pages == 24
    return interrupt.raised, made


def test_ctrl_c_while_sources_are_read() -> None:
    _, expected = _source_run(0)
    at, raised = 1, True
    while raised:
        raised, made = _source_run(at)
        assert made == expected
        at += SOME
    assert at > 10 * SOME


def test_the_key_comes_twice() -> None:
    """The second time while the first is being cleared up."""
    for second in range(1, 40, 3):
        engine = Engine(ReferenceModel(GPT2), pages=14, token_budget=8, max_sequences=4)
        requests = _requests(engine, None)
        for at in (140, second):
            with Interrupt(at):
                try:
                    while engine.step():
                        pass
                except KeyboardInterrupt:
                    pass
        for expected, request in requests:
            assert request.result() == expected
        assert engine.free_pages == 14
