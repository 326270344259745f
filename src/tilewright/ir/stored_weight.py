"""Weights as a file stores them: rows of blocks in bytes, shared with the mapped file, not widened."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StoredWeight:
    """A matrix, or a stack of them, in a block format.

    Attributes:
        format: name in ``tilewright.ops.blocks.FORMATS``.
        shape: of the elements, [.., N, K]; blocks run along K.
        data: [.., N, bytes of a row] uint8. It may share memory with a mapped file: never write to it.
    """

    format: str
    shape: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class StoredParameter:
    """What a parameter of a model is made of.

    Attributes:
        parts: stored one after the other along N: one for most; two where the model joins what the file keeps apart,
            such as the gate and up projections of experts. Parts may differ in format.
        transposed: the model's parameter is [K, N] (``Conv1D``), the parts are [N, K] all the same.
    """

    parts: tuple[StoredWeight, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the model's parameter."""
        *lead, _, k = self.parts[0].shape
        n = sum(part.shape[-2] for part in self.parts)
        return (*lead, k, n) if self.transposed else (*lead, n, k)
