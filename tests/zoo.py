"""Tiny models of many families with random weights, and how to run a captured graph beside them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from tilewright.ir.graph import info
from tilewright.passes.base import PassRecord, run_pass
from tilewright.passes.normalization.normalize import normalization

_SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def zoo() -> dict[str, Callable[[], nn.Module]]:
    """Builders by family; all share vocabulary 99, width 32 and 4 heads."""
    import transformers as hf

    short = {**_SMALL, "max_position_embeddings": 40}
    grouped = {**short, "num_key_value_heads": 2}
    wide = {**grouped, "head_dim": 8}
    layers = ["sliding_attention", "full_attention"]
    distil = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    gpt2 = {
        "vocab_size": 99,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    modern = {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
    return {
        "bert": lambda: hf.BertModel(hf.BertConfig(**short)),
        "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**{**short, "pad_token_id": 1, "type_vocab_size": 1})),
        "xlm_roberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**{**short, "pad_token_id": 1})),
        "distilbert": lambda: hf.DistilBertModel(hf.DistilBertConfig(**distil, max_position_embeddings=40)),
        "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**short, embedding_size=16)),
        "albert": lambda: hf.AlbertModel(hf.AlbertConfig(**short, embedding_size=16)),
        "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**{**short, "pad_token_id": 1})),
        "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(**short, **modern)),
        "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**gpt2)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped)),
        "qwen3": lambda: hf.Qwen3Model(hf.Qwen3Config(**wide)),
        "gemma3": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**wide, sliding_window=4, layer_types=layers)),
    }


def build(family: str, seed: int = 0) -> nn.Module:
    """The model in eval mode; norms and biases get random values too, so that each weight matters."""
    torch.manual_seed(seed)
    model = zoo()[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def normalize(gm: GraphModule) -> tuple[GraphModule, list[PassRecord]]:
    """Runs all passes from exported to normalized."""
    records = []
    for pass_ in normalization():
        gm, record = run_pass(pass_, gm)
        records.append(record)
    return gm, records


def run(gm: GraphModule, **inputs: Tensor) -> Any:
    """Runs the graph op by op and builds the model's output; inputs left out get their defaults."""
    ids = next(iter(inputs.values()))
    fill = {"ones": torch.ones_like, "zeros": torch.zeros_like}
    flat = [inputs[s.name] if s.name in inputs else fill[str(s.default)](ids) for s in info(gm).inputs]
    with torch.no_grad():
        return info(gm).output.build(list(Interpreter(gm).run(*flat)))


def ops(gm: GraphModule) -> Counter[str]:
    """How often each op is called."""
    return Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
