"""Typed facts about graph nodes.

A fact is a frozen record stored under its own class: ``set_fact(node, TensorType(...))``, then
``fact(node, TensorType)``. No pass keeps loose strings in ``node.meta``; what fx and torch keep there
(``stack_trace``, ``nn_module_stack``) is read only to make an ``Origin``.
"""

import re
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.fx import Node

from tilewright.errors import TilewrightError, Where
from tilewright.ir.sizes import Size

_KEY = "tilewright_facts"
FactT = TypeVar("FactT")


@dataclass(frozen=True)
class TensorType:
    """Shape (sizes over B, S, T) and dtype of the tensor a node produces."""

    shape: tuple[Size, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class TupleType:
    """Types of the tensors of a node with several results, read through ``operator.getitem``."""

    items: tuple[TensorType, ...]


@dataclass(frozen=True)
class SizeValue:
    """The node produces an integer (a size), not a tensor."""

    value: Size


@dataclass(frozen=True)
class Origin:
    """Where a node comes from.

    Attributes:
        source: Python line of the model with its code, e.g. ``modeling_bert.py:292 hidden_states = self.LayerNorm(.)``.
        module: path of the module that ran it, e.g. ``encoder.layer.0.attention.output``.
        made_by: the pass that made the node; "capture" for nodes of the model.
    """

    source: str | None = None
    module: str | None = None
    made_by: str = "capture"


@dataclass(frozen=True)
class Reason:
    """Why something was not done at this node, in a sentence a user can read."""

    text: str


def set_fact(node: Node, record: Any) -> None:
    """Stores ``record`` under its class, replacing an earlier one.

    The table is replaced, never changed: fx copies ``meta`` shallowly, so copies of a graph share it.
    """
    node.meta[_KEY] = {**node.meta.get(_KEY, {}), type(record): record}


def find_fact(node: Node, kind: type[FactT]) -> FactT | None:
    """The fact of that kind, or None."""
    found: FactT | None = node.meta.get(_KEY, {}).get(kind)
    return found


def fact(node: Node, kind: type[FactT]) -> FactT:
    """The fact of that kind.

    Raises:
        TilewrightError: the node has none; a pass that made the node forgot it.
    """
    found = find_fact(node, kind)
    if found is None:
        raise TilewrightError(
            f"node has no {kind.__name__}",
            where=where(node),
            why="each node must carry its facts from the pass that made it",
            hint="run with TILEWRIGHT_VERIFY=1 to see which pass left it out",
        )
    return found


def all_facts(node: Node) -> list[Any]:
    """All facts of the node, in the order of their class names."""
    records: dict[type, Any] = node.meta.get(_KEY, {})
    return [records[kind] for kind in sorted(records, key=lambda kind: kind.__name__)]


def drop_fact(node: Node, kind: type) -> None:
    """Removes the fact of that kind, if any."""
    node.meta[_KEY] = {owner: record for owner, record in node.meta.get(_KEY, {}).items() if owner is not kind}


def copy_origin(source: Node, target: Node, made_by: str) -> None:
    """Gives ``target`` the place of ``source`` in the model, and names the pass that made it."""
    old = find_fact(source, Origin) or Origin()
    set_fact(target, Origin(old.source, old.module, made_by))


def where(node: Node) -> Where:
    """The node's name and Python line, for errors."""
    origin = find_fact(node, Origin)
    source = origin.source if origin else None
    return Where(node.name, source or source_line(node.meta.get("stack_trace")))


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')


def source_line(stack_trace: str | None) -> str | None:
    """Innermost frame of a stack trace as ``file.py:line code``, or None."""
    frames = list(_FRAME.finditer(stack_trace or ""))
    if not frames:
        return None
    last = frames[-1]
    return f"{last['file'].rsplit('/', 1)[-1]}:{last['line']} {last['code'].strip()}"
