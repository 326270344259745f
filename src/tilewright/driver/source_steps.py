"""An encoder-decoder compiled for generation: one program reads sources, another one makes steps of the decoder."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from tilewright.driver.compile_graph import CompiledGraph, compile_graph
from tilewright.driver.kernels import Progress
from tilewright.driver.options import CompileOptions
from tilewright.driver.steps import NO_LIMIT, PAGE_SIZE, Pages, StepModel, capture_call
from tilewright.ir.graph import info, set_info
from tilewright.ir.sizes import SEQ
from tilewright.ir.steps import SourceBatch, StepBatch
from tilewright.ir.stored_weight import StoredParameter
from tilewright.passes.base import Observer
from tilewright.passes.steps.add_cache import AddCache
from tilewright.passes.steps.fill_pages import FillPages
from tilewright.passes.steps.split_source import SplitSource

_TOKENS = "decoder_input_ids"


class SourceStepModel(StepModel):
    """Steps of a decoder, and what it sees of a source; a ``tilewright.ir.steps.SourceModel``.

    Attributes:
        reader: the program that reads sources, and its graph.
        source_vocab_size: ids of sources are below it.
        max_source: most tokens of a source.
    """

    def __init__(
        self,
        compiled: CompiledGraph,
        reader: CompiledGraph,
        page_size: int,
        vocab_size: int,
        max_length: int,
        max_source: int,
    ) -> None:
        super().__init__(compiled, page_size, vocab_size, max_length)
        self.reader = reader
        self.max_source = max_source
        inputs = info(reader.graph).inputs
        self.source_vocab_size = int(next(spec.vocab or 0 for spec in inputs if spec.name == "input_ids"))
        # Pages of the reader, by their places in the pool of the steps: they have names of their own where they differ.
        names = [spec.name for spec in self.states]
        filled = [spec.name for spec in inputs if spec.state]
        self._filled = [names.index(f"source_{name}" if f"source_{name}" in names else name) for name in filled]

    def read_sources(self, pool: Pages, batch: SourceBatch) -> None:
        """Encodes sources; the keys and values of the cross-attentions go into the pool."""
        ids, lengths = batch.input_ids, batch.lengths
        slots = torch.arange(ids.shape[1], dtype=torch.int32)
        mask = (slots < lengths[:, None]).long()
        page = batch.page_table[:, slots.long() // self.page_size]
        places = page * self.page_size + slots % self.page_size
        self.reader(places, *(pool.tensors[place] for place in self._filled), ids, mask)

    def told(self, batch: StepBatch) -> tuple[Tensor, ...]:
        """As of ``StepModel``, and of each token the last slot of its source, and the sources' pages."""
        assert batch.source_table is not None, "each sequence of such a step has a source"
        assert batch.source_lengths is not None
        last = np.repeat(batch.source_lengths.numpy() - 1, np.diff(batch.cu_seqlens.numpy()))
        return (*super().told(batch), torch.from_numpy(last), batch.source_table)


def compile_source_steps(
    model: Any,
    options: CompileOptions,
    *,
    page_size: int = PAGE_SIZE,
    stored: Mapping[str, StoredParameter] | None = None,
    observers: tuple[Observer, ...] = (),
    progress: Progress | None = None,
) -> SourceStepModel:
    """Compiles an encoder-decoder of transformers; arguments and errors as of ``compile_steps``."""
    ids = torch.ones((1, 3), dtype=torch.int64)
    cache = AddCache(page_size, options.pages_dtype, tokens=_TOKENS)
    masks = {"attention_mask": ids, "decoder_attention_mask": ids}
    gm = capture_call(model, options, {"input_ids": ids, _TOKENS: ids, **masks, "use_cache": False})
    twin = GraphModule(gm, copy.deepcopy(gm.graph))
    set_info(twin, info(gm))
    # Both texts were traced at one length: what bounds one of them is taken to bound the other.
    limit = info(gm).bounds.get(SEQ, (1, None, ""))[1] or NO_LIMIT
    given: dict[str, Any] = {"observers": observers, "progress": progress, "stored": stored}
    fill = FillPages(page_size, options.pages_dtype)
    reader = compile_graph(twin, options, cache=fill, split=SplitSource("source"), **given)
    steps = compile_graph(gm, options, cache=cache, split=SplitSource("target"), **given)
    return SourceStepModel(steps, reader, page_size, int(info(steps.graph).inputs[0].vocab or 0), limit, limit)
