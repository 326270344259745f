"""Writes tiny GGUF files: what llama.cpp's converter does to each architecture, done here with ``gguf``'s writer."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor, nn

SCALES = {"Q8_0": (0,), "Q5_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the fp16 scales are in a block of each format."""

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def kind(name: str) -> gguf.GGMLQuantizationType:
    """The library's constant for a format."""
    return gguf.GGMLQuantizationType[name]


def random_blocks(name: str, rows: int, k: int, seed: int = 0) -> np.ndarray:
    """[rows, row bytes] uint8: any bytes, but with finite scales."""
    rng = np.random.default_rng(seed)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind(name)]
    data = rng.integers(0, 256, (rows, k // block, nbytes), np.uint8)
    for at in SCALES[name]:
        scale = (rng.standard_normal((rows, k // block, 1)) / 16).astype(np.float16)
        data[..., at : at + 2] = scale.view(np.uint8)
    return data.reshape(rows, -1)


def tiny_model(config: Any) -> Any:
    """A random model in which every parameter counts: norms and biases are random too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if parameter.ndim == 1 and "norm" in name and "gemma" not in config.model_type else 0.0
            parameter.normal_(center, 0.3 if parameter.ndim == 1 else 0.12)
    return model


def write_model(
    path: Path, model: Any, arch: str, form: str = "F32", keys: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None, pieces: bool = False,
) -> Path:  # fmt: skip
    """A file of a model.

    Args:
        path: to write.
        model: a transformers model.
        arch: by GGUF's name.
        form: of matrices whose rows it fits; the others stay fp32.
        keys: metadata of the architecture beside the usual.
        more: tensors beside the parameters.
        pieces: the vocabulary is SentencePiece's, with scores; else of byte pairs, with merges.
    """
    writer = gguf.GGUFWriter(path, arch)
    _add_metadata(writer, model.config, arch, keys or {}, pieces)
    tensors = {name: value.contiguous().numpy() for name, value in convert(model, arch).items()} | (more or {})
    for name, value in tensors.items():
        block = gguf.GGML_QUANT_SIZES[kind(form)][0]
        if value.ndim > 1 and value.shape[-1] % block == 0 and form != "F32":
            writer.add_tensor(name, gguf.quantize(value, kind(form)), raw_dtype=kind(form))
        else:
            writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: Any, config: Any, arch: str, keys: dict[str, Any], pieces: bool) -> None:
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads = config.num_attention_heads
    writer.add_name("tiny")
    writer.add_context_length(getattr(config, "max_position_embeddings", 128))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    if getattr(config, "num_key_value_heads", heads) != heads:
        writer.add_head_count_kv(config.num_key_value_heads)
    names = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
    epsilon = next(getattr(config, name) for name in names if hasattr(config, name))
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(epsilon)
    else:
        writer.add_layer_norm_eps(epsilon)
    rope = getattr(config, "rope_parameters", None)
    if rope:
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{arch}.{key}", value)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "t", "1", "\u2581", *(f"t{i}" for i in range(1, config.vocab_size - 6))]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 2, *(1 for _ in tokens[4:])])
    if pieces:
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_unk_token_id(3)
        writer.add_add_bos_token(True)
    else:
        writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def convert(model: Any, arch: str) -> dict[str, Tensor]:
    """A model's parameters as a file has them, by the file's names."""
    config = model.config
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch), config.num_hidden_layers
    )
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        stem, suffix = name.rsplit(".", 1) if name.endswith(("weight", "bias")) else (name, "weight")
        if stem.endswith("gate_up_proj") and parameter.ndim == 3:
            block = f"blk.{stem.split('.')[2]}"
            halves = parameter.detach().chunk(2, 1)
            found |= dict(zip((f"{block}.ffn_gate_exps.weight", f"{block}.ffn_up_exps.weight"), halves, strict=True))
            continue
        target = names.get_name(stem) or names.get_name(stem.split(".", 1)[1])
        assert target, f"no name for {name}"
        found[f"{target}.{suffix}"] = _change(arch, target, name, parameter.detach(), config, model)
    return found


def _change(arch: str, target: str, name: str, value: Tensor, config: Any, model: nn.Module) -> Tensor:
    stem = name.rpartition(".")[0]
    if arch == "llama" and target.endswith(("attn_q", "attn_k")):
        heads = config.num_attention_heads if target.endswith("attn_q") else config.num_key_value_heads
        return value.view(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
    if arch.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
        return value + 1
    if target.endswith("ffn_gate_inp_shexp"):
        return value[0]
    if isinstance(model.get_submodule(stem) if value.ndim == 2 else None, transformers.pytorch_utils.Conv1D):
        return value.t()
    if arch == "bloom" and target.endswith("attn_qkv"):
        split = value.view(config.n_head, 3, -1, *value.shape[1:])
        return split.transpose(0, 1).reshape(value.shape)
    return value
