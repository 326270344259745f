"""What a ``torch.fx.GraphModule`` of ours carries besides its nodes: level, inputs, outputs, history.

The graph stays a plain GraphModule at every level. Weights are ``get_attr`` nodes, inputs are placeholders, the output
node returns a flat tuple of tensors.
"""

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from tilewright.errors import TilewrightError
from tilewright.ir.sizes import Size

_KEY = "tilewright_graph"


class Level(IntEnum):
    """The levels a graph passes through; each has a spec in ``tilewright.passes.spec.verify``."""

    EXPORTED = 0
    NORMALIZED = 1
    PACKED = 2
    FUSED = 3
    SPECIALIZED = 4
    PLACED = 5


@dataclass(frozen=True)
class InputSpec:
    """One tensor input of the graph, in placeholder order.

    Attributes:
        name: argument name of the model's forward, e.g. ``input_ids``.
        dtype: element type expected.
        shape: sizes over B and S; an int where the graph needs exactly that.
        default: what to pass when the caller leaves it out: "ones", "zeros", or None when it is required.
        validity: True for the [B, S] input whose nonzero entries mark real tokens.
        vocab: exclusive upper bound of its integer values, where the graph uses it to index a table.
        lowest: their inclusive lower bound then; not 0 where they count from elsewhere.
        state: True for memory of the caller that the graph reads and writes in place.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]
    default: str | None = None
    validity: bool = False
    vocab: int | None = None
    state: bool = False
    lowest: int = 0


@dataclass(frozen=True)
class OutputSpec:
    """How the flat outputs become what the model returns.

    Attributes:
        build: takes the flat list of tensors and returns the model's own structure (``ModelOutput``, tuple, tensor).
        names: a name for each flat output, e.g. ``last_hidden_state``.
        class_path: dotted name of the output class, where there is one, e.g.
            ``transformers.modeling_outputs.BaseModelOutput``.
    """

    build: Any
    names: tuple[str, ...]
    class_path: str | None = None


@dataclass(frozen=True)
class GraphInfo:
    """Facts about the whole graph.

    Attributes:
        level: the level whose spec the graph meets.
        inputs: one per placeholder.
        output: structure of the result.
        bounds: inclusive (low, high) of a size symbol; high None when unbounded. From the model, e.g. S <= 512 by the
            position table, with the reason.
        reasons: what was not done, and why, for the whole graph (e.g. packing refused), by topic.
        name: a readable name of the model, for messages and artifacts.
    """

    level: Level
    inputs: tuple[InputSpec, ...]
    output: OutputSpec
    bounds: dict[sympy.Symbol, tuple[int, int | None, str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    name: str = "model"


def set_info(gm: GraphModule, info: GraphInfo) -> None:
    """Attaches ``info`` to the graph module."""
    gm.meta[_KEY] = info


def info(gm: GraphModule) -> GraphInfo:
    """Facts about the whole graph.

    Raises:
        TilewrightError: the graph was not made by capture.
    """
    found: GraphInfo | None = gm.meta.get(_KEY)
    if found is None:
        raise TilewrightError("the graph module carries no GraphInfo", hint="make it with tilewright.models.capture")
    return found


def update_info(gm: GraphModule, **changes: Any) -> GraphInfo:
    """Replaces fields of the graph's info and returns the new one."""
    new = replace(info(gm), **changes)
    set_info(gm, new)
    return new


def get_tensor(gm: GraphModule, node: Node) -> torch.Tensor:
    """The tensor a ``get_attr`` node stands for."""
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor):
        raise TilewrightError(f"get_attr node '{node.name}' is not a tensor", why=f"it is a {type(value).__name__}")
    return value
