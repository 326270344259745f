"""Tiny models with random weights: one of each family and head that transformers has a class for."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

HEADS = {
    "base": ("Model", "EncoderModel"),
    "sequence classification": ("ForSequenceClassification",),
    "token classification": ("ForTokenClassification",),
    "question answering": ("ForQuestionAnswering",),
    "masked LM": ("ForMaskedLM",),
}
VOCAB, EOS = 99, 2
_SIZES = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "max_position_embeddings": 80}
_WIDE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_COMMON = {**_SIZES, **_WIDE}
_FROM_IDS = {**_COMMON, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}
_SEVERAL = {"num_hidden_layers": 2}  # layers that differ, share their weights, see masked places of the one before
_HALVES = {"encoder": 2, "decoder": 2}
_DISENTANGLED = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        prefix: of its classes in transformers.
        config: fields of its configuration.
        heads: those that are encoders; of a base model with a decoder, the encoder alone.
    """

    prefix: str
    config: dict[str, Any]
    heads: tuple[str, ...] = tuple(HEADS)


FAMILIES = {
    "bert": Family("Bert", _COMMON),
    "roberta": Family("Roberta", _FROM_IDS),
    "xlm-roberta": Family("XLMRoberta", _FROM_IDS),
    "distilbert": Family("DistilBert", {**_SIZES, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}),
    "mpnet": Family("MPNet", {**_COMMON, "pad_token_id": 1, "bos_token_id": 0}),
    "electra": Family("Electra", {**_COMMON, "embedding_size": 16}),
    "albert": Family("Albert", {**_COMMON, **_SEVERAL, "embedding_size": 16}),
    "modernbert": Family(
        "ModernBert", {**_COMMON, **_SEVERAL, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
    ),
    "nomic_bert": Family("NomicBert", _COMMON),
    "deberta-v2": Family("DebertaV2", {**_COMMON, **_SEVERAL, **_DISENTANGLED}),
    "t5": Family(
        "T5",
        {**_SIZES, "decoder_start_token_id": 0, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        ("base", "token classification"),
    ),
    "bart": Family(
        "Bart",
        {
            **_SIZES,
            "d_model": 32,
            **{f"{half}_layers": count for half, count in _HALVES.items()},
            **{f"{half}_attention_heads": 4 for half in _HALVES},
            **{f"{half}_ffn_dim": 64 for half in _HALVES},
        },
        ("base",),
    ),
    "bloom": Family("Bloom", {**_SIZES, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "qwen3": Family("Qwen3", {**_COMMON, **_SEVERAL, "num_key_value_heads": 2, "head_dim": 8}),
}


def build(family: str, head: str, seed: int) -> nn.Module | None:
    """The tiny model in eval mode, its biases and norms random too; None where there is no such encoder."""
    entry = FAMILIES[family]
    if head not in entry.heads:
        return None
    names = [f"{entry.prefix}{suffix}" for suffix in HEADS[head]]
    known = next((name for name in reversed(names) if hasattr(hf, name)), None)
    if known is None:
        return None
    torch.manual_seed(seed)
    config = getattr(hf, f"{entry.prefix}Config")(**entry.config)
    model: nn.Module = getattr(hf, known)(config)
    if head == "base" and model.config.is_encoder_decoder and not known.endswith("EncoderModel"):
        model = model.get_encoder()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
