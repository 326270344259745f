"""Every operation on random tiles of random dtypes, shapes and strides, against numpy in fp64 or exact integers."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.coverage.differential import OPERATIONS, difference, examples
from tests.coverage.run import load

_SETTINGS = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("name", OPERATIONS)
@given(data=st.data())
@_SETTINGS
def test_operation(name: str, tmp_path: Path, one_thread: None, data: st.DataObject) -> None:
    operation = OPERATIONS[name]
    example = data.draw(examples(operation.least_rank))

    def launch(text: str, *arguments: object) -> None:
        load(text, tmp_path).kernel[(1,)](*arguments)

    problem = difference(operation, example, launch)
    assert not problem, problem
