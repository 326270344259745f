"""Facts of a captured graph: types of its nodes, where they come from, its outputs, and sizes it cannot exceed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from tilewright.errors import CaptureError, TilewrightError
from tilewright.ir.facts import Origin, SizeValue, TensorType, TupleType, set_fact, source_line, where
from tilewright.ir.graph import OutputSpec
from tilewright.ir.infer import size_of
from tilewright.ir.sizes import Size


def set_type(node: Node, value: Any, names: Mapping[sympy.Symbol, Size]) -> None:
    """Sets TensorType, TupleType or SizeValue from what the tracer recorded.

    Args:
        node: the node.
        value: fake tensor, sequence of fake tensors, or (symbolic) integer.
        names: our size for each of the tracer's symbols.

    Raises:
        CaptureError: the result is of another kind, or a size depends on data.
    """
    try:
        if isinstance(value, torch.Tensor):
            set_fact(node, _tensor_type(value, names))
        elif isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
            set_fact(node, SizeValue(size_of(value, names)))
        elif isinstance(value, list | tuple) and all(isinstance(v, torch.Tensor) for v in value):
            set_fact(node, TupleType(tuple(_tensor_type(v, names) for v in value)))
        else:
            raise CaptureError(
                "a value is neither a tensor nor a size", where=where(node), why=f"it is a {type(value).__name__}"
            )
    except TilewrightError as error:
        raise CaptureError(
            error.what, where=where(node), why=error.why, hint="a graph's sizes must follow from its inputs' sizes"
        ) from None


def _tensor_type(value: torch.Tensor, names: Mapping[sympy.Symbol, Size]) -> TensorType:
    return TensorType(tuple(size_of(s, names) for s in value.shape), value.dtype)


def set_origin(node: Node, meta: Mapping[str, Any]) -> None:
    """Sets Origin from the stack trace and module stack the tracer recorded."""
    stack = meta.get("nn_module_stack") or {}
    path = _module_path(str(list(stack.values())[-1][0])) if stack else None
    set_fact(node, Origin(source_line(meta.get("stack_trace")), path or None))


def _module_path(text: str) -> str:
    """``L['self'].encoder.layer[0]`` of dynamo and ``encoder.layer.0@1`` of export as ``encoder.layer.0``."""
    text = re.sub(r"^L\['\w+'\]\.?|^with_statics\.?|@\d+$", "", text)
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", text).replace("._modules.", ".").strip(".")


@dataclass(frozen=True)
class OutputBuilder:
    """Puts flat output tensors into the structure the model returns.

    Attributes:
        spec: torch's pytree spec of the structure.
        leaves: for each leaf, the index of a flat output, or a constant in a one-element tuple.
    """

    spec: Any
    leaves: tuple[int | tuple[Any], ...]

    def __call__(self, flat: list[torch.Tensor]) -> Any:
        return pytree.tree_unflatten([flat[x] if isinstance(x, int) else x[0] for x in self.leaves], self.spec)


def describe_output(spec: Any, results: list[Any]) -> tuple[OutputSpec, list[Node]]:
    """The output structure, and the nodes that become the flat outputs.

    Args:
        spec: pytree spec of what the model returns.
        results: one per leaf: a node, or a constant.

    Raises:
        CaptureError: no leaf is a tensor.
    """
    nodes: list[Node] = []
    leaves: list[int | tuple[Any]] = []
    for result in results:
        leaves.append(len(nodes) if isinstance(result, Node) else (result,))
        if isinstance(result, Node):
            nodes.append(result)
    if not nodes:
        raise CaptureError("the model returns no tensor", why=f"its output is {spec}")
    paths = _paths(pytree.tree_unflatten(list(range(len(results))), spec))
    names = tuple(paths.get(i, f"output_{i}") for i, r in enumerate(results) if isinstance(r, Node))
    cls = spec.type
    path = None if cls in (tuple, list, dict, None) else f"{cls.__module__}.{cls.__qualname__}"
    return OutputSpec(OutputBuilder(spec, tuple(leaves)), names, path), nodes


def _paths(structure: Any, prefix: str = "") -> dict[int, str]:
    """Dotted path of each leaf, by its number: fields of a ModelOutput, keys of a dict, positions of a sequence."""
    if isinstance(structure, int):
        return {structure: prefix or "output"}
    items: Any = ()
    if isinstance(structure, Mapping):
        items = structure.items()
    elif isinstance(structure, list | tuple):
        items = enumerate(structure)
    found: dict[int, str] = {}
    for key, value in items:
        found |= _paths(value, f"{prefix}.{key}" if prefix else (f"output_{key}" if isinstance(key, int) else str(key)))
    return found


def remove_dead(gm: GraphModule) -> None:
    """Removes calls and attributes that nothing uses; inputs stay. Assertions of the tracer count as unused."""
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            gm.graph.erase_node(node)
    gm.recompile()


def finish(gm: GraphModule, names: Mapping[sympy.Symbol, Size]) -> None:
    """Removes dead nodes and sets the facts of all others from what the tracer left in ``meta``."""
    remove_dead(gm)
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        if draws_random(node):
            raise CaptureError(
                "the model draws random numbers",
                where=where(node),
                why=f"{node.target} gives another result at every run",
                hint="turn it off for inference; the model runs as it was",
            )
        set_type(node, node.meta.get("val"), names)
        if node.op == "call_function":
            set_origin(node, node.meta)


def draws_random(node: Node) -> bool:
    """True for an op that draws random numbers; dropout in evaluation mode or of nothing does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    off = given.get("train", given.get("training", True)) is False or given.get("p", 1) == 0
    return not off and not ("dropout_p" in names and not given.get("dropout_p"))


def strip_meta(gm: GraphModule) -> None:
    """Drops the tracer's records: facts replace them, and stale ones would mislead."""
    for node in gm.graph.nodes:
        for key in ("val", "tensor_meta", "nn_module_stack", "torch_fn", "from_node", "source_fn_stack"):
            node.meta.pop(key, None)
