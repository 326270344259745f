"""Capture: a model becomes a graph at level exported."""

import copy
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from tilewright.errors import CaptureError, InputError
from tilewright.ir.facts import where
from tilewright.ir.graph import info, update_info
from tilewright.models.export import argument_names, example_sizes, graph_of, run_export
from tilewright.models.inputs import (
    CallSignature,
    TensorArgument,
    forward_parameters,
    implied_inputs,
    name_arguments,
    signature_of,
)

# Tracing sets the attention implementation of the model's configuration, and torch.export has state of its own.
_tracing = threading.RLock()
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def default_signature(model: Any) -> CallSignature | None:
    """The usual call of a transformers text model, ``model(input_ids, attention_mask)``; None where unknown."""
    if not _is_pretrained(model) or "input_ids" not in forward_parameters(model).names or not implied_inputs(model):
        return None
    return signature_of(model, (), {"input_ids": torch.zeros((1, 1), dtype=torch.int64)})


def capture(
    model: Any,
    signature: CallSignature | None = None,
    example: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
    *,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> GraphModule:
    """Traces a model with symbolic batch B and length S. The model is not changed.

    Args:
        model: a transformers ``PreTrainedModel``, any ``nn.Module``, or an ``ExportedProgram``; in eval mode.
        signature: how it will be called; None for the usual call of a transformers model, or the call of ``example``.
        example: (args, kwargs) of such a call. Needed unless all tensors of the signature are ids or masks. Its sizes
            do not matter: it is stretched to sizes that cannot be confused with the model's.
        dtype: compute and weight dtype; a copy of the floating-point weights is made, buffers the model computes for
            itself (rotary frequencies) keep their precision. None keeps the model's tensors, shared with it.
        name: for messages; None for the class name.

    Returns:
        A graph at level exported.

    Raises:
        CaptureError: the model is in training mode or cannot be traced; says where and why.
    """
    name = name or type(model).__name__
    if isinstance(model, ExportedProgram):
        return _capture_program(model, dtype, name)
    check_model(model)
    if signature is None:
        signature = signature_of(model, *example) if example is not None else default_signature(model)
    if signature is None:
        raise CaptureError(
            f"the inputs of {name} are not known", hint="give example inputs, or call the compiled model"
        )
    if signature.obstacle:
        raise CaptureError(f"this call of {name} cannot be captured", why=signature.obstacle, hint="it runs as it was")
    source = model
    if dtype is not None:
        source = cast_copy(model, dtype)
        # Calls may give floats in the model's own type; ``bind`` converts them to that of the graph.
        example = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, example)
    with _tracing:
        gm, tried = _trace(source, signature, example, name)
    return _with_reasons(gm, tried, model, signature)


def check_model(model: Any) -> None:
    """Checks what is to be compiled. A graph has no mode: its dropout, if it is on, is refused where it is.

    Raises:
        CaptureError: the model is none, or is in training mode.
    """
    if not isinstance(model, nn.Module | ExportedProgram):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise CaptureError(
            "this is no model",
            why=f"it is {kind}",
            hint="give a transformers model, a torch.nn.Module, an ExportedProgram, an fx.GraphModule or a .gguf file",
        )
    if getattr(model, "training", False) and not isinstance(model, GraphModule):
        raise CaptureError(
            "the model is in training mode",
            why="dropout would be compiled away and the result would differ from the model's",
            hint="call model.eval() first",
        )


def cast_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model with floating-point weights in ``dtype``; integer tensors and computed buffers are shared."""
    computed = {id(b) for m in model.modules() for key, b in m._buffers.items() if key in m._non_persistent_buffers_set}
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        convert = tensor.is_floating_point() and id(tensor) not in computed
        value = tensor.detach().to(dtype) if convert else tensor.detach()
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(model, memo)


def _trace(model: nn.Module, signature: CallSignature, example: Any, name: str) -> tuple[GraphModule, dict[str, str]]:
    """Tries the attention hooks, then torch's own attention; returns the graph and why earlier tries failed."""
    from tilewright.models.expert_hooks import experts_implementation
    from tilewright.models.hooks import NAME, attention_implementation

    choices: list[str | None] = [None]
    if dict(signature.statics).get("output_attentions"):
        choices = ["eager"] if _has_hooks(model) else [None]
    elif _has_hooks(model):
        choices = [NAME, None]
    tried: dict[str, str] = {}
    defaults = dict(implied_inputs(model))
    validity = "attention_mask" if any(t.name == "attention_mask" and t.ndim == 2 for t in signature.tensors) else None
    error: CaptureError | None = None
    for choice in choices:
        for stretched, short in (((0, 1), False), ((0, 1), True), ((0,), False), ((), False)):
            args, kwargs, dynamic = example_call(model, signature, example, stretched, short)
            attention = attention_implementation(model, choice) if choice else nullcontext()
            with attention, experts_implementation(model):
                try:
                    program = run_export(model, args, kwargs, dynamic)
                    gm = graph_of(program, defaults=defaults, validity=validity, model=name)
                    _check_masks(gm)
                    _check_symbolic(gm, kwargs, dynamic, stretched)
                    if len(stretched) == 2:  # nothing is lost by having to try another length
                        tried.pop(f"capture with {choice or 'own'} attention", None)
                    return gm, tried
                except CaptureError as caught:
                    error = error or caught
                    how = f"{choice or 'own'} attention" + ("" if len(stretched) == 2 else ", the example's sizes")
                    tried.setdefault(f"capture with {how}", f"{caught.what}: {caught.why}")
            if example is None and short:
                break
    assert error is not None
    raise error


def example_call(
    model: nn.Module,
    signature: CallSignature,
    example: tuple[tuple[Any, ...], Mapping[str, Any]] | None,
    stretched: tuple[int, ...],
    short: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, tuple[int, ...]]]:
    """Arguments to trace with, and the symbolic axes of each tensor by ``id``.

    The batch is axis 0 of each tensor and the length axis 1 of the first with two axes or more; other axes of that
    extent are lengths too, in axis 1 of any tensor and in the last two axes of tensors with four axes (masks).
    ``stretched`` repeats the example along them up to the sizes of ``example_sizes``, ``short`` to its short length:
    a model may have a limit that its configuration does not tell.

    Raises:
        InputError: the example is empty.
        CaptureError: a tensor cannot be made up and there is no example.
    """
    batch, long, little = example_sizes(model, longest(model))
    length = little if short else long
    parameters = forward_parameters(model)
    given: dict[str, Any] = {}
    if example is not None:
        given = name_arguments(parameters.positional, *example, varargs=parameters.varargs)
    first = next((given[t.name] for t in signature.tensors if t.name in given and t.ndim >= 2), None)
    extent = first.shape[1] if first is not None else length
    made: dict[str, Tensor] = {}
    dynamic: dict[int, tuple[int, ...]] = {}
    for argument in signature.tensors:
        tensor = given.get(argument.name)
        if tensor is None:
            tensor = _made_up(argument, first, batch, length)
        lengths = tuple(
            axis
            for axis in range(1, tensor.dim())
            if tensor.shape[axis] == extent and (axis == 1 or tensor.dim() == 4) and axis not in argument.ones
        )
        axes = (0, *lengths) if tensor.dim() else ()
        for axis in axes:
            if tensor.shape[axis] == 0:
                what = f"the {'length' if axis else 'batch'} of '{argument.name}' is empty"
                raise InputError(what, why=f"its shape is {tuple(tensor.shape)}", hint="skip the call for empty input")
            if min(axis, 1) in stretched:
                wanted = batch if axis == 0 else length
                tensor = tensor.index_select(axis, torch.arange(wanted, device=tensor.device) % tensor.shape[axis])
        made[argument.name] = tensor.detach()
        dynamic[id(made[argument.name])] = axes
    statics = dict(signature.statics)
    positional = [key for key in made if key.startswith("args_") and key not in parameters.names]
    if not positional:
        return (), {**made, **statics}, dynamic
    names = [*parameters.positional, *positional]
    return tuple(made.get(n, statics.get(n)) for n in names), {}, dynamic


def _made_up(argument: TensorArgument, first: Tensor | None, batch: int, length: int) -> Tensor:
    """Ids and masks can be made up: 1 is a valid id, type, position and mask value in every text model."""
    if argument.ndim != 2 or argument.kind != "integer":
        raise CaptureError(f"no example for argument '{argument.name}'", hint="give example inputs")
    shape = (batch, length) if first is None else first.shape[:2]
    return torch.ones(shape, dtype=torch.int64, device=first.device if first is not None else None)


def longest(model: nn.Module) -> int | None:
    """The longest input: the smallest limit that a configuration of the model, or of a model inside it, names."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    found = [getattr(config, key, None) for config in configs for key in _LENGTHS]
    return min((n for n in found if isinstance(n, int) and n > 0), default=None)


def _has_hooks(model: nn.Module) -> bool:
    """True when all attention goes through transformers' interface; a model that does not must keep its own masks."""
    pretrained = [m for m in model.modules() if _is_pretrained(m) and hasattr(m, "_can_set_attn_implementation")]
    return bool(pretrained) and all(m._can_set_attn_implementation() for m in pretrained)  # type: ignore[operator]


def _check_masks(gm: GraphModule) -> None:
    """The mask the hook hands out is [B, S]: code of the model that computes with it expects another shape.

    Raises:
        CaptureError: something other than attention reads it.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.tilewright.attention.default):
        valid = node.args[3]
        for user in valid.users if valid is not None else ():
            if user.target is not node.target:
                raise CaptureError("the model computes with its attention mask outside attention", where=where(user))


def _check_symbolic(
    gm: GraphModule, tensors: Mapping[str, Any], dynamic: Mapping[int, tuple[int, ...]], stretched: tuple[int, ...]
) -> None:
    """A graph made for sizes that were made up is of no use.

    Raises:
        CaptureError: the trace depends on a size that should have stayed symbolic.
    """
    for spec in info(gm).inputs:
        for axis in dynamic.get(id(tensors.get(spec.name)), ()):
            if min(axis, 1) in stretched and isinstance(spec.shape[axis], int):
                raise CaptureError(
                    f"the model computes with the {'length' if axis else 'batch size'} as a number",
                    where=f"axis {axis} of input '{spec.name}'",
                    why=f"a graph of it would hold for the size {spec.shape[axis]} alone",
                    hint="no Python branch may depend on sizes; the model runs as it was",
                )


def _is_pretrained(model: Any) -> bool:
    config = getattr(model, "config", None)
    return isinstance(model, nn.Module) and hasattr(config, "_attn_implementation")


def _with_reasons(gm: GraphModule, tried: Mapping[str, str], model: nn.Module, signature: CallSignature) -> GraphModule:
    reasons = dict(tried)
    caches = any(getattr(module, "is_causal", False) for module in model.modules())
    if caches and dict(signature.statics).get("use_cache") is False:
        reasons["cache"] = (
            "past_key_values are not returned: the compiled model is one forward pass over whole sequences"
        )
    update_info(gm, reasons=reasons)
    return gm


def _capture_program(program: ExportedProgram, dtype: torch.dtype | None, name: str) -> GraphModule:
    if dtype is not None:
        raise CaptureError("an ExportedProgram cannot be cast", hint="cast the model and export it again")
    with torch.no_grad():
        functional = program.run_decompositions({})
    names = argument_names(functional)
    return graph_of(
        functional, defaults={}, validity="attention_mask" if "attention_mask" in names else None, model=name
    )
