"""What a generation engine and a cached model say to each other: one step over packed tokens and paged keys.

Sizes: B sequences in the step, T new tokens packed one sequence after another, R rows whose logits are wanted, P width
of the page table, N pages in the pool; Ps width of the table of pages that sources have.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from tilewright.errors import InputError

_DTYPES = {"input_ids": torch.int64}


@dataclass(frozen=True)
class StepBatch:
    """One step: new tokens of several sequences, any number each, and where their keys lie.

    A step appends the keys of its tokens before it attends, so a token sees the keys of slots 0 to its own. Slots are
    written as given: to write a slot again is how a rejected token is replaced. The tensors may be windows into
    buffers that the next step fills again; a model does not keep them.

    Attributes:
        input_ids: [T] int64, new tokens.
        slots: [T] int32, the position of each in its sequence, 0-based; also its position id.
        cu_seqlens: [B + 1] int32, the rows of sequence b are cu_seqlens[b] to cu_seqlens[b + 1]; at least one each.
        seqlens_k: [B] int32, keys of each sequence once this step's are appended.
        page_table: [B, P] int32, page p of a sequence holds the keys of slots [p * page_size, (p + 1) * page_size);
            entries beyond need are 0.
        rows: [R] int32, packed rows whose logits are wanted, rising, so grouped by sequence.
        cu_rows: [B + 1] int32, the wanted rows of sequence b are rows[cu_rows[b]:cu_rows[b + 1]]; none, one or several.
        source_table: [B, Ps] int32, of a ``SourceModel`` alone: the pages that ``read_sources`` has filled for the
            source of each sequence; entries beyond need are 0.
        source_lengths: [B] int32, tokens of each source.
    """

    input_ids: torch.Tensor
    slots: torch.Tensor
    cu_seqlens: torch.Tensor
    seqlens_k: torch.Tensor
    page_table: torch.Tensor
    rows: torch.Tensor
    cu_rows: torch.Tensor
    source_table: torch.Tensor | None = None
    source_lengths: torch.Tensor | None = None

    def check(self, *, page_size: int, pages: int, vocab_size: int, max_length: int) -> None:
        """Checks every field against the others and against the model; meant for tests and for foreign callers.

        Args:
            page_size: slots in a page.
            pages: N, of the pool.
            vocab_size: ids are below it.
            max_length: most keys a sequence may have.

        Raises:
            InputError: a field has a wrong dtype, shape or value; the message names it.
        """
        tokens, sequences, wanted = len(self.input_ids), len(self.seqlens_k), len(self.rows)
        shapes = {
            "input_ids": (tokens,),
            "slots": (tokens,),
            "cu_seqlens": (sequences + 1,),
            "seqlens_k": (sequences,),
            "page_table": (sequences, self.page_table.shape[-1]),
            "rows": (wanted,),
            "cu_rows": (sequences + 1,),
        }
        if self.source_table is not None:
            shapes |= {"source_table": (sequences, self.source_table.shape[-1]), "source_lengths": (sequences,)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None:
                raise _wrong(name, "it is missing beside the table")
            dtype = _DTYPES.get(name, torch.int32)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise _wrong(name, f"it is {tensor.dtype} {list(tensor.shape)}, and has to be {dtype} {list(shape)}")
        lengths = self.cu_seqlens.diff()
        _require(tokens > 0 and sequences > 0, "input_ids", "a step has at least one token")
        _require(
            _divides(self.cu_seqlens, tokens) and bool((lengths > 0).all()), "cu_seqlens", "it does not share out T"
        )
        _require(_divides(self.cu_rows, wanted), "cu_rows", "it does not share out R")
        _require(bool((self.rows.diff() > 0).all()), "rows", "they do not rise")
        owner = torch.repeat_interleave(torch.arange(sequences), self.cu_rows.diff())
        inside = (self.rows >= self.cu_seqlens[owner]) & (self.rows < self.cu_seqlens[owner + 1])
        _require(bool(inside.all()), "rows", "a row is not one of its sequence's")
        _require(_within(self.input_ids, 0, vocab_size), "input_ids", f"an id is outside of [0, {vocab_size})")
        _require(_within(self.seqlens_k, 1, max_length + 1), "seqlens_k", f"a length is outside of [1, {max_length}]")
        first = (self.seqlens_k - lengths).repeat_interleave(lengths)
        expected = first + torch.arange(tokens) - self.cu_seqlens[:-1].repeat_interleave(lengths)
        _require(bool((self.slots == expected).all()), "slots", "they are not the last ones below seqlens_k")
        _require(bool((self.slots >= 0).all()), "slots", "one is negative")
        _require(_within(self.page_table, 0, pages), "page_table", f"a page is outside of [0, {pages})")
        needed = -(-int(self.seqlens_k.max()) // page_size)
        _require(self.page_table.shape[1] >= needed, "page_table", f"{needed} pages are needed, it is narrower")
        if self.source_table is not None and self.source_lengths is not None:
            most = self.source_table.shape[1] * page_size
            _require(_within(self.source_table, 0, pages), "source_table", f"a page is outside of [0, {pages})")
            _require(_within(self.source_lengths, 1, most + 1), "source_lengths", f"one is outside of [1, {most}]")


@dataclass(frozen=True)
class SourceBatch:
    """Sources to be read, all at once: an encoder sees a whole text.

    Attributes:
        input_ids: [B, S] int64, padded on the right with anything in the vocabulary.
        lengths: [B] int32, tokens of each; at least one.
        page_table: [B, P] int32, page p of a source is to hold what belongs to its tokens [p * page_size,
            (p + 1) * page_size); P * page_size is at least S, entries beyond need are 0.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    page_table: torch.Tensor


@runtime_checkable
class CachedModel(Protocol):
    """A causal language model with paged keys and values: what the engine drives.

    Attributes:
        page_size: slots in a page.
        vocab_size: V, width of the logits.
        max_length: most tokens a sequence may have.
    """

    page_size: int
    vocab_size: int
    max_length: int

    def make_pages(self, count: int) -> Any:
        """The pool: ``count`` pages in every layer. A page id means the same page in every layer."""
        ...

    def copy_pages(self, pool: Any, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies pages in every layer: page ``source[i]`` to ``target[i]``, [n] int64 each, targets distinct.

        All sources are read before a target is written: one that was let go may be the target of another copy.
        """
        ...

    def step(self, pool: Any, batch: StepBatch) -> torch.Tensor:
        """Appends keys and values of the step's tokens to their pages, in place, and returns logits [R, V] fp32.

        The caller may change the result.
        """
        ...


@runtime_checkable
class SourceModel(CachedModel, Protocol):
    """A model whose every sequence is written behind a source: an encoder-decoder.

    What it makes of a source lies in pages of the same pool, which no step writes to.

    Attributes:
        source_vocab_size: ids of sources are below it.
        max_source: most tokens of a source.
    """

    source_vocab_size: int
    max_source: int

    def read_sources(self, pool: Any, batch: SourceBatch) -> None:
        """Fills the pages of sources; steps then name them in ``source_table``."""
        ...


def _require(holds: bool, field: str, why: str) -> None:
    if not holds:
        raise _wrong(field, why)


def _wrong(field: str, why: str) -> InputError:
    return InputError("a step's batch contradicts itself", where=f"StepBatch.{field}", why=why)


def _divides(bounds: torch.Tensor, total: int) -> bool:
    """Whether the bounds run from 0 to the total without falling."""
    return int(bounds[0]) == 0 and int(bounds[-1]) == total and bool((bounds.diff() >= 0).all())


def _within(values: torch.Tensor, low: int, high: int) -> bool:
    return bool(((values >= low) & (values < high)).all())
