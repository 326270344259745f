"""Which tensors of a GGUF file are which parameter of a transformers model, rows in the order of the model.

transformers knows the names, and undoes what llama.cpp's converter did: it permutes the rows of rotated projections,
transposes, joins the projections of experts, takes 1 off norms. Its functions work on dense arrays. To find out what
they do to rows of blocks, they are given the numbers of the rows instead: what comes back says where each row goes, and
its bytes are put there. Tensors of one axis, and what is changed in another way, are widened and go through as numbers.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tilewright.ir.stored_weight import StoredParameter, StoredWeight
from tilewright.models.gguf.config import architecture, foreign
from tilewright.models.gguf.file import GgufFile, GgufTensor
from tilewright.models.gguf.names import parameter_names
from tilewright.models.gguf.rope import TENSORS as ROPE_TENSORS

_ROW_BITS = 40  # a row's number: the tensor's << _ROW_BITS, plus its own in the tensor, plus 1; 0 is no row


@dataclass(frozen=True)
class Weights:
    """Values of parameters, by the model's names; a parameter that the model uses twice is there once.

    Attributes:
        stored: matrices, and stacks of them.
        dense: the rest, fp32, in the parameter's shape.
    """

    stored: dict[str, StoredParameter]
    dense: dict[str, Tensor]


def find_weights(file: GgufFile, model: nn.Module) -> Weights:
    """The values of all parameters of a model.

    Args:
        file: an open file.
        model: made from the file's config; its parameters may be on the meta device.

    Raises:
        GgufError: a tensor belongs to no parameter or has another shape, or a parameter has none or two.
    """
    with foreign(file, "the tensors do not fit the model"):
        tracer = _Tracer(file, model)
        first = _canonical_names(model)
        for index, tensor in enumerate(file.tensors.values()):
            if tensor.name not in ROPE_TENSORS:
                tracer.trace(tensor, index)
        dense = {name: torch.from_numpy(np.ascontiguousarray(v, np.float32)) for name, v in tracer.dense.items()}
        stored = {name: _gather(file, name, np.asarray(numbers)) for name, numbers in tracer.rows.items()}
        weights = Weights(
            {first.get(name, name): value for name, value in stored.items()},
            {first.get(name, name): value for name, value in dense.items()},
        )
        _check(file, model, weights)
        return weights


class _Tracer:
    """Sends tensors through the functions of transformers.

    Attributes:
        rows: by parameter, numbers of rows: [.., N, 1], or [1, N] where the parameter is the transpose.
        dense: by parameter, values.
    """

    def __init__(self, file: GgufFile, model: Any) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        arch = architecture(file)
        self._file = file
        self._processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=model.config.to_dict())
        self.targets = parameter_names(model, self._processor, arch, file.metadata[f"{arch}.block_count"])
        self.rows: dict[str, Any] = {}
        self.dense: dict[str, Any] = {}

    def trace(self, tensor: GgufTensor, index: int) -> None:
        """Adds a tensor to ``rows`` or ``dense``."""
        if len(tensor.shape) > 1:
            own = np.arange(1, math.prod(tensor.shape[:-1]) + 1).reshape(*tensor.shape[:-1], 1)
            numbers = (index << _ROW_BITS) + own
            # One column is enough for most; a function that needs rows of the right length gets them.
            if self._try_rows(tensor, numbers, numbers) or self._try_rows(
                tensor, numbers, np.broadcast_to(numbers, tensor.shape)
            ):
                return
        target, values = self._process(tensor, self._file.dense(tensor.name).numpy(), self.dense)
        if target is not None:
            self._put(self.dense, target, values, tensor)

    def _try_rows(self, tensor: GgufTensor, numbers: np.ndarray, values: np.ndarray) -> bool:
        try:
            target, result = self._process(tensor, values, self.rows)
        except ValueError:
            return False
        if target is None:
            return True
        if values.shape[-1] > 1 and result.shape[-1] == values.shape[-1] and (result == result[..., :1]).all():
            result = result[..., :1]
        if not np.array_equal(np.sort(result, axis=None), numbers.ravel()):
            return False  # not only moved
        self._put(self.rows, target, result, tensor)
        return True

    def _put(self, into: dict[str, Any], target: str, value: Any, tensor: GgufTensor) -> None:
        if target in self.rows or target in self.dense:
            why = f"it has another one beside '{tensor.name}'"
            raise self._file.error("two tensors for one parameter", item=f"parameter '{target}'", why=why)
        into[target] = value

    def _process(self, tensor: GgufTensor, values: np.ndarray, into: dict[str, Any]) -> tuple[str | None, Any]:
        """Parameter and its value; None where the function itself wrote it to ``into``, joined with other tensors."""
        parsed = {"tensors": into}
        done = self._processor.process(
            values, name=tensor.name, tensor_key_mapping=self.targets, parsed_parameters=parsed
        )
        if done.name is not None and done.name not in self.targets:
            raise self._file.error("the model has no parameter for a tensor", item=f"tensor '{tensor.name}'")
        return (None if done.name is None else self.targets[done.name]), done.weights


def _gather(file: GgufFile, target: str, numbers: np.ndarray) -> StoredParameter:
    """A parameter's rows by their numbers. Where they are all those of a tensor in order, they stay in the file."""
    transposed = numbers.ndim == 2 and numbers.shape[0] == 1 < numbers.shape[1]
    numbers = numbers[0] if transposed else numbers[..., 0]
    if (numbers == 0).any():
        raise file.error("a parameter is incomplete", item=f"parameter '{target}'", why="rows of it are in no tensor")
    tensors, rows = numbers >> _ROW_BITS, (numbers & ((1 << _ROW_BITS) - 1)) - 1
    names = list(file.tensors)
    cuts = [0, *(np.flatnonzero(np.diff(tensors.reshape(-1, tensors.shape[-1])[0])) + 1).tolist(), tensors.shape[-1]]
    parts = []
    for start, stop in pairwise(cuts):
        (index,) = np.unique(tensors[..., start:stop])
        stored = file.stored(names[index])
        order = torch.from_numpy(np.ascontiguousarray(rows[..., start:stop]))
        data = stored.data.reshape(-1, stored.data.shape[-1])
        if not torch.equal(order.flatten(), torch.arange(data.shape[0])):
            data = data[order.flatten()]
        shape = (*order.shape, stored.shape[-1])
        parts.append(StoredWeight(stored.format, shape, data.view(*order.shape, data.shape[-1])))
    return StoredParameter(tuple(parts), transposed)


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """For each name of a parameter the first name of the same parameter: tied ones have several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def _check(file: GgufFile, model: nn.Module, weights: Weights) -> None:
    found = {name: tuple(value.shape) for name, value in (weights.stored | weights.dense).items()}
    for name, parameter in model.named_parameters():
        if name not in found:
            hint = "the file is incomplete, or its metadata describes another model"
            raise file.error("a parameter has no tensor", item=f"parameter '{name}'", hint=hint)
        if found[name] != tuple(parameter.shape):
            why = f"the file has {found[name]}, the metadata asks for {tuple(parameter.shape)}"
            raise file.error("a tensor has another shape than the model", item=f"parameter '{name}'", why=why)
        if name in weights.stored and len({part.shape[-1] for part in weights.stored[name].parts}) > 1:
            raise file.error("tensors that are one parameter differ in width", item=f"parameter '{name}'")
    unknown = found.keys() - dict(model.named_parameters()).keys()
    if unknown:
        raise file.error("the model has no parameter for a tensor", item=f"parameter '{min(unknown)}'")
