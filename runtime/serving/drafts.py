"""Proposals for speculative decoding: tokens that may come next, checked by the model in one step.

A proposal never changes what is made, only how many steps it takes: the engine chooses each token from the model's own
logits, and goes on to the next row only where the choice is what was proposed.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from tilewright.errors import OptionError
from tilewright.ir.steps import CachedModel
from tilewright.runtime.serving.kv_pages import PageAllocator, PageTable
from tilewright.runtime.serving.sampling import largest
from tilewright.runtime.serving.step_buffers import Fill, StepBuffers


@dataclass(frozen=True)
class Ask:
    """One sequence that proposals are wanted for.

    Attributes:
        key: stands for the sequence from step to step.
        tokens: all of its tokens, [L] int64.
        count: most tokens to propose, at least 1.
    """

    key: Hashable
    tokens: np.ndarray
    count: int


class Drafter(Protocol):
    """Proposes tokens."""

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Up to ``count`` tokens for each sequence; none where it has no idea."""
        ...

    def forget(self, key: Hashable) -> None:
        """The sequence is finished, or has lost its pages."""
        ...


class PromptLookup:
    """Proposes what followed the last time the latest tokens stood in the sequence (prompt lookup decoding).

    Args:
        max_ngram: longest run of latest tokens that is looked for; shorter ones follow down to a single token.
    """

    def __init__(self, max_ngram: int = 2) -> None:
        if max_ngram < 1:
            raise OptionError("prompt lookup needs a run of at least one token", why=f"max_ngram is {max_ngram}")
        self.max_ngram = max_ngram

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """As of ``Drafter``."""
        return [self._one(ask.tokens, ask.count) for ask in asks]

    def forget(self, key: Hashable) -> None:
        """Nothing is kept."""

    def _one(self, tokens: np.ndarray, count: int) -> list[int]:
        for size in range(min(self.max_ngram, len(tokens) - 1), 0, -1):
            ends = np.flatnonzero(tokens[size - 1 : -1] == tokens[-1]) + size - 1  # where such a run may end
            for back in range(1, size):
                ends = ends[tokens[ends - back] == tokens[-1 - back]]
            if len(ends):
                return tokens[ends[-1] + 1 : ends[-1] + 1 + count].tolist()
        return []


@dataclass
class _Draft:
    """What the draft model has of a sequence.

    Attributes:
        table: its pages.
        computed: slots whose keys lie in them.
        guesses: tokens of the last of these slots that were proposals when they were computed.
    """

    table: PageTable
    computed: int = 0
    guesses: list[int] = field(default_factory=list)

    def agree(self, tokens: np.ndarray) -> None:
        """Goes back to the slots whose tokens the sequence really has, and that leave one token to compute."""
        self.computed -= len(self.guesses)
        while self.guesses and self.computed < len(tokens) - 1 and tokens[self.computed] == self.guesses[0]:
            self.guesses.pop(0)
            self.computed += 1
        self.guesses.clear()


class DraftModel:
    """Proposes the largest logits of a smaller model of the same vocabulary; several sequences share its steps.

    Args:
        model: the draft model.
        pages: of its own pool. A sequence that finds no page gets no proposals.
        token_budget: most tokens in one of its steps.
        max_sequences: most sequences in one of its steps.
        confidence: a proposal of less probability is the last one of its sequence in this step.
    """

    def __init__(
        self,
        model: CachedModel,
        pages: int,
        token_budget: int = 512,
        max_sequences: int = 64,
        confidence: float = 0.0,
    ) -> None:
        self.model = model
        self.confidence = confidence
        self._allocator = PageAllocator(pages, model.page_size)
        self._pool = model.make_pages(pages)
        self._buffers = StepBuffers(token_budget, max_sequences)
        self._drafts: dict[Hashable, _Draft] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """As of ``Drafter``."""
        most = self._buffers.sequences
        groups = [asks[start : start + most] for start in range(0, len(asks), most)]
        return [guesses for group in groups for guesses in self._propose_together(group)]

    def forget(self, key: Hashable) -> None:
        """Lets its pages go. All are counted anew: an interruption may have lost some."""
        self._drafts.pop(key, None)
        self._allocator.recount([page for draft in self._drafts.values() for page in draft.table.pages])

    def _propose_together(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Token by token, all sequences in one step; first each catches up with what it has become."""
        made: list[list[int]] = [[] for _ in asks]
        active = [index for index, ask in enumerate(asks) if self._catch_up(ask)]
        while active:
            fills = {}
            for index in active:
                ask, draft = asks[index], self._drafts[asks[index].key]
                fresh = made[index][-1:] or ask.tokens[draft.computed :]
                fill = self._advance(draft, fresh, 1)
                if fill is not None:
                    fills[index] = fill
                    draft.guesses += made[index][-1:]
            if not fills:
                break
            logits = self._step(list(fills.values()))
            sure = self._is_sure(logits)
            for index, guess in zip(fills, largest(logits), strict=True):
                made[index].append(guess)
            active = [i for i, go_on in zip(fills, sure, strict=True) if go_on and len(made[i]) < asks[i].count]
        return made

    def _is_sure(self, logits: torch.Tensor) -> list[bool]:
        """Whether the largest of each row has at least the probability asked for."""
        if self.confidence <= 0:
            return [True] * len(logits)
        probability = (logits.amax(1) - logits.logsumexp(1)).exp()
        return (probability >= self.confidence).tolist()

    def _catch_up(self, ask: Ask) -> bool:
        """Computes all but the latest tokens, a sequence at a time; whether there are pages for it."""
        draft = self._drafts.get(ask.key)
        if draft is None:
            draft = self._drafts[ask.key] = _Draft(PageTable(self._allocator))
        draft.agree(ask.tokens)
        # All of it or none: what could not be finished would be begun anew for every token.
        stop = len(ask.tokens)
        if stop > self.model.max_length or draft.table.reserve(draft.computed, stop) is None:
            self.forget(ask.key)
            return False
        share = self._buffers.tokens // self._buffers.sequences
        while (missing := stop - draft.computed) > share:
            fresh = ask.tokens[draft.computed :][: min(self._buffers.tokens, missing - share)]
            fill = self._advance(draft, fresh, 0)
            assert fill is not None, "there are pages"
            self._step([fill])
        return True

    def _advance(self, draft: _Draft, fresh: np.ndarray | Sequence[int], wanted: int) -> Fill | None:
        """The share of the next step; None where pages or context end."""
        start, stop = draft.computed, draft.computed + len(fresh)
        if stop > self.model.max_length or draft.table.reserve(start, stop) is None:
            return None
        draft.computed = stop
        return Fill(fresh, start, draft.table.pages, wanted)

    def _step(self, fills: Sequence[Fill]) -> torch.Tensor:
        return self.model.step(self._pool, self._buffers.fill(fills, self.model.page_size))
