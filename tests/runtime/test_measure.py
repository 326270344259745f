"""Timing of GEMM variants: what is asked is timed, turn by turn."""

import pytest

from tilewright.runtime.measure import measure_variants


def test_every_variant_is_timed_at_every_row_count() -> None:
    log: list[tuple[str, int]] = []
    variants = {name: (lambda rows, name=name: lambda: log.append((name, rows))) for name in ("triton", "vendor")}
    found = measure_variants(variants, (8, 1, 8), budget_s=0.0)
    assert set(found) == {"triton", "vendor"}
    for times in found.values():
        assert [rows for rows, _ in times] == [1, 8]
        assert all(seconds >= 0 for _, seconds in times)
    # One turn to warm up and three that are timed, the variants taking turns.
    turns = [("triton", rows, "vendor", rows) for rows in (1, 8) for _ in range(4)]
    assert [(*a, *b) for a, b in zip(log[::2], log[1::2], strict=True)] == turns


def test_a_failing_variant_is_not_hidden() -> None:
    def fail() -> None:
        raise RuntimeError("cannot run")

    with pytest.raises(RuntimeError, match="cannot run"):
        measure_variants({"triton": lambda rows: fail}, (1,), budget_s=0.1)
