"""Rotary positions of a GGUF file: fields of a transformers config, and factors that the file has as tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tilewright.models.gguf.file import GgufFile

FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQUENCIES, _LONG, _SHORT)
"""Tensors that are no parameters: they divide the frequencies."""

_BASE = 10000.0  # of files that state none, as in llama.cpp
_SCALINGS = {"none": "default", "linear": "linear", "yarn": "yarn", "longrope": "longrope"}
_YARN = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}


def rope_fields(file: GgufFile, keys: Mapping[str, Any], default: Any, head: int) -> dict[str, Any]:
    """Fields that transformers does not read from the file.

    Args:
        file: with the tensors of factors, if any.
        keys: the metadata of its architecture.
        default: a config of the class, with default values.
        head: size of a head.

    Raises:
        GgufError: a kind of scaling that is not read, or part of each head rotated where the model rotates all.
    """
    defaults = default.to_dict().get("rope_parameters")
    if defaults is None:
        return {}
    found: dict[str, Any] = {} if "rope.freq_base" in keys else {"rope_theta": _BASE}
    rotated = keys.get("rope.dimension_count")
    if rotated is not None and "partial_rotary_factor" in defaults:
        found["partial_rotary_factor"] = rotated / head
    elif rotated is not None and rotated != head:
        why = f"{rotated} of {head} elements of each head are rotated; this model rotates all in transformers"
        raise file.error("the metadata is wrong", item="key 'rope.dimension_count'", why=why)
    if "rope.freq_base_swa" in keys and "sliding_attention" in defaults:
        found["rope_local_base_freq"] = keys["rope.freq_base_swa"]
    scaling = _scaling(file, keys)
    return found | {"rope_scaling": scaling} if scaling else found


def _scaling(file: GgufFile, keys: Mapping[str, Any]) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type", "longrope" if _LONG in file.tensors else "none")
    factor = keys.get("rope.scaling.factor")
    if "rope.scale_linear" in keys:  # what old files have
        kind, factor = "linear", keys["rope.scale_linear"]
    if kind not in _SCALINGS:
        why = f"it is {kind!r}; read are {', '.join(_SCALINGS)}"
        raise file.error("positions scaled in a way that is not read", item="key 'rope.scaling.type'", why=why)
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return {}
    scaling: dict[str, Any] = {"rope_type": _SCALINGS[kind]}
    if factor is not None:
        scaling["factor"] = factor
    if "rope.scaling.original_context_length" in keys:
        scaling["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
    if "rope.scaling.attn_factor" in keys:
        scaling["attention_factor"] = keys["rope.scaling.attn_factor"]
    if kind == "yarn":
        scaling |= {name: keys[key] for key, name in _YARN.items() if key in keys}
    if kind == "longrope":
        scaling |= {"long_factor": _factors(file, _LONG), "short_factor": _factors(file, _SHORT)}
    return scaling


def _factors(file: GgufFile, name: str) -> list[float]:
    if name not in file.tensors:
        raise file.error("factors of the positions are missing", item=f"tensor '{name}'", why="the scaling needs them")
    return file.dense(name).flatten().tolist()


def divide_frequencies(file: GgufFile, model: nn.Module) -> None:
    """Divides the rotary frequencies of a model by the file's factors, where it has them, as llama.cpp does.

    Llama 3.1 and later store their scaling in this form only. The frequencies are buffers ``inv_freq`` of the model's
    rotary modules.

    Raises:
        GgufError: the model has no frequencies of that number.
    """
    if FREQUENCIES not in file.tensors:
        return
    factors = file.dense(FREQUENCIES).flatten()
    found: list[Tensor] = [
        buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in ("inv_freq", "original_inv_freq") and buffer.shape == factors.shape
    ]
    if not found:
        why = f"it has {len(factors)} factors, the model no frequencies of that number"
        raise file.error("frequencies that do not fit the model", item=f"tensor '{FREQUENCIES}'", why=why)
    for buffer in found:
        buffer.div_(factors)
