"""Times GEMM variants on this machine, for the tables that ``passes.specialize`` makes."""

import time
from collections.abc import Callable, Mapping, Sequence

_FEWEST_REPEATS = 3
_MOST_REPEATS = 200

Make = Callable[[int], Callable[[], None]]


def measure_gemm(
    variants: Mapping[str, Make], rows: Sequence[int], budget_s: float
) -> dict[str, tuple[tuple[int, float], ...]]:
    """Times each variant at each row count; the variants take turns, so a change of clock rate meets all of them.

    Args:
        variants: by name, a function that prepares a run of a given row count and returns it.
        rows: row counts.
        budget_s: seconds to spend in all; every pair is run at least three times whatever the budget.

    Returns:
        For each variant, (rows, least seconds), sorted by rows: the form ``tilewright.ir.measurements`` keeps.
    """
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in variants}
    ordered = sorted(set(rows))
    end = time.perf_counter() + budget_s
    for done, count in enumerate(ordered):
        left = max(0.0, end - time.perf_counter()) / (len(ordered) - done)
        runs = {name: make(count) for name, make in variants.items()}
        for name, seconds in _interleave(runs, left).items():
            found[name].append((count, seconds))
    return {name: tuple(times) for name, times in found.items()}


def _interleave(runs: Mapping[str, Callable[[], None]], budget_s: float) -> dict[str, float]:
    """Least seconds of each run, after one untimed turn: what disturbs a run only ever adds to its time."""
    end = time.perf_counter() + budget_s
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(_MOST_REPEATS):
        if turn >= _FEWEST_REPEATS and time.perf_counter() >= end:
            break
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: min(each) for name, each in times.items()}
