"""Sets a field of all configurations of a transformers model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def configurations(model: nn.Module) -> list[Any]:
    """Every configuration object that some module of the model reads, sub-configurations included."""
    found: dict[int, Any] = {}
    pending: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    while pending:
        config = pending.pop()
        if config is None or id(config) in found or not hasattr(config, "__dict__"):
            continue
        found[id(config)] = config
        pending += [getattr(config, name, None) for name in getattr(config, "sub_configs", {}) or {}]
    return list(found.values())


@contextmanager
def replaced_field(model: nn.Module, field: str, value: Any) -> Iterator[None]:
    """Sets a field in the configurations that have it, and restores each exactly."""
    before = {id(config): (config, config.__dict__[field]) for config in configurations(model) if field in vars(config)}
    try:
        for config, _ in before.values():
            config.__dict__[field] = value
        yield
    finally:
        for config, old in before.values():
            config.__dict__[field] = old
