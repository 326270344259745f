"""The graph that ``torch.compile`` hands to a backend, as a graph of ours at level exported.

dynamo records calls of torch functions and methods; weights arrive as inputs, sizes as integer inputs. The graph is
traced once more, down to ATen, on dynamo's own fake tensors, so its size symbols and source lines stay.
"""

import re
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type

from tilewright.errors import CaptureError
from tilewright.ir.graph import GraphInfo, InputSpec, Level, set_info
from tilewright.ir.infer import size_of
from tilewright.ir.sizes import Size
from tilewright.models.bounds import find_bounds, vocabularies
from tilewright.models.describe import describe_output, finish, strip_meta
from tilewright.models.export import copy_body, size_names
from tilewright.models.functional import make_functional

aten = torch.ops.aten


def from_dynamo(gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[GraphModule, list[int], list[int]]:
    """Converts dynamo's graph.

    Args:
        gm: what dynamo hands to a backend.
        example_inputs: one per placeholder: tensors, weights among them, and integers of dynamic sizes.

    Returns:
        The graph at level exported; positions of its inputs among the arguments; positions of the arguments that became
        weights, which a later call must pass unchanged.

    Raises:
        CaptureError: the graph has a size of its own meaning, returns a size, or draws random numbers.
        TensorifyScalarRestartAnalysis: dynamo passed Python numbers as tensors; it traces again with the numbers.
    """
    places = list(gm.graph.find_nodes(op="placeholder"))
    values = [_value(node, example) for node, example in zip(places, example_inputs, strict=True)]
    env = next((v.fake_mode.shape_env for v in values if hasattr(v, "fake_mode")), None)
    _specialize_numbers(env)
    weights = [i for i, (n, e) in enumerate(zip(places, example_inputs, strict=True)) if _is_weight(n, e)]
    traced = _trace(gm, values)
    return _convert(traced, places, example_inputs, weights)


def _value(node: Node, example: Any) -> Any:
    """What to trace with: dynamo's own fake tensor or symbolic integer, where it left one."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return example if value is None else value


def _specialize_numbers(env: ShapeEnv | None) -> None:
    """Python floats of the model (an epsilon, a scale) must be constants.

    dynamo may pass them as tensors; this asks it, in the way its own backend does, to trace again with their values.
    """
    wanted = [str(s) for s in (env.backed_var_to_val if env else {}) if symbol_is_type(s, SymT.FLOAT)]
    wanted = [name for name in wanted if not TensorifyState.should_specialize(name)]
    for name in wanted:
        TensorifyState.specialize(name)
    if wanted:
        raise TensorifyScalarRestartAnalysis


def _is_weight(node: Node, example: Any) -> bool:
    """Parameters, and buffers that dynamo marks as part of a module."""
    marks = node.meta.get("tensor_dict") or {}
    return isinstance(example, nn.Parameter) or (isinstance(example, Tensor) and "_dynamo_static_input_type" in marks)


def _trace(gm: GraphModule, values: list[Any]) -> GraphModule:
    """Down to ATen, without decomposing what is one op for us (linear, layer_norm, scaled_dot_product_attention)."""
    fake = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)

    def run(*args: Any) -> Any:
        return Interpreter(gm).run(*args)

    with torch.no_grad(), fx_traceback.preserve_node_meta():
        if fake is None:
            traced = make_fx(run, tracing_mode="symbolic", pre_dispatch=True)(*values)
        else:
            with fake:
                traced = make_fx(run, pre_dispatch=True)(*values)
    make_functional(traced)
    return traced


def _convert(
    traced: GraphModule, places: list[Node], example_inputs: Sequence[Any], weights: list[int]
) -> tuple[GraphModule, list[int], list[int]]:
    traced_places = list(traced.graph.find_nodes(op="placeholder"))
    is_tensor = [isinstance(node.meta.get("val"), Tensor) for node in traced_places]
    inputs = [i for i, tensor in enumerate(is_tensor) if tensor and i not in weights]
    names = size_names(traced_places[i] for i in inputs)
    graph, env, tensors = Graph(), {}, {}
    for i in (*inputs, *weights):
        node = traced_places[i]
        if i in weights:
            key = _weight_name(places[i].name)
            tensors[key] = example_inputs[i].detach()
            env[node] = graph.get_attr(key)
        else:
            env[node] = graph.placeholder(_input_name(places[i].name))
        env[node].meta = dict(node.meta)
    for i, node in enumerate(traced_places):
        if not is_tensor[i]:
            env[node] = _size(graph, node, [traced_places[k] for k in inputs], env)
    results = copy_body(traced, graph, env, tensors)
    output, nodes = describe_output(pytree.tree_structure([0] * len(results)), results)
    graph.output(tuple(nodes))
    gm = GraphModule(tensors, graph, class_name="Model")
    finish(gm, names)
    _describe(gm, names, output)
    strip_meta(gm)
    return gm, inputs, weights


def _size(graph: Graph, node: Node, inputs: list[Node], env: dict[Node, Any]) -> Any:
    """An integer input, read off the tensor input that has it as a size."""
    value = node.meta.get("val")
    if not isinstance(value, torch.SymInt) or value.node.expr.is_Integer:
        return int(value) if isinstance(value, int | torch.SymInt) else value
    for source in inputs:
        for axis, size in enumerate(source.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                made = graph.call_function(aten.sym_size.int, (env[source], axis))
                made.meta = {"val": value}
                return made
    if not node.users:
        return None
    raise CaptureError(f"integer input '{node.name}' is the size of no tensor input", why=f"it is {value.node.expr}")


def _describe(gm: GraphModule, names: dict[sympy.Symbol, Size], output: Any) -> None:
    vocab = vocabularies(gm)
    specs = tuple(
        InputSpec(
            name=str(node.target),
            dtype=node.meta["val"].dtype,
            shape=tuple(size_of(s, names) for s in node.meta["val"].shape),
            vocab=vocab.get(node.name),
        )
        for node in gm.graph.find_nodes(op="placeholder")
    )
    reasons = {}
    if not names:
        reasons["sizes"] = "dynamo traced with constant sizes; torch.compile(model, dynamic=True) makes them symbolic"
    set_info(gm, GraphInfo(Level.EXPORTED, specs, output, find_bounds(gm, {}), reasons, "torch.compile graph"))


def _input_name(name: str) -> str:
    """``l_kwargs_input_ids_`` or ``L_input_ids_`` as ``input_ids``."""
    short = re.sub(r"^[lL]_(kwargs_)?|_$", "", name)
    return short if short.isidentifier() else name


def _weight_name(name: str) -> str:
    """dynamo's name of a weight, as a path: the indices and names of modules it went through."""
    path = re.sub(r"^[lL]_self_", "", name).rstrip("_")
    return re.sub(r"_?(modules|parameters|buffers)_", ".", path).strip(".") or name
