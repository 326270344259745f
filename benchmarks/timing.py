"""Timing shared by the benchmarks: contenders take turns in one process, and only their ratios are quoted."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LEAST_SECONDS = 2e-3  # one sample; shorter calls are repeated until it is reached


@dataclass(frozen=True)
class Line:
    """One line of a benchmark's table.

    Attributes:
        name: what is measured, with its sizes.
        target: what the ratio should reach: at least, or at most where ``at_most``; None for orientation only.
        ratio: what it was in this run.
        note: absolute figures of the run, for orientation, and the error where there is one.
    """

    name: str
    target: float | None
    ratio: float
    note: str = ""
    at_most: bool = False

    @property
    def reached(self) -> bool:
        """Whether the ratio is on the right side of the target."""
        if self.target is None:
            return True
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Seconds of one call of each contender: the median of its samples, all contenders in turn in each round.

    A first round warms up and finds out how often a call has to be repeated for one sample.
    """
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(LEAST_SECONDS / max(_seconds(call, 1), 1e-8)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_seconds(call, repeats[name]) / repeats[name])
    return {name: statistics.median(values) for name, values in samples.items()}


def _seconds(call: Callable[[], Any], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return time.perf_counter() - start


def print_lines(lines: list[Line]) -> None:
    """The table, in Markdown."""
    print("| | target | measured | |\n| --- | --- | --- | --- |")
    for line in lines:
        target = "" if line.target is None else f"{'<=' if line.at_most else '>='} {line.target:g}"
        mark = "" if line.reached else " **short**"
        print(f"| {line.name} | {target} | {line.ratio:.3g}{mark} | {line.note} |", flush=True)
