"""From ``torch.export`` to a graph of ours: weights become attributes, sizes become B and S, nodes get their facts."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from tilewright.errors import CaptureError
from tilewright.ir.graph import GraphInfo, InputSpec, Level, set_info
from tilewright.ir.infer import is_prime, size_of
from tilewright.ir.sizes import BATCH, SEQ, Size
from tilewright.models.bounds import find_bounds, vocabularies
from tilewright.models.describe import describe_output, finish, strip_meta
from tilewright.models.functional import mutates

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def example_sizes(model: nn.Module, longest: int | None) -> tuple[int, int, int]:
    """Batch, length and a short length to trace with: primes that are no size of the model.

    A size equal to one of the model's would let the tracer confuse the two; 0 and 1 would be taken for constants.

    Args:
        model: its parameters' and buffers' sizes are avoided.
        longest: greatest length the model takes; half of it is never passed, as some models offset their positions.
    """
    taken = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    high = max(3, (longest or 254) // 2)
    lengths = [n for n in range(min(high, 127), 1, -1) if is_prime(n) and n not in taken]
    length = lengths[0] if lengths else high
    batch = next(n for n in range(5, 10**6) if is_prime(n) and n not in taken and n != length)
    short = next((n for n in range(3, length) if is_prime(n) and n not in taken and n != batch), length)
    return batch, length, short


class WithStatics(nn.Module):
    """The model with its plain arguments fixed: torch.export finds no place for those that go into ``**kwargs``."""

    PREFIX = "with_statics."

    def __init__(self, model: nn.Module, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.with_statics = model
        self.training = model.training
        statics = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}

        # The graph of an exported module takes its arguments only in the way it was exported, which is by position.
        by_position = isinstance(model, GraphModule) and not statics

        def forward(**tensors: Tensor) -> Any:
            return model(*tensors.values()) if by_position else model(**tensors, **statics)

        kind = inspect.Parameter.KEYWORD_ONLY
        names = [name for name in kwargs if name not in statics]
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        self.forward = forward


def run_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Mapping[int, Any]
) -> ExportedProgram:
    """``torch.export`` with symbolic sizes, made functional.

    Args:
        dynamic: for ``id(tensor)``, the set of its axes that are symbolic.

    Raises:
        CaptureError: the model cannot be traced; says where torch gave up.
    """
    if isinstance(model, GraphModule) or set(kwargs) - set(inspect.signature(model.forward).parameters):
        model, kwargs = WithStatics(model, kwargs), {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
    shapes: Any = torch.export.ShapesCollection()
    for tensor in (*args, *kwargs.values()):
        if isinstance(tensor, Tensor):
            shapes[tensor] = dict.fromkeys(dynamic.get(id(tensor), ()), torch.export.Dim.AUTO)
    try:
        with torch.no_grad(), _without_logs():
            program = torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
            if any(mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be traced",
            where=model_line(error),
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            hint="no Python branch may depend on the values of tensors; the model runs as it was",
        ) from error
    return program


@contextmanager
def _without_logs() -> Iterator[None]:
    """torch logs the stack of each failure it then raises; what failed is in the CaptureError."""
    logs = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch._export.non_strict_utils")]
    before = [log.disabled for log in logs]
    try:
        for log in logs:
            log.disabled = True
        yield
    finally:
        for log, disabled in zip(logs, before, strict=True):
            log.disabled = disabled


def model_line(error: BaseException) -> str | None:
    """Innermost line outside torch that the error passed through."""
    found, trace = None, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/torch/" not in code.co_filename and "tilewright" not in trace.tb_frame.f_globals.get("__name__", ""):
            found = f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno} in {code.co_name}"
        trace = trace.tb_next
    return found


def graph_of(program: ExportedProgram, *, defaults: Mapping[str, str], validity: str | None, model: str) -> GraphModule:
    """The graph of an exported program at level exported.

    Args:
        program: functional; its inputs' first axes are the batch, second axes the length where symbolic.
        defaults: default of inputs that a caller may leave out, by name.
        validity: name of the input that says which tokens are real.
        model: its name, for messages.

    Raises:
        CaptureError: a size is no function of B and S, an input is written to, or an output is no tensor.
    """
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    called = dict(zip(user_inputs(program), argument_names(program), strict=True))
    names = size_names(
        n for n in program.graph.find_nodes(op="placeholder") if kinds[n.name].kind is InputKind.USER_INPUT
    )
    tensors: dict[str, Tensor] = {}
    graph = Graph()
    env: dict[Node, Any] = {}
    inputs: dict[Node, str] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        spec = kinds[node.name]
        if spec.kind in _WEIGHTS:
            env[node] = _weight(graph, program, str(spec.target), tensors)
            env[node].meta = dict(node.meta)
        elif isinstance(spec.arg, ConstantArgument):
            env[node] = spec.arg.value
        elif isinstance(spec.arg, TensorArgument):
            env[node] = graph.placeholder(node.name)
            env[node].meta = dict(node.meta)
            inputs[env[node]] = called[node.name]
        else:
            raise CaptureError(
                f"input '{node.name}' is a {type(spec.arg).__name__}", hint="pass tensors and plain values"
            )
    results = copy_body(program.graph_module, graph, env, tensors)
    output, nodes = describe_output(program.call_spec.out_spec, user_results(program, results))
    graph.output(tuple(nodes))
    gm = GraphModule(tensors, graph, class_name="Model")
    finish(gm, names)
    vocab = vocabularies(gm)
    specs = tuple(
        InputSpec(
            name=name,
            dtype=node.meta["val"].dtype,
            shape=tuple(size_of(s, names) for s in node.meta["val"].shape),
            default=defaults.get(name),
            validity=name == validity,
            vocab=vocab.get(node.name),
        )
        for node, name in inputs.items()
    )
    bounds = find_bounds(gm, _ranges(program, names))
    set_info(gm, GraphInfo(Level.EXPORTED, specs, output, bounds, {}, model))
    strip_meta(gm)
    return gm


def user_inputs(program: ExportedProgram) -> list[str]:
    """Names of the placeholders that stand for arguments of a call."""
    specs = program.graph_signature.input_specs
    return [spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT]


def argument_names(program: ExportedProgram) -> list[str]:
    """What a caller calls these inputs: torch.export gives a placeholder another name where its own is taken."""
    found = user_inputs(program)
    spec = program.call_spec.in_spec
    if spec is None or spec.num_leaves != len(found):
        return found
    _, named = pytree.tree_unflatten(list(range(len(found))), spec)
    for name, place in named.items():
        if isinstance(place, int):
            found[place] = name
    return found


def size_names(inputs: Iterator[Node]) -> dict[sympy.Symbol, Size]:
    """Our size for each of the tracer's symbols: the first axis of an input is the batch, any other the length.

    Raises:
        CaptureError: one symbol stands for both.
    """
    names: dict[sympy.Symbol, Size] = {}
    for node in inputs:
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                wanted = BATCH if axis == 0 else SEQ
                if names.setdefault(size.node.expr, wanted) != wanted:
                    raise CaptureError(
                        f"axis {axis} of input '{node.name}' has the size of both the batch and the length",
                        hint="export with a batch size that differs from the length",
                    )
    return names


def _weight(graph: Graph, program: ExportedProgram, target: str, tensors: dict[str, Tensor]) -> Node:
    value = program.state_dict.get(target)
    value = program.constants[target] if value is None else value
    for known, tensor in tensors.items():
        if tensor is value or (tensor.data_ptr() == value.data_ptr() and _same_view(tensor, value)):
            return next(n for n in graph.nodes if n.op == "get_attr" and n.target == known)
    key = target.removeprefix(WithStatics.PREFIX)
    tensors[key] = value.detach()
    return graph.get_attr(key)


def _same_view(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


def copy_body(source: GraphModule, graph: Graph, env: dict[Node, Any], tensors: dict[str, Tensor]) -> list[Any]:
    """Copies all calls of ``source`` into ``graph`` and returns what its output lists.

    Regions that only switch gradients or autocast are inlined: neither means anything in a compiled forward pass.
    """
    for node in source.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(source, str(node.target))
            if isinstance(value, Tensor):
                key = f"constant_{len(tensors)}"
                tensors[key] = value.detach()
                env[node] = graph.get_attr(key)
                env[node].meta = dict(node.meta)
            else:
                env[node] = value
        elif node.op == "call_function" and getattr(node.target, "__name__", "") in _INLINED:
            args = [env[a] if isinstance(a, Node) else a for a in node.args]
            body = next(i for i, a in enumerate(args) if isinstance(a, GraphModule))
            inner = args[body]
            places = inner.graph.find_nodes(op="placeholder")
            env[node] = copy_body(inner, graph, dict(zip(places, args[body + 1 :], strict=True)), tensors)
        elif (
            node.op == "call_function"
            and node.args
            and isinstance(env.get(node.all_input_nodes[0]) if node.all_input_nodes else None, list)
        ):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            env[node] = graph.node_copy(node, lambda n: env[n])
        elif node.op == "output":
            return [env[r] if isinstance(r, Node) else r for r in node.args[0]]
    raise CaptureError("the traced graph has no output")


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def user_results(program: ExportedProgram, results: list[Any]) -> list[Any]:
    """The results the user sees, without those that stand for writes to buffers."""
    specs = program.graph_signature.output_specs
    written = [s.target for s in specs if s.kind.name != "USER_OUTPUT"]
    if written:
        raise CaptureError(
            "the model writes to its own state or inputs while it runs",
            where=", ".join(map(str, written)),
            why="a compiled model is one pure forward pass",
            hint="turn the state off (e.g. a cache); the model runs as it was",
        )
    return list(results)


def _ranges(program: ExportedProgram, names: Mapping[sympy.Symbol, Size]) -> dict[sympy.Symbol, int]:
    """Upper bounds the tracer found, by our symbol."""
    found: dict[sympy.Symbol, int] = {}
    for symbol, interval in program.range_constraints.items():
        ours = names.get(symbol)
        if isinstance(ours, sympy.Symbol) and getattr(interval.upper, "is_Integer", False) and interval.upper < 2**40:
            found[ours] = min(int(interval.upper), found.get(ours, 2**40))
    return found
