"""A causal model compiled into steps of generation: prefill, chunks of it, decoding, and mixes of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from tilewright.driver.compile_graph import CompiledGraph, compile_graph
from tilewright.driver.kernels import Progress
from tilewright.driver.options import CompileOptions
from tilewright.driver.precision import precision_of
from tilewright.driver.step_memory import StepMemory, step_memory
from tilewright.errors import CacheRefused, CaptureError
from tilewright.ir.graph import info
from tilewright.ir.sizes import SEQ
from tilewright.ir.steps import StepBatch
from tilewright.ir.stored_weight import StoredParameter
from tilewright.models.capture import capture, longest
from tilewright.models.inputs import signature_of
from tilewright.passes.base import Observer
from tilewright.passes.steps.add_cache import AddCache

PAGE_SIZE = 32
NO_LIMIT = 2**30


@dataclass(frozen=True)
class Pages:
    """Keys and values of all layers: a pool of ``count`` pages, as the program takes them."""

    tensors: tuple[Tensor, ...]
    count: int

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


class StepModel:
    """One step of a causal model; a ``tilewright.ir.steps.CachedModel``.

    Attributes:
        compiled: the program and its graph.
        page_size: slots of a page.
        vocab_size: columns of the logits.
        max_length: most tokens that a sequence may have.
        states: the inputs that are pages, in the order of a pool's tensors.
    """

    def __init__(self, compiled: CompiledGraph, page_size: int, vocab_size: int, max_length: int) -> None:
        self.compiled = compiled
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.states = [spec for spec in info(compiled.graph).inputs if spec.state]

    def make_pages(self, count: int) -> Pages:
        """An empty pool of ``count`` pages."""
        made = []
        for spec in self.states:
            shape = [size if isinstance(size, int) else count for size in spec.shape]
            made.append(torch.zeros(shape, dtype=spec.dtype))
        return Pages(tuple(made), count)

    def memory(
        self, *, pages: int, token_budget: int = 512, max_sequences: int = 64, most_wanted: int | None = None
    ) -> StepMemory:
        """What an engine over this model will hold, before it is made; without what it takes to read sources.

        Args:
            pages, token_budget, max_sequences: as of ``tilewright.runtime.serving.engine.Engine``.
            most_wanted: rows of logits in a step; None for one a sequence, which is all where nothing is drafted.

        Raises:
            OptionError: a number is out of range.
        """
        return step_memory(
            self, pages=pages, token_budget=token_budget, max_sequences=max_sequences, most_wanted=most_wanted
        )

    def copy_pages(self, pool: Pages, source: Tensor, target: Tensor) -> None:
        """Copies pages within the pool: those of ids ``source`` over those of ids ``target``."""
        for tensor in pool.tensors:
            tensor[target.long()] = tensor[source.long()]

    def step(self, pool: Pages, batch: StepBatch) -> Tensor:
        """Runs the new tokens of a batch; their keys and values go into the pool.

        Returns:
            Logits [R, vocabulary] fp32 of the wanted rows.
        """
        (logits,) = self.compiled(batch.input_ids, *self.told(batch), *pool.tensors)
        return logits.float()

    def told(self, batch: StepBatch) -> tuple[Tensor, ...]:
        """What the program is told besides tokens, in the order of its inputs."""
        return batch.slots, self._places(batch), batch.cu_seqlens, batch.page_table, batch.rows, batch.cu_rows

    def _places(self, batch: StepBatch) -> Tensor:
        """Where in the pool each new token's keys go: ``page * page_size + slot % page_size``."""
        slots, offsets = batch.slots.numpy(), batch.cu_seqlens.numpy()
        sequence = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        page = batch.page_table.numpy()[sequence, slots // self.page_size]
        return torch.from_numpy(page * self.page_size + slots % self.page_size)


def capture_call(model: Any, options: CompileOptions, call: Mapping[str, Any]) -> GraphModule:
    """The graph of a model that is called with these arguments, for steps to be made of it.

    Raises:
        CacheRefused: it cannot be captured, or ``opt_level`` is 0.
    """
    if options.opt_level == 0:
        raise CacheRefused(
            "there are no steps at opt_level=0",
            why="that level runs the model's own operations, which know no pages",
            hint="choose opt_level 1, 2 or 3",
        )
    try:
        return capture(model, signature_of(model, (), call), dtype=precision_of(model, options).capture)
    except CaptureError as error:
        raise CacheRefused("the model cannot be captured", where=error.where, why=error.why, hint=error.hint) from error


def compile_steps(
    model: Any,
    options: CompileOptions,
    *,
    page_size: int = PAGE_SIZE,
    stored: Mapping[str, StoredParameter] | None = None,
    observers: tuple[Observer, ...] = (),
    progress: Progress | None = None,
) -> StepModel:
    """Compiles a causal language model of transformers into steps.

    Args:
        model: in eval mode; it is not changed.
        options: as of ``tilewright.compile``.
        page_size: slots of a page of keys and values.
        stored: weights that a file stores, by parameter; the model's own are not read.
        observers, progress: as of ``compile_graph``.

    Raises:
        CacheRefused: it is no causal model that can go on from a cache, with the node; or ``opt_level`` is 0.
    """
    cache = AddCache(page_size, options.pages_dtype)
    ids = torch.ones((1, 3), dtype=torch.int64)
    call = {cache.tokens: ids, "attention_mask": ids, cache.positions: ids, "use_cache": False}
    gm = capture_call(model, options, call)
    limits = (info(gm).bounds.get(SEQ, (1, None, ""))[1], longest(model), NO_LIMIT)
    compiled = compile_graph(gm, options, observers=observers, progress=progress, cache=cache, stored=stored)
    tokens, slots = info(compiled.graph).inputs[:2]
    # A table that is looked up by position ends where it ends, whatever the configuration says.
    return StepModel(compiled, page_size, int(tokens.vocab or 0), min(filter(None, (*limits, slots.vocab))))
