"""What a table row is made of: a piece of kernel text, the dtypes the front end takes it for, and a reference."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.coverage.values import NUMBERS, Array

Reference = Callable[[Array, Array, Array], "Array | tuple[Array | None, Array]"]


@dataclass(frozen=True)
class Case:
    """One row of the table, or part of one: rows of several cases pass when all of them do.

    Attributes:
        name: name of the row, as in ``triton.language``; methods and operators of tensors are written ``tensor.sum``.
        code: kernel text that sets ``out``, a tensor or a scalar. It may use x, y and z (tiles of 32 elements), x2 (the
            same as x in shape [4, 8]), i (0 to 31), p (pointer to x), mem (pointer to memory of its own that holds a
            copy of y), and D (the dtype).
        reference: ``out`` from x, y and z in fp64 or in exact integers, or a pair of ``out`` (or None, when that is not
            compared) and what is in ``mem`` afterwards.
        dtypes: those that Triton's front end takes the function for; it must refuse all others.
        ulps: error allowed in a float result, in units of the dtype's rounding error, relative to the largest result.
        once: the row is not about dtypes; it is run for the first of ``dtypes`` only.
        exact: NaN and the signs of zeros are compared as well, and no error is allowed.
    """

    name: str
    code: str
    reference: Reference
    dtypes: tuple[str, ...] = NUMBERS
    ulps: float = 2
    once: bool = False
    exact: bool = False
