"""``torch.compile(model, backend="tilewright")``: the backend that dynamo calls with each graph it traced.

Use ``dynamic=True``: with constant sizes dynamo traces anew for each shape, and what depends on symbolic sizes
(removing padding) is not done. Graphs that cannot be converted run as they were, with a warning that says why.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

if TYPE_CHECKING:
    from tilewright.driver.compile_graph import CompiledGraph
    from tilewright.driver.options import CompileOptions

compiled_graphs: "weakref.WeakSet[CompiledGraph]" = weakref.WeakSet()
"""What this backend has compiled and dynamo still holds; each has ``stats``, ``records`` and ``graph``."""


def compile_fx_graph(gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """Compiles one graph of dynamo.

    Args:
        gm: the graph; parameters may be inputs or attributes.
        example_inputs: its inputs: tensors, and integers of dynamic sizes.
        **options: as of ``tilewright.compile`` (``torch.compile(..., options={...})`` passes them).

    Returns:
        A callable that takes the graph's flat inputs and returns its flat outputs.
    """
    from tilewright.driver.options import CompileOptions
    from tilewright.errors import CaptureError
    from tilewright.ir.graph import info
    from tilewright.models.dynamo_graph import from_dynamo

    try:
        graph, inputs, weights = from_dynamo(gm, example_inputs)
    except CaptureError as error:
        warnings.warn(f"tilewright runs a graph of torch.compile as it was: {error}", stacklevel=2)
        return gm.forward
    settings = CompileOptions(**options)
    build = info(graph).output.build
    known = {tuple(id(example_inputs[i]) for i in weights): _compile(graph, settings)}
    kept = [example_inputs[i] for i in weights]  # so that no id is used again

    def run(*args: Any) -> Any:
        key = tuple(id(args[i]) for i in weights)
        if key not in known:
            # dynamo runs one graph for several modules of equal structure; a program holds the weights of one.
            kept.extend(args[i] for i in weights)
            known[key] = _compile(from_dynamo(gm, args)[0], settings)
        with torch.no_grad():
            return build(known[key](*(args[i].contiguous() for i in inputs)))

    return run


def _compile(graph: GraphModule, options: "CompileOptions") -> "CompiledGraph":
    from tilewright.driver.compile_graph import compile_graph

    compiled = compile_graph(graph, options)
    compiled_graphs.add(compiled)
    return compiled
