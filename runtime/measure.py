"""Times variants of a kernel on this machine, for the tables that ``passes.specialize*`` make."""

import time
from collections.abc import Callable, Mapping, Sequence

_FEWEST_REPEATS = 3
_MOST_REPEATS = 200
_SAME = 1.03
_LONGER = 4.0

Make = Callable[[int], Callable[[], None]]


def measure_variants(
    variants: Mapping[str, Make], sizes: Sequence[int], budget_s: float
) -> dict[str, tuple[tuple[int, float], ...]]:
    """Times each variant at each size; the variants take turns, so a change of clock rate meets all of them.

    Args:
        variants: by name, a function that prepares a run of a given size and returns it.
        sizes: row counts of a GEMM, lengths of an attention.
        budget_s: seconds to spend in all, or up to four times as many on a machine with other work to do; every pair
            is run at least three times whatever the budget.

    Returns:
        For each variant, (size, least seconds), sorted by size: the form ``tilewright.ir.measurements`` keeps.
    """
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in variants}
    ordered = sorted(set(sizes))
    end = time.perf_counter() + budget_s
    for done, count in enumerate(ordered):
        left = max(0.0, end - time.perf_counter()) / (len(ordered) - done)
        runs = {name: make(count) for name, make in variants.items()}
        for name, seconds in _interleave(runs, left).items():
            found[name].append((count, seconds))
    return {name: tuple(times) for name, times in found.items()}


def _interleave(runs: Mapping[str, Callable[[], None]], budget_s: float) -> dict[str, float]:
    """Least seconds of each run, after one untimed turn: what disturbs a run only ever adds to its time.

    Where other work on the machine disturbs so much that the two least times of a run differ, it goes on for longer.
    """
    begin = time.perf_counter()
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(_MOST_REPEATS):
        spent = time.perf_counter() - begin
        agreed = all(_agree(each) for each in times.values())
        if turn >= _FEWEST_REPEATS and spent >= budget_s * (1.0 if agreed else _LONGER):
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: min(each) for name, each in times.items()}


def _agree(times: Sequence[float]) -> bool:
    least = sorted(times)[:2]
    return len(least) == 2 and least[1] <= _SAME * least[0]
