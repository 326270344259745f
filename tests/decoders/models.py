"""Tiny language models with random weights, one of each family: causal ones, and encoder-decoders."""

from typing import Any

import torch
import transformers as hf
from torch import nn

VOCAB = 99
WINDOW = 5  # of families with one: short, so that a test of a few pages reaches past it
_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_PLAIN = {**_IDS, **_SIZES, "pad_token_id": 0, "max_position_embeddings": 96}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 16}
_SCALED = {"query_pre_attn_scalar": 8, "sliding_window": WINDOW}
_LOCAL = {"layer_types": ["sliding_attention", "full_attention"]}

# A router that first chooses a group of experts, and one dense layer in front.
_GROUPS = {
    "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}),
    "opt": ("OPT", {**_PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoX", _PLAIN),
    "gptj": ("GPTJ", {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "rotary_dim": 4}),
    "falcon": ("Falcon", {**_PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "bert": ("Bert", {**_PLAIN, "is_decoder": True}),
    "llama": ("Llama", _HEADS),
    "mistral": ("Mistral", {**_HEADS, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", _HEADS),
    "gemma2": ("Gemma2", {**_HEADS, **_SCALED}),
    "gemma3": ("Gemma3Text", {**_HEADS, **_SCALED, **_LOCAL}),
    "bloom": ("Bloom", {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "phi3": ("Phi3", _GROUPED),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**_HEADS, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 3}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {**_HEADS, "moe_intermediate_size": 24, "moe_num_experts": 6, "moe_k": 2, "moe_layer_start_index": 1},
    ),
    "gpt_oss": ("GptOss", {**_HEADS, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "glm4_moe": ("Glm4Moe", {**_HEADS, **_GROUPS, "partial_rotary_factor": 0.5}),
    "deepseek_v3": ("DeepseekV3", {**_PLAIN, **_GROUPS, **_LATENT, "num_key_value_heads": 4}),
}

_STARTS = {"pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None}
_HALVES = {
    f"{half}_{name}": value
    for half in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
_BART = {**_IDS, **_STARTS, **_HALVES, "d_model": 32, "max_position_embeddings": 96}
_BUCKETS = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}  # some hold several distances
_T5 = {**_IDS, **_STARTS, **_BUCKETS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

SOURCE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("Bart", _BART),
    "mbart": ("MBart", _BART),
    "marian": ("Marian", {**_BART, "activation_function": "swish"}),
    "pegasus": ("Pegasus", {**_BART, "encoder_layers": 1}),
    "blenderbot": ("Blenderbot", _BART),
    "t5": ("T5", _T5),
    "t5 v1.1": ("T5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("UMT5", _T5),
}


def build(family: str, seed: int) -> nn.Module:
    """The model; weights are spread wide enough that attention is not uniform."""
    prefix, fields = (FAMILIES | SOURCE_FAMILIES)[family]
    torch.manual_seed(seed)
    config = getattr(hf, f"{prefix}Config")(**fields)
    auto = hf.AutoModelForSeq2SeqLM if family in SOURCE_FAMILIES else hf.AutoModelForCausalLM
    model: nn.Module = auto.from_config(config).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the faster ones have no fp64
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model
