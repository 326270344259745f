"""A contender cannot harm the others: what fails, dies, hangs or is wrong is named, and the rest goes on."""

import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch

INPUTS = {"x": numpy.array([[1.0, 3.0]], dtype=numpy.float32)}


@pytest.fixture(scope="module")
def workers() -> Iterator[ModuleType]:
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import workers

    yield workers
    sys.path.remove(folder)


def halving() -> Any:
    return lambda batch: batch["x"].bfloat16() / 2


def no_library() -> Any:
    raise ImportError("no such library\nand more of it")


def ending(how: str) -> Any:
    """Runs one batch; the second is its end."""
    seen = []

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if seen:
            {"dies": lambda: os._exit(3), "hangs": lambda: time.sleep(600), "raises": lambda: 1 // 0}[how]()
        seen.append(1)
        return batch["x"]

    return run


def test_what_fails_is_named_and_the_rest_goes_on(workers: ModuleType) -> None:
    makes = {"fine": halving, "missing": no_library} | {
        how: partial(ending, how) for how in ("dies", "hangs", "raises")
    }
    with workers.started(makes) as (running, failed):
        assert failed == {"missing": "ImportError: no such library"}
        assert list(running) == ["fine", "dies", "hangs", "raises"]
        numpy.testing.assert_array_equal(running["fine"].result(INPUTS), [[0.5, 1.5]])
        for name in ("dies", "hangs", "raises"):
            numpy.testing.assert_array_equal(running[name].result(INPUTS), INPUTS["x"])
        seconds, failed = workers.in_turn(running, INPUTS, rounds=2, limit=5.0)  # a busy machine may stall for seconds
        assert list(seconds) == ["fine"]
        assert seconds["fine"] > 0
        assert failed["dies"] == "its process died, exit code 3"
        assert failed["hangs"].startswith("ended: no answer in")
        assert failed["raises"].startswith("ZeroDivisionError")
        with pytest.raises(workers.FailedError, match="exit code 3"):
            running["dies"].result(INPUTS)
        processes = [worker._process for worker in running.values()]
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("wrong", [numpy.nan, 0.5])
def test_a_wrong_result_is_no_contender(workers: ModuleType, wrong: float) -> None:
    import encoders

    class Answers:
        def __init__(self, result: numpy.ndarray) -> None:
            self.result = lambda inputs: result

    expected = numpy.zeros((1, 3, 2), dtype=numpy.float32)
    inputs = {"attention_mask": numpy.array([[1, 1, 0]])}
    near, off, padding = expected + numpy.float32(1e-5), expected.copy(), expected.copy()
    off[0, 1, 1] = wrong
    padding[0, 2] = wrong  # not a real token
    found = {"near": near, "off": off, "padding": padding, "shape": expected[:, :2]}
    answers = {name: Answers(value) for name, value in found.items()}
    errors, failed = encoders.check(answers, dict.fromkeys(found, ("fp32", halving)), inputs, expected)
    assert errors == {"near": pytest.approx(1e-5), "padding": 0.0}
    assert list(failed) == ["off", "shape"]
    assert all(why.startswith("wrong result") for why in failed.values())
