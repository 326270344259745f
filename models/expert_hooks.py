"""Experts hook of transformers: a model under capture emits one ``tilewright::expert_linear`` per product of experts.

``ExpertsInterface`` is transformers' own extension point, through which every mixture of experts calls its weights with
the experts that its router chose. The hook writes the layer token by token; what is special about a model (its gate,
activation, biases, norm behind the experts) is the model's own code, traced as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tilewright import ops as ops  # registers tilewright::expert_linear
from tilewright.errors import CaptureError
from tilewright.models.config_fields import replaced_field

NAME = "tilewright"
_CONFIG_FIELD = "_experts_implementation_internal"


def run_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts hook; arguments as transformers passes them to every experts function.

    Args:
        module: the layer's weights: ``gate_up_proj`` [E, 2 I, H] (``up_proj`` [E, I, H] without a gate) and
            ``down_proj`` [E, H, I], or transposed, and what it computes between and behind them.
        hidden_states: [T, H]. top_k_index: [T, k], experts of each token. top_k_weights: [T, k].

    Returns:
        [T, H]

    Raises:
        CaptureError: the experts are divided among devices.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise CaptureError(
            "experts that are divided among devices cannot be captured",
            where=type(module).__name__,
            hint="load the model on one device",
        )
    rows = hidden_states.unsqueeze(1)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _product(module, name, rows, top_k_index)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    out = _product(module, "down_proj", hidden, top_k_index)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    return (out * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)


def _product(module: Any, name: str, rows: Tensor, experts: Tensor) -> Tensor:
    weight = getattr(module, name)
    weight = weight.transpose(1, 2) if module.is_transposed else weight
    out: Tensor = torch.ops.tilewright.expert_linear(rows.to(weight.dtype), weight, experts)
    return out + nn.functional.embedding(experts, getattr(module, f"{name}_bias")) if module.has_bias else out


ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)


@contextmanager
def experts_implementation(model: nn.Module) -> Iterator[None]:
    """Has all mixtures of experts of ``model`` call the hook, and restores their configurations exactly."""
    with replaced_field(model, _CONFIG_FIELD, NAME):
        yield
