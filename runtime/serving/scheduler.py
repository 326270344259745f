"""Which requests take part in the next step, with how many tokens: continuous batching with chunked prefill.

A step has a token budget. Requests that decode come first, one token each and their drafts; what is left of the budget
goes to prompts in the order of arrival, a chunk of one where the whole does not fit (Sarathi; Dynamic SplitFuse). When
pages run out the youngest running request goes back to waiting and computes its keys anew later; the oldest can always
go on, because no request is admitted that does not fit into the pool by itself.
"""

from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence

from tilewright.runtime.serving.kv_pages import PageAllocator
from tilewright.runtime.serving.request import Part, Request, Status


def _arrival(request: Request) -> int:
    return request.arrival


class Scheduler:
    """Waiting and running requests over one pool of pages.

    Attributes:
        running: hold pages; in the order of arrival.
        waiting: hold none; in the order of arrival.
        preempted: how often a running request lost its pages.
        reused: tokens whose keys were found in pages of earlier requests.
    """

    def __init__(self, allocator: PageAllocator, token_budget: int, max_sequences: int) -> None:
        self.allocator = allocator
        self.token_budget = token_budget
        self.max_sequences = max_sequences
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.preempted = 0
        self.reused = 0

    @property
    def decoding(self) -> list[Request]:
        """Running requests that have one token to compute."""
        return [request for request in self.running if request.pending == 1]

    def add(self, request: Request) -> None:
        """A new request waits its turn; nothing happens to one that waits already."""
        if request not in self.waiting:
            insort(self.waiting, request, key=_arrival)

    def plan(self, drafts: Mapping[Request, Sequence[int]]) -> tuple[list[Part], list[tuple[int, int]]]:
        """The parts of the next step, and the pages to copy before it.

        Args:
            drafts: proposals for requests that decode; shortened or left out where budget or pages end.
        """
        parts, copies = [], []
        before = self.preempted
        for part in self._shares(drafts):
            made = self._reserve(part)
            if made is not None:
                parts.append(part)
                copies += made
        if self.preempted == before:
            self._admit(parts)
        return parts, copies

    def fork(self, leader: Request) -> list[Request]:
        """The followers that start now, on the pages of their leader; none but when its prompt is just complete."""
        if leader.made:
            return []
        started = []
        for follower in leader.followers:
            if follower.status is not Status.WAITING or len(self.running) >= self.max_sequences:
                continue
            follower.table = leader.table.fork()
            follower.source = leader.source and leader.source.fork()
            follower.computed = leader.computed
            self._run(follower)
            self.waiting.remove(follower)
            started.append(follower)
        return started

    def finish(self, request: Request, reason: str) -> None:
        """Ends a request wherever it stands; its pages are free."""
        request.finish_reason = reason
        request.status = Status.FINISHED
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self._lose_pages(request)

    def preempt(self, request: Request) -> None:
        """A running request waits again, in its place by arrival, and its pages are free."""
        insort(self.waiting, request, key=_arrival)
        self.running.remove(request)
        request.status = Status.WAITING
        self._lose_pages(request)
        self.preempted += 1

    def recount(self) -> None:
        """Lets go of all pages that no running request holds."""
        self.allocator.recount([page for request in self.running for page in request.pages])

    def restart(self) -> list[Request]:
        """All requests wait and hold no pages; returns them. They keep their tokens, and full pages can be found.

        For after an interruption in the middle of a change: nothing but tokens, and the content of full pages, is
        believed. Even a table may name a page that was to be copied into, and was not.
        """
        requests = sorted({*self.running, *self.waiting}, key=_arrival)
        requests = [request for request in requests if not request.finished]
        self.waiting = deque(requests)
        self.running = []
        for request in requests:
            request.status = Status.WAITING
            request.table.clear()
            if request.source is not None:
                request.source.clear()
            request.computed = 0
        self.recount()
        return requests

    def _shares(self, drafts: Mapping[Request, Sequence[int]]) -> list[Part]:
        """How the budget is shared out among running requests, in the order of arrival."""
        decoding = self.decoding
        budget = self.token_budget - len(decoding)
        shares = {}
        for request in decoding:
            guesses = drafts.get(request, ())[: max(budget, 0)]
            shares[request] = Part(request, 1, guesses)
            budget -= len(guesses)
        for request in self.running:
            if request not in shares and budget > 0:
                shares[request] = Part(request, min(request.pending, budget))
                budget -= shares[request].count
        return [shares[request] for request in self.running if request in shares]

    def _reserve(self, part: Part) -> list[tuple[int, int]] | None:
        """Pages for a part, taken from younger requests where there are none; None if it is the one that gives way."""
        request = part.request
        while request.status is Status.RUNNING:
            start = request.computed
            copies = request.table.reserve(start, start + part.count + len(part.drafts))
            if copies is not None:
                return copies
            if part.drafts:
                part.drafts = ()
            else:
                self.preempt(self.running[-1])
        return None

    def _admit(self, parts: list[Part]) -> None:
        """Starts waiting requests in the order of arrival, as far as sequences, budget and pages allow.

        One starts only if its whole prompt and its source fit beside a page for each running request that will need
        another: else it would soon be the youngest that gives way. A source is read as a whole, so the last one may
        exceed the budget.
        """
        budget = self.token_budget - sum(part.count + len(part.drafts) for part in parts)
        for request in tuple(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_sequences:
                return
            if request.follows:
                continue
            request.computed = request.table.adopt_prefix(request.tokens)
            unread = request.source if request.source is not None and not request.source.adopt() else None
            needed = self.allocator.pages_for(request.length) - len(request.table.pages)
            needed += unread.count if unread is not None else 0
            if needed + sum(map(self._grows, self.running)) > self.allocator.available:
                self._lose_pages(request)
                return
            request.table.reserve(request.computed, request.length)
            if unread is not None:
                unread.reserve()
            self.reused += request.computed
            self._run(request)
            self.waiting.remove(request)
            parts.append(Part(request, min(request.pending, budget)))
            budget -= parts[-1].count + (len(unread.tokens) if unread is not None else 0)

    def _grows(self, request: Request) -> bool:
        """Whether a request may need more pages than it holds. The key of its last token is never needed."""
        return self.allocator.pages_for(request.limit - 1) > len(request.table.pages)

    def _run(self, request: Request) -> None:
        request.status = Status.RUNNING
        insort(self.running, request, key=_arrival)

    def _lose_pages(self, request: Request) -> None:
        request.table.release()
        if request.source is not None:
            request.source.release()
        request.computed = 0
