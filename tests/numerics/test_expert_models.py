"""Models with mixtures of experts against eager: the error rule, no eager part, rows with equal scores, half types."""

from typing import Any

import pytest
import torch
from references import ErrorRule, in_double, masks

import tilewright

SMALL = {
    "vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 80, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "intermediate_size": 64, "moe_intermediate_size": 40, "num_experts": 9, "num_experts_per_tok": 3,
        "head_dim": 16, "norm_topk_prob": True,
    },
    "olmoe": {"intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 4},
    # Biases, transposed weights, a gate of its own and sinks; layers with and without a window.
    "gpt_oss": {
        "num_hidden_layers": 2,
        "intermediate_size": 40, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip


def build(family: str, seed: int = 0) -> Any:
    """A tiny model whose eager form loops over experts, its weights scaled up so that errors show."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    model = AutoModel.from_config(AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "bias" in name or "sinks" in name:
                parameter.normal_(std=0.2)
            elif parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_error_rule(family: str) -> None:
    rule = ErrorRule()
    model = build(family)
    double = in_double(model)
    compiled = tilewright.compile(model, gemm="triton", unpad="on")
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 1, "full"), (1, 7, "full"), (2, 150, "full"), (5, 33, "uneven"), (3, 9, "left"), (4, 12, "holes"))
    for batch, length, pattern in shapes:
        ids = torch.randint(3, 99, (batch, length), generator=generator)
        mask = masks(batch, length, pattern, generator)
        before = compiled.stats.rows_computed
        with torch.no_grad():
            eager = model(ids, attention_mask=mask).last_hidden_state
            reference = double(ids, attention_mask=mask).last_hidden_state
        rule.add(compiled(ids, attention_mask=mask).last_hidden_state, eager, reference, mask.bool())
        assert compiled.stats.rows_computed - before == int(mask.sum())
    assert compiled.stats.eager_steps == 0
    assert compiled.stats.fallbacks == 0
    assert compiled.stats.vendor_calls == 0
    rule.check(family)
    empty = compiled(ids, attention_mask=torch.zeros_like(mask)).last_hidden_state
    assert (empty == 0).all()


def test_equal_scores() -> None:
    """Where all experts have one score torch may choose any, so all have the same weights here."""
    model = build("mixtral")
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.gate.weight.zero_()
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weight.copy_(weight[:1].expand_as(weight))
    ids = torch.randint(3, 99, (2, 20))
    with torch.no_grad():
        eager, reference = model(ids).last_hidden_state, in_double(model)(ids).last_hidden_state
    rule = ErrorRule()
    rule.add(tilewright.compile(model, gemm="triton")(ids).last_hidden_state, eager, reference)
    rule.check()


def test_half_type() -> None:
    """Routing is a step: rows near one may take another expert than in fp64, as eager's do; the rest obeys the rule."""
    model = build("olmoe")
    ids = torch.randint(3, 99, (2, 40))
    compiled = tilewright.compile(model, dtype="bf16", gemm="triton")
    ours = compiled(ids).last_hidden_state
    half = build("olmoe").bfloat16()
    with torch.no_grad():
        eager, reference = half(ids).last_hidden_state, in_double(half)(ids).last_hidden_state
    error, bound = ((value.double() - reference).abs().amax(-1).flatten().sort().values for value in (ours, eager))
    assert ours.dtype == torch.bfloat16
    assert compiled.stats.eager_steps == 0
    middle = error.numel() * 3 // 4
    assert error[middle] <= 2 * bound[middle] + 1e-6


def test_configuration_is_restored() -> None:
    model = build("mixtral")
    before = dict(vars(model.config))
    tilewright.compile(model, opt_level=0)(torch.randint(3, 99, (1, 4)))
    assert vars(model.config) == before
    assert model.config._experts_implementation == "eager"
