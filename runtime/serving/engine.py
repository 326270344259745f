"""The engine: takes requests at any time, and runs one step of a cached model for all of them together."""

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tilewright.errors import InputError, OptionError
from tilewright.ir.steps import CachedModel
from tilewright.runtime.serving.choose import Turn, choose
from tilewright.runtime.serving.drafts import Ask, Drafter
from tilewright.runtime.serving.kv_pages import PageAllocator, PageTable
from tilewright.runtime.serving.limits import checked_prompt, checked_source, most_tokens
from tilewright.runtime.serving.request import Part, Request, RequestOptions, Status
from tilewright.runtime.serving.scheduler import Scheduler
from tilewright.runtime.serving.source_pages import SourcePages, read_sources
from tilewright.runtime.serving.step_buffers import Fill, StepBuffers

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
        self._inside: int | None = None  # the thread that holds it
        self._unfinished = False  # whether a change has begun and not ended
        self._ended = threading.Condition()  # told at the end of each step
        self._ends = 0
        # Changes asked for while a step may be running in another thread, or in the middle of a step in this one.
        self._incoming: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._next_steps: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}

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
            Exception: what the model raised. Requests keep their tokens, and the next call tries again.
            InputError: it is called from inside of a step, by a processor or a stopping criterion.
        """
        self._refuse_inside()
        try:
            with self._stepping:
                self._begin()
                did = self._step()
                self._end()
        finally:
            self._leave()
        return did

    def progress(self) -> None:
        """Runs a step; if another thread is running one, waits for the end of that instead.

        So threads that read requests of one engine see each step's tokens, whoever runs it.
        """
        with self._ended:
            seen = self._ends
            if self._stepping.locked() and self._inside != threading.get_ident():
                # Not for ever: Ctrl-C may come before the other thread tells.
                self._ended.wait_for(lambda: self._ends != seen or not self._stepping.locked(), timeout=1)
                return
        self.step()

    async def next_step(self) -> None:
        """Waits for the end of a step that all tasks of this event loop wait for together; it runs in a thread."""
        loop = asyncio.get_running_loop()
        task = self._next_steps.get(loop)
        if task is None:
            task = self._next_steps[loop] = loop.create_task(asyncio.to_thread(self.progress))
            task.add_done_callback(lambda _: self._next_steps.pop(loop, None))
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
        self._refuse_inside()
        try:
            with self._stepping:
                self._begin()
                while self._allocator.available < pages:
                    self._scheduler.preempt(self._scheduler.running[-1])
                yield self._allocator, self._pool
                self._scheduler.recount()
                self._end()
        finally:
            self._leave()

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
                followers = self._scheduler.fork(request)
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
            asks = [Ask(each, each.tokens, each.most_drafts) for each in requests]
            drafts |= dict(zip(requests, drafter.propose(asks), strict=True))
        return drafts

    def _finish(self, request: Request, reason: str) -> None:
        if request.options.drafter is not None:
            request.options.drafter.forget(request)
        self._scheduler.finish(request, reason)

    def _refuse_inside(self) -> None:
        if self._stepping.locked() and self._inside == threading.get_ident():
            raise InputError(
                "a step cannot run inside of a step",
                why="a logits processor or stopping criterion generates with the model that called it",
                hint="give it a compiled model of its own",
            )

    def _begin(self) -> None:
        """The first thing in a change of the books, by the thread that holds the engine.

        An error or Ctrl-C may leave a change between any two lines: then ``_unfinished`` stays, and the next change
        starts all requests anew. Not a context manager: only the lock's own ``with`` is safe from interruptions.
        """
        self._inside = threading.get_ident()
        if self._unfinished:
            self._restart()
        self._unfinished = True
        self._take_changes()

    def _end(self) -> None:
        """The last thing in a change: the books are right."""
        self._unfinished = False
        self._inside = None

    def _leave(self) -> None:
        """After a change, whatever came of it: tells those who wait for its end, and does what has been asked for."""
        if self._inside == threading.get_ident():
            self._inside = None
        with self._ended:
            self._ends += 1
            self._ended.notify_all()
        self._settle()

    def _settle(self) -> None:
        """Ends what was cancelled, and clears up an interruption: now, or at the end of a step of another thread."""
        while (self._cancelled or self._unfinished) and not self._stepping.locked():
            with self._stepping:
                self._begin()
                self._end()

    def _take_changes(self) -> None:
        """What was asked for; a change stays in its queue until it is made."""
        while self._incoming:
            self._scheduler.add(self._incoming[0])
            self._incoming.popleft()
        while self._cancelled:
            request = self._cancelled[0]
            if request.status is not Status.FINISHED:
                self._finish(request, "cancelled")
            self._cancelled.popleft()

    def _restart(self) -> None:
        """All requests wait, with the tokens they have; those whose last token is their end are finished."""
        for request in self._scheduler.restart():
            if request.options.drafter is not None:
                request.options.drafter.forget(request)
            reason = request.end_reason()
            if reason is not None:
                self._finish(request, reason)


def _fill(part: Part) -> Fill:
    request = part.request
    tokens = request.tokens[request.computed : request.computed + part.count]
    if part.drafts:
        tokens = np.array([*tokens.tolist(), *part.drafts])
    return Fill(tokens, request.computed, request.table.pages, part.wanted, request.source)
