"""The op registry: which ops a normalized graph may contain, their traits and their native references.

The native reference of an op is the op itself called eagerly (``tilewright::`` ops are written in plain torch); it
defines
the op, and ``opt_level=0`` runs it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.errors import OptionError
from tilewright.ops.traits import Flow, Traits


@dataclass(frozen=True)
class OpSpec:
    """A registered op: the overload fx calls, its traits, and its definition in plain torch.

    ``reference`` can be traced through (for export); for ATen's own ops it is the op itself.
    """

    target: Callable[..., Any]
    traits: Traits
    reference: Callable[..., Any]

    @property
    def name(self) -> str:
        """Readable name, e.g. ``aten.gelu.default``."""
        return str(self.target)


_registry: dict[Any, OpSpec] = {}


def register(target: Callable[..., Any], traits: Traits, reference: Callable[..., Any] | None = None) -> OpSpec:
    """Declares the traits of an op; after this, passes and codegen handle it.

    Args:
        target: an ``OpOverload``, e.g. ``torch.ops.mylib.squared_relu.default``. Its eager implementation is the native
            reference.
        traits: how its axes flow and how Triton writes it.
        reference: the same computation in plain torch, where the op's own implementation cannot be traced through.

    Raises:
        OptionError: the op is registered with other traits already, or a trait does not fit the flow.
    """
    if traits.triton is not None and traits.flow is not Flow.POINTWISE:
        raise OptionError(
            f"op {target}: a Triton expression goes with flow POINTWISE", why=f"its flow is {traits.flow}"
        )
    spec = OpSpec(target, traits, reference or target)
    if _registry.setdefault(target, spec) != spec:
        raise OptionError(f"op {target} is registered already with other traits", why=f"{_registry[target].traits}")
    return spec


def find(target: Any) -> OpSpec | None:
    """The registered op, or None."""
    return _registry.get(target)


def traits_of(target: Any) -> Traits:
    """Traits of the op; flow OTHER for one that was never registered."""
    spec = _registry.get(target)
    return spec.traits if spec else Traits(Flow.OTHER, why_not=f"{target} has no declared traits")


def all_ops() -> Iterator[OpSpec]:
    """All registered ops in the order of registration."""
    yield from _registry.values()


def is_overload(target: Any) -> bool:
    """True for an op of the dispatcher, as opposed to a Python function."""
    return isinstance(target, torch._ops.OpOverload)
