"""Fills a step's batch in memory that is used again by the next step."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tilewright.errors import OptionError
from tilewright.ir.steps import StepBatch
from tilewright.runtime.serving.source_pages import SourcePages


class Fill(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        tokens: its new tokens, int64.
        start: slot of the first of them.
        pages: its pages, in order, enough for all new slots.
        wanted: how many of its last rows' logits are wanted.
        source: what it is written behind, filled; all sequences of a step have one or none has.
    """

    tokens: np.ndarray | Sequence[int]
    start: int
    pages: Sequence[int]
    wanted: int
    source: SourcePages | None = None


class StepBuffers:
    """Memory for steps of up to ``tokens`` tokens of up to ``sequences`` sequences.

    The width of a page table is a power of two, so that it seldom changes.
    """

    def __init__(self, tokens: int, sequences: int) -> None:
        if not 1 <= sequences <= tokens:
            raise OptionError(
                "the token budget of a step has to hold a token of each sequence",
                why=f"token_budget is {tokens}, max_sequences is {sequences}",
                hint="raise token_budget or lower max_sequences, to at least 1",
            )
        self.tokens = tokens
        self.sequences = sequences
        self._ids = np.empty(tokens, np.int64)
        self._slots = np.empty(tokens, np.int32)
        self._rows = np.empty(tokens, np.int32)
        self._cu_seqlens = np.zeros(sequences + 1, np.int32)
        self._cu_rows = np.zeros(sequences + 1, np.int32)
        self._seqlens_k = np.empty(sequences, np.int32)
        self._table = np.zeros(sequences, np.int32)
        self._source_lengths = np.empty(sequences, np.int32)
        self._source_table = np.zeros(sequences, np.int32)

    def fill(self, fills: Sequence[Fill], page_size: int) -> StepBatch:
        """The batch of a step, valid until the next call."""
        count, width = len(fills), self._width(fills, page_size)
        if len(self._table) < count * width:
            self._table = np.zeros(self.sequences * width, np.int32)
        table = self._table[: count * width].reshape(count, width)
        row = wanted_rows = 0
        for index, (tokens, start, pages, wanted, _) in enumerate(fills):
            end, stop = row + len(tokens), start + len(tokens)
            self._ids[row:end] = tokens
            self._slots[row:end] = start if end - row == 1 else np.arange(start, stop)
            self._rows[wanted_rows : wanted_rows + wanted] = np.arange(end - wanted, end) if wanted > 1 else end - 1
            row, wanted_rows = end, wanted_rows + wanted
            needed = -(-stop // page_size)
            table[index, :needed] = pages[:needed]
            table[index, needed:] = 0
            self._seqlens_k[index] = stop
            self._cu_seqlens[index + 1] = row
            self._cu_rows[index + 1] = wanted_rows
        arrays = (
            self._ids[:row],
            self._slots[:row],
            self._cu_seqlens[: count + 1],
            self._seqlens_k[:count],
            table,
            self._rows[:wanted_rows],
            self._cu_rows[: count + 1],
            *self._sources([fill.source for fill in fills if fill.source is not None]),
        )
        return StepBatch(*map(torch.from_numpy, arrays))

    def _sources(self, sources: Sequence[SourcePages]) -> tuple[np.ndarray, ...]:
        """Table and lengths of the sources, one a sequence; nothing if there are none."""
        if not sources:
            return ()
        count, width = len(sources), _power_of_two(max(len(source.pages) for source in sources))
        if len(self._source_table) < count * width:
            self._source_table = np.zeros(self.sequences * width, np.int32)
        table = self._source_table[: count * width].reshape(count, width)
        for index, source in enumerate(sources):
            table[index, : len(source.pages)] = source.pages
            table[index, len(source.pages) :] = 0
            self._source_lengths[index] = len(source.tokens)
        return table, self._source_lengths[:count]

    @staticmethod
    def _width(fills: Sequence[Fill], page_size: int) -> int:
        longest = max(fill.start + len(fill.tokens) for fill in fills)
        return _power_of_two(-(-longest // page_size))


def _power_of_two(count: int) -> int:
    """The least that is not below a count of at least one."""
    return 1 << (count - 1).bit_length()
