"""The engine: takes requests at any time, and runs one step of a cached model for all of them together."""

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from tilewright.errors import InputError, OptionError
from tilewright.ir.steps import CachedModel
from tilewright.runtime.choose import Turn, choose
from tilewright.runtime.drafts import Ask, Drafter
from tilewright.runtime.kv_pages import PageAllocator, PageTable
from tilewright.runtime.limits import checked_prompt, checked_source, most_tokens
from tilewright.runtime.request import Part, Request, RequestOptions, Status
from tilewright.runtime.scheduler import Scheduler
from tilewright.runtime.source_pages import SourcePages, read_sources
from tilewright.runtime.step_buffers import Fill, StepBuffers

Ids = Sequence[int] | np.ndarray | torch.Tensor
"""A row of token ids, [n]."""


@dataclass
class EngineStats:
    """Counters since the engine was made.

    Attributes:
        steps: of the model.
        tokens: computed in them, drafts included.
        made: tokens given to requests.
        drafted, accepted: tokens proposed, and those that were chosen.
        preempted: how often a request lost its pages and had to compute its keys anew.
        reused: tokens whose keys were found in pages of earlier requests.
        sources: read, for requests of an encoder-decoder.
    """

    steps: int = 0
    tokens: int = 0
    made: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    reused: int = 0
    sources: int = 0


class Engine:
    """Continuous batching over a cached model. Calls from several threads are safe: their requests share steps.

    Args:
        model: what computes; of one device.
        pages: N, of the pool, made once; memory never grows beyond.
        token_budget: most tokens in a step. A larger one makes prompts faster and what decodes beside them slower.
        max_sequences: most sequences in a step.

    Raises:
        OptionError: a number is out of range.
    """

    def __init__(self, model: CachedModel, *, pages: int, token_budget: int = 512, max_sequences: int = 64) -> None:
        if pages < 1:
            raise OptionError("an engine needs at least one page", why=f"pages is {pages}")
        self.model = model
        self._buffers = StepBuffers(token_budget, max_sequences)
        self._allocator = PageAllocator(pages, model.page_size)
        self._scheduler = Scheduler(self._allocator, token_budget, max_sequences)
        self._pool = model.make_pages(pages)
        self._stats = EngineStats()
        self._arrivals = itertools.count()
        self._stepping = threading.Lock()
        # Changes asked for while a step may be running in another thread, or in the middle of a step in this one.
        self._incoming: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._next_steps: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[bool]] = WeakKeyDictionary()

    @property
    def pages(self) -> int:
        """N, of the pool."""
        return self._allocator.count

    @property
    def free_pages(self) -> int:
        """Pages that no request holds."""
        return self._allocator.available

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._incoming or self._scheduler.running or self._scheduler.waiting)

    @property
    def stats(self) -> EngineStats:
        """Counters: a snapshot."""
        return replace(self._stats, preempted=self._scheduler.preempted, reused=self._scheduler.reused)

    def add_request(
        self, prompt: Ids, options: RequestOptions | None = None, *, source: Ids | None = None, **fields: Any
    ) -> Request:
        """Queues a request; the next steps work on it.

        Args:
            prompt: token ids, at least one.
            options: or its ``fields`` by name: ``add_request(prompt, max_new_tokens=9)``.
            source: what an encoder-decoder reads; the prompt then begins what its decoder writes.

        Raises:
            InputError: prompt or source is empty, has an id out of the vocabulary, or cannot fit into context or pool
                together with ``max_new_tokens``; there is a source and the model reads none, or the reverse; or
                ``max_new_tokens`` is below 1.
        """
        return self.add_requests(prompt, [replace(options or RequestOptions(), **fields)], source=source)[0]

    def add_requests(
        self, prompt: Ids, options: Sequence[RequestOptions], *, source: Ids | None = None
    ) -> list[Request]:
        """Several requests behind one prompt: its keys are computed once. As ``add_request`` otherwise."""
        ids, read = checked_prompt(prompt, self.model.vocab_size), checked_source(self.model, source)
        count = 0 if read is None else len(read)
        limits = [most_tokens(self.model, self.pages, len(ids), each.max_new_tokens, count) for each in options]
        requests = []
        for limit, each in zip(limits, options, strict=True):
            pages = None if read is None else SourcePages(self._allocator, read)
            table = PageTable(self._allocator, b"" if pages is None else pages.digest)
            requests.append(Request(self, next(self._arrivals), ids, limit, each, table, pages))
        leader, *leader.followers = requests
        for follower in leader.followers:
            follower.leader = leader
        self._incoming.extend(requests)
        return requests

    def cancel(self, request: Request) -> None:
        """Ends a request, if it is not finished; its pages come back now, or at the end of a step that is running."""
        if request.status is not Status.FINISHED:
            self._cancelled.append(request)
            self._settle()

    def step(self) -> bool:
        """Runs one step; returns whether there was anything to do.

        Raises:
            Exception: what the model raised. Requests stand as they stood before, and the next call tries again.
        """
        with self._stepping:
            self._take_changes()
            try:
                did = self._step()
            except BaseException:
                self._recover()
                raise
        self._settle()
        return did

    async def next_step(self) -> None:
        """Waits for the end of a step that all tasks of this event loop wait for together; it runs in a thread."""
        loop = asyncio.get_running_loop()
        task = self._next_steps.get(loop)
        if task is None or task.done():
            task = self._next_steps[loop] = loop.create_task(asyncio.to_thread(self.step))
        await asyncio.shield(task)

    @contextmanager
    def exclusive(self, pages: int) -> Iterator[tuple[PageAllocator, Any]]:
        """The pool for a search that plans its own steps: allocator and pages. Requests wait until it is over.

        Args:
            pages: free ones it needs at least; running requests lose theirs for it, the youngest first. What is
                held at the end is let go.

        Raises:
            InputError: the pool has fewer.
        """
        if pages > self.pages:
            raise InputError(
                "the cache is smaller than this search",
                why=f"it needs {pages} pages of {self.model.page_size} slots, there are {self.pages}",
                hint="give more pages, fewer beams, shorter prompts or fewer new tokens",
            )
        with self._stepping:
            self._take_changes()
            while self._allocator.available < pages:
                self._scheduler.preempt(self._scheduler.running[-1])
            try:
                yield self._allocator, self._pool
            finally:
                self._recover()
        self._settle()

    def _step(self) -> bool:
        parts, copies = self._scheduler.plan(self._propose())
        if not parts:
            return False
        if copies:
            source, target = torch.tensor(copies).unbind(1)
            self.model.copy_pages(self._pool, source, target)
        fills = [_fill(part) for part in parts]
        with torch.no_grad():
            self._read_sources(parts)
            logits = self.model.step(self._pool, self._buffers.fill(fills, self.model.page_size))
            self._advance(parts, logits)
        stats = self._stats
        stats.steps += 1
        stats.tokens += sum(len(fill.tokens) for fill in fills)
        stats.drafted += sum(len(part.drafts) for part in parts)
        return True

    def _read_sources(self, parts: Sequence[Part]) -> None:
        """Fills the pages of sources that nobody has read yet, all in one run."""
        unread = [source for part in parts if (source := part.request.source) is not None and not source.ready]
        if unread:
            read_sources(self.model, self._pool, unread)
            self._stats.sources += len(unread)

    def _advance(self, parts: Sequence[Part], logits: torch.Tensor) -> None:
        """Takes note of the computed keys, and gives tokens to the requests that are due."""
        turns: list[Turn] = []
        row = 0
        for part in parts:
            request, wanted = part.request, part.wanted
            request.computed += part.count
            request.table.publish(request.tokens, request.computed)
            if wanted:
                followers = self._scheduler.fork(request) if request.followers else []
                turns.append(Turn(request, row, part.drafts, bool(followers)))
                turns += [Turn(follower, row, shared=True) for follower in followers]
            row += wanted
        if not turns:
            return
        lengths = [turn.request.length for turn in turns]
        for turn, before, reason in zip(turns, lengths, choose(turns, logits), strict=True):
            request, made = turn.request, turn.request.length - before
            if made:
                request.computed = request.length - 1
                request.table.publish(request.tokens, request.computed)
            self._stats.made += made
            self._stats.accepted += max(0, made - 1)
            if reason is not None:
                self._finish(request, reason)

    def _propose(self) -> dict[Request, Sequence[int]]:
        """Drafts for the requests that decode and want them; one question to each drafter."""
        asked: dict[Drafter, list[Request]] = {}
        for request in self._scheduler.decoding:
            if request.options.drafter is not None and request.most_drafts > 0:
                asked.setdefault(request.options.drafter, []).append(request)
        drafts: dict[Request, Sequence[int]] = {}
        for drafter, requests in asked.items():
            asks = [Ask(each.arrival, each.tokens, each.most_drafts) for each in requests]
            drafts |= dict(zip(requests, drafter.propose(asks), strict=True))
        return drafts

    def _finish(self, request: Request, reason: str) -> None:
        self._scheduler.finish(request, reason)
        if request.options.drafter is not None:
            request.options.drafter.forget(request.arrival)

    def _settle(self) -> None:
        """Ends what was cancelled now, or leaves it to the thread that is running a step."""
        while self._cancelled and self._stepping.acquire(blocking=False):
            try:
                self._take_changes()
            finally:
                self._stepping.release()

    def _take_changes(self) -> None:
        while self._incoming:
            self._scheduler.add(self._incoming.popleft())
        while self._cancelled:
            request = self._cancelled.popleft()
            if request.status is not Status.FINISHED:
                self._finish(request, "cancelled")

    def _recover(self) -> None:
        """Counts pages anew after an interruption, which may have come between any two lines of a change."""
        self._scheduler.recount()
        for request in self._scheduler.running:
            if request.options.drafter is not None:
                request.options.drafter.forget(request.arrival)


def _fill(part: Part) -> Fill:
    request = part.request
    tokens = request.tokens[request.computed : request.computed + part.count]
    if part.drafts:
        tokens = np.array([*tokens.tolist(), *part.drafts])
    return Fill(tokens, request.computed, request.table.pages, part.wanted, request.source)
