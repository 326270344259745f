"""A cached model made of an eager one, whose pages hold token ids: a wrong page, slot or copy gives wrong logits."""

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tilewright.ir.steps import StepBatch

EMPTY = -1
_LOGITS: dict[tuple[Any, tuple[int, ...]], Tensor] = {}  # by model and tokens: tests meet the same ones often


def tiny_gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """Random weights, 64 ids, 64 positions; no special tokens."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**(sizes | {"bos_token_id": None, "eos_token_id": None} | changes))
    return _lively(GPT2LMHeadModel(config))


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Random weights, 96 ids, 4 heads over 2 of keys; no special tokens."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(**(sizes | heads | {"bos_token_id": None, "eos_token_id": None} | changes))
    return _lively(LlamaForCausalLM(config))


def _lively(model: Any) -> Any:
    """Weights large enough that every token matters: with the usual 0.02 a tiny model repeats one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


class ReferenceModel:
    """As of ``CachedModel``, over an eager causal model; every step runs each sequence anew in full."""

    def __init__(self, model: Any, page_size: int = 4) -> None:
        self.model = model
        self.page_size = page_size
        self.vocab_size = model.config.vocab_size
        self.max_length = model.config.max_position_embeddings
        self.pools = 0
        self.steps: list[list[int]] = []  # of each step the tokens of its sequences

    def make_pages(self, count: int) -> Tensor:
        self.pools += 1
        return torch.full((count, self.page_size), EMPTY)

    def copy_pages(self, pool: Tensor, source: Tensor, target: Tensor) -> None:
        assert not set(source.tolist()) & set(target.tolist())
        pool[target] = pool[source]

    @torch.no_grad()
    def step(self, pool: Tensor, batch: StepBatch) -> Tensor:
        batch.check(page_size=self.page_size, pages=len(pool), vocab_size=self.vocab_size, max_length=self.max_length)
        bounds, row_bounds = batch.cu_seqlens.tolist(), batch.cu_rows.tolist()
        self.steps.append(batch.cu_seqlens.diff().tolist())
        logits = []
        for index in range(len(batch.seqlens_k)):
            new = slice(bounds[index], bounds[index + 1])
            slots = batch.slots[new].long()
            table = batch.page_table[index].long()
            pool[table[slots // self.page_size], slots % self.page_size] = batch.input_ids[new]
        for index, length in enumerate(batch.seqlens_k.tolist()):
            rows = batch.rows[row_bounds[index] : row_bounds[index + 1]].long()
            if len(rows) == 0:
                continue
            table = batch.page_table[index].long()
            ids = pool[table].reshape(-1)[:length]
            assert (ids != EMPTY).all(), "a slot is read that was never written"
            logits.append(self._logits(pool, batch, index, ids)[batch.slots[rows].long()])
        return torch.cat(logits).clone() if logits else torch.empty(0, self.vocab_size)

    def _logits(self, pool: Tensor, batch: StepBatch, index: int, ids: Tensor) -> Tensor:
        """Of all tokens ``ids`` of sequence ``index``."""
        key = (self.model, tuple(ids.tolist()))
        if key not in _LOGITS:
            _LOGITS[key] = self.model(ids[None]).logits[0]
        return _LOGITS[key]
