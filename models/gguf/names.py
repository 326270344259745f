"""Which tensor of a GGUF file is which parameter, by name: from the tables of ``gguf`` and of transformers."""

from typing import Any


def parameter_names(model: Any, processor: Any, architecture: str, layers: int) -> dict[str, str]:
    """The parameter of ``model.state_dict()`` that each tensor of a file would be, by the tensor's name.

    The tables know some models by the names inside of their base model (``h.0.attn`` for ``transformer.h.0.attn``), so
    what is not found under its full name is looked up without its first part, then its second, and so on. This is what
    transformers' ``get_gguf_hf_weights_map`` does module by module, each time with a table made anew.

    Args:
        model: a transformers model, on any device.
        processor: transformers' for the architecture: it changes names that the tables have in another form.
        architecture: by GGUF's name.
        layers: of the model.

    Raises:
        KeyError: ``gguf`` does not know the architecture.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    table = get_tensor_name_map({name: arch for arch, name in MODEL_ARCH_NAMES.items()}[architecture], layers)
    pending = list(model.state_dict())
    found: dict[str, str] = {}
    for depth in range(max(name.count(".") for name in pending) + 1):
        level: dict[str, str] = {}
        for full in pending:
            parts = full.split(".")
            outer, inner = "".join(f"{part}." for part in parts[:depth]), ".".join(parts[depth:])
            if inner:
                _look_up(table, processor, outer, inner, level)
        found = level | found
    return found


def _look_up(table: Any, processor: Any, outer: str, inner: str, into: dict[str, str]) -> None:
    inner = processor.preprocess_name(inner)
    stem, dot, kind = inner.rpartition(".")
    stem, suffix = (stem, dot + kind) if kind in ("weight", "bias") else (inner, "")
    name = table.get_name(stem)
    if name is None:
        processor.perform_fallback_tensor_mapping(into, suffix, outer, inner)
    else:
        into[name + suffix] = outer + inner
