"""The cache that transformers' beam search works on: a page table a beam, forked when a beam is continued twice."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.driver.generation_padding import own_tokens
from tilewright.ir.steps import CachedModel
from tilewright.runtime.serving.kv_pages import PageAllocator, PageTable
from tilewright.runtime.serving.source_pages import SourcePages, read_sources
from tilewright.runtime.serving.step_buffers import Fill, StepBuffers


def pages_of_search(
    model: CachedModel, prompts: Sequence[int], beams: int, new_tokens: int, sources: Sequence[int] = ()
) -> int:
    """Most pages a search holds: full pages of a prompt once, and those of its source; all others once a beam.

    Args:
        model: the model.
        prompts: lengths of the prompts.
        beams: of each prompt.
        new_tokens: most tokens behind each.
        sources: lengths of the sources, if there are any.
    """
    size = model.page_size
    read = sum(-(-n // size) for n in sources)
    return read + sum(n // size + beams * (-(-(n + new_tokens) // size) - n // size) for n in prompts)


class BeamCache:
    """Keys of ``beams`` sequences behind each prompt, in pages of a pool that is the search's alone.

    Args:
        model: what computes.
        allocator, pool: the pages; enough of them are free.
        rows: sequences of the search, all beams of all prompts.
        beams: beams of a prompt; its rows stand together.
        token_budget: most tokens of a step while prompts are computed.
        sources: [n] int64 of each prompt, for a model that reads sources. All beams of a prompt hold its pages.
    """

    def __init__(
        self,
        model: CachedModel,
        allocator: PageAllocator,
        pool: Any,
        rows: int,
        beams: int,
        token_budget: int,
        sources: Sequence[Tensor] = (),
    ) -> None:
        self._model = model
        self._allocator = allocator
        self._pool = pool
        self._beams = beams
        self._buffers = StepBuffers(max(token_budget, rows), rows)
        self._sources = [SourcePages(allocator, each.numpy()) for each in sources]
        self._tables: list[PageTable] = []
        self._lengths: list[int] = []

    def get_seq_length(self) -> int:
        """Of nothing but the first call, which is given all tokens: 0."""
        return 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row ``beam_idx[i]`` has been so far."""
        chosen = beam_idx.tolist()
        before, self._tables = self._tables, [self._tables[row].fork() for row in chosen]
        self._lengths = [self._lengths[row] for row in chosen]
        for table in before:
            table.release()

    def advance(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits [rows, V] behind the last token of each row [rows, L]; the first call computes the prompts."""
        if not self._tables:
            return self._prefill(own_tokens(input_ids, attention_mask)[:: self._beams])
        fills, copies = [], []
        for row, (table, token) in enumerate(zip(self._tables, input_ids[:, -1:].tolist(), strict=True)):
            start = self._lengths[row]
            copies += self._reserve(table, start, start + 1)
            fills.append(Fill(token, start, table.pages, 1, self._source(row // self._beams)))
            self._lengths[row] += 1
        if copies:
            source, target = torch.tensor(copies).unbind(1)
            self._model.copy_pages(self._pool, source, target)
        return self._step(fills)

    def _prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Each prompt once, in chunks; its beams fork from it."""
        self._read_sources()
        last = []
        for number, prompt in enumerate(prompts):
            source = self._source(number)
            tokens, table = prompt.numpy(), PageTable(self._allocator, b"" if source is None else source.digest)
            start = table.adopt_prefix(tokens)
            while start < len(tokens):
                stop = min(len(tokens), start + self._buffers.tokens)
                self._reserve(table, start, stop)
                logits = self._step([Fill(tokens[start:stop], start, table.pages, int(stop == len(tokens)), source)])
                start = stop
            table.publish(tokens, len(tokens))
            last.append(logits)
            self._tables += [table, *(table.fork() for _ in range(self._beams - 1))]
            self._lengths += [len(tokens)] * self._beams
        return torch.cat(last).repeat_interleave(self._beams, dim=0)

    def _source(self, prompt: int) -> SourcePages | None:
        return self._sources[prompt] if self._sources else None

    def _read_sources(self) -> None:
        """All that are not known from before, in one run."""
        unread = [source for source in self._sources if not source.adopt()]
        if unread:
            for source in unread:
                source.reserve()
            read_sources(self._model, self._pool, unread)

    def _reserve(self, table: PageTable, start: int, stop: int) -> list[tuple[int, int]]:
        copies = table.reserve(start, stop)
        assert copies is not None, "pages_of_search are free"
        return copies

    def _step(self, fills: Sequence[Fill]) -> Tensor:
        return self._model.step(self._pool, self._buffers.fill(fills, self._model.page_size))
