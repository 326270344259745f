"""A model out of a GGUF file: built from its metadata, its weights left as they are stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.errors import OptionError
from tilewright.ir.stored_weight import StoredParameter
from tilewright.models.gguf.config import foreign, make_config
from tilewright.models.gguf.file import GgufFile, open_gguf, widen
from tilewright.models.gguf.rope import divide_frequencies
from tilewright.models.gguf.weights import find_weights

_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class GgufModel:
    """A causal language model in a file.

    Attributes:
        file: that it is in.
        model: the transformers model in eval mode, on the CPU. It can be traced, but not run: its matrices have their
            shapes and no memory, every element is one NaN. Its other parameters and its buffers are real.
        stored: matrices by parameter name. A parameter that is used under several names (tied embeddings) is here
            under the first of ``model.named_parameters()``.
        dense: the other parameters by name, fp32: norms and biases. Each parameter is in one of the two.
    """

    file: GgufFile
    model: Any
    stored: Mapping[str, StoredParameter] = field(repr=False)
    dense: Mapping[str, Tensor] = field(repr=False)


def load_gguf(path: str | Path) -> GgufModel:
    """Opens a GGUF file as a model. The weights are not read: they stay in the file until something uses them.

    Raises:
        GgufError: the file is damaged or incomplete, or its model is not read.
        OptionError: the package ``gguf`` is not installed.
    """
    if find_spec("gguf") is None:
        raise OptionError("GGUF files need the package gguf", hint="pip install 'tilewright[gguf]'")
    file = open_gguf(path)
    model = _empty_model(file)
    weights = find_weights(file, model)
    # Not on the meta device: tracing would write that device into the graph.
    shapes = {name: torch.full((), math.nan).expand(stored.shape) for name, stored in weights.stored.items()}
    _set_parameters(model, shapes | weights.dense)
    _make_buffers(file, model)
    return GgufModel(file, model, weights.stored, weights.dense)


def dense_model(loaded: GgufModel) -> Any:
    """The same model with all weights widened to fp32, to be run by transformers: the reference.

    Takes 4 bytes of memory for each weight. ``loaded`` stays as it is.
    """
    model = _empty_model(loaded.file)
    widened = {name: widen_parameter(stored) for name, stored in loaded.stored.items()}
    _set_parameters(model, widened | {name: value.clone() for name, value in loaded.dense.items()})
    _make_buffers(loaded.file, model)
    return model


def widen_parameter(stored: StoredParameter) -> Tensor:
    """The elements of a parameter, fp32, in the model's shape."""
    joined = torch.cat([widen(part) for part in stored.parts], -2)
    return joined.transpose(-1, -2).contiguous() if stored.transposed else joined


def _empty_model(file: GgufFile) -> Any:
    """The model on the meta device: no memory, whatever sizes the metadata asks for."""
    from transformers import AutoModelForCausalLM

    config = make_config(file)
    with foreign(file, "the metadata gives no model"), torch.device("meta"):
        ends = [file.metadata[f"tokenizer.ggml.{key}"] for key in _ENDS if f"tokenizer.ggml.{key}" in file.metadata]
        if len(ends) > 1:
            config.eos_token_id = list(dict.fromkeys(ends))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def _set_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives parameters new values, by their first names; tied ones stay tied."""
    new = {id(parameter): nn.Parameter(values[name], False) for name, parameter in model.named_parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, new[id(parameter)])


def _make_buffers(file: GgufFile, model: Any) -> None:
    """Real buffers in place of those on the meta device, with the values that transformers gives them."""
    with foreign(file, "the metadata gives no model"):
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        for parameter in model.parameters():
            parameter._is_hf_initialized = True  # leaves the parameters as they are
        model.initialize_weights()
        divide_frequencies(file, model)
