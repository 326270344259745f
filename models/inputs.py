"""How a model is called: the signature that selects a captured graph, and the tensors of one call in placeholder order.

Which tensor arguments are given, and the values of all other arguments, decide what a model computes; sizes do not.
Conventions for transformers models: ``attention_mask`` and ``token_type_ids`` (where the model has token types) are
always inputs of the graph, with the defaults the models themselves use (all ones, all zeros), so leaving them out is
not another signature. Arguments equal to the default of ``forward`` do not count. ``use_cache`` is False unless the
caller says otherwise: the compiled model is one forward pass, and its ``past_key_values`` is None.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from tilewright.errors import InputError
from tilewright.ir.graph import GraphInfo, InputSpec
from tilewright.ir.sizes import BATCH, SEQ, Size, compile_sizes
from tilewright.models.export import argument_names

_CONVERTIBLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class TensorArgument:
    """A tensor argument of a call.

    Attributes:
        name: of the parameter.
        ndim: number of axes.
        kind: "integer", "float" or "bool".
        ones: of a tensor with four axes, those after the batch that have size 1: a mask [B, 1, 1, S] and one
            [B, 1, S, S] mean different graphs.
    """

    name: str
    ndim: int
    kind: str
    ones: tuple[int, ...] = ()


@dataclass(frozen=True)
class CallSignature:
    """What selects a captured graph.

    Attributes:
        tensors: tensor arguments, in the order of ``forward``'s parameters.
        statics: other arguments that differ from their defaults, as (name, value) in order of names.
        obstacle: why this call cannot be captured, or "".
        parameters: names of ``forward``'s positional parameters; they name positional arguments and do not select.
    """

    tensors: tuple[TensorArgument, ...]
    statics: tuple[tuple[str, Any], ...] = ()
    obstacle: str = ""
    parameters: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        tensors = [t.name if t.ndim < 4 else f"{t.name} of {t.ndim} axes" for t in self.tensors]
        return ", ".join(tensors + [f"{name}={value!r}" for name, value in self.statics])

    def to_json(self) -> dict[str, Any]:
        """As plain data; only signatures whose statics are numbers, strings and booleans can be stored."""
        return {
            "tensors": [[t.name, t.ndim, t.kind, list(t.ones)] for t in self.tensors],
            "statics": [list(item) for item in self.statics],
            "parameters": list(self.parameters),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "CallSignature":
        """Reads what ``to_json`` wrote."""
        return CallSignature(
            tuple(TensorArgument(name, ndim, kind, tuple(ones)) for name, ndim, kind, ones in data["tensors"]),
            tuple((name, value) for name, value in data["statics"]),
            parameters=tuple(data["parameters"]),
        )


@dataclass(frozen=True)
class Parameters:
    """Parameters of a ``forward``: positional names in order, all names, and defaults of those that have one."""

    positional: tuple[str, ...]
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    varargs: bool


@lru_cache(maxsize=64)
def _parameters(forward: Callable[..., Any], of_class: bool) -> Parameters:
    parameters = list(inspect.signature(forward).parameters.values())[1 if of_class else 0 :]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return Parameters(tuple(positional), tuple(names), defaults, any(p.kind is p.VAR_POSITIONAL for p in parameters))


def forward_parameters(model: Any) -> Parameters:
    """Parameters of what is called: ``forward`` of a module, the inputs of an ``ExportedProgram``."""
    if isinstance(model, torch.export.ExportedProgram):
        names = tuple(argument_names(model))
        return Parameters(names, names, {}, False)
    own = vars(model).get("forward")
    return _parameters(own or type(model).forward, own is None)


def implied_inputs(model: Any) -> tuple[tuple[str, str], ...]:
    """(name, default) of inputs that every captured graph of a transformers model has, given in the call or not."""
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or not hasattr(config, "model_type"):
        return ()
    if getattr(config, "is_encoder_decoder", False) or getattr(model, "main_input_name", "") != "input_ids":
        return ()
    names = forward_parameters(model).names
    implied = [("attention_mask", "ones")] if "attention_mask" in names else []
    if "token_type_ids" in names and getattr(config, "type_vocab_size", None):
        implied.append(("token_type_ids", "zeros"))
    return tuple(implied)


def implied_statics(model: Any) -> dict[str, Any]:
    """Arguments a transformers model is captured with unless the caller gives them."""
    config = getattr(model, "config", None)
    caches = config is not None and "use_cache" in forward_parameters(model).names and hasattr(model, "main_input_name")
    return {"use_cache": False} if caches else {}


def signature_of(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallSignature:
    """The signature of the call ``model(*args, **kwargs)``.

    Raises:
        InputError: more positional arguments than parameters, or one given twice.
    """
    parameters = forward_parameters(model)
    named = name_arguments(parameters.positional, args, kwargs, varargs=parameters.varargs)
    tensors: dict[str, TensorArgument] = {}
    statics: dict[str, Any] = {}
    obstacle = ""
    for name, value in named.items():
        if value is None:
            continue
        if isinstance(value, Tensor):
            ones = tuple(axis for axis in range(1, 4) if value.shape[axis] == 1) if value.dim() == 4 else ()
            tensors[name] = TensorArgument(name, value.dim(), _kind(value.dtype), ones)
        elif isinstance(value, bool | int | float | str | torch.dtype):
            if name not in parameters.defaults or parameters.defaults[name] != value:
                statics[name] = value
        else:
            obstacle = f"argument '{name}' is a {type(value).__name__}; only tensors and plain values are captured"
    if "input_ids" in tensors or "inputs_embeds" in tensors:
        for name, _ in implied_inputs(model):
            given = tensors.get(name)
            # A 2-D mask is the same input whatever its dtype; ``bind`` converts it.
            if given is None or given.ndim == 2:
                tensors[name] = TensorArgument(name, 2, "integer")
            elif given.ndim != 4:
                raise InputError(
                    f"input '{name}' has {given.ndim} axes",
                    why="it marks tokens as [batch, length], or pairs of tokens as [batch, 1, queries, keys]",
                    hint="give one value for each id, in the shape of input_ids",
                )
    statics = implied_statics(model) | statics
    order = {name: i for i, name in enumerate(parameters.names)}
    ordered = sorted(tensors.values(), key=lambda t: order.get(t.name, len(order)))
    return CallSignature(tuple(ordered), tuple(sorted(statics.items())), obstacle, parameters.positional)


def name_arguments(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, varargs: bool = False
) -> dict[str, Any]:
    """All arguments by name, given the positional names; those of ``*args`` are called ``args_0`` and so on."""
    if len(args) > len(names):
        if not varargs:
            raise InputError(
                "too many positional arguments", why=f"{len(args)} given, the model takes {len(names)}: {names}"
            )
        names = names + tuple(f"args_{i}" for i in range(len(args) - len(names)))
    named = dict(zip(names, args, strict=False))
    twice = named.keys() & kwargs.keys()
    if twice:
        raise InputError(f"argument '{min(twice)}' is given twice", why="once by position and once by name")
    return named | dict(kwargs)


def bind(signature: CallSignature, info: GraphInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of one call in placeholder order: checked, converted to the dtypes of the graph, contiguous.

    A 2-D validity mask may be of any dtype; a float one must hold zeros and ones alone. Integer inputs may have any
    integer dtype. Float inputs are cast to the dtype the graph was captured in. Full masks ([B, 1, S, S], bool or
    float) are inputs of a graph of their own.

    Raises:
        InputError: an argument is missing or has the wrong rank, size, dtype or values; the batch is empty; the
            length is beyond a table of the model.
    """
    tensors: list[Tensor | None] = _given(signature, info, args, kwargs)
    sizes: dict[sympy.Symbol, int] = {}
    for spec, tensor in zip(info.inputs, tensors, strict=True):
        if tensor is not None:
            _read_sizes(spec, tensor, sizes)
        elif spec.default is None:
            raise InputError(f"argument '{spec.name}' is missing", why=f"the graph was captured with: {signature}")
    _check_bounds(info, sizes)
    bound = []
    for spec, tensor in zip(info.inputs, tensors, strict=True):
        shape = evaluate(spec.shape, sizes)
        if tensor is None:
            bound.append(torch.full(shape, 1 if spec.default == "ones" else 0, dtype=spec.dtype))
            continue
        if tuple(tensor.shape) != shape:
            if spec.validity or spec.shape[0] != BATCH or (1, *shape[1:]) != tuple(tensor.shape):
                raise _shape_error(spec, tensor, shape)
            tensor = tensor.expand(shape)
        bound.append(_convert(spec, tensor).contiguous())
    return bound


def other_sizes(signature: CallSignature, info: GraphInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Why the graph, made for some constant sizes, does not take this call; "" when it does."""
    for spec, tensor in zip(info.inputs, _given(signature, info, args, kwargs), strict=True):
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
        if len(shape) == len(spec.shape) and any(
            isinstance(size, int) and size != given for size, given in zip(spec.shape, shape, strict=True)
        ):
            return f"the graph was traced for '{spec.name}' of shape {_shape_text(spec.shape)}, and this is {shape}"
    return ""


def _given(
    signature: CallSignature, info: GraphInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any | None]:
    """The arguments that stand for the graph's inputs, None where left out."""
    named = dict(zip(signature.parameters, args, strict=False)) | dict(kwargs)
    return [named.get(spec.name) for spec in info.inputs]


def example_inputs(info: GraphInfo, batch: int = 1, length: int = 1) -> list[Tensor]:
    """Valid inputs of that size: ids 0, masks 1, floats 0."""
    sizes = {BATCH: batch, SEQ: length}
    return [torch.full(evaluate(s.shape, sizes), 1 if s.default == "ones" else 0, dtype=s.dtype) for s in info.inputs]


def evaluate(shape: tuple[Size, ...], sizes: Mapping[sympy.Symbol, int]) -> tuple[int, ...]:
    """The shape in numbers."""
    if all(isinstance(s, int) or s in sizes for s in shape):
        return tuple(s if isinstance(s, int) else sizes[s] for s in shape)
    return compile_sizes(list(sizes), shape)(*sizes.values())


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "integer"


def _read_sizes(spec: InputSpec, tensor: Tensor, sizes: dict[sympy.Symbol, int]) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"argument '{spec.name}' is not a tensor", why=f"it is a {type(tensor).__name__}")
    if tensor.layout != torch.strided or not tensor.is_cpu:
        raise InputError(
            f"argument '{spec.name}' is not a dense tensor on the CPU",
            why=f"its layout is {tensor.layout}, its device {tensor.device}",
            hint="call .to_dense() or .cpu() first",
        )
    if tensor.dim() != len(spec.shape):
        hint = "pass one row a sequence, e.g. ids[None]" if tensor.dim() == len(spec.shape) - 1 else ""
        raise InputError(
            f"argument '{spec.name}' has {tensor.dim()} axes, the model takes {len(spec.shape)}",
            why=f"its shape is {tuple(tensor.shape)}, expected {_shape_text(spec.shape)}",
            hint=hint,
        )
    for size, actual in zip(spec.shape, tensor.shape, strict=True):
        # A batch of 1 may stand for any: position ids are often given once for all sequences.
        if isinstance(size, sympy.Symbol) and (size not in sizes or (size == BATCH and sizes[size] == 1)):
            sizes[size] = actual


def _check_bounds(info: GraphInfo, sizes: dict[sympy.Symbol, int]) -> None:
    for symbol, value in sizes.items():
        if value == 0:
            what = "batch" if symbol == BATCH else "sequence"
            raise InputError(f"the {what} is empty", why=f"size {symbol} is 0", hint="skip the call for empty input")
        low, high, reason = info.bounds.get(symbol, (1, None, ""))
        if value < low or (high is not None and value > high):
            raise InputError(
                f"size {symbol} = {value} is outside {low}..{high if high is not None else 'any'}",
                why=reason,
                hint="truncate the input to the length the model was made for" if symbol == SEQ else "",
            )


def _shape_error(spec: InputSpec, tensor: Tensor, shape: tuple[int, ...]) -> InputError:
    return InputError(
        f"argument '{spec.name}' has shape {tuple(tensor.shape)}, expected {shape}",
        why=f"it must be {_shape_text(spec.shape)}, with sizes as in the arguments before it",
        hint="give a mask of the same batch and length as the ids" if spec.validity else "",
    )


def _convert(spec: InputSpec, tensor: Tensor) -> Tensor:
    if spec.validity and tensor.dtype.is_floating_point:
        bad = tensor[(tensor != 0) & (tensor != 1)]
        if bad.numel():
            raise InputError(
                f"argument '{spec.name}' is a float mask with values other than 0 and 1",
                why=f"it holds {bad.reshape(-1)[0].item()}; a 2-D mask says which tokens are real",
                hint="pass 1 for real tokens and 0 for padding; an additive mask must have 4 axes",
            )
        return tensor.to(spec.dtype)
    if tensor.dtype != spec.dtype:
        same_kind = tensor.dtype.is_floating_point and spec.dtype.is_floating_point
        integers = tensor.dtype in _CONVERTIBLE and spec.dtype in _CONVERTIBLE
        if not (same_kind or integers or spec.validity):
            raise InputError(
                f"argument '{spec.name}' has dtype {tensor.dtype}, expected {spec.dtype}",
                hint="ids are integers" if spec.vocab is not None else "",
            )
        tensor = tensor.to(spec.dtype)
    if spec.vocab is not None:
        low, high = (int(v) for v in torch.aminmax(tensor))
        if low < spec.lowest or high >= spec.vocab:
            outside = low if low < spec.lowest else high
            raise InputError(
                f"argument '{spec.name}' holds {outside}, outside {spec.lowest}..{spec.vocab - 1}",
                why=f"it indexes a table of {spec.vocab} rows",
                hint="is the tokenizer the one of this model, and is each position or type one it has?",
            )
    return tensor


def _shape_text(shape: tuple[Size, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
