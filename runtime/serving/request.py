"""One request to the engine: its tokens, how far their keys are computed, and how a caller reads what is made."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tilewright.runtime.serving.drafts import Drafter
from tilewright.runtime.serving.kv_pages import PageTable
from tilewright.runtime.serving.sampling import GREEDY, Sampling
from tilewright.runtime.serving.source_pages import SourcePages

if TYPE_CHECKING:
    from tilewright.runtime.serving.engine import Engine

Stop = Callable[[Tensor, "tuple[Tensor, ...] | None"], bool]
"""Called after each token with all tokens [1, L] int64, and the scores so far if they are kept: whether to end."""


class Status(Enum):
    """Where a request stands."""

    WAITING = "waiting"  # holds no pages
    RUNNING = "running"
    FINISHED = "finished"  # holds no pages


@dataclass(frozen=True)
class RequestOptions:
    """What is asked for besides the prompt.

    Attributes:
        max_new_tokens: None for as many as the context and the pages allow.
        eos_token_ids: a token of these ends the request, and is its last.
        sampling: how tokens are chosen.
        stop: ends the request when it says so.
        drafter: proposes tokens that are checked in one step; the result stays the same.
        draft_tokens: most tokens proposed for a step.
        keep_logits, keep_scores: keep [V] fp32 of each token in ``Request.logits`` and ``Request.scores``.
    """

    max_new_tokens: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    sampling: Sampling = GREEDY
    stop: Stop | None = None
    drafter: Drafter | None = None
    draft_tokens: int = 0
    keep_logits: bool = False
    keep_scores: bool = False


class Request:
    """A prompt and what is made behind it. Made by ``Engine.add_request``.

    Iterating gives the new tokens, and runs the engine where none is there yet; so does ``result``. ``stream`` does
    the same in asyncio. To leave a loop before the end cancels the request.

    Attributes:
        arrival: requests are numbered as they come; the smaller number is served first.
        prompt_length: tokens of the prompt.
        limit: most tokens, prompt included.
        length: tokens so far, prompt included.
        computed: tokens whose keys lie in pages.
        table: its pages.
        source: what it is written behind, of a model that reads sources.
        leader: a request with the same prompt, which is computed for both; None for one that comes alone.
        followers: requests whose leader it is.
        status: where it stands.
        finish_reason: "eos", "length", "stop", "cancelled" or "error", once it is finished.
        error: what a processor or a stopping criterion of this request raised.
        logits, scores: of each new token, if they are kept.
    """

    def __init__(
        self,
        engine: "Engine",
        arrival: int,
        prompt: np.ndarray,
        limit: int,
        options: RequestOptions,
        table: PageTable,
        source: SourcePages | None = None,
    ) -> None:
        self.arrival = arrival
        self.options = options
        self.prompt_length = self.length = len(prompt)
        self.limit = limit
        self.computed = 0
        self.table = table
        self.source = source
        self.leader: Request | None = None
        self.followers: list[Request] = []
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []
        self._engine = engine
        self._tokens = np.empty(min(limit, max(2 * len(prompt), 64)), np.int64)
        self._tokens[: len(prompt)] = prompt

    @property
    def tokens(self) -> np.ndarray:
        """All tokens so far, [length] int64: a window that later tokens do not change."""
        return self._tokens[: self.length]

    @property
    def new_tokens(self) -> list[int]:
        """The tokens made so far."""
        return self._tokens[self.prompt_length : self.length].tolist()

    @property
    def made(self) -> int:
        """How many tokens have been made so far."""
        return self.length - self.prompt_length

    @property
    def input_ids(self) -> Tensor:
        """All tokens so far, [1, length] int64: a window."""
        return torch.from_numpy(self.tokens).unsqueeze(0)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.status is Status.FINISHED

    @property
    def follows(self) -> bool:
        """Whether it is to start on the pages of its leader, which does not have the whole prompt yet."""
        return self.leader is not None and not self.leader.made and not self.leader.finished

    @property
    def pending(self) -> int:
        """Tokens whose keys are not computed yet; 1 while decoding."""
        return self.length - self.computed

    @property
    def pages(self) -> list[int]:
        """All pages it holds."""
        return [*self.table.pages, *(self.source.pages if self.source is not None else ())]

    @property
    def most_drafts(self) -> int:
        """Proposals worth checking in the next step: the last token allowed is never one."""
        return min(self.options.draft_tokens, self.limit - self.length - 1)

    def append(self, token: int) -> None:
        """Adds a token; the memory for tokens grows by doubling up to ``limit``."""
        if self.length == len(self._tokens):
            grown = np.empty(min(self.limit, 2 * self.length), np.int64)
            grown[: self.length] = self._tokens
            self._tokens = grown
        self._tokens[self.length] = token
        self.length += 1

    def end_reason(self) -> str | None:
        """Why the request ends with the token it has last, or None. What a stopping criterion raises is an end too."""
        options = self.options
        if self.error is not None:
            return "error"
        if self.made == 0:
            return None
        if int(self._tokens[self.length - 1]) in options.eos_token_ids:
            return "eos"
        if self.length >= self.limit:
            return "length"
        return self._stop_reason(options.stop) if options.stop is not None else None

    def cancel(self) -> None:
        """Ends the request; its pages come back at once, or when the step that uses them ends."""
        self._engine.cancel(self)

    def result(self) -> list[int]:
        """Runs the engine until the request is finished; returns its new tokens.

        Raises:
            Exception: what a processor or stopping criterion of this request raised.
        """
        for _ in self:
            pass
        return self.new_tokens

    def __iter__(self) -> Iterator[int]:
        sent = self.prompt_length
        try:
            while True:
                while sent < self.length:
                    sent += 1
                    yield int(self._tokens[sent - 1])
                if self.finished:
                    break
                self._engine.progress()
        finally:
            self.cancel()
        self._raise()

    async def stream(self) -> AsyncIterator[int]:
        """The new tokens, as they come; steps run in a thread, for all requests of the engine at once."""
        sent = self.prompt_length
        try:
            while True:
                while sent < self.length:
                    sent += 1
                    yield int(self._tokens[sent - 1])
                if self.finished:
                    break
                await self._engine.next_step()
        finally:
            self.cancel()
        self._raise()

    def _stop_reason(self, stop: Stop) -> str | None:
        try:
            scores = tuple(score.unsqueeze(0) for score in self.scores) if self.options.keep_scores else None
            return "stop" if stop(self.input_ids, scores) else None
        except Exception as error:
            self.error = error
            return "error"

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


@dataclass
class Part:
    """A request's share of one step.

    Attributes:
        request: whose.
        count: its tokens that are computed, from slot ``request.computed`` on.
        drafts: proposed tokens behind them, computed and checked in the same step.
    """

    request: Request
    count: int
    drafts: Sequence[int] = field(default=())

    @property
    def wanted(self) -> int:
        """Rows of logits: none in the middle of a prompt, else one and one for each draft."""
        complete = self.request.computed + self.count == self.request.length
        return 1 + len(self.drafts) if complete else 0
