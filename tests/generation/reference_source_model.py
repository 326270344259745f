"""A model that reads sources made of an eager encoder-decoder, whose pages hold token ids, of sources too."""

from typing import Any

import torch
from reference_model import EMPTY, ReferenceModel
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from tilewright.ir.steps import SourceBatch, StepBatch

_LOGITS: dict[tuple[Any, ...], Tensor] = {}


def tiny_bart(seed: int = 0, **changes: Any) -> BartForConditionalGeneration:
    """Random weights, 64 ids, 64 positions; token 2 starts, nothing ends."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_layers": 1, f"{half}_attention_heads": 2, f"{half}_ffn_dim": 48}
    special = {"decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    model = BartForConditionalGeneration(BartConfig(**(sizes | special | {"forced_eos_token_id": None} | changes)))
    model.generation_config.forced_eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


class ReferenceSourceModel(ReferenceModel):
    """As of ``SourceModel``."""

    def __init__(self, model: Any, page_size: int = 4, max_source: int = 40) -> None:
        super().__init__(model, page_size)
        self.source_vocab_size = model.config.vocab_size
        self.max_source = max_source
        self.read: list[list[list[int]]] = []  # of each run the sources

    def read_sources(self, pool: Tensor, batch: SourceBatch) -> None:
        sources = [ids[:length] for ids, length in zip(batch.input_ids, batch.lengths.tolist(), strict=True)]
        self.read.append([source.tolist() for source in sources])
        for source, table in zip(sources, batch.page_table.long(), strict=True):
            slot = torch.arange(len(source))
            pool[table[slot // self.page_size], slot % self.page_size] = source

    def _logits(self, pool: Tensor, batch: StepBatch, index: int, ids: Tensor) -> Tensor:
        assert batch.source_table is not None
        assert batch.source_lengths is not None
        length = int(batch.source_lengths[index])
        source = pool[batch.source_table[index].long()].reshape(-1)[:length]
        assert (source != EMPTY).all(), "a source is seen that was never read"
        key = (self.model, tuple(source.tolist()), tuple(ids.tolist()))
        if key not in _LOGITS:
            _LOGITS[key] = self.model(input_ids=source[None], decoder_input_ids=ids[None]).logits[0]
        return _LOGITS[key]
