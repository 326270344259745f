"""A step's batch is checked field by field."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tilewright.errors import InputError
from tilewright.ir.steps import StepBatch

LIMITS = {"page_size": 4, "pages": 9, "vocab_size": 100, "max_length": 20}


def _ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


GOOD = StepBatch(
    input_ids=torch.tensor([5, 6, 7, 99, 0]),
    slots=_ints(0, 1, 2, 6, 0),
    cu_seqlens=_ints(0, 3, 4, 5),
    seqlens_k=_ints(3, 7, 1),
    page_table=_ints([1, 0], [2, 3], [8, 0]),
    rows=_ints(1, 2, 3),
    cu_rows=_ints(0, 2, 3, 3),
)


def test_a_good_batch_passes() -> None:
    GOOD.check(**LIMITS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_ids", torch.tensor([5, 6, 7, 100, 0])),
        ("input_ids", torch.tensor([5, 6, 7, -1, 0])),
        ("input_ids", _ints(5, 6, 7, 99, 0)),
        ("slots", _ints(0, 1, 2, 5, 0)),
        ("slots", _ints(0, 1, 2, 6)),
        ("cu_seqlens", _ints(0, 3, 3, 5)),
        ("cu_seqlens", _ints(0, 3, 4, 6)),
        ("cu_seqlens", _ints(1, 3, 4, 5)),
        ("seqlens_k", _ints(2, 7, 1)),
        ("seqlens_k", _ints(3, 21, 1)),
        ("page_table", _ints([1, 0], [2, 9], [8, 0])),
        ("page_table", _ints([1], [2], [8])),
        ("rows", _ints(2, 1, 3)),
        ("rows", _ints(1, 3, 4)),
        ("rows", _ints(1, 2, 5)),
        ("cu_rows", _ints(0, 2, 3, 4)),
        ("cu_rows", _ints(0, 3, 2, 3)),
    ],
)
def test_a_wrong_field_is_named(field: str, value: torch.Tensor) -> None:
    with pytest.raises(InputError, match="contradicts itself"):
        replace(GOOD, **{field: value}).check(**LIMITS)


def test_a_wrong_length_is_reported_against_the_slots() -> None:
    with pytest.raises(InputError, match=r"StepBatch\.slots"):
        replace(GOOD, seqlens_k=_ints(3, 8, 1)).check(**LIMITS)
